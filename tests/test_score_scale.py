# SPDX-License-Identifier: Apache-2.0
"""What is said of scores whose mean is far from zero; whole runs in test_trainer.py normalize scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reward_model.evaluation.score_scale import MOST_TIES, doubt_mean, spread_of, ties_in
from reward_model.training.run import keep_scale

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.bfloat16, 22.9, 1.0),
        (torch.bfloat16, -22.9, 1.0),
        (torch.bfloat16, 6.0, 0.5),
        (torch.float16, 1400.0, 8.0),
    ],
)
def test_share_of_ties_is_what_rounding_makes_of_normal_scores(dtype, mean, std):
    generator = torch.Generator().manual_seed(0)
    rounded = (mean + std * torch.randn(2, 200_000, generator=generator)).to(dtype)
    ties = (rounded[0] == rounded[1]).float().mean().item()
    assert ties == pytest.approx(ties_in(dtype, mean, std), rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "mean", "std", "is_told"),
    [
        (torch.bfloat16, 22.9, 1.0, True),
        (torch.bfloat16, -22.9, 1.0, True),
        (torch.bfloat16, 3.0, 1.0, False),
        (torch.bfloat16, 0.0, 1.0, False),
        (torch.bfloat16, 0.0, 1e-3, False),
        (torch.bfloat16, 22.9, 10.0, False),
        (torch.float16, 22.9, 1.0, False),
        (torch.float16, 229.0, 1.0, True),
        (torch.float32, 229.0, 1.0, False),
        (torch.bfloat16, 0.0, 0.0, False),
    ],
)
def test_a_mean_that_costs_accuracy_is_told(dtype, mean, std, is_told):
    line = doubt_mean(dtype, mean, std)
    assert bool(line) is is_told
    assert (ties_in(dtype, mean, std) > MOST_TIES) is is_told
    if is_told:
        assert "--score_penalty center" in line
        assert "float32" in line
        assert f"{mean:.4g}" in line


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_the_last_evaluation_tells(dtype, capsys):
    scores = np.random.default_rng(0).normal(229.0, 1.0, 1000)
    trainer = SimpleNamespace(
        forward=SimpleNamespace(scorer=SimpleNamespace(thresholds=None), dtype=dtype),
        planner=None,
        last=SimpleNamespace(scores={"chosen": scores[:500], "rejected": scores[500:]}),
        objective=SimpleNamespace(lowest_grade=0),
    )
    keep_scale(trainer, None)
    assert ("the mean of the scores, 229" in capsys.readouterr().out) == (dtype in HALF)
    trainer.last.scores = {}
    keep_scale(trainer, None)
    assert capsys.readouterr().out == ""
    assert spread_of(np.zeros(0)).answers == 0
