# SPDX-License-Identifier: Apache-2.0
"""What stays together when rows are dealt out to steps and ranks: one row, or rows of one prompt.

A row of the data is a Comparison. A group is what stays together. Notation: r rows, g groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from reward_model.data.comparisons import Comparisons

CANDIDATES = 64  # texts looked at when a block grows: a prompt may have 100,000


@dataclass(frozen=True)
class RowGroups:
    """What is dealt out.

    rows: the rows of all groups, one group's after the other (r,); sizes: what the batch size counts in each of them, a
    row or its judged pairs (r,); starts: where each group begins in these, and the end (u + 1,).
    size: of each group; texts: how many; length: tokens of the longest text; tokens: of all, their prompt once. (u,)
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

    def rows_of(self, group: int) -> np.ndarray:
        return self.rows[self.starts[group] : self.starts[group + 1]]

    def sizes_of(self, group: int) -> np.ndarray:
        return self.sizes[self.starts[group] : self.starts[group + 1]]


def row_sizes(comparisons: Comparisons, by_row: bool) -> np.ndarray:
    """What the batch size counts in each row: the row, or its judged pairs, 1 if there are none. (r,)"""
    return np.ones(len(comparisons), np.int64) if by_row else np.maximum(comparisons.pairs, 1)


def single_rows(comparisons: Comparisons, by_row: bool = False) -> RowGroups:
    """Every row a group of its own. ``by_row`` as in :func:`row_sizes`."""
    size = len(comparisons)
    sizes = row_sizes(comparisons, by_row)
    return RowGroups(
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
) -> RowGroups:
    """Rows of one prompt brought together, so that each of its responses is encoded as few times as possible.

    Every row comes once. Greedy: a group of pairs grows by the response that completes the most rows with those it has;
    lists and single answers are taken as they come.

    Args:
        most_responses, most_size, most_tokens: limits of a group, which holds one row at least; no tokens: no limit.
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
    groups: list[list[int]] = []
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
        groups += _runs(others, answers, sizes, most_responses, most_size, most)
        groups += _blocks(pairs, answers, most_responses, most_size, most)
    return _measured(comparisons, groups, sizes)


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


def _measured(comparisons: Comparisons, groups: list[list[int]], sizes: np.ndarray) -> RowGroups:
    hashes, lengths, counts = comparisons.texts()
    first = np.cumsum(counts) - counts
    count, length, tokens = np.empty((3, len(groups)), np.int64)
    for i, group in enumerate(groups):
        texts = {int(hashes[t]): int(lengths[t]) for row in group for t in range(first[row], first[row] + counts[row])}
        merged = sum(texts.values()) - (len(texts) - 1) * comparisons.prompt_tokens[group].min()
        count[i], length[i] = len(texts), max(texts.values())
        tokens[i] = min(merged, comparisons.tokens[group].sum())
    counts = [len(group) for group in groups]
    rows = np.fromiter((row for group in groups for row in group), np.int64, sum(counts))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RowGroups(rows, sizes[rows], starts, np.add.reduceat(sizes[rows], starts[:-1]), count, length, tokens)


def rows_to_evaluate(size: int, most: int, seed: int) -> np.ndarray | None:
    """The same random rows at every evaluation, if it is to have at most so many; None: all of them."""
    return np.random.default_rng(seed).permutation(size)[:most] if most and most < size else None
