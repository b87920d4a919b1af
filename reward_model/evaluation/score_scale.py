# SPDX-License-Identifier: Apache-2.0
"""What scores mean: their mean and spread on reference rows, kept in the config that is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from reward_model.common.distributed import DistributedContext
from reward_model.evaluation.evaluate import Loaded, score_batches
from reward_model.models.forward import ForwardPass
from reward_model.models.scorer import Scorer, divide_head, gathered


@dataclass(frozen=True)
class Spread:
    """Number, mean and (population) standard deviation of scores."""

    answers: int
    mean: float
    std: float


def measure(forward: ForwardPass, batches: Iterable[Loaded], context: DistributedContext) -> Spread:
    """The spread of the scores of all responses of all rows."""
    (scores,) = score_batches(forward, batches, context, lambda batch, scores: [scores[batch.points.responses]])
    scores = scores.astype(np.float64)
    return Spread(len(scores), float(scores.mean()), float(scores.std()))


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
