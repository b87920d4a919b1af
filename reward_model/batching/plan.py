# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which rows in which step, and what they weigh, as pure functions of sizes, seed and epoch.

The unit that is dealt out is a group of rows (:mod:`reward_model.batching.groups`).

Notation for shapes: m rows of a micro-batch, u groups.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.batching.groups import RowGroups
from reward_model.batching.layout import ONE_ROW

MEGA_BATCH = 50  # global batches that are sorted by length together; Transformers' group_by_length takes 50 too


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, and what they weigh.

    rows: The indices of the rows in the data set.
    weight: The weight of the micro-batch's mean loss in the step's loss, which is the sum over all ranks. A weight of 0
        marks a filler, which is there so that every rank takes part equally often.
    groups: One number for each row, equal where rows were brought together. None means that no rows were.
    row_weights: The weight of each row in the mean loss, in any unit. None means that all pairs weigh the same.
    """

    rows: np.ndarray  # (m,)
    weight: float
    groups: np.ndarray | None = None  # (m,)
    row_weights: np.ndarray | None = None  # (m,)


@dataclass(frozen=True)
class BatchSpec:
    """How groups become micro-batches.

    micro_batch: The size of a micro-batch, counted as the groups count their size (in pairs or in rows).
    accumulation: The number of micro-batches of a rank in a step.
    by_prompt: Whether ``micro_batch`` counts groups instead. Then all groups weigh the same, however many pairs they
        have (InstructGPT's choice for the responses to one prompt, against overfitting).
    layout: As ``kind`` in :class:`reward_model.batching.layout.Layout`: ``packed`` and ``unpadded`` make a
        micro-batch one row of token ids without pads, ``shared`` one padded row for each group, and ``separate`` one
        padded row for each text.
    tokens: The largest number of tokens in a micro-batch, pads included. A step then has as many micro-batches as that
        takes. 0 means that there is no such limit.
    by_length: Whether a step holds groups of similar length, as far as that leaves the order random.
    """

    micro_batch: int
    accumulation: int = 1
    by_prompt: bool = False
    layout: str = "packed"
    tokens: int = 0
    by_length: bool = False

    def width(self, groups: RowGroups) -> np.ndarray:
        """Number of tokens of the longest row of token ids that each group becomes, or takes of one, shape (u,)."""
        return {"separate": groups.length, "unpadded": groups.apart}.get(self.layout, groups.tokens)

    @property
    def is_one_row(self) -> bool:
        """Whether a micro-batch is one row, without pads."""
        return self.layout in ONE_ROW

    def height(self, groups: RowGroups, group: int) -> int:
        """Number of rows of token ids that a group becomes."""
        return int(groups.texts[group]) if self.layout == "separate" else 1


class EpochPlan(Sequence[list[MicroBatch]]):
    """One rank's share of an epoch: the list of its micro-batches in each optimizer step, equally many on every rank.

    Every group comes once. A global batch holds micro_batch · accumulation · world_size pairs (or rows, or prompts),
    and the last one holds what is left. It is dealt out so that the ranks compute about the same number of tokens at a
    time. Weights are shares of the global batch, so that the gradient of the weighted sum is the gradient of the mean
    over the global batch, however it was split.

    What a step holds depends on seed and epoch, but neither on the number of ranks for the same global batch nor on the
    layout. A step's share is computed when it is asked for, so a run that resumes takes the plan from the step that it
    had reached.

    Example: four pairs, two ranks, and one pair at a time. Each pair is half of a step.

    >>> ones = np.ones(4, np.int64)
    >>> sizes = {"sizes": ones, "size": ones, "texts": 2 * ones}
    >>> sizes |= {"length": 9 * ones, "tokens": 12 * ones, "apart": 18 * ones}
    >>> groups = RowGroups(rows=np.arange(4), starts=np.arange(5), **sizes)
    >>> for rank in range(2):
    ...     plan = EpochPlan(groups, BatchSpec(micro_batch=1), rank, world_size=2, seed=0, epoch=0)
    ...     print([[(m.rows.tolist(), m.weight) for m in step] for step in plan])
    [[([2], 0.5)], [([1], 0.5)]]
    [[([0], 0.5)], [([3], 0.5)]]
    """

    def __init__(self, groups: RowGroups, spec: BatchSpec, rank: int, world_size: int, seed: int, epoch: int):
        self.groups, self.spec, self.rank, self.world_size = groups, spec, rank, world_size
        self.sizes = np.ones_like(groups.size) if spec.by_prompt else groups.size
        self.steps = self._draw(np.random.default_rng((seed, epoch)))

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Draw the groups of each step."""
        global_batch = self.spec.micro_batch * self.spec.accumulation * self.world_size
        order = rng.permutation(len(self.groups))
        if not self.spec.by_length:
            return _cut(order, self.sizes, global_batch)
        mega = (np.cumsum(self.sizes[order]) - 1) // (MEGA_BATCH * global_batch)
        steps = _cut(order[np.lexsort((-self.groups.length[order], mega))], self.sizes, global_batch)
        return [steps[i] for i in rng.permutation(len(steps) - 1)] + steps[-1:]  # the last one may be short

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[MicroBatch]:  # type: ignore[override]  # no slices
        chosen = self.steps[step]
        total = self.sizes[chosen].sum()
        return [
            _micro_batch(part, self.groups, self.sizes[part].sum() / total, self.spec.by_prompt)
            if len(part)
            else MicroBatch(self.groups.rows_of(chosen[np.argmin(self.groups.tokens[chosen])])[:1], 0.0)
            for part in self._parts(step)
        ]

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step on all ranks, in rising order."""
        return np.sort(np.concatenate([self.groups.rows_of(group) for group in self.steps[step]]))

    def _parts(self, step: int) -> list[np.ndarray]:
        """The groups in each of this rank's micro-batches in a step."""
        return _deal(self.steps[step], self.groups, self.spec, self.world_size)[self.rank :: self.world_size]

    def tokens(self, steps: int) -> int:
        """Number of tokens, pads included, that this rank computes in the first ``steps`` steps without merging."""
        width = self.spec.width(self.groups)
        total = 0
        for part in (part for step in range(min(steps, len(self))) for part in self._parts(step) if len(part)):
            rows = sum(self.spec.height(self.groups, group) for group in part)
            total += int(width[part].sum() if self.spec.is_one_row else width[part].max() * rows)
        return total


def _cut(order: np.ndarray, sizes: np.ndarray, global_batch: int) -> list[np.ndarray]:
    """Cut the order into global batches. A group that lies on a border goes where its greater half is."""
    if not len(order):
        return []
    middle = np.cumsum(sizes[order]) - (sizes[order] + 1) / 2
    return np.split(order, np.flatnonzero(np.diff(middle // global_batch)) + 1)


def _micro_batch(part: np.ndarray, groups: RowGroups, weight: float, by_prompt: bool) -> MicroBatch:
    """Make a micro-batch of groups."""
    rows = [groups.rows_of(group) for group in part]
    sizes = [len(r) for r in rows]
    together = np.repeat(part, sizes) if max(sizes) > 1 else None
    shares = [groups.sizes_of(group) / (groups.size[group] if by_prompt else 1) for group in part]
    return MicroBatch(np.concatenate(rows), float(weight), together, np.concatenate(shares))


def _deal(chosen: np.ndarray, groups: RowGroups, spec: BatchSpec, world_size: int) -> list[np.ndarray]:
    """Divide the groups of a step into a multiple of ``world_size`` parts, neighbors in the list about equally long."""
    width = spec.width(groups)
    chosen = chosen[np.argsort(-width[chosen], kind="stable")]
    is_packed = spec.is_one_row
    if not spec.tokens:
        number = spec.accumulation * world_size
        return _balance(chosen, width, number) if is_packed else _slice(chosen, groups.size, number)
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
    """Divide groups, longest first, into parts of about equal size."""
    middle = np.cumsum(sizes[chosen]) - sizes[chosen] / 2
    borders = np.searchsorted(middle, np.arange(1, parts) * sizes[chosen].sum() / parts)
    return np.split(chosen, borders)


def _level(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Give each group, longest first, to the part with the fewest tokens."""
    loads = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for group in chosen:
        load, part = heapq.heappop(loads)
        dealt[part].append(group)
        heapq.heappush(loads, (load + int(width[group]), part))
    return [np.array(dealt[part], dtype=np.int64) for _, part in sorted(loads, reverse=True)]


def _balance(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Give each group, longest first, to the part with the fewest tokens, where parts differ by one group at most."""
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
    """Divide groups, longest first, into parts of at most ``tokens`` tokens, pads included, and at most ``most_size``.

    A limit of 0 does not apply.
    """
    width = spec.width(groups)
    parts: list[np.ndarray] = []
    first = total = rows = size = 0
    for i, group in enumerate(chosen):
        longest = width[chosen[first]]
        cost = total + width[group] if spec.is_one_row else longest * (rows + spec.height(groups, group))
        is_full = (tokens and cost > tokens) or (most_size and size + groups.size[group] > most_size)
        if i > first and is_full:
            parts.append(chosen[first:i])
            first, total, rows, size = i, 0, 0, 0
        total, rows, size = total + width[group], rows + spec.height(groups, group), size + groups.size[group]
    return [*parts, chosen[first:]]


def _fill_evenly(chosen: np.ndarray, groups: RowGroups, spec: BatchSpec, world_size: int) -> list[np.ndarray]:
    """Like :func:`_fill`, but into a multiple of ``world_size`` parts, the largest of them as small as that allows."""
    parts = _fill(chosen, groups, spec, spec.tokens)
    count = world_size * -(-len(parts) // world_size)
    low, high = 0, spec.tokens  # high is enough, low is not
    while count > 1 and high - low > 1:
        middle = (low + high) // 2
        tried = _fill(chosen, groups, spec, middle)
        low, high, parts = (low, middle, tried) if len(tried) <= count else (middle, high, parts)
    return parts + [chosen[:0]] * (count - len(parts))


def plan_evaluation(groups: RowGroups, spec: BatchSpec, rank: int, world_size: int) -> list[MicroBatch]:
    """One rank's share of an evaluation, in which every row comes once over all ranks.

    Every rank has the same number of micro-batches. The longest come first, so that the rows of a batch are about
    equally long, and a batch that does not fit into memory fails at once.
    """
    order = np.argsort(-spec.width(groups), kind="stable")
    parts = _fill(order, groups, spec, spec.tokens, most_size=spec.micro_batch)
    mine = [_micro_batch(part, groups, 1.0, by_prompt=False) for part in parts[rank::world_size]]
    while len(mine) < -(-len(parts) // world_size):
        mine.append(MicroBatch(groups.rows_of(parts[-1][0])[:1], 0.0))
    return mine
