# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch as the flags define it, and what a row needs so that the loss can learn from it.

An objective learns from judged pairs, from ranked lists, or from single responses with a score or label. If there is
one objective, of pairs, every pair of a batch weighs the same. With any other choice every row weighs the same, and
the pairs of a row share its weight, as its scored responses do.

Notation for shapes: n responses, of which the longest has r tokens; p judged pairs; t responses of the rows, where a
response that several rows judged counts once for each; K score heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from reward_model.batching.batch import Batch
from reward_model.common.errors import UserError
from reward_model.config.groups import DataConfig
from reward_model.config.loss import SIMILARITY, Loss
from reward_model.config.objectives import PAIR_LOSSES, kind_of
from reward_model.data.comparisons import GRADES, BadRow, Comparison, Comparisons, answers
from reward_model.objectives import losses
from reward_model.objectives.bootstrap import Bootstrap
from reward_model.objectives.losses import LIST_FUNCTIONS
from reward_model.objectives.terms import (
    RunningDistance,
    contrastive_loss,
    differences,
    distances,
    names_of_differences,
    norm_weights,
    similarity_margin,
)
from reward_model.reward_model import pairwise_loss, score_penalty, span_loss

MOST_GRADES = 1_000

PairLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Objective:
    """The loss of a run.

    kinds: for each objective whether it learns from pairs, lists or points.
    distance: the running mean by which ``--pair_weight norm`` weighs pairs; None: they weigh the same.
    """

    def __init__(self, loss: Loss, seed: int = 0):
        """
        Args:
            seed: Of what several heads draw.
        """
        self.loss = loss
        self.bootstrap = Bootstrap(seed)
        self.weights = loss.weights
        self.kinds = {name: kind_of(name) for name in self.weights}
        self.names = {kind: name for name, kind in self.kinds.items()}
        self.lowest_grade = 0.0
        self.distance = RunningDistance() if loss.pair_weight == "norm" else None

    @property
    def by_row(self) -> bool:
        """Whether the batch size counts rows, not pairs."""
        return set(self.kinds.values()) != {"pairs"}

    def __call__(
        self,
        batch: Batch,
        scores: torch.Tensor,
        every: torch.Tensor | None = None,
        thresholds: torch.Tensor | None = None,
        heads: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss of a batch, a 0-d float32 tensor: the weighted sum of the objectives, and the penalties.

        Args:
            scores: The score of each response, shape (n,).
            every: The score at each token of each response, shape (n, r), for ``--loss_level token``.
            thresholds: The thresholds between grades, for ``--loss ordinal``.
            heads: The score of each response by each of several heads, shape (n, K), see :meth:`of_heads`.
            states: What the head was given of each response, (n, h), for a loss that reads states.

        Example: one pair, whose scores differ by 2. Its logistic loss is log(1 + exp(−2)).

        >>> from reward_model.batching.collate import collate
        >>> from reward_model.batching.layout import Layout
        >>> from reward_model.config.groups import LossConfig
        >>> from reward_model.config.loss import resolve_loss
        >>> row = Comparison([1, 2], [[3], [4]], better=[0], worse=[1], margin=[0.0])
        >>> objective = Objective(resolve_loss(LossConfig(loss=["logistic"])))
        >>> loss = objective(collate([row], Layout("packed", pad=0)), scores=torch.tensor([1.5, -0.5]))
        >>> round(loss.item(), 4)
        0.1269
        """
        if heads is not None:
            return self.of_heads(batch, heads, thresholds, states)
        total = scores.new_zeros(())
        for name, weight in self.weights.items():
            if name in PAIR_LOSSES:
                part = (self.pair_losses(batch, scores, every, states) * batch.pairs.weights).sum()
            elif name in LIST_FUNCTIONS:
                lists = batch.lists
                part = (LIST_FUNCTIONS[name](scores[lists.responses], lists.ranks) * lists.weights).sum()
            else:
                part = (self.point_losses(batch, scores, thresholds) * batch.points.weights).sum()
            total = total + weight * part
        return total + self.penalties(batch, scores)

    def of_heads(
        self,
        batch: Batch,
        heads: torch.Tensor,
        thresholds: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean over several heads of each one's loss on its own bootstrap of the rows, a 0-d float32 tensor.

        A head's loss is that of a model with this head alone, in which each judged pair, list or scored row weighs as
        often as the head has drawn it; mean over the heads, as in RewardUQ's code, so that the backbone has gradients
        of the size that one head gives it. Penalties look at each head's scores of all rows, drawn or not: they keep
        the scale of scores, and learn from no judgement.

        Args:
            heads: The score of each response by each head, shape (n, K).
            states: What the heads were given of each response, (n, h), for a loss that reads states.
        """
        count = heads.shape[-1]
        total = heads.new_zeros(())
        for name, weight in self.weights.items():
            if name in PAIR_LOSSES:
                pairs = batch.pairs
                each = self.pair_loss(batch, True, states)(heads[pairs.better], heads[pairs.worse])  # (p, K)
                weights = pairs.weights * self.pair_weights(batch, states)
                drawn = self._drawn(pairs.identity, len(pairs.weights), count)
            elif name in LIST_FUNCTIONS:
                lists = batch.lists
                scores = heads[lists.responses].movedim(-1, 0).flatten(0, 1)  # (K·l, k), one head's lists after another
                each = LIST_FUNCTIONS[name](scores, lists.ranks.repeat(count, 1))
                each = each.reshape(count, len(lists.ranks)).T  # (l, K)
                weights, drawn = lists.weights, self._drawn(lists.identity, len(lists.weights), count)
            else:
                points = batch.points
                scores, targets = heads[points.responses].flatten(), points.targets.repeat_interleave(count)  # (t·K,)
                each = self._of_points(scores, targets, thresholds).unflatten(0, (-1, count))
                weights, drawn = (
                    points.weights,
                    self._drawn(points.identity, len(points.row_weights), count)[points.rows],
                )
            total = total + weight * (each * drawn * weights[:, None]).sum() / count
        if self.loss.score_penalty or self.loss.length_penalty:
            total = total + torch.stack([self.penalties(batch, own) for own in heads.unbind(-1)]).mean()
        return total

    def _drawn(self, identity: torch.Tensor, rows: int, heads: int) -> torch.Tensor:
        """How often each head has drawn each row, (rows, K); the batch has to say by what its rows are known."""
        assert len(identity) == rows, "a batch of rows that are not identified"
        return self.bootstrap.weights(identity, heads)

    def pair_losses(
        self,
        batch: Batch,
        scores: torch.Tensor,
        every: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each judged pair, shape (p,)."""
        pairs, lengths = batch.pairs, batch.tokens.span_lengths
        pair_loss = self.pair_loss(batch, every is not None, states)
        if every is None:
            return pair_loss(scores[pairs.better], scores[pairs.worse]) * self.pair_weights(batch, states)
        end = torch.minimum(lengths[pairs.better], lengths[pairs.worse])  # no pad has a score
        return span_loss(every[pairs.better], every[pairs.worse], pairs.start, end, pair_loss)

    def pair_weights(self, batch: Batch, states: torch.Tensor | None) -> torch.Tensor | float:
        """What each judged pair weighs beside the weight of its row, shape (p,), or the same of all."""
        if self.distance is None or self.distance.mean is None:
            return 1.0
        assert states is not None
        found = distances(states[batch.pairs.better], states[batch.pairs.worse])
        return norm_weights(found, self.distance.mean)

    def pair_loss(self, batch: Batch, per_token: bool, states: torch.Tensor | None = None) -> PairLoss:
        """The function from chosen and rejected scores, shape (p,) or per token (p, r), to losses of the same shape."""
        name, pairs = self.names["pairs"], batch.pairs

        def per_pair(value):
            return value[:, None] if per_token and isinstance(value, torch.Tensor) else value

        margin = per_pair(self.margin(batch, states))
        if name == "scaled":
            return lambda c, r: losses.scaled_loss(c, r, margin)
        if name == "hinge":
            return lambda c, r: losses.hinge_loss(c, r, margin)
        if name == "focal":
            return lambda c, r: losses.focal_loss(c, r, self.loss.focal_gamma)
        if name == "direct":
            return losses.direct_loss
        if name == "logistic":
            smoothing = per_pair(self.smoothing(batch))
            return lambda c, r: pairwise_loss(c, r, margin, smoothing)
        if name == "prior_length":
            lengths = batch.tokens.span_lengths
            own = lengths[pairs.better] - pairs.start, lengths[pairs.worse] - pairs.start
            similarity = losses.length_similarity(*own)
        else:
            similarity = losses.angular_similarity(pairs.similarity)
        bound = per_pair(losses.prior_bound(similarity, *self.loss.prior_beta))
        return lambda c, r: losses.prior_constrained_loss(c, r, bound)

    def margin(self, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor | float:
        """The margin of all pairs as a number, or of each judged pair, shape (p,)."""
        pairs = batch.pairs
        margin = self.loss.margin
        if margin == SIMILARITY:
            assert states is not None
            return similarity_margin(states[pairs.better], states[pairs.worse], self.loss.margin_scale)
        if isinstance(margin, str):
            return {
                "column": pairs.margin,
                "large": pairs.rating,
                "small": pairs.rating / 3,
                "strength": pairs.strength,  # negative ones, too: the paper adds it to all pairs (equation 6)
            }[margin]
        return margin

    def smoothing(self, batch: Batch) -> torch.Tensor | float:
        """The label smoothing of all pairs as a number, or of each judged pair, shape (p,)."""
        smoothing = self.loss.label_smoothing
        if isinstance(smoothing, str):
            pairs = batch.pairs
            return 1 - pairs.probability if smoothing == "column" else losses.strength_smoothing(pairs.strength)
        return smoothing

    def point_losses(self, batch: Batch, scores: torch.Tensor, thresholds: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of each response of each row, shape (t,). Where there is no target, the loss is that of the target 0."""
        return self._of_points(scores[batch.points.responses], batch.points.targets, thresholds)

    def _of_points(self, scores: torch.Tensor, targets: torch.Tensor, thresholds: torch.Tensor | None) -> torch.Tensor:
        """Loss of each of some scores beside its target, of their shape."""
        name = self.names["points"]
        if name == "mse":
            return losses.squared_error(scores, targets)
        if name == "mae":
            return losses.absolute_error(scores, targets)
        if name == "huber":
            return losses.huber_loss(scores, targets, self.loss.huber_delta)
        if name == "bce":
            return losses.binary_loss(scores, targets)
        assert thresholds is not None  # the last one, ordinal, has learned them
        grade = (targets - self.lowest_grade).clamp(0, len(thresholds))
        return losses.ordinal_loss(scores, grade, thresholds)

    def right_labels(self, batch: Batch, scores: torch.Tensor, thresholds: torch.Tensor | None) -> torch.Tensor:
        """Whether each response of each row gets its label right, 1 or 0, shape (t,).

        ``ordinal`` compares the likeliest grade, and ``bce`` the sign of the score. Any other loss gives NaN.
        """
        name, scores, targets = self.names.get("points"), scores[batch.points.responses], batch.points.targets
        if name == "ordinal":
            return (losses.likeliest_grade(scores, thresholds) == targets - self.lowest_grade).float()
        if name == "bce":
            return ((scores > 0) == (targets > 0.5)).float()
        return torch.full_like(scores, math.nan)

    def penalties(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor | float:
        """Penalty on the scale of the scores, and on scores that follow length: means over rows and their responses."""
        loss, points, total = self.loss, batch.points, 0.0
        own = scores[points.responses]
        if loss.score_penalty == "center":  # (r_1 + r_2)² of a pair: four times the squared mean of a row
            shares = points.response_weights / points.row_weights[points.rows]
            means = own.new_zeros(len(points.row_weights)).index_add(0, points.rows, own * shares)
            total = loss.score_penalty_weight * score_penalty("center", means, means, points.row_weights)
        elif loss.score_penalty:
            penalty = score_penalty(loss.score_penalty, own, own, points.response_weights)
            total = loss.score_penalty_weight * penalty
        if loss.length_penalty:
            lengths = batch.tokens.response_lengths[points.responses]
            total = total + loss.length_penalty * losses.length_penalty(own, lengths, points.response_weights)
        return total

    def contrastive(self, batch: Batch, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The mean contrastive term of a batch, 0-d float32, in which all negatives are of this batch.

        Args:
            one, other: What the head was given of each response in two passes, (n, h).
        """
        names = batch.tokens.text_names()  # a text may stand in a batch twice, and is not told from itself
        if self.loss.contrastive == "difference":
            names = names_of_differences(batch.pairs, names)
            one, other = differences(one, batch.pairs), differences(other, batch.pairs)
        found = contrastive_loss(one, other, self.loss.contrastive_temperature, names)
        return found.sum() / max(1, len(found))

    def start_thresholds(self, train_set: Comparisons) -> torch.Tensor | None:
        """The initial thresholds between the grades of the training rows, or None if the loss has no thresholds.

        Raises:
            UserError: The rows have a single grade, or more than a thousand.
        """
        if "ordinal" not in self.kinds:
            return None
        grades = train_set.targets()
        grades = grades[~np.isnan(grades)]
        self.lowest_grade = grades.min()
        count = int(grades.max() - grades.min()) + 1
        if not 2 <= count <= MOST_GRADES:
            raise UserError(f"--loss ordinal: the labels span {count} grades; 2 to {MOST_GRADES} can be told apart")
        return losses.frequency_thresholds(torch.from_numpy(np.bincount((grades - grades.min()).astype(int))))

    def require_rows(self, train_set: Comparisons) -> None:
        """Raise UserError if an objective has no row to learn from."""
        has = {
            "pairs": (train_set.pairs > 0).any(),
            "lists": (train_set.pairs > 0).any(),
            "points": not np.isnan(train_set.targets()).all(),
        }
        for name, kind in self.kinds.items():
            if not has[kind]:
                what = "a score or a label" if kind == "points" else "an order"
                raise UserError(f"--loss {name} has nothing to learn from: no training row has {what}")

    def missing(self, row: Comparison) -> str | None:
        """Why there is nothing to learn from a training row, or None if an objective can learn from it.

        Raises:
            BadRow: What the row has does not suit the loss.
        """
        checks = {"pairs": self._missing_in_pairs, "lists": self._missing_in_lists, "points": self._missing_in_points}
        reasons = [checks[kind](row, name) for name, kind in self.kinds.items()]
        if not all(reasons):
            return None
        return " and ".join(filter(None, reasons)) + (_that_would_do(row) if len(reasons) == 1 else "")

    def _missing_in_pairs(self, row: Comparison, name: str) -> str | None:
        if not row.better:
            return f"--loss {name} needs a preferred answer, and the row has {answers(row)}{_no_order(row)}"
        margin = self.loss.margin
        if margin == "column" and any(map(math.isnan, row.margin)):
            raise BadRow("margin is missing, and --margin column needs one, or two scores")
        if margin in ("small", "large") and any(map(math.isnan, row.rating)):
            grades = ", ".join(list(GRADES)[:5])
            raise BadRow(f"the row has no rating that --margin {margin} knows: 0 to 3, or {grades}")
        if margin == "column" and min(row.margin) < 0:
            raise BadRow(f"margin is {min(row.margin):g}, so that the better answer need not win: give 0 or more")
        by_strength = [name for name in ("margin", "label_smoothing") if getattr(self.loss, name) == "strength"]
        if by_strength and (reason := no_strength(row)):
            raise BadRow(f"{reason}, and --{by_strength[0]} strength needs one")
        if self.loss.label_smoothing == "column" and any(map(math.isnan, row.probability)):
            raise BadRow("the row has no probability from 0 to 1, and --label_smoothing column needs one")
        return None

    def _missing_in_lists(self, row: Comparison, name: str) -> str | None:
        if not row.better:
            return f"--loss {name} needs ranked lists, and the row has {answers(row)}{_no_order(row)}"
        if name == "plackett_luce" and len(set(row.ranks)) < len(row.ranks):
            one, other = _tied(row.ranks, max(row.ranks, key=row.ranks.count))
            raise BadRow(
                f"responses {one} and {other} are tied, and --loss {name} needs a strict order; rank_list takes ties"
            )
        if name == "best_of_k" and row.ranks.count(0) > 1:
            one, other = _tied(row.ranks, 0)
            raise BadRow(
                f"responses {one} and {other} are both the best, and --loss {name} needs one; rank_list takes ties"
            )
        return None

    def _missing_in_points(self, row: Comparison, name: str) -> str | None:
        targets = [target for target in row.targets if not math.isnan(target)]
        if not targets:
            return f"--loss {name} needs a score or label, and the row has none"
        for target in targets:
            if name == "bce" and not 0 <= target <= 1:
                raise BadRow(f"the label {target:g} is not in [0, 1], as --loss {name} needs it")
            if name == "ordinal" and not target.is_integer():
                raise BadRow(f"the label {target:g} is not a whole number, as --loss {name} needs it")
        return None


def missing_by(objective: Objective, data: DataConfig) -> Callable[[Comparison], str | None]:
    """Why a training row cannot be learned from: what the objective says, or that it has no strength to rank it by."""
    flags = [f"--{name}" for name in ("flip_share", "drop_share") if getattr(data, name)]
    if not flags:
        return objective.missing

    def missing(row: Comparison) -> str | None:
        reason = objective.missing(row)
        if row.better and (without := no_strength(row)):
            raise BadRow(f"{without}, and {flags[0]} needs one")
        return reason

    return missing


def no_strength(row: Comparison) -> str:
    """Why a row that judges pairs has no strength; empty: it has."""
    if row.strength:
        return ""
    is_list = len(row.better) != 1
    return (
        "a list has no strength" if is_list else "the row has no finite strength_mean (reward-model ensemble writes it)"
    )


def _no_order(row: Comparison) -> str:
    if len(row.targets) == 1:
        return ""
    return " that are all tied" if row.ranks else " and no order (scores or ranks)"


def _tied(ranks: list[int], rank: int) -> list[int]:
    """The first two responses of one rank, counted from 1."""
    return [i for i, found in enumerate(ranks, 1) if found == rank][:2]


def _that_would_do(row: Comparison) -> str:
    """Objectives that learn from what a row has."""
    if row.better:
        return "; --loss logistic learns from pairs"
    if len(row.targets) == 1 and not math.isnan(row.targets[0]):
        return "; --loss bce learns from labels, --loss mse from scores"
    return ""
