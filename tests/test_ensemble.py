# SPDX-License-Identifier: Apache-2.0
"""reward-model ensemble: rows come back with what several models make of them, whoever scores which part and whenever.

The reference is the score of each text alone, by each model and, where it has several, by each head.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import datasets
import filelock
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import runs
import torch
from saved import save

import reward_model
from reward_model.__main__ import main
from reward_model.commands.folds import HELD_OUT, MODEL, TRAIN, WORK, deal, training_of
from reward_model.common import processes
from reward_model.common.errors import UserError
from reward_model.common.locking import LOCK
from reward_model.common.words import counted
from reward_model.config.ensemble import EnsembleConfig
from reward_model.data.strengths import COLUMNS, strength_of_differences
from reward_model.inference import load
from reward_model.serving import ensemble as module
from reward_model.serving.ensemble import BLOCK, Judge, Notes, Scoring, notes_in_words, parts_of, require_free

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]


def row_of(number):
    chance = np.random.default_rng(number)
    said = [" ".join(chance.choice(WORDS, chance.integers(2, 8))) for _ in range(2)]
    return {
        "id": number,
        "prompt": f"{WORDS[number % 5]} {number % 11} ",
        "chosen": f"{said[0]} .",
        "rejected": said[1],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of unlike size of scores, the second with a temperature."""
    found = [save(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (5, 6)]
    config = json.loads((found[1] / "config.json").read_text())
    (found[1] / "config.json").write_text(json.dumps(config | {"score_temperature": 0.5}))
    return [str(each) for each in found]


@pytest.fixture(autouse=True)
def alone():
    """No process group is left to the next test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(models, data, **flags):
    flags = {"attention": "separate", "device": "cpu", "output": str(data.with_name("out.jsonl"))} | flags
    summary = reward_model.ensemble(models, EnsembleConfig(data=str(data), **flags))
    with contextlib.suppress(KeyError):
        return summary, rows_in(data.with_name("out.jsonl"))


def differences(model, rows):
    reward = load(model)
    chosen, rejected = (
        reward.score([row["prompt"] for row in rows], [row[side] for row in rows], batch_size=1)
        for side in ("chosen", "rejected")
    )
    return [c - r for c, r in zip(chosen, rejected)]


def test_rows_come_back_with_strengths(models, tmp_path):
    rows = [row_of(i) for i in range(12)]
    rows[3] |= {"strength_mean": 99, "strength_std": 1, "kept": [1, None, "ü"]}
    summary, found = judged(models, write_rows(tmp_path / "rows.jsonl", rows))
    expected = [strength_of_differences(each) for each in zip(*(differences(model, rows) for model in models))]
    assert [{name: row[name] for name in row if name not in COLUMNS} for row in found] == [
        {name: row[name] for name in row if name not in COLUMNS} for row in rows
    ]
    for row, strength in zip(found, expected):
        assert [row[name] for name in COLUMNS[:3]] == pytest.approx(list(strength), abs=1e-5)
        assert row["strength_models"] == 2
    means = [strength.mean for strength in expected]
    assert (summary["rows"], summary["judged"]) == (12, 12)
    assert summary["below_zero"] == np.mean([mean < 0 for mean in means])
    assert summary["agree"] == pytest.approx(np.mean([strength.agree for strength in expected]))
    assert summary["deciles"][0]["from"] == pytest.approx(min(means), abs=1e-5)
    assert sum(each["rows"] for each in summary["deciles"]) == 12
    right = [np.mean([d > 0 for d in differences(model, rows)]) for model in models]
    assert [each["accuracy"] for each in summary["models"]] == pytest.approx(right)
    assert not parts_of(tmp_path / "out.jsonl").exists()
    assert found[0]["strength_std"] > 1e-4  # the models differ


# --- several heads: each is a vote, and a model weighs as much as any other ---


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("heads"), seed=7, heads=3))


def by_heads(model, rows):
    """r(chosen) − r(rejected) of each row by each head, a text at a time."""
    reward = load(model)
    found = []
    for row in rows:
        (texts,) = reward.rows([row["prompt"]], [[row["chosen"], row["rejected"]]])
        chosen, rejected = (reward._columns_of_texts([texts.text(side)])[0, 1:].tolist() for side in (0, 1))
        found.append([c - r for c, r in zip(chosen, rejected)])
    return found


def test_each_head_of_one_model_is_a_vote(with_heads, tmp_path, capfd):
    rows = [row_of(i) for i in range(9)]
    summary, found = judged([with_heads], write_rows(tmp_path / "rows.jsonl", rows))
    for row, votes in zip(found, by_heads(with_heads, rows)):
        assert [row[name] for name in COLUMNS[:3]] == pytest.approx(list(strength_of_differences(votes)), abs=1e-5)
        assert row["strength_models"] == 1
    assert found[0]["strength_std"] > 1e-3
    assert summary["models"][0]["heads"] == 3
    assert "one model: strength_std" not in capfd.readouterr().out


@pytest.mark.parametrize("scale", ["none", "std"])
def test_a_model_with_heads_weighs_as_much_as_one_without(models, with_heads, tmp_path, monkeypatch, scale):
    """Also in blocks that three files of numbers of other widths hold, and where a block is short."""
    monkeypatch.setattr(module, "BLOCK", 4)
    rows = [row_of(i) for i in range(9)]
    _, found = judged([with_heads, models[0]], write_rows(tmp_path / "rows.jsonl", rows), scale=scale)
    of_heads, single = by_heads(with_heads, rows), differences(models[0], rows)
    scales = [1.0, 1.0]
    if scale == "std":
        scales = [math.sqrt(np.mean(np.square(each))) for each in (np.mean(of_heads, 1), single)]
    for row, votes, alone in zip(found, of_heads, single):
        votes, alone = [vote / scales[0] for vote in votes], alone / scales[1]
        mean = (sum(votes) / 3 + alone) / 2
        variance = (sum((vote - mean) ** 2 for vote in votes) / 3 + (alone - mean) ** 2) / 2
        agree = (sum(vote > 0 for vote in votes) / 3 + (alone > 0)) / 2
        assert [row[name] for name in COLUMNS] == pytest.approx([mean, math.sqrt(variance), agree, 2], abs=1e-4)


@pytest.mark.parametrize("scale", ["std", "temperature"])
def test_models_of_other_scales(models, tmp_path, scale):
    rows = [row_of(i) for i in range(8)]
    summary, found = judged(models, write_rows(tmp_path / "rows.jsonl", rows), scale=scale)
    made = [differences(model, rows) for model in models]
    scales = [1.0, 0.5] if scale == "temperature" else [math.sqrt(np.mean(np.square(each))) for each in made]
    expected = [np.mean([d / s for d, s in zip(each, scales)]) for each in zip(*made)]
    assert [row["strength_mean"] for row in found] == pytest.approx(expected, abs=1e-4)
    assert [each["scale"] for each in summary["models"]] == pytest.approx(scales, rel=1e-4)


def test_rows_that_are_no_pairs_stay_as_they_are(models, tmp_path, capfd):
    others = [
        {"prompt": "the cat", "responses": [" a", " b"], "scores": [1, 2]},
        {"prompt": "the cat", "response": " a", "score": 1},
        {"prompt": "the cat", "chosen": " sat", "rejected": None},
        {"prompt": "the cat ", "chosen": "sat", "rejected": "sat"},
        {"prompt": "the cat ", "chosen": "sat", "rejected": ""},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [row_of(0), *others]) + "{no row\n")
    summary, found = judged(models[:1], data)
    assert found[1:] == others
    assert (summary["rows"], summary["judged"], summary["unreadable"]) == (6, 1, 1)
    said = capfd.readouterr().out
    assert "2 rows not judged, row 2 the first of them: it has no chosen and rejected answer" in said
    assert "1 row not judged, row 4 the first of them: rejected is missing" in said
    assert "1 row not judged, row 5 the first of them: chosen and rejected are equal" in said
    assert "5 of 6 rows judged by no model, and written without strengths" in said
    assert "1 row could not be read, and left out" in said
    assert "one model: strength_std is 0" in said


def test_prompts_that_are_cut_are_counted(models, tmp_path, capfd):
    rows = [row_of(0), row_of(1) | {"prompt": "the cat sat on the mat " * 20}]
    summary, _ = judged(models[:1], write_rows(tmp_path / "rows.jsonl", rows), max_seq_len=48)
    assert summary["judged"] == 2
    assert "the prompts of 1 row lost their left, to fit the longest text (--max_seq_len)" in capfd.readouterr().out


def test_what_all_ranks_left_out_is_told_together():
    notes = [
        Notes(1.0, 1, 2, {"a #": (3, 8, "row 9", "a 5")}),
        Notes(1.0, 1, 1, {"a #": (1, 3, "row 4", "a 6"), "b": (1, 6, "row 7", "b")}),
        Notes(1.0, 1, 0, {}),
    ]
    assert list(notes_in_words(notes)) == [
        "the prompts of 3 rows lost their left, to fit the longest text (--max_seq_len)",
        "4 rows not judged, row 4 the first of them: a …",
        "1 row not judged, row 7 the first of them: b",
    ]


def test_what_is_left_out_for_its_length_is_a_line_and_so_is_what_no_model_takes(models, tmp_path, capfd):
    rows = [row_of(i) for i in range(3)] + [row_of(3) | {"chosen": " a b c" * (30 + i)} for i in range(4)]
    summary, _ = judged(models[:2], write_rows(tmp_path / "rows.jsonl", rows), max_seq_len=48)
    assert summary["judged"] == 3
    said = [line for line in capfd.readouterr().out.splitlines() if "not judged" in line]
    assert len(said) == 1 and said[0].startswith("all models: 4 rows not judged, row 4 the first of them: ")
    assert "… tokens" in said[0] and "48" in said[0]


def test_layouts_and_parquet(models, tmp_path):
    """A column that names the winner decides what is chosen; the row keeps its own columns."""
    rows = [row_of(i) for i in range(6)]
    sides = [("a", "b"), ("b", "a")]
    given = [
        {"prompt": row["prompt"], f"response_{sides[i % 2][0]}": row["chosen"],
         f"response_{sides[i % 2][1]}": row["rejected"], "winner": f"model_{sides[i % 2][0]}"}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "rows.parquet")
    _, found = judged(models[:1], tmp_path / "rows.parquet")
    assert [{name: row[name] for name in given[0]} for row in found] == given
    assert [row["strength_mean"] for row in found] == pytest.approx(differences(models[0], rows), abs=1e-5)


# --- the data, as training takes them ---


def parts_in(tmp_path):
    """Rows in several places: 0 to 4, 10 to 13, 20 to 22."""
    (tmp_path / "folder").mkdir()
    for name, numbers in (("a.jsonl", range(5)), ("folder/train.jsonl", range(10, 14)), ("folder/test.jsonl", [20])):
        write_rows(tmp_path / name, [row_of(i) for i in numbers])
    table = datasets.Dataset.from_list([row_of(i) for i in range(30, 33)])
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")


FORMS_OF_DATA = [
    (["a.jsonl"], {}, [0, 1, 2, 3, 4]),
    (["folder"], {}, [10, 11, 12, 13]),
    (["folder"], {"split": "test"}, [20]),
    (["saved"], {}, [30, 31, 32]),
    (["saved"], {"split": "test"}, [31]),
    (["a.jsonl", "folder", "saved"], {}, [*range(5), *range(10, 14), *range(30, 33)]),
    (["owner/name"], {"split": "train_prefs"}, [40, 41]),
    (["owner/name", "a.jsonl:1.0"], {"split": "test_prefs"}, [42, *range(5)]),
]


@pytest.mark.parametrize("entries, flags, expected", FORMS_OF_DATA)
def test_data_are_read_as_training_reads_them(entries, flags, expected, tmp_path, monkeypatch):
    parts_in(tmp_path)
    hub = {"train_prefs": [40, 41], "test_prefs": [42]}
    hub = datasets.DatasetDict({n: datasets.Dataset.from_list([row_of(i) for i in of]) for n, of in hub.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"owner/name": hub}[name])
    entries = [entry if entry == "owner/name" else str(tmp_path / entry) for entry in entries]
    rows = module.rows_of(EnsembleConfig(data=entries, output=str(tmp_path / "o.jsonl"), **flags))
    assert [stored.columns() for stored in rows] == [row_of(i) for i in expected]
    assert len(rows) == len(expected)
    for first in range(len(rows)):
        for last in range(first, len(rows) + 1):
            assert [each.columns()["id"] for each in rows.part(first, last)] == expected[first:last]


def test_a_part_of_a_file_is_drawn_by_the_seed(tmp_path):
    parts_in(tmp_path)

    def drawn(seed):
        config = EnsembleConfig(data=f"{tmp_path / 'a.jsonl'}:2", output=str(tmp_path / "o.jsonl"), seed=seed)
        return [stored.columns()["id"] for stored in module.rows_of(config)]

    assert all(len(drawn(seed)) == 2 for seed in range(4))
    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 1


def test_several_places_are_judged_as_one(models, tmp_path, capfd):
    parts_in(tmp_path)
    write_rows(tmp_path / "b.jsonl", [row_of(50), {"prompt": "the cat", "chosen": " sat", "rejected": None}])
    config = {"output": str(tmp_path / "o.jsonl"), "attention": "separate", "device": "cpu"}
    data = [str(tmp_path / name) for name in ("b.jsonl", "saved", "folder")]
    reward_model.ensemble(models, EnsembleConfig(data=data, **config))
    found = rows_in(tmp_path / "o.jsonl")
    assert [row.get("id") for row in found] == [50, None, *range(30, 33), *range(10, 14)]
    expected = [row_of(row["id"]) for row in found if "id" in row]
    means = np.mean([differences(model, expected) for model in models], 0)
    assert [row["strength_mean"] for row in found if "id" in row] == pytest.approx(means.tolist(), abs=1e-5)
    said = capfd.readouterr().out
    assert "1 row not judged, b.jsonl, row 2 the first of them: rejected is missing" in said
    assert "test.jsonl: rows to evaluate on, which are left out; --split takes another split" in said


def test_other_rows_are_other_data(tmp_path):
    """Whatever the files are called, and whenever they were written."""
    parts_in(tmp_path)

    def sha256(*names):
        data = [str(tmp_path / name) for name in names]
        return module.identity_of(module.rows_of(EnsembleConfig(data=data, output=str(tmp_path / "o.jsonl"))))

    whole = sha256("a.jsonl", "folder")
    assert whole["rows"] == 9
    assert sha256("folder", "a.jsonl") != whole
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    assert sha256("c.jsonl", "folder") == whole
    write_rows(tmp_path / "folder" / "train.jsonl", [row_of(i) for i in (10, 11, 12, 14)])
    assert sha256("c.jsonl", "folder") != whole
    saved = sha256("saved")
    table = datasets.Dataset.from_list([row_of(i) for i in (30, 31, 33)])
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "again")
    assert sha256("again") != saved
    table = datasets.Dataset.from_list([row_of(i) for i in (30, 31, 32)])
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "same")
    assert sha256("same") == saved


OTHER_ROWS = [{"prompt": "the cat", "response_a": " sat", "response_b": " ate", "winner": "model_a"}]
REFUSED_DATA = [
    ({"data": ["a.jsonl", "other.jsonl"]}, "several layouts, and a file has one"),
    ({"data": ["folder"], "output": None}, "give --output: the data are not one file"),
    ({"data": ["a.jsonl", "folder"], "output": None}, "give --output: the data are not one file"),
    ({"data": ["folder"], "output": "folder/judged.jsonl"}, "lies in .*folder, and would be of the data"),
    ({"data": ["a.jsonl"], "split": "test"}, "--split test: .*a.jsonl is one file, which has no splits"),
    ({"data": ["saved"], "split": "dev"}, "has no split named dev, only train, test"),
    ({"data": ["gone.jsonl"], "output": None}, "gone.jsonl: no such file or folder"),
    ({"data": ["Dahoas/synthetic-instruct-gptj-pairwise/a.jsonl"]},
     "o.jsonl: its rows would be read in another way than those of .*; let its path have Dahoas/synthetic-"),
]  # fmt: skip


@pytest.mark.parametrize("flags, said", REFUSED_DATA)
def test_data_that_cannot_be_read_or_written_back(flags, said, tmp_path):
    parts_in(tmp_path)
    write_rows(tmp_path / "other.jsonl", OTHER_ROWS)
    known = tmp_path / "Dahoas" / "synthetic-instruct-gptj-pairwise"
    known.mkdir(parents=True)
    write_rows(known / "a.jsonl", [row_of(0)])
    flags = {"output": "o.jsonl"} | flags
    flags["data"] = [str(tmp_path / name) for name in flags["data"]]
    flags["output"] = flags["output"] and str(tmp_path / flags["output"])
    with pytest.raises(UserError, match=said):
        module.rows_of(EnsembleConfig(**flags))


class Killed(Exception):
    """In place of a signal."""


def test_an_interrupted_run_goes_on_to_the_same_numbers(models, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    data = write_rows(tmp_path / "rows.jsonl", [row_of(i) for i in range(11)])
    _, whole = judged(models, data, output=str(tmp_path / "out.jsonl"))
    (tmp_path / "out.jsonl").unlink()
    scored = []
    original = Scoring._differences

    def until(self, start, block):
        scored.append((self.judge.model, start))
        if len(scored) == 5:  # in the second model's second block
            raise Killed
        return original(self, start, block)

    monkeypatch.setattr(Scoring, "_differences", until)
    with pytest.raises(Killed):
        judged(models, data)
    (part,) = parts_of(tmp_path / "out.jsonl").glob("differences-001-*.f64")
    with part.open("ab") as file:
        file.write(b"half a num")  # as a power cut leaves it
    with pytest.raises(UserError, match="--resume goes on with it"):
        judged(models, data)
    with pytest.raises(UserError, match="begun with another model"):
        judged(models[::-1], data, resume=True)
    with pytest.raises(UserError, match="other flags: tokens_per_batch"):
        judged(models, data, resume=True, tokens_per_batch=100)
    _, found = judged(models, data, resume=True)
    assert found == whole
    # a last block that is short may be a part of one, and is judged again
    assert scored[5:] == [(models[0], 8), (models[1], 4), (models[1], 8)]


def test_ranks_take_turns_and_the_parts_come_together(models, tmp_path, monkeypatch):
    """What three ranks write one after the other is what one writes alone."""
    from reward_model.common.distributed import DistributedContext

    monkeypatch.setattr(module, "BLOCK", 4)
    data = write_rows(tmp_path / "rows.jsonl", [row_of(i) for i in range(23)])
    _, whole = judged(models, data, output=str(tmp_path / "out.jsonl"))
    config = EnsembleConfig(data=str(data), output=str(tmp_path / "three.jsonl"), attention="separate", device="cpu")
    parts, rows = parts_of(tmp_path / "three.jsonl"), module.rows_of(config)
    parts.mkdir()
    for number, model in enumerate(models):
        for rank in range(3):
            context = DistributedContext(rank, 3, torch.device("cpu"))
            Scoring.load(Judge(model), config, context).run(parts, number, {}, lambda chat: rows)
    module.write([Judge(model) for model in models], [Notes(1.0, 1, 0, {})] * 2, config, rows, 3)
    assert rows_in(tmp_path / "three.jsonl") == whole


def test_a_model_judges_its_own_rows_alone(models, tmp_path):
    rows = [row_of(i) for i in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = EnsembleConfig(data=str(data), output=str(tmp_path / "o.jsonl"), attention="separate", device="cpu")
    first = np.array([True, False, True, False, False, False])
    from reward_model.common.distributed import join, prepare_environment

    prepare_environment()
    module.judge_with([Judge(models[0], first), Judge(models[1], ~first)], config, join())
    one, other = (differences(model, rows) for model in models)
    found = rows_in(tmp_path / "o.jsonl")
    expected = [a if mine else b for a, b, mine in zip(one, other, first)]
    assert [row["strength_mean"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert {row["strength_models"] for row in found} == {1}


REFUSED = [
    ({"output": "judged.json"}, "JSON lines"),
    ({"output": "rows.jsonl"}, "is the data"),
    ({"output": "taken.jsonl"}, "is there"),
    ({"data": None}, "give --data"),
]


@pytest.mark.parametrize("flags, said", REFUSED)
def test_what_cannot_be_judged_or_written(tmp_path, flags, said):
    write_rows(tmp_path / "rows.jsonl", [row_of(0)])
    (tmp_path / "taken.jsonl").write_text("")
    flags = {"data": "rows.jsonl"} | flags
    flags = {name: value and str(tmp_path / value) for name, value in flags.items()}
    with pytest.raises(UserError, match=said):
        require_free(EnsembleConfig(**flags))


COMMANDS = [
    ([], "name the models before the flags"),
    (["one", "--folds", "5"], "--folds trains its own models"),
    (["one", "--", "--seed", "1"], "flags after --"),
    (["one", "--repeats", "2"], "--repeats without --folds"),
    (["--folds", "1"], "--folds 1: give 2"),
    (["one", "one", "--data", "x.jsonl"], "one is given twice"),
    (["one", "--scale", "mean"], "scale"),
]


def test_a_model_that_is_not_there_is_said_before_any_judges(models, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [row_of(0)])
    with pytest.raises(UserError, match="nope: no such folder"):
        reward_model.ensemble([models[0], "nope"], EnsembleConfig(data=str(data)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("rows")) == ["rows.jsonl"]


def test_two_runs_do_not_write_to_one_place(models, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [row_of(0)])
    parts = parts_of(tmp_path / "out.jsonl")
    parts.mkdir()
    with filelock.FileLock(parts / LOCK), pytest.raises(UserError, match="another run is writing there"):
        judged(models, data, resume=True)
    judged(models, data, resume=True)


@pytest.mark.parametrize("words, said", COMMANDS)
def test_command_lines_that_contradict_themselves(words, said, capsys):
    assert main(["ensemble", *words]) == 1
    assert said in capsys.readouterr().err


def test_the_command_prints_json_alone(models, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [row_of(i) for i in range(3)])
    assert main(["ensemble", *models, "--data", str(data), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "rows.strengths.jsonl")
    assert len(rows_in(tmp_path / "rows.strengths.jsonl")) == 3


# --- folds ---


def test_prompts_stay_together_and_parts_are_of_one_size():
    chance = np.random.default_rng(0)
    hashes = chance.integers(-(2**62), 2**62, 40)[chance.integers(0, 40, 300)]
    found = deal(hashes, 5, seed=3)
    assert all(len(set(found[hashes == each])) == 1 for each in np.unique(hashes))
    sizes = np.bincount(found, minlength=5)
    assert sizes.min() >= 50
    assert sizes.max() <= 70
    order = chance.permutation(300)
    assert (deal(hashes[order], 5, seed=3) == found[order]).all()  # whatever the order of the rows
    assert (deal(hashes, 5, seed=4) != found).any()
    with pytest.raises(UserError, match="--folds 5: the rows have 4 prompts"):
        deal(np.array([1, 2, 3, 4, 4]), 5, 0)


WORDS_OF_TRAINING = [
    (["--data_path", "x"], "--data_path after --"),
    (["--output_dir", "x"], "--output_dir after --"),
    (["--seed", "3"], "--seed after --: .*--seed before --"),
    (["--keep_best", "accuracy", "--output_dir", "x"], "--output_dir after --"),
    (["--learning_rate", "0"], "--learning_rate"),
]


@pytest.mark.parametrize("words, said", WORDS_OF_TRAINING)
def test_flags_that_are_not_for_the_folds(words, said):
    with pytest.raises(UserError, match=said):
        training_of(["--model_name_or_path", "m", *words])


FEW = ["--max_steps", "4", "--max_seq_len", "256", "--learning_rate", "1e-3", "--per_device_train_batch_size", "16"]


@pytest.mark.slow
def test_no_model_of_a_fold_has_seen_the_rows_it_judges(demo, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = rows_in(demo / "data" / "train.jsonl")[:96]
    write_rows(data, rows)
    output = tmp_path / "judged.jsonl"
    words = ["--folds", "2", "--repeats", "2", "--data", str(data), "--output", str(output), "--json"]
    training = ["--model_name_or_path", str(demo / "model"), *FEW, "--data_output_path", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "reward_model", "ensemble", *words]
    environment = runs.environment(HF_HUB_OFFLINE="1", RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)
    with subprocess.Popen([*command, "--", *training], env=environment, stdout=subprocess.PIPE, text=True) as process:
        work = output.with_name(output.name + WORK)
        started = time.monotonic()  # ended in the middle of the second training
        while not (work / "repeat-0" / "fold-001" / MODEL).exists() and time.monotonic() - started < 300:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == os.EX_TEMPFAIL
    assert not output.exists()
    done = subprocess.run(
        [*command, "--resume", "--", *training], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary, found = json.loads(done.stdout), rows_in(output)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert {row["strength_models"] for row in found} == {2}
    assert summary["judged"] == 96
    for repeat in range(2):
        folds = [work / f"repeat-{repeat}" / f"fold-{fold:03}" for fold in range(2)]
        held_out = [rows_in(fold / HELD_OUT) for fold in folds]
        assert sorted(json.dumps(row) for part in held_out for row in part) == sorted(map(json.dumps, rows))
        for fold, mine in zip(folds, held_out):
            seen = {row["prompt"] for row in rows_in(fold / TRAIN)}
            assert seen.isdisjoint(row["prompt"] for row in mine)
            run = json.loads((fold / MODEL / "run.json").read_text())
            assert sum(run["data"]["train"].values()) == 96 - len(mine)
    first = found[rows.index(rows_in(work / "repeat-0" / "fold-000" / HELD_OUT)[0])]
    of_models = [differences(work / f"repeat-{r}" / f"fold-{f:03}" / MODEL, [first])[0] for r in (0, 1) for f in (0, 1)]
    judges = [
        of_models[2 * r + f]
        for r in (0, 1)
        for f in (0, 1)
        if first["id" if "id" in first else "prompt"]
        in {row["id" if "id" in row else "prompt"] for row in rows_in(work / f"repeat-{r}" / f"fold-{f:03}" / HELD_OUT)}
    ]
    assert first["strength_mean"] == pytest.approx(np.mean(judges), abs=1e-4)


@pytest.mark.slow
def test_folds_train_in_several_processes(demo, tmp_path):
    """By torchrun, with several heads and from a folder; each head of the model of a fold is a vote."""
    (tmp_path / "data").mkdir()
    rows = rows_in(demo / "data" / "train.jsonl")[:64]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:40])
    write_rows(tmp_path / "more.jsonl", rows[40:])
    output = tmp_path / "judged.jsonl"
    words = ["--folds", "2", "--processes", "2", "--data", str(tmp_path / "data"), str(tmp_path / "more.jsonl")]
    training = ["--model_name_or_path", str(demo / "model"), *FEW, "--data_output_path", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "reward_model", "ensemble", *words, "--output", str(output), "--json", "--", *training,
         "--heads", "3"],
        env=runs.environment(HF_HUB_OFFLINE="1", RANK=None, WORLD_SIZE=None, LOCAL_RANK=None),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary, found = json.loads(done.stdout), rows_in(output)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert {row["strength_models"] for row in found} == {1}
    assert min(row["strength_std"] for row in found) > 0
    assert [each["heads"] for each in summary["models"]] == [3, 3]
    work = output.with_name(output.name + WORK) / "repeat-0"
    for fold in sorted(work.iterdir()):
        run = json.loads((fold / MODEL / "run.json").read_text())
        assert run["world_size"] == 2
        (judged_row,) = rows_in(fold / HELD_OUT)[:1]
        votes = by_heads(str(fold / MODEL), [judged_row])[0]
        assert found[rows.index(judged_row)]["strength_mean"] == pytest.approx(np.mean(votes), abs=1e-4)


LAUNCHED = runs.environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)


def ensemble_words(ranks):
    """The beginning of a command line."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", "reward_model", "ensemble"]


def ranks_of(launcher):
    """The processes that it has started."""
    found = {number: processes.stat(number) for number in processes.numbers()}
    return [processes.named(number) for number, said in found.items() if said and said[1] == launcher.pid]


def until(reached, seconds=300):
    started = time.monotonic()
    while not reached():
        assert time.monotonic() - started < seconds
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_ranks_are_gone_on_with_to_the_byte(models, with_heads, tmp_path):
    """SIGKILL of the launcher in the middle of the first model, then of all in the second; one rank is the reference.

    The ranks that have lost their launcher end by themselves: they would go on writing beside those of --resume.
    """
    rows = [row_of(i) for i in range(8 * BLOCK + 40)]
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", rows[: 3 * BLOCK + 7])
    datasets.Dataset.from_list(rows[3 * BLOCK + 7 :]).save_to_disk(tmp_path / "saved")
    data = [str(tmp_path / "folder"), str(tmp_path / "saved")]

    def command(ranks, name):
        flags = ["--data", *data, "--device", "cpu", "--attention", "separate", "--output", str(tmp_path / name)]
        return [*ensemble_words(ranks), with_heads, models[0], *flags]

    whole = subprocess.run(command(1, "whole.jsonl"), env=LAUNCHED, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    output = tmp_path / "out.jsonl"

    def written(model):
        """Numbers of a model by each rank."""
        paths = (parts_of(output) / f"differences-{model:03}-{rank:03}.f64" for rank in (0, 1))
        return [path.stat().st_size // 8 if path.exists() else 0 for path in paths]

    def killed(model, *more, ranks_too):
        """A run that is killed as soon as there is more of a model."""
        before = sum(written(model))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*command(2, "out.jsonl"), *more], env=LAUNCHED, **quiet) as process:
            until(lambda: sum(written(model)) > before or process.poll() is not None)
            ranks = ranks_of(process)
            for number in (process.pid, *([rank.number for rank in ranks] if ranks_too else [])):
                os.kill(number, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and len(ranks) == 2
        until(lambda: not any(rank.is_there() for rank in ranks), 30)
        assert not output.exists()

    killed(0, ranks_too=False)
    assert 0 < sum(written(0)) < 3 * len(rows) and not sum(written(1))
    killed(1, "--resume", ranks_too=True)
    assert sum(written(0)) == 3 * len(rows) and 0 < sum(written(1)) < len(rows)
    left = written(1)[0] // BLOCK * BLOCK
    done = subprocess.run([*command(2, "out.jsonl"), "--resume"], env=LAUNCHED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = f"differences-001-000.f64: goes on after {counted(left, 'row')}"  # the first rank speaks
    assert (said in done.stdout + done.stderr) == (left > 0)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not parts_of(output).exists()
