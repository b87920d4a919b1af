# SPDX-License-Identifier: Apache-2.0
"""Metrics of scored pairs against numbers derived by hand."""

import json
import math

import numpy as np
import pytest

from reward_model.metrics import QUANTILES, accuracy, pair_metrics


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
    found = metrics([1.0, 2.0], [0.5, 3.0])
    assert json.loads(json.dumps(found)) == found
