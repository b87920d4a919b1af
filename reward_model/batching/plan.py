# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which rows in which step, and what they weigh: pure functions of sizes, seed and epoch.

What is dealt out are groups, see :mod:`reward_model.batching.groups`. Notation: r rows, g groups.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.batching.groups import (
    RowGroups,
)

MEGA_BATCH = 50  # global batches that are sorted by length together; Transformers' group_by_length takes 50 too


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, and what they weigh.

    rows: indices of Comparisons.
    weight: of its mean loss in the step's, which is the sum over all ranks; 0: a filler, there so that every rank takes
        part as often.
    groups: a number for each row, equal where rows were brought together; None: none were.
    row_weights: of each row in that mean, in any unit; None: all pairs weigh the same.
    """

    rows: np.ndarray
    weight: float
    groups: np.ndarray | None = None
    row_weights: np.ndarray | None = None


@dataclass(frozen=True)
class BatchSpec:
    """How groups become micro-batches.

    micro_batch: of a micro-batch, in the groups' sizes (pairs, or rows), or in groups if ``by_prompt``; then a group
        weighs as much as another, however many pairs it has (InstructGPT's choice for a prompt, against overfitting).
    accumulation: micro-batches of a rank in a step.
    layout: ``packed``: a micro-batch is one row without pads; ``shared``, ``separate``: a row for each group, or each
        text, padded to the longest (:class:`reward_model.batching.layout.Layout`).
    tokens: at most so many, pads included, in a micro-batch, of which a step then has as many as that takes; 0: no
        such limit.
    by_length: groups of similar length in a step, as far as that leaves the order random.
    """

    micro_batch: int
    accumulation: int = 1
    by_prompt: bool = False
    layout: str = "packed"
    tokens: int = 0
    by_length: bool = False

    def width(self, groups: RowGroups) -> np.ndarray:
        """Tokens of the longest row that each group becomes."""
        return groups.length if self.layout == "separate" else groups.tokens

    def height(self, groups: RowGroups, group: int) -> int:
        """Rows that a group becomes."""
        return int(groups.texts[group]) if self.layout == "separate" else 1


class EpochPlan(Sequence):
    """One rank's share of an epoch: for each optimizer step, its micro-batches; equally many on every rank.

    Every group comes once. A global batch holds micro_batch · accumulation · world_size pairs (rows, prompts), the last
    one what is left, and is dealt out so that the ranks have about as many tokens to compute at a time. Weights are
    shares of the global batch, so that the gradient of the weighted sum is the mean over it, however it was split.

    What is in a step depends on seed and epoch, not on how many ranks share it, nor on the layout. A step's share is
    worked out when it is asked for: a run that resumes takes the plan from the step it had reached.
    """

    def __init__(self, groups: RowGroups, spec: BatchSpec, rank: int, world_size: int, seed: int, epoch: int):
        self.groups, self.spec, self.rank, self.world_size = groups, spec, rank, world_size
        self.sizes = np.ones_like(groups.size) if spec.by_prompt else groups.size
        self.steps = self._draw(np.random.default_rng((seed, epoch)))

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The groups of each step."""
        global_batch = self.spec.micro_batch * self.spec.accumulation * self.world_size
        order = rng.permutation(len(self.groups))
        if not self.spec.by_length:
            return _cut(order, self.sizes, global_batch)
        mega = (np.cumsum(self.sizes[order]) - 1) // (MEGA_BATCH * global_batch)
        steps = _cut(order[np.lexsort((-self.groups.length[order], mega))], self.sizes, global_batch)
        return [steps[i] for i in rng.permutation(len(steps) - 1)] + steps[-1:]  # the last one may be short

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        chosen = self.steps[step]
        total = self.sizes[chosen].sum()
        return [
            _micro_batch(part, self.groups, self.sizes[part].sum() / total, self.spec.by_prompt)
            if len(part)
            else MicroBatch(self.groups.rows_of(chosen[np.argmin(self.groups.tokens[chosen])])[:1], 0.0)
            for part in self._parts(step)
        ]

    def _parts(self, step: int) -> list[np.ndarray]:
        """This rank's groups in each micro-batch."""
        return _deal(self.steps[step], self.groups, self.spec, self.world_size)[self.rank :: self.world_size]

    def tokens(self, steps: int) -> int:
        """Tokens that this rank computes in the first so many steps, pads included (merging left out)."""
        width = self.spec.width(self.groups)
        total = 0
        for part in (part for step in range(min(steps, len(self))) for part in self._parts(step) if len(part)):
            rows = sum(self.spec.height(self.groups, group) for group in part)
            total += int(width[part].sum() if self.spec.layout == "packed" else width[part].max() * rows)
        return total


def _cut(order: np.ndarray, sizes: np.ndarray, global_batch: int) -> list[np.ndarray]:
    """Groups into global batches; one that lies on a border goes where its greater half is."""
    if not len(order):
        return []
    middle = np.cumsum(sizes[order]) - (sizes[order] + 1) / 2
    return np.split(order, np.flatnonzero(np.diff(middle // global_batch)) + 1)


def _micro_batch(part: Sequence[int], groups: RowGroups, weight: float, by_prompt: bool) -> MicroBatch:
    rows = [groups.rows_of(group) for group in part]
    sizes = [len(r) for r in rows]
    together = np.repeat(part, sizes) if max(sizes) > 1 else None
    shares = [groups.sizes_of(group) / (groups.size[group] if by_prompt else 1) for group in part]
    return MicroBatch(np.concatenate(rows), float(weight), together, np.concatenate(shares))


def _deal(chosen: np.ndarray, groups: RowGroups, spec: BatchSpec, world_size: int) -> list[np.ndarray]:
    """The groups of a step in a multiple of ``world_size`` parts, neighbours in the list about equally long."""
    width = spec.width(groups)
    chosen = chosen[np.argsort(-width[chosen], kind="stable")]
    is_packed = spec.layout == "packed"
    if not spec.tokens:
        parts = spec.accumulation * world_size
        return _balance(chosen, width, parts) if is_packed else _slice(chosen, groups.size, parts)
    if not is_packed:
        return _fill_evenly(chosen, groups, spec, world_size)
    most = world_size * -(-len(chosen) // world_size)  # more would be empty
    count = min(most, world_size * max(1, -(-int(width[chosen].sum()) // (spec.tokens * world_size))))
    while True:
        parts = _level(chosen, width, count)
        if count == most or all(len(part) < 2 or width[part].sum() <= spec.tokens for part in parts):
            return parts
        count += world_size


def _slice(chosen: np.ndarray, sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Groups, longest first, into parts of about one size."""
    middle = np.cumsum(sizes[chosen]) - sizes[chosen] / 2
    borders = np.searchsorted(middle, np.arange(1, parts) * sizes[chosen].sum() / parts)
    return np.split(chosen, borders)


def _level(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Groups, longest first, to the part with the fewest tokens."""
    loads = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for group in chosen:
        load, part = heapq.heappop(loads)
        dealt[part].append(group)
        heapq.heappush(loads, (load + int(width[group]), part))
    return [np.array(dealt[part], dtype=np.int64) for _, part in sorted(loads, reverse=True)]


def _balance(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Groups, longest first, to the part with the fewest tokens; the numbers of groups differ by one at most."""
    if parts == 1:
        return [chosen]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = np.zeros(parts, np.int64)
    for first in range(0, len(chosen), parts):
        groups = chosen[first : first + parts]
        for part, group in zip(np.argsort(loads, kind="stable"), groups):
            dealt[part].append(group)
            loads[part] += width[group]
    return [np.array(dealt[part], dtype=np.int64) for part in np.argsort(-loads, kind="stable")]


def _fill(chosen: np.ndarray, groups: RowGroups, spec: BatchSpec, tokens: int, most_size: int = 0) -> list[np.ndarray]:
    """Groups, longest first, into parts of at most so many tokens, pads included, and such a size; 0: no limit."""
    width = spec.width(groups)
    parts: list[np.ndarray] = []
    first = total = rows = size = 0
    for i, group in enumerate(chosen):
        longest = width[chosen[first]]
        cost = total + width[group] if spec.layout == "packed" else longest * (rows + spec.height(groups, group))
        is_full = (tokens and cost > tokens) or (most_size and size + groups.size[group] > most_size)
        if i > first and is_full:
            parts.append(chosen[first:i])
            first, total, rows, size = i, 0, 0, 0
        total, rows, size = total + width[group], rows + spec.height(groups, group), size + groups.size[group]
    return [*parts, chosen[first:]]


def _fill_evenly(chosen: np.ndarray, groups: RowGroups, spec: BatchSpec, world_size: int) -> list[np.ndarray]:
    """As :func:`_fill`, in a multiple of ``world_size`` parts, the largest of them as small as that allows."""
    parts = _fill(chosen, groups, spec, spec.tokens)
    count = world_size * -(-len(parts) // world_size)
    low, high = 0, spec.tokens  # high is enough, low is not
    while count > 1 and high - low > 1:
        middle = (low + high) // 2
        tried = _fill(chosen, groups, spec, middle)
        low, high, parts = (low, middle, tried) if len(tried) <= count else (middle, high, parts)
    return parts + [chosen[:0]] * (count - len(parts))


def plan_evaluation(groups: RowGroups, spec: BatchSpec, rank: int, world_size: int) -> list[MicroBatch]:
    """One rank's share of an evaluation: every row once over all ranks, the same number of batches on each.

    Longest first, so that rows of a batch are about equally long, and a batch that does not fit fails at once.
    """
    order = np.argsort(-spec.width(groups), kind="stable")
    parts = _fill(order, groups, spec, spec.tokens, most_size=spec.micro_batch)
    mine = [_micro_batch(part, groups, 1.0, by_prompt=False) for part in parts[rank::world_size]]
    while len(mine) < -(-len(parts) // world_size):
        mine.append(MicroBatch(groups.rows_of(parts[-1][0])[:1], 0.0))
    return mine
