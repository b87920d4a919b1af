# SPDX-License-Identifier: Apache-2.0
"""Metrics of scored pairs and answers against numbers derived by hand, and slow loops."""

import json
import math

import numpy as np
import pytest

from reward_model.evaluation.calibration import calibration
from reward_model.evaluation.metrics import QUANTILES, accuracy, correlation, pair_metrics, point_metrics


def metrics(chosen, rejected, chosen_lengths=None, rejected_lengths=None, dtype=np.float32):
    columns = (chosen, rejected, chosen_lengths or [1] * len(chosen), rejected_lengths or [1] * len(chosen))
    return pair_metrics(*(np.array(column, dtype=dtype) for column in columns))


def test_numbers_by_hand():
    found = metrics([1.0, 3.0], [0.0, 4.0])
    # gaps 1 and -1: log(1 + e^-1) = 0.313262 and log(1 + e) = 1.313262
    assert found["pairs"] == 2
    assert found["loss"] == pytest.approx(0.813262, abs=1e-6)
    assert found["accuracy"] == 0.5
    assert found["gap_mean"] == 0.0
    assert (found["chosen_mean"], found["chosen_std"]) == (2.0, 1.0)
    assert (found["rejected_mean"], found["rejected_std"]) == (2.0, 2.0)
    # 0, 1, 3, 4: squares of the distances from 2 are 4, 1, 1, 4, their mean 2.5
    assert (found["score_mean"], found["score_std"]) == (2.0, pytest.approx(math.sqrt(2.5)))


def test_the_mean_gap_is_chosen_less_rejected():
    assert metrics([3.0, 1.0, 2.0], [1.0, 0.0, 2.0])["gap_mean"] == 1.0


@pytest.mark.parametrize(
    ("winner", "loser", "share"),
    [([1, 2], [0, 1], 1.0), ([0, 1], [1, 2], 0.0), ([1, 1], [1, 1], 0.5), ([2, 1, 0, 5], [1, 1, 1, 4], 0.625)],
)
def test_a_tie_counts_one_half(winner, loser, share):
    assert accuracy(np.array(winner), np.array(loser)) == share
    assert metrics(winner, loser)["accuracy"] == share


def test_equal_scores_cost_log_2():
    assert metrics([7.0], [7.0])["loss"] == pytest.approx(math.log(2))


def test_longer_wins_by_hand():
    # longer, shorter, equal, longer: 1 + 0 + 1/2 + 1 of 4, whatever the scores are
    found = metrics([0, 0, 0, 0], [1, 1, 1, 1], [9, 2, 4, 8], [3, 5, 4, 1])
    assert found["longer_wins_accuracy"] == 0.625
    assert found["accuracy"] == 0.0


def test_quantiles_by_hand():
    # 0 to 20: a quantile q lies at 20 q
    found = metrics(range(21), range(100, 121))
    assert QUANTILES == (0.05, 0.25, 0.5, 0.75, 0.95)
    assert found["chosen_quantiles"] == pytest.approx([1, 5, 10, 15, 19])
    assert found["rejected_quantiles"] == pytest.approx([101, 105, 110, 115, 119])


@pytest.mark.parametrize(("gap", "loss"), [(1e4, 0.0), (-1e4, 1e4), (20.0, 2.061e-9), (-20.0, 20.0)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_loss_is_finite_for_wide_gaps(gap, loss, dtype):
    with np.errstate(over="raise", invalid="raise"):
        found = metrics([gap], [0.0], dtype=dtype)
    assert found["loss"] == pytest.approx(loss, rel=1e-3)


def test_statistics_are_of_float64():
    # 2^24 + 1 is no float32
    assert metrics([2.0**24], [-1.0])["gap_mean"] == 2**24 + 1


def test_one_pair_has_no_spread():
    found = metrics([2.0], [1.0])
    assert (found["chosen_std"], found["rejected_std"], found["score_std"]) == (0.0, 0.0, 0.5)
    assert found["chosen_quantiles"] == [2.0] * 5


def test_what_is_reported_can_be_written_as_json():
    columns = (np.array(column, np.float32) for column in ([1, 2], [2, 1], [0, 0], [1, 0]))
    for found in (metrics([1.0, 2.0], [0.5, 3.0]), point_metrics(*columns)):
        assert json.loads(json.dumps(found)) == found


def test_size_calibration_and_length_of_pairs_by_hand():
    # sizes 2, 1, 1, 4; the gaps 3 and -5 are certain to 0.9526 and 0.9933: one bin, where half is right
    found = metrics([2.0, -1.0], [-1.0, 4.0], [3, 1], [1, 6])
    assert found["score_abs_mean"] == 2
    assert found["calibration_error"] == pytest.approx((0.952574 + 0.993307) / 2 - 0.5, abs=1e-6)
    # scores and lengths without their means, 1 and 2.75: 1, -2, -2, 3 and 0.25, -1.75, -1.75, 3.25
    assert found["length_correlation"] == pytest.approx(17 / math.sqrt(18 * 16.75))


CERTAIN = math.log(3)  # to three quarters


@pytest.mark.parametrize(
    ("gaps", "error"),
    [
        ([CERTAIN, CERTAIN, -CERTAIN, CERTAIN], 0.0),
        ([CERTAIN] * 4, 0.25),
        ([-CERTAIN] * 4, 0.75),
        ([1e4, -1e4], 0.5),
        ([1e4, 1e4], 0.0),
        ([0.0, 0.0, 0.0], 0.0),  # ties are half right, and certain to one half
        ([1e-4, -1e-4], 0.0),
        ([0.0, 1e4, 1e4, -1e4], 0.25),  # 1/4 · 0 + 3/4 · 1/3
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calibration_by_hand(gaps, error, dtype):
    with np.errstate(over="raise", invalid="raise"):
        assert calibration(np.array(gaps, dtype=dtype)).ece == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize("width", [0.3, 2.0, 8.0])
def test_calibration_agrees_with_a_slow_loop(width):
    gaps = np.random.default_rng(0).normal(0.3, width, 500).round(1)
    bins = [[] for _ in range(10)]
    for gap in gaps.tolist():
        confidence = 1 / (1 + math.exp(-abs(gap)))
        right = 0.5 if gap == 0 else float(gap > 0)
        bins[min(int((confidence - 0.5) / 0.05), 9)].append((right, confidence))
    errors = [
        len(found) / 500 * abs(np.mean([r for r, _ in found]) - np.mean([c for _, c in found]))
        for found in bins
        if found
    ]
    assert len(errors) > 1
    assert calibration(gaps).ece == pytest.approx(sum(errors))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [0, -2, -4], -1),
        ([1, 2, 3], [1, 3, 2], 0.5),
        ([0.1, 0.1, 0.1], [1, 2, 4], 0),
        ([1, 2, 4], [7, 7, 7], 0),
        ([5], [3], 0),
    ],
)
def test_correlation_by_hand(one, other, expected):
    assert correlation(np.array(one, np.float32), np.array(other, np.float32)) == pytest.approx(expected)


def points(scores, targets, losses=None, right=None):
    columns = (scores, targets, *(column or [math.nan] * len(scores) for column in (losses, right)))
    return point_metrics(*(np.array(column, np.float32) for column in columns))


def test_points_by_hand():
    # ranks 1, 2½, 2½, 4 and 1, 2, 3½, 3½: products of the distances from 2½ are 2¼, 0, 0, 1½; squares 4½ and 4½
    found = points([1, 2, 2, 7], [10, 20, 30, 30], [0.5, 1, 1.5, 2], [1, 0, 1, 1])
    assert (found["rated"], found["point_loss"], found["label_accuracy"]) == (4, 1.25, 0.75)
    assert found["spearman"] == pytest.approx(3.75 / 4.5)
    # -2, -1, -1, 4 and -12.5, -2.5, 7.5, 7.5
    assert found["pearson"] == pytest.approx(50 / math.sqrt(22 * 275))
    assert (found["rated_mean"], found["rated_std"]) == (3, pytest.approx(math.sqrt(5.5)))
    assert points([1, 2], [1, 2]).keys() == found.keys() - {"point_loss", "label_accuracy"}


def test_spearman_sees_the_order_alone():
    found = points([0.1, 1, 10, 1000], [1, 2, 3, 4])
    assert found["spearman"] == pytest.approx(1) != found["pearson"]
    assert points([4, 3, 2], [0, 1, 9])["spearman"] == pytest.approx(-1)
    assert points([2, 2, 2], [0, 1, 9])["spearman"] == 0


def test_spearman_agrees_with_a_slow_loop():
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 30, 60), rng.integers(0, 4, 60)

    def ranks(values):
        return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]

    expected = np.corrcoef(ranks(scores), ranks(targets))[0, 1]
    assert points(scores.tolist(), targets.tolist())["spearman"] == pytest.approx(expected)
