# SPDX-License-Identifier: Apache-2.0
"""A data set scored on all ranks, and the metrics of the whole of it. Needs no DeepSpeed: any forward pass will do.

Notation: n responses of a batch, p pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reward_model.batching.batch import Batch, PackedBatch
from reward_model.common.distributed import DistributedContext, any_for_later, gather_rows
from reward_model.common.progress import progress
from reward_model.common.pulse import beat
from reward_model.common.words import counted
from reward_model.evaluation.metrics import pair_metrics, point_metrics
from reward_model.models.forward import ForwardPass
from reward_model.objectives.objective import Objective

Loaded = list[Batch] | list[PackedBatch]  # as a loader gives the batches of a step
Read = Callable[[Batch, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    metrics: name → number, as ``metrics.jsonl`` has them. scores: name of a group, such as ``chosen``, → its scores.
    """

    metrics: dict = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)


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


def evaluate(
    forward: ForwardPass,
    objective: Objective,
    batches: Iterable[Loaded],
    context: DistributedContext,
    is_asked: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Metrics of the whole set, however many ranks share it; None: a score is not finite.

    Raises:
        Stopped: ``is_asked`` said so on a rank.
    """

    def read(batch: Batch, scores: torch.Tensor) -> list[torch.Tensor]:
        return read_judged(batch, scores, objective, forward.thresholds)

    pairs, points, hits = score_batches(forward, batches, context, read, is_asked)
    if not (np.isfinite(pairs).all() and np.isfinite(points[:, 0]).all()):
        return None
    metrics: dict[str, Any] = {}
    scores: dict[str, np.ndarray] = {}
    if len(pairs):
        scores = {"chosen": pairs[:, 0], "rejected": pairs[:, 1]}
        metrics |= pair_metrics(*pairs.T)
    if len(points):
        metrics |= point_metrics(*points.T)
        scores = scores or {"scored answers": points[:, 0]}
    if len(hits):
        metrics |= {"lists": len(hits), "best_of_list_accuracy": float(hits.mean())}
    return Evaluation(metrics, scores)


def read_judged(
    batch: Batch, scores: torch.Tensor, objective: Objective, thresholds: torch.Tensor | None
) -> list[torch.Tensor]:
    """Read what an evaluation needs from a batch, as three tables.

    Returns:
        For each pair its chosen score, rejected score, chosen length and rejected length, shape (p, 4). For each scored
        response its score, its target, its loss and whether its label is right, shape (·, 4). For each list of three or
        more whether a best response has the highest score, shape (·, 1).
    """
    sides, lengths = (batch.pairs.better, batch.pairs.worse), batch.tokens.response_lengths
    pairs = torch.stack([v[side].float() for v in (scores, lengths) for side in sides], dim=1)
    targets, scored = batch.points.targets, batch.points.weights > 0
    losses = torch.full_like(targets, math.nan)
    if "points" in objective.names:
        losses = objective.point_losses(batch, scores, thresholds)
    right = objective.right_labels(batch, scores, thresholds)
    points = torch.stack([scores[batch.points.responses], targets, losses, right], dim=1)[scored]
    ranks, absent = batch.lists.ranks, batch.lists.ranks < 0
    hits = scores.new_zeros(0, 1)
    if len(ranks):
        best = scores[batch.lists.responses].masked_fill(absent, -math.inf).argmax(1, keepdim=True)
        hits = (ranks.gather(1, best) == 0)[(~absent).sum(1) > 2].float()  # a list of two is told by its pair
    return [pairs, points, hits]


def described(metrics: dict, names: dict[str, str]) -> str:
    """An evaluation in a line.

    Args:
        names: kind → name of the objectives.
    """
    m, said = metrics, []
    if "accuracy" in m:
        kind = "loss" if list(names.values()) == ["logistic"] else "logistic loss"
        said.append(
            f"held-out accuracy {m['accuracy']:.4f}, {kind} {m['loss']:.4f}, gap {m['gap_mean']:.3f}, "
            f"chosen {m['chosen_mean']:.3f} ± {m['chosen_std']:.3f}, "
            f"rejected {m['rejected_mean']:.3f} ± {m['rejected_std']:.3f}"
        )
    if "rated" in m:
        loss = f", {names['points']} {m['point_loss']:.4f}" if "point_loss" in m else ""
        label = f", right label {m['label_accuracy']:.4f}" if "label_accuracy" in m else ""
        said.append(f"{counted(m['rated'], 'scored answer')}: correlation {m['pearson']:.4f}{loss}{label}")
    return "; ".join(said)


def summary(metrics: dict, names: dict[str, str]) -> list[str]:
    """What a user wants to know at the end, in lines."""
    m, said = metrics, []
    if "accuracy" in m:
        pairs, longer = counted(m["pairs"], "pair"), m["longer_wins_accuracy"]
        said.append(f"held-out accuracy {m['accuracy']:.4f} on {pairs} (always the longer answer: {longer:.4f})")
    if "rated" in m and ("points" in names or "accuracy" not in m):
        right = f" (right label: {m['label_accuracy']:.4f})" if "label_accuracy" in m else ""
        said.append(f"correlation of scores with {counted(m['rated'], 'held-out target')}: {m['pearson']:.4f}{right}")
    return said
