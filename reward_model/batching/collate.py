# SPDX-License-Identifier: Apache-2.0
"""Comparisons → batches of token ids, in which responses share their prompt where the model allows.

Notation: b rows, s tokens, n responses, r tokens of the longest response; p judged pairs, l ranked lists of k answers
at most, c Comparisons and their a answers, which are responses that may be there once for several of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from reward_model.batching.plan import MicroBatch
from reward_model.data.comparisons import Comparison, common_prefix

WORKERS = 2  # processes that make batches ready while the GPU computes


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, where each response ends in them, and what was judged of the responses.

    input_ids, attention_mask, position_ids: (b, s) int64; positions go on from the prompt for each of its responses.
    comparison, response: (b, s) int32, which comparison a token is of (−1: a pad), and which of its responses (from 1;
        0: the prompt).
    sizes: int64; for each comparison K, then the tokens of the prompt and of its K responses.
    ends: (n,) each response's last token, as an index into the b·s tokens.
    tokens: (n, r) each response's own tokens (separate rows: the whole text's), indices like ``ends``, which fills
        what is beyond the end.
    token_lengths: (n,) how many of them there are.
    response_lengths: (n,) tokens after what was asked, end token included.
    better, worse: (p,) responses; better[i] beat worse[i].
    margin, rating, probability, similarity: (p,) float32, as in Comparison; NaN where the data say nothing.
    start: (p,) first token in which the two responses of a pair differ.
    pair_weights: (p,) float32, of each pair in the batch's mean loss.
    listed: (l, k) responses; ranks: (l, k) of them, −1 where a list has fewer.
    list_weights: (l,) float32, as ``pair_weights``.
    answers: (a,) responses, one Comparison's after the other; answer_rows: (a,) whose they are, from 0 to c − 1.
    answer_weights: (a,) float32, their shares of ``row_weights``.
    targets: (a,) float32, score or label; 0 where there is none.
    point_weights: (a,) float32, as ``pair_weights``; 0 where there is no target.
    row_weights: (c,) float32, of each Comparison; they sum to 1. Its pairs share it, so do its scored answers.
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
    rating: torch.Tensor
    probability: torch.Tensor
    similarity: torch.Tensor
    start: torch.Tensor
    pair_weights: torch.Tensor
    listed: torch.Tensor
    ranks: torch.Tensor
    list_weights: torch.Tensor
    answers: torch.Tensor
    answer_rows: torch.Tensor
    answer_weights: torch.Tensor
    targets: torch.Tensor
    point_weights: torch.Tensor
    row_weights: torch.Tensor
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


@dataclass(frozen=True)
class MergedComparison:
    """A prompt and its responses, and which Comparisons they are those of: (position, where its responses are)."""

    texts: Comparison
    rows: list[tuple[int, list[int]]]


def merge(
    comparisons: Sequence[Comparison], layout: Layout, groups: Sequence[int] | None = None
) -> list[MergedComparison]:
    """Join Comparisons of one prompt, so that a response that was judged often is there once.

    Those of one group are joined first, then any that have the same prompt hash: if they have no more than
    ``most_responses`` then, no more tokens than apart (a prompt that was cut in two places shares nothing), and, where
    rows are padded, make no row the longest.

    Args:
        groups: equal numbers for what was brought together.
    """
    parts = [
        MergedComparison(
            Comparison(c.prompt, c.responses, prompt_hash=c.prompt_hash), [(i, list(range(len(c.responses))))]
        )
        for i, c in enumerate(comparisons)
    ]
    if groups is not None:
        keys = [(group, c.prompt_hash) for group, c in zip(groups, comparisons)]
        parts = _join_equals(parts, keys, layout.most_responses)
    keys = [part.texts.prompt_hash for part in parts]
    widest = max(part.texts.tokens for part in parts) if layout.kind == "shared" else None
    return _join_equals(parts, keys, layout.most_responses, widest)


def _join_equals(
    parts: list[MergedComparison], keys: Sequence, most_responses: int, widest: int | None = None
) -> list[MergedComparison]:
    """Join parts of one key (None: no key) one after the other, as long as the limits allow."""
    joined: list[MergedComparison] = []
    newest: dict[object, int] = {}  # where a key's last one is
    for part, key in zip(parts, keys):
        at = newest.get(key)
        one = _join(joined[at], part) if at is not None else None
        if one and (
            len(one.texts.responses) <= most_responses
            and one.texts.tokens <= joined[at].texts.tokens + part.texts.tokens
            and (widest is None or one.texts.tokens <= widest)
        ):
            joined[at] = one
        else:
            if key is not None:
                newest[key] = len(joined)
            joined.append(part)
    return joined


def _join(one: MergedComparison, other: MergedComparison) -> MergedComparison:
    texts: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, list[int]]] = []
    for part in (one, other):
        c = part.texts
        places = [texts.setdefault((*c.prompt, *r), len(texts)) for r in c.responses]
        rows += [(i, [places[k] for k in mine]) for i, mine in part.rows]
    shared = common_prefix(one.texts.prompt, other.texts.prompt)
    responses = [list(text[shared:]) for text in texts]
    return MergedComparison(Comparison(one.texts.prompt[:shared], responses, prompt_hash=one.texts.prompt_hash), rows)


def collate(
    comparisons: Sequence[Comparison],
    layout: Layout,
    weight: float = 1.0,
    groups: Sequence[int] | None = None,
    row_weights: Sequence[float] | None = None,
) -> Batch:
    """Merge Comparisons that share a prompt, and write them into rows.

    Args:
        weight: of the batch's mean loss in the step's.
        groups: as in :func:`merge`.
        row_weights: of each Comparison in that mean, in any unit. None: all pairs weigh the same.
    """
    merged = merge(comparisons, layout, groups)
    parts = [part.texts for part in merged]
    if row_weights is None:
        row_weights = [max(len(c.better), 1) for c in comparisons]
    shares = np.array(row_weights, np.float64) / np.sum(row_weights)
    judged = _judged(comparisons, merged, layout.kind, shares)
    if layout.kind == "separate":
        parts = [Comparison([], [c.prompt + response]) for c in parts for response in c.responses]
    return Batch(**_rows([parts] if layout.kind == "packed" else [[c] for c in parts], layout), **judged, weight=weight)


def _judged(comparisons, merged: list[MergedComparison], kind: str, shares: np.ndarray) -> dict[str, torch.Tensor]:
    """What was judged of the responses, in numbers of the merged ones."""
    pairs: list[tuple] = []
    lists: list[tuple[list[int], list[int], float]] = []
    answers: list[tuple] = []
    lengths = np.zeros(sum(len(part.texts.responses) for part in merged), np.int64)
    first, number = 0, 0
    for part in merged:
        texts = part.texts
        for i, places in part.rows:
            row, share = comparisons[i], shares[i]
            at = [first + place for place in places]
            asked = len(row.prompt) if row.prompt_tokens is None else row.prompt_tokens
            lengths[at] = [len(texts.prompt) + len(texts.responses[place]) - asked for place in places]
            facts = zip(*(_each(row, name) for name in ("margin", "rating", "probability", "similarity")))
            pairs += [
                (at[b], at[w], shared_tokens(texts, places[b], places[w], kind), *fact, share / len(row.better))
                for b, w, fact in zip(row.better, row.worse, facts)
            ]
            if row.ranks:
                lists.append((at, row.ranks, share))
            targets = np.array(row.targets or [math.nan] * len(at))
            scored = ~np.isnan(targets)
            values = zip(at, np.where(scored, targets, 0.0), scored * share / max(scored.sum(), 1))
            answers += [(*value, number, share / len(at)) for value in values]
            number += 1
        first += len(texts.responses)
    better, worse, start, *facts, pair_weights = np.array(pairs, np.float64).reshape(-1, 8).T
    answer, targets, point_weights, answer_rows, answer_weights = np.array(answers, np.float64).T
    longest = max((len(at) for at, _, _ in lists), default=0)
    whole = {
        "better": better,
        "worse": worse,
        "start": start,
        "listed": np.array([at + [0] * (longest - len(at)) for at, _, _ in lists]).reshape(len(lists), longest),
        "ranks": np.array([ranks + [-1] * (longest - len(ranks)) for _, ranks, _ in lists]).reshape(
            len(lists), longest
        ),
        "answers": answer,
        "answer_rows": answer_rows,
        "response_lengths": lengths,
    }
    real = dict(zip(("margin", "rating", "probability", "similarity"), facts)) | {
        "pair_weights": pair_weights,
        "list_weights": np.array([share for _, _, share in lists]),
        "answer_weights": answer_weights,
        "targets": targets,
        "point_weights": point_weights,
        "row_weights": shares[[i for part in merged for i, _ in part.rows]],
    }
    values = {name: torch.from_numpy(v.astype(np.int64)) for name, v in whole.items()}
    return values | {name: torch.from_numpy(v.astype(np.float32)) for name, v in real.items()}


def _each(row: Comparison, name: str) -> list[float]:
    """A number for each judged pair; NaN where nothing is known."""
    return getattr(row, name) or [math.nan] * len(row.better)


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


class PlannedBatches(Sequence):
    """The batches of a plan, a list for each of its items, made when they are asked for."""

    def __init__(self, comparisons: Sequence[Comparison], plan: Sequence[list[MicroBatch]], layout: Layout):
        self.comparisons, self.plan, self.layout = comparisons, plan, layout

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> list[Batch]:
        return [
            collate([self.comparisons[row] for row in m.rows], self.layout, m.weight, m.groups, m.row_weights)
            for m in self.plan[i]
        ]


def loader(batches: PlannedBatches, on_gpu: bool) -> DataLoader:
    """Goes through the items in order; beside a GPU, processes of their own make them ready ahead of time."""
    options = {"num_workers": WORKERS, "pin_memory": True} if on_gpu else {}
    own = torch.Generator()  # else it would draw from the numbers that dropout takes
    return DataLoader(batches, batch_size=None, generator=own, **options)
