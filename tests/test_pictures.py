# SPDX-License-Identifier: Apache-2.0
"""The picture of a run, and the records that it is drawn from."""

import json
import struct

import numpy as np
import pytest

from reward_model.evaluation.metrics import pair_metrics, point_metrics
from reward_model.evaluation.pictures import draw, read_metrics, read_warnings

PNG = b"\x89PNG\r\n\x1a\n"


def train_record(step):
    return {
        "split": "train",
        "step": step,
        "loss": 0.7 / (1 + step),
        "accuracy": 0.5 + 0.01 * step,
        "chosen_mean": 0.1 * step,
        "rejected_mean": -0.1 * step,
    }


def eval_record(step):
    chosen, rejected = np.array([0.1, 0.5]) * (step + 1), np.array([0.0, -0.2])
    return {"split": "eval", "step": step} | pair_metrics(chosen, rejected, np.array([3, 4]), np.array([4, 3]))


def point_record(step, with_loss=True):
    targets, nothing = np.array([1.0, 0.0, 3.0]), np.full(3, np.nan)
    found = point_metrics(targets * step + [0.0, 0.1, 0.0], targets, targets if with_loss else nothing, nothing)
    return {"split": "eval", "step": step} | found


PAIR_SCORES = {"chosen": np.array([0.5, 1.0, 2.0]), "rejected": np.array([0.0, -1.0, 0.5])}
POINT_SCORES = {"scored answers": np.array([0.5, 1.0, 2.0, -3.0])}


def without_pairs(record):
    return {name: record[name] for name in ("split", "step", "loss")}


@pytest.fixture
def metrics(tmp_path):
    def write(records):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def size_of(picture):
    """Width and height of a PNG; fails on anything else."""
    content = picture.read_bytes()
    assert content.startswith(PNG)
    assert content[12:16] == b"IHDR"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    ("records", "scores"),
    [
        ([train_record(1), eval_record(1)], PAIR_SCORES),
        ([eval_record(0), *map(train_record, range(1, 31)), eval_record(15), eval_record(30)], PAIR_SCORES),
        ([point_record(0), without_pairs(train_record(1)), point_record(1)], POINT_SCORES),
        # scores beside a loss of pairs, and pairs beside a loss of scores
        ([train_record(1), point_record(1, with_loss=False)], POINT_SCORES),
        ([without_pairs(train_record(1)), eval_record(1) | point_record(1)], PAIR_SCORES),
    ],
    ids=["one evaluation", "several evaluations", "points", "points without a loss", "pairs and points"],
)
@pytest.mark.filterwarnings("error::UserWarning")  # a legend of nothing, an axis without a range
def test_draw_writes_a_png(metrics, tmp_path, records, scores):
    picture = tmp_path / "report.png"
    draw(metrics(records), picture, scores)
    assert size_of(picture) == (1210, 770)  # 11 by 7 inches of 110 dots


def test_equal_scores_can_be_drawn(metrics, tmp_path):
    draw(
        metrics([train_record(1), eval_record(1)]),
        tmp_path / "report.png",
        {"chosen": np.zeros(3), "rejected": np.zeros(3)},
    )
    assert size_of(tmp_path / "report.png")


def test_the_picture_follows_the_records(metrics, tmp_path):
    first, same, other = (tmp_path / f"{name}.png" for name in ("first", "same", "other"))
    for picture, step in ((first, 1), (same, 1), (other, 2)):
        draw(metrics([train_record(step), eval_record(step)]), picture, PAIR_SCORES)
    assert first.read_bytes() == same.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_warnings_are_below_the_picture(metrics, tmp_path):
    alarm = {"split": "alarm", "step": 1, "kind": "score_limit", "message": "step 1: scores " + "as long as this " * 30}
    bad = {"split": "bad_step", "step": 2, "in_a_row": 1, "rows": {"a.jsonl": [7]}}
    records = [train_record(1), eval_record(1)]
    for picture, more in (("plain", []), ("alarm", [alarm]), ("both", [alarm, bad])):
        draw(metrics([*records, *more]), tmp_path / f"{picture}.png", PAIR_SCORES)
        assert size_of(tmp_path / f"{picture}.png") == (1210, 770)
    assert len({picture.read_bytes() for picture in tmp_path.glob("*.png")}) == 3
    said = ["steps skipped for a loss or gradient that was not finite: 2"]
    assert read_warnings(metrics([*records, alarm, bad])) == [alarm["message"], *said]


def test_draw_leaves_no_figure_open(metrics, tmp_path):
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    draw(metrics([train_record(1), eval_record(1)]), tmp_path / "report.png", PAIR_SCORES)
    assert plt.get_fignums() == before


def test_read_metrics_separates_training_and_evaluations(metrics):
    records = [eval_record(0), train_record(1), train_record(2), eval_record(2)]
    train, evaluations = read_metrics(metrics(records))
    assert train == [records[1], records[2]]
    assert evaluations == [records[0], records[3]]
