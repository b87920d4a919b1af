# SPDX-License-Identifier: Apache-2.0
"""What scores mean: their mean and spread on reference rows, kept in the config that is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from reward_model.common.distributed import DistributedContext
from reward_model.evaluation.scoring import Loaded, score_batches
from reward_model.models.forward import ForwardPass
from reward_model.models.scorer import Scorer, divide_head, gathered

MOST_TIES = 0.01  # of pairs; each is a pair that the model does not decide


@dataclass(frozen=True)
class Spread:
    """Number, mean and (population) standard deviation of scores."""

    answers: int
    mean: float
    std: float


def measure(forward: ForwardPass, batches: Iterable[Loaded], context: DistributedContext) -> Spread:
    """The spread of the scores of all responses of all rows."""
    (scores,) = score_batches(forward, batches, context, lambda batch, scores: [scores[batch.points.responses]])
    return spread_of(scores)


def normalize(
    forward: ForwardPass, batches: Callable[[], Iterable[Loaded]], context: DistributedContext
) -> tuple[Spread, Spread]:
    """Give the scores of reference rows standard deviation 1, and write mean and divisor to the config.

    The mean stays where it is, since a head has no bias to take it: it goes to the config, and our scoring subtracts
    it. It is measured after the head was divided, so that it is that of the head as it is stored.

    Args:
        batches: makes the batches of the reference rows anew.

    Returns:
        The spread before and after.
    """
    scorer = forward.scorer
    before = measure(forward, batches(), context)
    scale = before.std or 1.0  # equal scores have no spread to be given
    divide_head(scorer, scale)
    after = measure(forward, batches(), context)
    scorer.config.score_mean, scorer.config.score_std = after.mean, scale
    return before, after


def begin_at_one(forward: ForwardPass, batches: Iterable[Loaded], context: DistributedContext) -> Spread:
    """Divide the head so that the scores of some rows have standard deviation 1, before DeepSpeed has the weights.

    Ziegler et al. 2019 (arXiv 1909.08593, section 2.2) did so before and after training, and their code
    (lm-human-preferences, ``normalize_before``) on 256 samples. They also moved the mean to 0, which losses that
    compare answers do not see.

    Returns:
        The spread that was found.
    """
    found = measure(forward, batches, context)
    divide_head(forward.scorer, found.std or 1.0)
    return found


def spread_of(scores: np.ndarray) -> Spread:
    """The spread of scores (n,); of none it is 0."""
    scores = scores.astype(np.float64)
    if not len(scores):
        return Spread(0, 0.0, 0.0)
    return Spread(len(scores), float(scores.mean()), float(scores.std()))


def ties_in(dtype: torch.dtype, mean: float, std: float) -> float:
    """The share of pairs of independent answers whose scores come out equal in a dtype.

    Its numbers near the mean are q apart. The gap of two scores is normal with the variance 2·std², so that its density
    at 0 is 1 / (2·√π·std), and a gap within ± q/2 is a tie: q / (2·√π·std) of them.

    >>> round(ties_in(torch.bfloat16, mean=22.9, std=1.0), 3)  # numbers from 16 to 32 are 1/8 apart
    0.035
    """
    size = max(abs(mean), std)
    if not size or not std:
        return 0.0
    apart = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size))
    return min(1.0, apart / (2 * math.sqrt(math.pi) * std))


def doubt_mean(dtype: torch.dtype, mean: float, std: float) -> str:
    """What is wrong with scores whose mean is far from zero, and what to do, in a line; empty: nothing.

    Args:
        dtype: of the saved model, in which Transformers multiplies the head. Our own scoring does so in float32.
    """
    ties = ties_in(dtype, mean, std)
    if ties <= MOST_TIES:
        return ""
    return (
        f"the mean of the scores, {mean:.4g}, is large beside their standard deviation, {std:.4g}: in "
        f"{str(dtype).removeprefix('torch.')} Transformers gives {ties:.0%} of unrelated answers equal scores, and "
        "more of like ones; train with --score_penalty center, or load the model in float32"
    )


def keep_thresholds(scorer: Scorer, lowest_grade: float, scale: float = 1.0) -> None:
    """Write what an ordinal loss has learned to the config, if there is one.

    Args:
        scale: by which the head was divided since.
    """
    if scorer.thresholds is None:
        return
    with gathered(list(scorer.thresholds.parameters())), torch.no_grad():
        scorer.config.score_thresholds = (scorer.thresholds().double() / scale).tolist()
    scorer.config.lowest_grade = int(lowest_grade)
