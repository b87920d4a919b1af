# SPDX-License-Identifier: Apache-2.0
"""Comparisons → batches of token ids, in which responses share their prompt where the model allows.

Notation: b rows, s tokens, n responses, r tokens of the longest response, p judged pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from reward_model.data import Comparison, common_prefix
from reward_model.sampling import MicroBatch

WORKERS = 2  # processes that make batches ready while the GPU computes


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, where each response ends in them, and the pairs judged among the responses.

    input_ids, attention_mask, position_ids: (b, s) int64; positions go on from the prompt for each of its responses.
    comparison, response: (b, s) int32, which comparison a token is of (−1: a pad), and which of its responses (from 1;
        0: the prompt).
    sizes: int64; for each comparison K, then the tokens of the prompt and of its K responses.
    ends: (n,) each response's last token, as an index into the b·s tokens.
    tokens: (n, r) each response's own tokens (separate rows: the whole text's), indices like ``ends``, which fills
        what is beyond the end.
    token_lengths: (n,) how many of them there are.
    response_lengths: (n,) tokens after the prompt, end token included.
    better, worse: (p,) responses; better[i] beat worse[i].
    margin: (p,) float32; NaN where the data say nothing.
    start: (p,) first token in which the two responses of a pair differ.
    pair_weights: (p,) float32, of each pair in the batch's mean loss; they sum to 1.
    weight: of this batch's mean loss in the step's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    comparison: torch.Tensor
    response: torch.Tensor
    sizes: torch.Tensor
    ends: torch.Tensor
    tokens: torch.Tensor
    token_lengths: torch.Tensor
    response_lengths: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    margin: torch.Tensor
    start: torch.Tensor
    pair_weights: torch.Tensor
    weight: float = 1.0

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True)
class Layout:
    """How Comparisons become rows.

    kind: ``packed``: all in one row, without pads; ``shared``: each in a row of its own; ``separate``: each response
        in a row of its own, after a copy of the prompt.
    pad: id that fills the rows; the attention mask, not this id, says where a text ends.
    most_responses: of rows that are merged because they share a prompt.
    multiple: the rows' length is one of this.
    """

    kind: str
    pad: int
    most_responses: int = 16
    multiple: int = 1


def merge(
    comparisons: Sequence[Comparison], layout: Layout, units: Sequence[int] | None = None
) -> list[tuple[Comparison, list[int]]]:
    """Join Comparisons of one prompt, so that a response that was judged often is there once.

    Those of one unit are joined first, then any that have the same prompt hash: if they have no more than
    ``most_responses`` then, no more tokens than apart (a prompt that was cut in two places shares nothing), and, where
    rows are padded, make no row the longest.

    Args:
        units: equal numbers for what was brought together.

    Returns:
        Each joined Comparison with the positions in ``comparisons`` of its judged pairs.
    """
    parts = [(comparison, [i] * len(comparison.better)) for i, comparison in enumerate(comparisons)]
    if units is not None:
        keys = [(unit, c.prompt_hash) for unit, c in zip(units, comparisons)]
        parts = _join_equals(parts, keys, layout.most_responses)
    keys = [c.prompt_hash for c, _ in parts]
    widest = max(c.tokens for c, _ in parts) if layout.kind == "shared" else None
    return _join_equals(parts, keys, layout.most_responses, widest)


def _join_equals(parts, keys: Sequence, most_responses: int, widest: int | None = None):
    """Join parts of one key (None: no key) one after the other, as long as the limits allow."""
    joined: list[tuple[Comparison, list[int]]] = []
    newest: dict[object, int] = {}  # where a key's last one is
    for part, key in zip(parts, keys):
        at = newest.get(key)
        one = _join(joined[at][0], part[0]) if at is not None else None
        if one and (
            len(one.responses) <= most_responses
            and one.tokens <= joined[at][0].tokens + part[0].tokens
            and (widest is None or one.tokens <= widest)
        ):
            joined[at] = one, joined[at][1] + part[1]
        else:
            if key is not None:
                newest[key] = len(joined)
            joined.append(part)
    return joined


def _join(one: Comparison, other: Comparison) -> Comparison:
    texts: dict[tuple[int, ...], int] = {}
    places = [[texts.setdefault((*c.prompt, *r), len(texts)) for r in c.responses] for c in (one, other)]
    shared = common_prefix(one.prompt, other.prompt)
    return Comparison(
        prompt=one.prompt[:shared],
        responses=[list(text[shared:]) for text in texts],
        better=one.better + [places[1][i] for i in other.better],
        worse=one.worse + [places[1][i] for i in other.worse],
        margin=one.margin + other.margin,
        prompt_hash=one.prompt_hash,
    )


def collate(
    comparisons: Sequence[Comparison],
    layout: Layout,
    weight: float = 1.0,
    units: Sequence[int] | None = None,
    row_weights: Sequence[float] | None = None,
) -> Batch:
    """Merge Comparisons that share a prompt, and write them into rows.

    Args:
        weight: of the batch's mean loss in the step's.
        units: as in :func:`merge`.
        row_weights: of the pairs of each Comparison in that mean. None: all pairs weigh the same.
    """
    merged = merge(comparisons, layout, units)
    parts = [comparison for comparison, _ in merged]
    first = np.cumsum([0] + [len(c.responses) for c in parts])  # of each comparison, among all responses
    judged = [
        (first[i] + better, first[i] + worse, margin, shared_tokens(c, better, worse, layout.kind))
        for i, c in enumerate(parts)
        for better, worse, margin in zip(c.better, c.worse, c.margin)
    ]
    better, worse, margin, start = zip(*judged)
    origin = [i for _, origins in merged for i in origins]
    weights = torch.ones(len(origin)) if row_weights is None else torch.tensor([row_weights[i] for i in origin])
    lengths = torch.tensor([len(response) for c in parts for response in c.responses])
    if layout.kind == "separate":
        parts = [Comparison([], [c.prompt + response]) for c in parts for response in c.responses]
    return Batch(
        **_rows([parts] if layout.kind == "packed" else [[c] for c in parts], layout),
        response_lengths=lengths,
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        margin=torch.tensor(margin, dtype=torch.float32),
        start=torch.tensor(start),
        pair_weights=(weights / weights.sum()).float(),
        weight=weight,
    )


def shared_tokens(comparison: Comparison, one: int, other: int, kind: str) -> int:
    """Tokens before two responses differ; each keeps one, where one begins with all of the other."""
    first, second = comparison.responses[one], comparison.responses[other]
    shared = min(common_prefix(first, second), len(first) - 1, len(second) - 1)
    return shared + (len(comparison.prompt) if kind == "separate" else 0)


def _rows(rows: list[list[Comparison]], layout: Layout) -> dict[str, torch.Tensor]:
    """Write lists of Comparisons into one row each."""
    width = max(sum(c.tokens for c in row) for row in rows)
    width = layout.multiple * -(-width // layout.multiple)
    shape = len(rows), width
    ids, positions = np.full(shape, layout.pad, np.int64), np.zeros(shape, np.int64)
    comparison, response = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    sizes: list[int] = []
    spans: list[tuple[int, int]] = []  # first token and length of each response
    number = 0
    for i, row in enumerate(rows):
        at = 0
        for c in row:
            sizes.append(len(c.responses))
            for k, segment in enumerate([c.prompt, *c.responses]):
                here = slice(at, at + len(segment))
                ids[i, here] = segment
                positions[i, here] = np.arange(len(segment)) + (len(c.prompt) if k else 0)
                comparison[i, here], response[i, here] = number, k
                sizes.append(len(segment))
                if k:
                    spans.append((i * width + at, len(segment)))
                at += len(segment)
            number += 1
    begin, length = np.array(spans).T[:, :, None]  # (n, 1) each
    tokens = begin + np.minimum(np.arange(length.max()), length - 1)
    values = {
        "input_ids": ids,
        "attention_mask": (comparison >= 0).astype(np.int64),
        "position_ids": positions,
        "comparison": comparison,
        "response": response,
        "sizes": np.array(sizes),
        "ends": (begin + length - 1)[:, 0],
        "tokens": tokens,
        "token_lengths": length[:, 0],
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


class Loading(Sequence):
    """The batches of a plan, a list for each of its items, made when they are asked for."""

    def __init__(self, comparisons: Sequence[Comparison], plan: Sequence[list[MicroBatch]], layout: Layout):
        self.comparisons, self.plan, self.layout = comparisons, plan, layout

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> list[Batch]:
        return [
            collate([self.comparisons[row] for row in m.rows], self.layout, m.weight, m.units, m.row_weights)
            for m in self.plan[i]
        ]


def loader(batches: Loading, on_gpu: bool) -> DataLoader:
    """Goes through the items in order; beside a GPU, processes of their own make them ready ahead of time."""
    options = {"num_workers": WORKERS, "pin_memory": True} if on_gpu else {}
    own = torch.Generator()  # else it would draw from the numbers that dropout takes
    return DataLoader(batches, batch_size=None, generator=own, **options)
