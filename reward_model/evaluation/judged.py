# SPDX-License-Identifier: Apache-2.0
"""A data set as a model scores it, row for row in the order of the data: what every figure is computed from.

Notation: r rows, n responses of all rows, p judged pairs, c rows of a batch, t responses of these, K score heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from reward_model.batching.batch import Batch
from reward_model.batching.plan import MicroBatch
from reward_model.common.distributed import DistributedContext
from reward_model.data.comparisons import Comparisons, Origins
from reward_model.evaluation.scoring import Loaded, score_batches
from reward_model.models.forward import ForwardPass

Also = Callable[[Batch, torch.Tensor], list[torch.Tensor]]  # a batch and its scores → tensors (t,)


@dataclass(frozen=True)
class Judged:
    """Scores of the responses of a data set, and what people said of them.

    data: the rows. Of rows, (r,): prompts, equal numbers where the same was asked; subsets, empty where there is none.
    Of responses, (n,): rows, which row; scores; lengths, in tokens; ranks, 0 the best in its row, −1 not said; targets,
    NaN not said. Of pairs, (p,): better, worse, which responses; margins, NaN not said.

    heads: the score of each response by each of several heads, (n, K); None: the model has one. beside: name → what
    goes with the scores, (n,): of several heads ``std`` and ``lower``, as :meth:`with_bounds` has them; ``novelty``,
    where it was fitted. beta: of the bounds. novel_from: the novelty from which on a response is novel.
    """

    data: Comparisons
    prompts: np.ndarray
    subsets: np.ndarray
    rows: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray
    targets: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    margins: np.ndarray
    heads: np.ndarray | None = None
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    beta: float = 1.0
    novel_from: float = 1.0

    @classmethod
    def of(cls, data: Comparisons, scores: np.ndarray, heads: np.ndarray | None = None) -> Judged:
        """Put scores (n,), and those of several heads (n, K), beside what the data say."""
        _, text_lengths, counts = data.texts()
        first = np.cumsum(counts) - counts
        rows = np.repeat(np.arange(len(data)), counts)
        places = np.repeat(first, data.pairs)
        better, worse = (data.numbers(name) for name in ("better", "worse"))
        return cls(
            data=data,
            prompts=data.prompt_hashes(),
            subsets=data.subsets(),
            rows=rows,
            scores=np.asarray(scores, np.float64),
            lengths=text_lengths - data.prompt_tokens[rows],
            ranks=data.filled("ranks", counts, -1).astype(np.int64),
            targets=data.filled("targets", counts, np.nan),
            better=better + places,
            worse=worse + places,
            margins=data.filled("margin", data.pairs, np.nan),
            heads=heads,
        )

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.better)

    @property
    def origins(self) -> Origins:
        """Where each row was read."""
        return self.data.origins

    @cached_property
    def gaps(self) -> np.ndarray:
        """Score of the better response minus that of the other, (p,)."""
        return self.scores[self.better] - self.scores[self.worse]

    @cached_property
    def gap_spread(self) -> np.ndarray | None:
        """Standard deviation (the population's) over the heads of each pair's gap, (p,); None: there is one head.

        It is that of the K gaps, not of two scores: what all heads add to both answers of a pair is no doubt of it.
        """
        if self.heads is None:
            return None
        return (self.heads[self.better] - self.heads[self.worse]).std(axis=1)

    @cached_property
    def pair_rows(self) -> np.ndarray:
        """The row of each pair, (p,)."""
        return self.rows[self.better]

    @cached_property
    def pair_prompts(self) -> np.ndarray:
        """The prompt of each pair, numbered from 0, (p,)."""
        return np.unique(self.prompts[self.pair_rows], return_inverse=True)[1]

    @property
    def right(self) -> np.ndarray:
        """1 where a pair is in the right order, ½ where its scores are equal, (p,)."""
        return (self.gaps > 0) + 0.5 * (self.gaps == 0)

    def divided(self, temperature: float) -> Judged:
        """With every score divided by a temperature."""
        return self.on_scale(temperature, 0.0)

    def on_scale(self, std: float, mean: float) -> Judged:
        """With every score r, by whichever head, in its new place, r / std − mean; what is beside follows."""
        heads = None if self.heads is None else self.heads / std - mean
        moved = replace(self, scores=self.scores / std - mean, heads=heads)
        return moved.with_bounds(self.beta) if "lower" in self.beside else moved

    def with_bounds(self, beta: float) -> Judged:
        """With ``std``, the standard deviation u of each score over the heads, and ``lower``, r − β·u, beside them."""
        if self.heads is None:
            return self
        spread = self.heads.std(axis=1)
        bounds = {"std": spread, "lower": self.scores - beta * spread}
        return replace(self, beside=self.beside | bounds, beta=beta)


def judge(
    forward: ForwardPass,
    data: Comparisons,
    plan: Sequence[list[MicroBatch]],
    batches: Iterable[Loaded],
    context: DistributedContext,
    pad: int | None = None,
    is_asked: Callable[[], bool] | None = None,
    also: Also | None = None,
) -> tuple[Judged, list[np.ndarray]]:
    """Score the rows of a plan on all ranks; every rank gets all of them.

    Args:
        plan: this rank's share of an evaluation that has every row of the data, or some of them.
        batches: of this plan.
        pad: of which a text is not scored at the last one; None: it is scored at its last token.
        also: what else to read of each response.

    Returns:
        The rows of the plan, in the order of the data, a score that is not finite as it is; and what ``also`` has read,
        float64 (n,) each.

    Raises:
        Stopped: ``is_asked`` said so on a rank.
    """
    shares = iter(micro_batch.rows for (micro_batch,) in plan)

    def read(batch: Batch, scores: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.from_numpy(np.asarray(next(shares))).to(scores.device)
        found = [rows[batch.points.row_indices][batch.points.rows], scores[batch.points.responses]]
        found += also(batch, scores) if also else []
        if forward.heads is not None:
            found += forward.heads[batch.points.responses].unbind(1)
        return [torch.stack([values.double() for values in found], dim=1)]

    (table,) = score_batches(forward, batches, context, read, is_asked, lambda batch: scored_at(batch, pad))
    table = table[np.argsort(table[:, 0], kind="stable")]  # a row's responses stay in their order
    rows = np.unique(table[:, 0].astype(np.int64))
    count = forward.scorer.heads
    heads = None if count == 1 else table[:, -count:]
    judged = Judged.of(data if len(rows) == len(data) else data.select(rows), table[:, 1], heads)
    return judged, list((table[:, 2:] if heads is None else table[:, 2:-count]).T)


def columns_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The scores, (n,), and those of several heads, (n, K) or None, from what has them side by side, (n, 1 + K)."""
    return table[:, 0], table[:, 1:] if table.shape[1] > 1 else None


def scored_at(batch: Batch, pad: int | None) -> torch.Tensor:
    """Where each response is scored, (n,): at its last token that is no pad, as Transformers' classes have it."""
    ends, ids = batch.tokens.ends, batch.tokens.input_ids.flatten()
    if pad is None:
        return ends
    first = batch.tokens.spans[:, 0]
    while (is_pad := (ids[ends] == pad) & (ends > first)).any():
        ends = ends - is_pad.long()
    return ends
