# SPDX-License-Identifier: Apache-2.0
"""Groups of rows, which stay together when rows are dealt out to steps and ranks.

A row of the data is a Comparison. A group is one row, or rows that have the same prompt.

Notation for shapes: r rows, u groups.
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
    """The rows of each group, and the sizes by which a plan deals the groups out. All arrays are int64."""

    rows: np.ndarray  # (r,) the rows of all groups, one group's after the other
    sizes: np.ndarray  # (r,) what the batch size counts in each of these rows: the row, or its judged pairs
    starts: np.ndarray  # (u + 1,) where each group begins in ``rows``, and where the last one ends
    size: np.ndarray  # (u,) the sum of each group's ``sizes``
    texts: np.ndarray  # (u,) number of distinct texts in each group
    length: np.ndarray  # (u,) tokens of each group's longest text
    tokens: np.ndarray  # (u,) tokens of all of its texts, the shared prompt counted once
    apart: np.ndarray  # (u,) tokens of all of its texts, each with its prompt

    def __len__(self) -> int:
        return len(self.size)

    def rows_of(self, group: int) -> np.ndarray:
        """The rows of a group."""
        return self.rows[self.starts[group] : self.starts[group + 1]]

    def sizes_of(self, group: int) -> np.ndarray:
        """What the batch size counts in each row of a group."""
        return self.sizes[self.starts[group] : self.starts[group + 1]]


def row_sizes(comparisons: Comparisons, by_row: bool) -> np.ndarray:
    """What the batch size counts in each row, shape (r,): the row, or its judged pairs, but 1 if it has none."""
    return np.ones(len(comparisons), np.int64) if by_row else np.maximum(comparisons.pairs, 1)


def single_rows(comparisons: Comparisons, by_row: bool = False) -> RowGroups:
    """Make every row a group of its own. ``by_row`` is that of :func:`row_sizes`."""
    size = len(comparisons)
    sizes = row_sizes(comparisons, by_row)
    _, lengths, texts = comparisons.texts()
    return RowGroups(
        rows=np.arange(size),
        sizes=sizes,
        starts=np.arange(size + 1),
        size=sizes,
        texts=texts,
        length=comparisons.lengths,
        tokens=comparisons.tokens,
        apart=np.add.reduceat(lengths, np.cumsum(texts) - texts) if size else np.zeros(0, np.int64),
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
    """Bring rows of one prompt together, so that each of its responses is encoded as few times as possible.

    Every row comes once. The method is greedy: a group of pairs grows by the response that completes the most rows with
    the responses that it has. Lists and single responses are taken in the order in which they come.

    Args:
        most_responses: The largest number of responses in a group. Every limit gives way to a group of one row.
        most_size: The largest size of a group, as the batch size counts it.
        seed: Decides the order in which ties are broken.
        chosen: The rows to group. None means all of them.
        most_tokens: The largest number of tokens in a group. 0 means that there is no such limit.
        by_row: As in :func:`row_sizes`.
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
        responses = {
            int(hashes[t]): int(lengths[t]) - prompt
            for row in rows
            for t in range(first[row], first[row] + counts[row])
        }
        most = most_tokens - prompt if most_tokens else sum(responses.values())
        pairs = {row: (found[0], found[1]) for row, found in texts.items() if len(found) == 2 and sizes[row] == 1}
        others = {row: found for row, found in texts.items() if row not in pairs}
        groups += _runs(others, responses, sizes, most_responses, most_size, most)
        groups += _blocks(pairs, responses, most_responses, most_size, most)
    return _measured(comparisons, groups, sizes)


def _runs(
    rows: dict[int, list[int]],
    tokens: dict[int, int],
    sizes: np.ndarray,
    most_texts: int,
    most_size: int,
    most_tokens: int,
) -> Iterator[list[int]]:
    """Group rows in the order in which they come, as many as the limits allow.

    Args:
        rows: The texts of each row.
        tokens: The number of tokens of each text.
    """
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
    """Group pairs into blocks of few texts and many rows.

    Args:
        pairs: The two texts of each row.
        tokens: The number of tokens of each text.
    """
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
                text = max(islice(gain, CANDIDATES), key=gain.__getitem__)
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
    """Measure groups of rows. ``sizes`` are those of all rows."""
    hashes, lengths, counts = comparisons.texts()
    first = np.cumsum(counts) - counts
    count, length, tokens, apart = np.empty((4, len(groups)), np.int64)
    for i, group in enumerate(groups):
        texts = {int(hashes[t]): int(lengths[t]) for row in group for t in range(first[row], first[row] + counts[row])}
        count[i], length[i], apart[i] = len(texts), max(texts.values()), sum(texts.values())
        merged = apart[i] - (len(texts) - 1) * comparisons.prompt_tokens[group].min()
        tokens[i] = min(merged, comparisons.tokens[group].sum())
    held = [len(group) for group in groups]
    rows = np.fromiter((row for group in groups for row in group), np.int64, sum(held))
    starts = np.concatenate([[0], np.cumsum(held)]).astype(np.int64)
    size = np.add.reduceat(sizes[rows], starts[:-1])
    return RowGroups(rows, sizes[rows], starts, size, count, length, tokens, apart)


def rows_to_evaluate(size: int, most: int, seed: int) -> np.ndarray | None:
    """The same ``most`` random rows at every evaluation. None stands for all rows: ``most`` is 0, or not exceeded."""
    return np.random.default_rng(seed).permutation(size)[:most] if most and most < size else None
