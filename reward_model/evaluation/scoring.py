# SPDX-License-Identifier: Apache-2.0
"""Batches scored on all ranks, each row once. Needs no DeepSpeed: any forward pass will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from reward_model.batching.batch import Batch, PackedBatch
from reward_model.common.distributed import DistributedContext, any_for_later, gather_rows
from reward_model.common.progress import progress
from reward_model.common.pulse import beat
from reward_model.models.forward import ForwardPass

Loaded = list[Batch] | list[PackedBatch]  # as a loader gives the batches of a step
Read = Callable[[Batch, torch.Tensor], list[torch.Tensor]]


class Stopped(Exception):
    """An evaluation that all ranks left together, since the run shall end."""


def _never() -> bool:
    return False


@torch.no_grad()
def score_batches(
    forward: ForwardPass,
    batches: Iterable[Loaded],
    context: DistributedContext,
    read: Read,
    is_asked: Callable[[], bool] | None = None,
    at: Callable[[Batch], torch.Tensor] = lambda batch: batch.tokens.ends,
) -> list[np.ndarray]:
    """Score batches on all ranks, each row once, and join what ``read`` takes from each batch.

    Args:
        batches: Lists of one batch. A batch of weight 0 is a filler, of which nothing counts.
        read: Takes a batch and its scores, shape (n,), and returns tables with a line for each pair, response or list.
        is_asked: Whether this rank is asked to end the run; None: nobody can ask.
        at: The tokens at which a batch is scored.

    Returns:
        The tables, with the lines of all ranks.

    Raises:
        Stopped: A rank was asked to end the run; on all of them after the same batch.
    """
    forward.module.eval()
    found, any_asked = [], _never
    for (loaded,) in progress(batches, desc="evaluating", unit="batch", leave=False, disable=not context.is_first):
        beat("a batch of an evaluation")
        batch = loaded.to(forward.device)
        tables = read(batch, forward(batch, at(batch)))
        counts = batch.weight and context.sequence.rank == 0  # its neighbors have the same scores
        found.append([table if counts else table[:0] for table in tables])
        if any_asked():
            raise Stopped
        if is_asked is not None:  # known one batch later, so that none waits for it
            any_asked = any_for_later(is_asked(), forward.device)
    return [gather_rows(torch.cat(parts)).cpu().numpy() for parts in zip(*found)]
