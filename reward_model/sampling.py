# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which rows in which step, and what they weigh: pure functions of sizes, seed and epoch.

A row of the data is a Comparison. A unit is what stays together: one row, or rows of one prompt that were brought
together. Notation: r rows, u units.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from reward_model.data import Comparisons

MEGA_BATCH = 50  # global batches that are sorted by length together; Transformers' group_by_length takes 50 too
CANDIDATES = 64  # texts looked at when a block grows: a prompt may have 100,000


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
class Units:
    """What is dealt out.

    rows: the rows of all units, one unit's after the other (r,); sizes: what the batch size counts in each of them, a
    row or its judged pairs (r,); starts: where each unit begins in these, and the end (u + 1,).
    size: of each unit; texts: how many; length: tokens of the longest text; tokens: of all, their prompt once. (u,)
    """

    rows: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    size: np.ndarray
    texts: np.ndarray
    length: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def rows_of(self, unit: int) -> np.ndarray:
        return self.rows[self.starts[unit] : self.starts[unit + 1]]

    def sizes_of(self, unit: int) -> np.ndarray:
        return self.sizes[self.starts[unit] : self.starts[unit + 1]]


@dataclass(frozen=True)
class Rule:
    """How units become micro-batches.

    micro_batch: of a micro-batch, in the units' sizes (pairs, or rows), or in units if ``by_prompt``; then a unit
        weighs as much as another, however many pairs it has (InstructGPT's choice for a prompt, against overfitting).
    accumulation: micro-batches of a rank in a step.
    layout: ``packed``: a micro-batch is one row without pads; ``shared``, ``separate``: a row for each unit, or each
        text, padded to the longest (:class:`reward_model.batching.Layout`).
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


def row_sizes(comparisons: Comparisons, by_row: bool) -> np.ndarray:
    """What the batch size counts in each row: the row, or its judged pairs, 1 if there are none. (r,)"""
    return np.ones(len(comparisons), np.int64) if by_row else np.maximum(comparisons.pairs, 1)


def single_rows(comparisons: Comparisons, by_row: bool = False) -> Units:
    """Every row a unit of its own. ``by_row`` as in :func:`row_sizes`."""
    size = len(comparisons)
    sizes = row_sizes(comparisons, by_row)
    return Units(
        rows=np.arange(size),
        sizes=sizes,
        starts=np.arange(size + 1),
        size=sizes,
        texts=comparisons.texts()[2],
        length=comparisons.lengths,
        tokens=comparisons.tokens,
    )


def rows_by_prompt(
    comparisons: Comparisons,
    most_responses: int,
    most_size: int,
    seed: int,
    chosen: np.ndarray | None = None,
    most_tokens: int = 0,
    by_row: bool = False,
) -> Units:
    """Rows of one prompt brought together, so that each of its responses is encoded as few times as possible.

    Every row comes once. Greedy: a unit of pairs grows by the response that completes the most rows with those it has;
    lists and single answers are taken as they come.

    Args:
        most_responses, most_size, most_tokens: limits of a unit, which holds one row at least; no tokens: no limit.
        by_row: as in :func:`row_sizes`.
        seed: of the order in which ties are broken.
        chosen: these rows only; None: all.
    """
    chosen = np.arange(len(comparisons)) if chosen is None else chosen
    hashes, lengths, counts = comparisons.texts()
    first = np.cumsum(counts) - counts
    prompts = comparisons.prompt_hashes()
    sizes = row_sizes(comparisons, by_row)
    order = np.random.default_rng(seed).permutation(chosen)
    order = order[np.argsort(prompts[order], kind="stable")]
    units: list[list[int]] = []
    for rows in np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1) if len(order) else ():
        texts = {int(row): hashes[first[row] : first[row] + counts[row]].tolist() for row in rows}
        prompt = int(comparisons.prompt_tokens[rows].min())
        answers = {
            int(hashes[t]): int(lengths[t]) - prompt
            for row in rows
            for t in range(first[row], first[row] + counts[row])
        }
        most = most_tokens - prompt if most_tokens else sum(answers.values())
        pairs = {row: (found[0], found[1]) for row, found in texts.items() if len(found) == 2 and sizes[row] == 1}
        others = {row: found for row, found in texts.items() if row not in pairs}
        units += _runs(others, answers, sizes, most_responses, most_size, most)
        units += _blocks(pairs, answers, most_responses, most_size, most)
    return _measured(comparisons, units, sizes)


def _runs(
    rows: dict[int, list[int]],
    tokens: dict[int, int],
    sizes: np.ndarray,
    most_texts: int,
    most_size: int,
    most_tokens: int,
) -> Iterator[list[int]]:
    """Rows (each some texts, which have so many tokens) in the order in which they come, as many as go together."""
    run: list[int] = []
    inside: set[int] = set()
    for row, texts in rows.items():
        grown = inside.union(texts)
        is_full = (
            len(grown) > most_texts
            or sizes[[*run, row]].sum() > most_size
            or sum(tokens[text] for text in grown) > most_tokens
        )
        if run and is_full:
            yield run
            run, grown = [], set(texts)
        run.append(row)
        inside = grown
    if run:
        yield run


def _blocks(
    pairs: dict[int, tuple[int, int]], tokens: dict[int, int], most_texts: int, most_pairs: int, most_tokens: int
) -> Iterator[list[int]]:
    """Rows (each a pair of texts, which have so many tokens) in blocks of few texts and many rows."""
    near: dict[int, dict[int, list[int]]] = {}  # text: {text that it was judged against: rows}
    for row, (a, b) in pairs.items():
        near.setdefault(a, {}).setdefault(b, []).append(row)
        if a != b:
            near.setdefault(b, {})[a] = near[a][b]
    starts = list(near)
    while starts:
        block: list[int] = []
        inside: set[int] = set()
        gain: dict[int, int] = {}  # text outside: rows that it would complete
        total = 0
        while len(block) < most_pairs:
            room = most_texts - len(inside)
            while starts and not near[starts[-1]]:
                starts.pop()
            if gain and room >= 1:
                text = max(islice(gain, CANDIDATES), key=gain.get)
            elif starts and not gain and room >= 2:
                text = starts[-1]
            else:
                break
            total += tokens[text]
            if block and total > most_tokens:
                break
            gain.pop(text, None)
            inside.add(text)
            for other in [other for other in inside if other in near[text]]:
                rows = near[text][other]
                while rows and len(block) < most_pairs:
                    block.append(rows.pop())
                if not rows:
                    del near[text][other]
                    near[other].pop(text, None)
            for other in islice(near[text], CANDIDATES):
                if other not in inside:
                    gain[other] = gain.get(other, 0) + len(near[text][other])
        if block:
            yield block


def _measured(comparisons: Comparisons, units: list[list[int]], sizes: np.ndarray) -> Units:
    hashes, lengths, counts = comparisons.texts()
    first = np.cumsum(counts) - counts
    count, length, tokens = np.empty((3, len(units)), np.int64)
    for i, unit in enumerate(units):
        texts = {int(hashes[t]): int(lengths[t]) for row in unit for t in range(first[row], first[row] + counts[row])}
        merged = sum(texts.values()) - (len(texts) - 1) * comparisons.prompt_tokens[unit].min()
        count[i], length[i] = len(texts), max(texts.values())
        tokens[i] = min(merged, comparisons.tokens[unit].sum())
    counts = [len(unit) for unit in units]
    rows = np.fromiter((row for unit in units for row in unit), np.int64, sum(counts))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Units(rows, sizes[rows], starts, np.add.reduceat(sizes[rows], starts[:-1]), count, length, tokens)


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


def rows_to_evaluate(size: int, most: int, seed: int) -> np.ndarray | None:
    """The same random rows at every evaluation, if it is to have at most so many; None: all of them."""
    return np.random.default_rng(seed).permutation(size)[:most] if most and most < size else None
