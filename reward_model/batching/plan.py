# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which rows in which step, and what they weigh: pure functions of sizes, seed and epoch.

What is dealt out are units, see :mod:`reward_model.batching.groups`. Notation: r rows, u units.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.batching.groups import (
    Units,
)

MEGA_BATCH = 50  # global batches that are sorted by length together; Transformers' group_by_length takes 50 too


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, and what they weigh.

    rows: indices of Comparisons.
    weight: of its mean loss in the step's, which is the sum over all ranks; 0: a filler, there so that every rank takes
        part as often.
    units: a number for each row, equal where rows were brought together; None: none were.
    row_weights: of each row in that mean, in any unit; None: all pairs weigh the same.
    """

    rows: np.ndarray
    weight: float
    units: np.ndarray | None = None
    row_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Rule:
    """How units become micro-batches.

    micro_batch: of a micro-batch, in the units' sizes (pairs, or rows), or in units if ``by_prompt``; then a unit
        weighs as much as another, however many pairs it has (InstructGPT's choice for a prompt, against overfitting).
    accumulation: micro-batches of a rank in a step.
    layout: ``packed``: a micro-batch is one row without pads; ``shared``, ``separate``: a row for each unit, or each
        text, padded to the longest (:class:`reward_model.batching.collate.Layout`).
    tokens: at most so many, pads included, in a micro-batch, of which a step then has as many as that takes; 0: no
        such limit.
    by_length: units of similar length in a step, as far as that leaves the order random.
    """

    micro_batch: int
    accumulation: int = 1
    by_prompt: bool = False
    layout: str = "packed"
    tokens: int = 0
    by_length: bool = False

    def width(self, units: Units) -> np.ndarray:
        """Tokens of the longest row that each unit becomes."""
        return units.length if self.layout == "separate" else units.tokens

    def height(self, units: Units, unit: int) -> int:
        """Rows that a unit becomes."""
        return int(units.texts[unit]) if self.layout == "separate" else 1


class EpochPlan(Sequence):
    """One rank's share of an epoch: for each optimizer step, its micro-batches; equally many on every rank.

    Every unit comes once. A global batch holds micro_batch · accumulation · world_size pairs (rows, prompts), the last
    one what is left, and is dealt out so that the ranks have about as many tokens to compute at a time. Weights are
    shares of the global batch, so that the gradient of the weighted sum is the mean over it, however it was split.

    What is in a step depends on seed and epoch, not on how many ranks share it, nor on the layout. A step's share is
    worked out when it is asked for: a run that resumes takes the plan from the step it had reached.
    """

    def __init__(self, units: Units, rule: Rule, rank: int, world_size: int, seed: int, epoch: int):
        self.units, self.rule, self.rank, self.world_size = units, rule, rank, world_size
        self.sizes = np.ones_like(units.size) if rule.by_prompt else units.size
        self.steps = self._draw(np.random.default_rng((seed, epoch)))

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The units of each step."""
        global_batch = self.rule.micro_batch * self.rule.accumulation * self.world_size
        order = rng.permutation(len(self.units))
        if not self.rule.by_length:
            return _cut(order, self.sizes, global_batch)
        mega = (np.cumsum(self.sizes[order]) - 1) // (MEGA_BATCH * global_batch)
        steps = _cut(order[np.lexsort((-self.units.length[order], mega))], self.sizes, global_batch)
        return [steps[i] for i in rng.permutation(len(steps) - 1)] + steps[-1:]  # the last one may be short

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        chosen = self.steps[step]
        total = self.sizes[chosen].sum()
        return [
            _micro_batch(part, self.units, self.sizes[part].sum() / total, self.rule.by_prompt)
            if len(part)
            else MicroBatch(self.units.rows_of(chosen[np.argmin(self.units.tokens[chosen])])[:1], 0.0)
            for part in self._parts(step)
        ]

    def _parts(self, step: int) -> list[np.ndarray]:
        """This rank's units in each micro-batch."""
        return _deal(self.steps[step], self.units, self.rule, self.world_size)[self.rank :: self.world_size]

    def tokens(self, steps: int) -> int:
        """Tokens that this rank computes in the first so many steps, pads included (merging left out)."""
        width = self.rule.width(self.units)
        total = 0
        for part in (part for step in range(min(steps, len(self))) for part in self._parts(step) if len(part)):
            rows = sum(self.rule.height(self.units, unit) for unit in part)
            total += int(width[part].sum() if self.rule.layout == "packed" else width[part].max() * rows)
        return total


def _cut(order: np.ndarray, sizes: np.ndarray, global_batch: int) -> list[np.ndarray]:
    """Units into global batches; one that lies on a border goes where its greater half is."""
    if not len(order):
        return []
    middle = np.cumsum(sizes[order]) - (sizes[order] + 1) / 2
    return np.split(order, np.flatnonzero(np.diff(middle // global_batch)) + 1)


def _micro_batch(part: Sequence[int], units: Units, weight: float, by_prompt: bool) -> MicroBatch:
    rows = [units.rows_of(unit) for unit in part]
    sizes = [len(r) for r in rows]
    together = np.repeat(part, sizes) if max(sizes) > 1 else None
    shares = [units.sizes_of(unit) / (units.size[unit] if by_prompt else 1) for unit in part]
    return MicroBatch(np.concatenate(rows), float(weight), together, np.concatenate(shares))


def _deal(chosen: np.ndarray, units: Units, rule: Rule, world_size: int) -> list[np.ndarray]:
    """The units of a step in a multiple of ``world_size`` parts, neighbours in the list about equally long."""
    width = rule.width(units)
    chosen = chosen[np.argsort(-width[chosen], kind="stable")]
    is_packed = rule.layout == "packed"
    if not rule.tokens:
        parts = rule.accumulation * world_size
        return _balance(chosen, width, parts) if is_packed else _slice(chosen, units.size, parts)
    if not is_packed:
        return _fill_evenly(chosen, units, rule, world_size)
    most = world_size * -(-len(chosen) // world_size)  # more would be empty
    count = min(most, world_size * max(1, -(-int(width[chosen].sum()) // (rule.tokens * world_size))))
    while True:
        parts = _level(chosen, width, count)
        if count == most or all(len(part) < 2 or width[part].sum() <= rule.tokens for part in parts):
            return parts
        count += world_size


def _slice(chosen: np.ndarray, sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Units, longest first, into parts of about one size."""
    middle = np.cumsum(sizes[chosen]) - sizes[chosen] / 2
    borders = np.searchsorted(middle, np.arange(1, parts) * sizes[chosen].sum() / parts)
    return np.split(chosen, borders)


def _level(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Units, longest first, to the part with the fewest tokens."""
    loads = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for unit in chosen:
        load, part = heapq.heappop(loads)
        dealt[part].append(unit)
        heapq.heappush(loads, (load + int(width[unit]), part))
    return [np.array(dealt[part], dtype=np.int64) for _, part in sorted(loads, reverse=True)]


def _balance(chosen: np.ndarray, width: np.ndarray, parts: int) -> list[np.ndarray]:
    """Units, longest first, to the part with the fewest tokens; the numbers of units differ by one at most."""
    if parts == 1:
        return [chosen]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = np.zeros(parts, np.int64)
    for first in range(0, len(chosen), parts):
        units = chosen[first : first + parts]
        for part, unit in zip(np.argsort(loads, kind="stable"), units):
            dealt[part].append(unit)
            loads[part] += width[unit]
    return [np.array(dealt[part], dtype=np.int64) for part in np.argsort(-loads, kind="stable")]


def _fill(chosen: np.ndarray, units: Units, rule: Rule, tokens: int, most_size: int = 0) -> list[np.ndarray]:
    """Units, longest first, into parts of at most so many tokens, pads included, and such a size; 0: no limit."""
    width = rule.width(units)
    parts: list[np.ndarray] = []
    first = total = rows = size = 0
    for i, unit in enumerate(chosen):
        longest = width[chosen[first]]
        cost = total + width[unit] if rule.layout == "packed" else longest * (rows + rule.height(units, unit))
        is_full = (tokens and cost > tokens) or (most_size and size + units.size[unit] > most_size)
        if i > first and is_full:
            parts.append(chosen[first:i])
            first, total, rows, size = i, 0, 0, 0
        total, rows, size = total + width[unit], rows + rule.height(units, unit), size + units.size[unit]
    return [*parts, chosen[first:]]


def _fill_evenly(chosen: np.ndarray, units: Units, rule: Rule, world_size: int) -> list[np.ndarray]:
    """As :func:`_fill`, in a multiple of ``world_size`` parts, the largest of them as small as that allows."""
    parts = _fill(chosen, units, rule, rule.tokens)
    count = world_size * -(-len(parts) // world_size)
    low, high = 0, rule.tokens  # high is enough, low is not
    while count > 1 and high - low > 1:
        middle = (low + high) // 2
        tried = _fill(chosen, units, rule, middle)
        low, high, parts = (low, middle, tried) if len(tried) <= count else (middle, high, parts)
    return parts + [chosen[:0]] * (count - len(parts))


def plan_evaluation(units: Units, rule: Rule, rank: int, world_size: int) -> list[MicroBatch]:
    """One rank's share of an evaluation: every row once over all ranks, the same number of batches on each.

    Longest first, so that rows of a batch are about equally long, and a batch that does not fit fails at once.
    """
    order = np.argsort(-rule.width(units), kind="stable")
    parts = _fill(order, units, rule, rule.tokens, most_size=rule.micro_batch)
    mine = [_micro_batch(part, units, 1.0, by_prompt=False) for part in parts[rank::world_size]]
    while len(mine) < -(-len(parts) // world_size):
        mine.append(MicroBatch(units.rows_of(parts[-1][0])[:1], 0.0))
    return mine
