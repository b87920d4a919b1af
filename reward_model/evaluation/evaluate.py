# SPDX-License-Identifier: Apache-2.0
"""A data set scored on all ranks, and the metrics of the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reward_model.batching.batch import Batch
from reward_model.batching.plan import MicroBatch
from reward_model.common.distributed import DistributedContext
from reward_model.common.words import counted
from reward_model.data.comparisons import Comparisons
from reward_model.evaluation.bounds import spread_metrics
from reward_model.evaluation.judged import Judged, judge
from reward_model.evaluation.list_metrics import lists_of
from reward_model.evaluation.metrics import pair_metrics, point_metrics
from reward_model.evaluation.scoring import Loaded
from reward_model.models.forward import ForwardPass
from reward_model.objectives.objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    metrics: name → number, as ``metrics.jsonl`` has them. scores: name of a group, such as ``chosen``, → its scores.
    judged: all of it, row for row; None: of an earlier run.
    """

    metrics: dict = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    judged: Judged | None = None


def evaluate(
    forward: ForwardPass,
    objective: Objective,
    data: Comparisons,
    plan: Sequence[list[MicroBatch]],
    batches: Iterable[Loaded],
    context: DistributedContext,
    is_asked: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Metrics of the whole set, however many ranks share it; None: a score is not finite.

    Args:
        data, plan, batches: as :func:`reward_model.evaluation.judged.judge` takes them.

    Raises:
        Stopped: ``is_asked`` said so on a rank.
    """

    def also(batch: Batch, scores: torch.Tensor) -> list[torch.Tensor]:
        return read_points(batch, scores, objective, forward.thresholds)

    judged, (losses, right) = judge(forward, data, plan, batches, context, is_asked=is_asked, also=also)
    if not np.isfinite(judged.scores).all():  # the mean of heads of which one is not finite is none, too
        return None
    metrics: dict[str, Any] = {}
    scores: dict[str, np.ndarray] = {}
    if len(judged):
        sides = judged.better, judged.worse
        scores = {name: judged.scores[side] for name, side in zip(("chosen", "rejected"), sides)}
        metrics |= pair_metrics(*scores.values(), *(judged.lengths[side] for side in sides))
    known = np.isfinite(judged.targets)
    if known.any():
        of_known = judged.scores[known]
        metrics |= point_metrics(of_known, judged.targets[known], losses[known], right[known])
        scores = scores or {"scored answers": of_known}
    if hits := [best_has_highest(judged, members) for members in lists_of(judged)]:
        metrics |= {"lists": len(hits), "best_of_list_accuracy": float(np.mean(hits))}
    return Evaluation(metrics | spread_metrics(judged), scores, judged)


def best_has_highest(judged: Judged, members: np.ndarray) -> bool:
    """Whether the first of the responses with the highest score is one of the best of its list."""
    return bool(judged.ranks[members][judged.scores[members].argmax()] == 0)


def read_points(
    batch: Batch, scores: torch.Tensor, objective: Objective, thresholds: torch.Tensor | None
) -> list[torch.Tensor]:
    """Of each response of each row of a batch its loss, NaN where the objective has none of responses, and whether its
    label is right, NaN where there are no labels; (t,) each."""
    losses = torch.full_like(batch.points.targets, math.nan)
    if "points" in objective.names:
        losses = objective.point_losses(batch, scores, thresholds)
    return [losses, objective.right_labels(batch, scores, thresholds)]


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
