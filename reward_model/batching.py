# SPDX-License-Identifier: Apache-2.0
"""Comparisons → padded batches, and the plan of an epoch: who computes which pairs, and what they weigh.

Notation: n rows (responses), s tokens, p judged pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from reward_model.data import Comparison, common_prefix


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the Comparisons of one forward pass, and its weight in the step's loss (0: a filler)."""

    indices: np.ndarray
    weight: float


@dataclass(frozen=True)
class Batch:
    """Padded rows and the pairs judged among them.

    input_ids, attention_mask: (n, s) int64, padded on the right.
    ends: (n,) column of each row's last token.
    response_lengths: (n,) tokens after the prompt, end token included.
    better, worse: (p,) rows; better[i] beat worse[i].
    margin: (p,) float32; NaN where the data say nothing.
    start: (p,) first column in which the two rows of a pair differ.
    weight: of this batch's mean loss in the step's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    ends: torch.Tensor
    response_lengths: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    margin: torch.Tensor
    start: torch.Tensor
    weight: float = 1.0

    def to(self, device: torch.device) -> Batch:
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def plan_epoch(
    size: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
) -> list[list[MicroBatch]]:
    """One rank's share of an epoch: for each optimizer step, ``accumulation`` micro-batches.

    Every Comparison comes once. A global batch holds micro_batch · accumulation · world_size of them, the last one what
    is left, dealt out evenly; a micro-batch that gets none repeats another's Comparison with weight 0, so that every
    rank takes part in every step. The weights make the gradient the mean over the global batch, however it was split:
    DeepSpeed averages over accumulation · world_size micro-batches, so one with n of the batch's N Comparisons weighs
    n · accumulation · world_size / N, which is 1 in a full batch.

    The order depends on seed and epoch alone, not on the number of ranks.
    """
    order = np.random.default_rng((seed, epoch)).permutation(size)
    parts = accumulation * world_size
    steps = []
    for first in range(0, size, micro_batch * parts):
        chosen = order[first : first + micro_batch * parts]
        shares = np.array_split(chosen, parts)
        steps.append(
            [
                MicroBatch(share if len(share) else chosen[:1], len(share) * parts / len(chosen))
                for share in shares[rank::world_size]
            ]
        )
    return steps


def plan_evaluation(
    lengths: np.ndarray, micro_batch: int, rank: int, world_size: int, limit: int = 0, seed: int = 0
) -> list[MicroBatch]:
    """One rank's share of an evaluation: every Comparison once over all ranks, the same number of batches on each.

    Longest first, so that rows of a batch are about equally long, and a batch that does not fit fails at once.

    Args:
        lengths: of each Comparison's longest text, in tokens.
        limit: batches per rank; 0: the whole set. With a limit, the same random Comparisons at every evaluation.
        seed: of that choice.
    """
    chosen = np.arange(len(lengths))
    if limit and limit * micro_batch * world_size < len(lengths):
        chosen = np.random.default_rng(seed).permutation(len(lengths))[: limit * micro_batch * world_size]
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    batches = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    mine = [MicroBatch(indices, 1.0) for indices in batches[rank::world_size]]
    while len(mine) < -(-len(batches) // world_size):
        mine.append(MicroBatch(batches[-1], 0.0))
    return mine


def collate(comparisons: Sequence[Comparison], pad: int, weight: float = 1.0) -> Batch:
    """Pad Comparisons to the longest of them, one row a response, the winners of all pairs first for K = 2.

    Args:
        pad: id that fills the rows; the attention mask, not this id, says where a text ends.
    """
    # all first responses, then all second ones, …: for pairs this is upstream's "b chosen, then b rejected"
    slots = [
        (position, i)
        for position in range(max(len(c.responses) for c in comparisons))
        for i, c in enumerate(comparisons)
        if position < len(c.responses)
    ]
    row_of = {(i, position): row for row, (position, i) in enumerate(slots)}
    texts = [comparisons[i].prompt + comparisons[i].responses[position] for position, i in slots]
    lengths = torch.tensor([len(text) for text in texts])
    input_ids = torch.full((len(texts), int(lengths.max())), pad, dtype=torch.int64)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = torch.tensor(text)
    judged = [
        (row_of[i, better], row_of[i, worse], margin, len(c.prompt) + _shared(c.responses[better], c.responses[worse]))
        for i, c in enumerate(comparisons)
        for better, worse, margin in zip(c.better, c.worse, c.margin)
    ]
    better, worse, margin, start = zip(*judged)
    return Batch(
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        ends=lengths - 1,
        response_lengths=torch.tensor([len(comparisons[i].responses[position]) for position, i in slots]),
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        margin=torch.tensor(margin, dtype=torch.float32),
        start=torch.tensor(start),
        weight=weight,
    )


def _shared(first: list[int], second: list[int]) -> int:
    """Tokens before two responses differ; each keeps one, where one begins with all of the other."""
    return min(common_prefix(first, second), len(first) - 1, len(second) - 1)


class PlannedBatches(Sequence):
    """The batches of a plan, each made when it is asked for."""

    def __init__(self, comparisons: Sequence[Comparison], plan: Sequence[MicroBatch], pad: int):
        self.comparisons, self.plan, self.pad = comparisons, plan, pad

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> Batch:
        return collate([self.comparisons[j] for j in self.plan[i].indices], self.pad, self.plan[i].weight)
