# SPDX-License-Identifier: Apache-2.0
"""Merging of Comparisons that share a prompt, so that a response that was judged several times is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reward_model.batching.layout import Layout
from reward_model.data.comparisons import Comparison, common_prefix


@dataclass(frozen=True)
class MergedComparison:
    """A prompt with the responses of one or several Comparisons.

    texts: The prompt and the responses, without what was judged of them.
    rows: For each of the Comparisons, its position in the list that was merged and, for each of its responses, the
        index in ``texts.responses``.
    """

    texts: Comparison
    rows: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class PlacedRow:
    """A row of the data, and where its responses are in a batch.

    comparison: The row itself.
    index: Its position in the list that was merged.
    weight: The row's share of the batch's mean loss. The weights of all rows of a batch sum to 1.
    responses: The number of each of the row's responses among the n responses of the batch.
    """

    comparison: Comparison
    index: int
    weight: float
    responses: list[int]


def merge(
    comparisons: Sequence[Comparison], layout: Layout, groups: Sequence[int] | np.ndarray | None = None
) -> list[MergedComparison]:
    """Join Comparisons that share a prompt, so that each distinct response appears once.

    Comparisons of one group are joined first, and then any that have the same prompt hash; texts of two segments are
    not joined with texts of one. They are joined as long as the result has at most ``most_responses`` responses and no
    more tokens than its parts (prompts that were cut in two places share nothing), and, where rows are padded, does not
    become the longest row.

    Args:
        groups: One number for each Comparison, equal where the plan brought rows together. None means that it brought
            none together.

    Example: the response ``[4]`` lost one comparison and won the other. ``merge`` keeps one copy of it.

    >>> rows = [
    ...     Comparison([1, 2], [[3], [4]], better=[0], worse=[1], prompt_hash=7),
    ...     Comparison([1, 2], [[4], [5, 6]], better=[0], worse=[1], prompt_hash=7),
    ... ]
    >>> (merged,) = merge(rows, Layout("packed", pad=0))
    >>> merged.texts.prompt, merged.texts.responses
    ([1, 2], [[3], [4], [5, 6]])
    >>> merged.rows  # the second row's responses are now those with index 1 and 2
    [(0, [0, 1]), (1, [1, 2])]
    """
    parts = [
        MergedComparison(
            Comparison(c.prompt, c.responses, prompt_hash=c.prompt_hash, two_segments=c.two_segments),
            [(i, list(range(len(c.responses))))],
        )
        for i, c in enumerate(comparisons)
    ]
    if groups is not None:
        keys = [(group, c.prompt_hash, c.two_segments) for group, c in zip(groups, comparisons)]
        parts = _join_equals(parts, keys, layout.most_responses)
    prompts = ((part.texts.prompt_hash, part.texts.two_segments) for part in parts)
    hashes = [None if prompt[0] is None else prompt for prompt in prompts]
    widest = max(part.texts.tokens for part in parts) if layout.kind == "shared" else None
    return _join_equals(parts, hashes, layout.most_responses, widest)


def _join_equals(
    parts: list[MergedComparison], keys: Sequence, most_responses: int, widest: int | None = None
) -> list[MergedComparison]:
    """Join parts that have the same key, one after the other, as long as the limits allow.

    Args:
        keys: One for each part. A part whose key is None is not joined.
        widest: The largest number of tokens that a joined part may have. None means that there is no limit.
    """
    joined: list[MergedComparison] = []
    newest: dict[object, int] = {}  # index in ``joined`` of the latest part of each key
    for part, key in zip(parts, keys):
        at = newest.get(key)
        one = None if at is None else _join(joined[at], part)
        if (
            at is not None
            and one is not None
            and (
                len(one.texts.responses) <= most_responses
                and one.texts.tokens <= joined[at].texts.tokens + part.texts.tokens
                and (widest is None or one.texts.tokens <= widest)
            )
        ):
            joined[at] = one
        else:
            if key is not None:
                newest[key] = len(joined)
            joined.append(part)
    return joined


def _join(one: MergedComparison, other: MergedComparison) -> MergedComparison:
    """Join two parts under the prompt that they have in common, with one copy of each distinct text."""
    texts: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, list[int]]] = []
    for part in (one, other):
        c = part.texts
        places = [texts.setdefault((*c.prompt, *r), len(texts)) for r in c.responses]
        rows += [(i, [places[k] for k in mine]) for i, mine in part.rows]
    shared = common_prefix(one.texts.prompt, other.texts.prompt)
    responses = [list(text[shared:]) for text in texts]
    common = replace(one.texts, prompt=one.texts.prompt[:shared], responses=responses)
    return MergedComparison(common, rows)


def place(
    comparisons: Sequence[Comparison], merged: Sequence[MergedComparison], weights: Sequence[float]
) -> list[PlacedRow]:
    """Number the responses of merged comparisons one after the other, and find each row's own among them.

    Args:
        comparisons: The rows that were merged.
        weights: The weight of each of these rows in the batch's mean loss.

    Returns:
        The rows in the order in which merging arranged them.
    """
    placed, first = [], 0
    for part in merged:
        placed += [PlacedRow(comparisons[i], i, weights[i], [first + at for at in places]) for i, places in part.rows]
        first += len(part.texts.responses)
    return placed
