# SPDX-License-Identifier: Apache-2.0
"""A batch as tensors, in five parts: tokens, judged pairs, ranked lists, scored responses, and blocks of the mask.

Each part collates itself. A response is named by its number among the responses of the batch, 0 to n − 1. A row of the
data (a Comparison) is not a row of token ids, which may hold many of them or one response.

Notation for shapes: b rows of token ids with s tokens each; n responses, of which the longest has r tokens; p judged
pairs; l ranked lists, of which the longest has k responses; c rows of the data; t responses of these rows, where a
response that several rows judged counts once for each; m numbers in ``Tokens.sizes``, K + 2 for each comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from reward_model.batching.blocks import Blocks
from reward_model.batching.fields import TensorFields
from reward_model.batching.identity import pair_identities, row_identity
from reward_model.batching.layout import Layout
from reward_model.batching.merging import PlacedRow
from reward_model.data.comparisons import Comparison, common_prefix

Digests = Sequence[list[bytes]]  # of each row those of its texts, see ``identity.py``


@dataclass(frozen=True)
class Tokens(TensorFields):
    """Rows of token ids, and where each response is in them.

    An index of a token counts through all b · s tokens, row after row. What a response's span holds depends on the
    layout: the tokens after the shared prompt or, in separate rows, the whole text.
    """

    input_ids: torch.Tensor  # (b, s) int64
    attention_mask: torch.Tensor  # (b, s) int64; 1 for a token of a text, 0 for a pad
    position_ids: torch.Tensor  # (b, s) int64; each response continues the positions of its prompt
    begin: torch.Tensor  # (b, s) int32; column at which the prompt or response of a token begins; of a pad, its own
    prompt_begin: torch.Tensor  # (b, s) int32; column at which the prompt of a response's token begins
    prompt_end: torch.Tensor  # (b, s) int32; column after its last token; no more than prompt_begin where there is none
    sizes: torch.Tensor  # (m,) int64; for each comparison K, then the lengths of its prompt and of its K responses
    ends: torch.Tensor  # (n,) int64; index of each response's last token
    spans: torch.Tensor  # (n, r) int64; indices of each response's tokens; its last token fills what is beyond its end
    span_lengths: torch.Tensor  # (n,) int64; number of tokens in each span
    response_lengths: torch.Tensor  # (n,) int64; tokens after what was asked, the end token included
    segment_lengths: torch.Tensor  # (n,) int64; of these the tokens of a second segment; 0: the text is one segment

    @classmethod
    def collate(cls, rows: Sequence[Sequence[Comparison]], layout: Layout, placed: Sequence[PlacedRow]) -> Tokens:
        """Write merged comparisons into rows of token ids.

        Args:
            rows: The comparisons of each row, as ``layout`` distributes them.
            placed: The rows of the data, which say where what was asked ends.
        """
        shape = len(rows), layout.width(rows)
        ids, positions = np.full(shape, layout.pad, np.int64), np.zeros(shape, np.int64)
        is_text = np.zeros(shape, np.int64)
        begin = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        prompt_begin, prompt_end = np.zeros((2, *shape), np.int32)
        segments = list(_segments(rows))
        for segment in segments:
            length = len(segment.ids)
            here = segment.row, slice(segment.column, segment.column + length)
            ids[here] = segment.ids
            positions[here] = np.arange(segment.position, segment.position + length)
            is_text[here], begin[here] = 1, segment.column
            prompt_begin[here], prompt_end[here] = segment.prompt
        responses = [segment for segment in segments if segment.is_response]
        begins = np.array([segment.row * shape[1] + segment.column for segment in responses])
        lengths = np.array([len(segment.ids) for segment in responses])
        response_lengths, segment_lengths = np.zeros((2, len(responses)), np.int64)
        for row in placed:
            response_lengths[row.responses] = _response_lengths(row.comparison)
            if row.comparison.two_segments:
                segment_lengths[row.responses] = response_lengths[row.responses]
        values = {
            "input_ids": ids,
            "attention_mask": is_text,
            "position_ids": positions,
            "begin": begin,
            "prompt_begin": prompt_begin,
            "prompt_end": prompt_end,
            "sizes": np.array([size for row in rows for c in row for size in _sizes(c)]),
            "ends": begins + lengths - 1,
            "spans": begins[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1),
            "span_lengths": lengths,
            "response_lengths": response_lengths,
            "segment_lengths": segment_lengths,
        }
        return cls(**{name: torch.from_numpy(value) for name, value in values.items()})

    def segment_ids(self) -> torch.Tensor:
        """1 for a token of a second segment, a separator after it included, 0 for others and for pads. (b, s) int64

        Only where no prompt is shared, so that a span holds a whole text.
        """
        first = (self.span_lengths - self.segment_lengths)[:, None]  # (n, 1): where in its text it begins
        is_second = torch.arange(self.spans.shape[1], device=self.spans.device) >= first  # (n, r)
        is_second = is_second & (self.segment_lengths > 0)[:, None]  # of a text of one segment the last token stays 0
        ids = torch.zeros_like(self.input_ids).flatten()
        return ids.scatter_(0, self.spans.flatten(), is_second.flatten().to(ids.dtype)).view_as(self.input_ids)

    def answer_tokens(self, responses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens of answers, from after what was asked to the end token, as a language model predicts them.

        The first token of a text without a prompt is not among them, as nothing is before it. The host waits for the
        device, for how many there are.

        Args:
            responses: Numbers of responses, (k,), at least one.

        Returns:
            Indices of the tokens before them, their ids, and which of the k responses each belongs to; (m,) each.
        """
        lengths, first = self.response_lengths[responses], self.spans[responses, 0]  # (k,)
        width = self.input_ids.shape[1]
        prompt_begin, prompt_end = self.prompt_begin.flatten()[first], self.prompt_end.flatten()[first]
        shared = (prompt_end - prompt_begin).clamp(min=0)  # tokens of the prompt, which are not in the span
        skipped = shared + self.span_lengths[responses] - lengths  # tokens of the text before the answer
        in_text = torch.arange(int(shared.max()) + self.spans.shape[1], device=first.device)
        in_text = in_text.expand(len(responses), -1)  # (k, longest text)

        def place(at: torch.Tensor) -> torch.Tensor:
            in_prompt = (first // width * width + prompt_begin)[:, None] + at
            return torch.where(at < shared[:, None], in_prompt, first[:, None] + at - shared[:, None])

        is_answer = (in_text >= skipped.clamp(min=1)[:, None]) & (in_text < (skipped + lengths)[:, None])
        owners, columns = is_answer.nonzero(as_tuple=True)
        before = place(in_text - 1)[owners, columns]
        return before, self.input_ids.flatten()[place(in_text)[is_answer]], owners

    def text_names(self) -> torch.Tensor:
        """A number for each response, equal for equal texts, prompt included; others differ but for 2⁻⁶⁴. (n,) int64

        A sum over the tokens of a text, each of which counts by its id and its position, mixed as SplitMix64 does.
        """
        mixed = self.input_ids * -7046029254386353131 + self.position_ids * -4658895280553007687  # wraps around
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        mixed = (mixed ^ (mixed >> 31)) * self.attention_mask
        flat, width = mixed.flatten(), mixed.shape[1]
        inside = torch.arange(self.spans.shape[1], device=flat.device) < self.span_lengths[:, None]  # (n, r)
        names = (flat[self.spans] * inside).sum(1)
        first = self.spans[:, 0]  # at which a response begins
        before = F.pad(mixed.cumsum(1), (1, 0)).flatten()  # (b · (s + 1),): of the tokens of a row before a column
        row = first // width * (width + 1)
        begin, end = self.prompt_begin.flatten()[first], self.prompt_end.flatten()[first]
        return names + before[row + torch.maximum(begin, end)] - before[row + begin]


class _Segment(NamedTuple):
    """A prompt or a response, and where it is written."""

    ids: list[int]
    row: int
    column: int
    position: int  # of its first token in its text
    prompt: tuple[int, int]  # columns at which its prompt begins and ends; equal: it has none
    is_response: bool


def _segments(rows: Sequence[Sequence[Comparison]]) -> Iterator[_Segment]:
    """Each prompt and each response, in the order in which they are written."""
    for i, row in enumerate(rows):
        column = 0
        for c in row:
            prompt = column, column + len(c.prompt)
            yield _Segment(c.prompt, i, column, 0, (0, 0), is_response=False)
            column = prompt[1]
            for ids in c.responses:
                yield _Segment(ids, i, column, len(c.prompt), prompt, is_response=True)
                column += len(ids)


def _sizes(c: Comparison) -> list[int]:
    """Number of responses, then the number of tokens of the prompt and of each response."""
    return [len(c.responses), len(c.prompt), *map(len, c.responses)]


def _response_lengths(row: Comparison) -> list[int]:
    """Number of tokens of each response after what was asked, which may be less than what the responses share."""
    return [len(row.prompt) + len(response) - row.asked for response in row.responses]


@dataclass(frozen=True)
class Pairs(TensorFields):
    """Pairs of responses of which one was preferred.

    ``margin``, ``rating``, ``probability``, ``strength`` and ``similarity`` mean what they mean in a Comparison. They
    are NaN where the data say nothing.
    """

    better: torch.Tensor  # (p,) int64; the preferred response of each pair
    worse: torch.Tensor  # (p,) int64; the other response
    margin: torch.Tensor  # (p,) float32
    rating: torch.Tensor  # (p,) float32
    probability: torch.Tensor  # (p,) float32
    strength: torch.Tensor  # (p,) float32
    similarity: torch.Tensor  # (p,) float32
    start: torch.Tensor  # (p,) int64; first place in the two spans at which they differ
    weights: torch.Tensor  # (p,) float32; weight in the batch's mean loss; the pairs of a row share its weight
    identity: torch.Tensor  # (p,) int64; by which whatever is drawn for a pair is drawn, see ``identity.py``; or (0,)

    @classmethod
    def collate(cls, placed: Sequence[PlacedRow], spans: Sequence[list[int]], texts: Digests | None) -> Pairs:
        """Collect the judged pairs, one row's after the other.

        Args:
            spans: The token ids in the span of each of the n responses.
            texts: Of each row the digests of its texts; None: nothing is drawn by them.
        """
        better = [row.responses[k] for row in placed for k in row.comparison.better]
        worse = [row.responses[k] for row in placed for k in row.comparison.worse]

        def known(name: str) -> torch.Tensor:
            rows = [row.comparison for row in placed]
            return _floats([value for c in rows for value in getattr(c, name) or [math.nan] * len(c.better)])

        return cls(
            better=_integers(better),
            worse=_integers(worse),
            margin=known("margin"),
            rating=known("rating"),
            probability=known("probability"),
            strength=known("strength"),
            similarity=known("similarity"),
            start=_integers([_shared_tokens(spans[b], spans[w]) for b, w in zip(better, worse)]),
            weights=_floats([row.weight / len(row.comparison.better) for row in placed for _ in row.comparison.better]),
            identity=_integers(
                [n for row, own in zip(placed, texts or ()) for n in pair_identities(row.comparison, own)]
            ),
        )


def _shared_tokens(one: list[int], other: list[int]) -> int:
    """Number of tokens before two spans differ. If one begins with all of the other, each keeps its last token."""
    return min(common_prefix(one, other), len(one) - 1, len(other) - 1)


@dataclass(frozen=True)
class Lists(TensorFields):
    """Ranked lists of responses, padded to the longest list."""

    responses: torch.Tensor  # (l, k) int64; 0 where a list has fewer
    ranks: torch.Tensor  # (l, k) int64; 0 is the best, equal ranks are tied, −1 where a list has fewer
    weights: torch.Tensor  # (l,) float32; weight in the batch's mean loss
    identity: torch.Tensor  # (l,) int64; of its row; or (0,)

    @classmethod
    def collate(cls, placed: Sequence[PlacedRow], texts: Digests | None) -> Lists:
        """Collect the ranked lists. A judged pair with ranks is a list of two.

        Args:
            texts: Of each row the digests of its texts; None: nothing is drawn by them.
        """
        ranked = [row for row in placed if row.comparison.ranks]
        identities = [
            row_identity(row.comparison, own) for row, own in zip(placed, texts or ()) if row.comparison.ranks
        ]
        longest = max((len(row.responses) for row in ranked), default=0)

        def padded(lists: list[list[int]], pad: int) -> torch.Tensor:
            return _integers([one + [pad] * (longest - len(one)) for one in lists]).reshape(len(ranked), longest)

        return cls(
            responses=padded([row.responses for row in ranked], 0),
            ranks=padded([row.comparison.ranks for row in ranked], -1),
            weights=_floats([row.weight for row in ranked]),
            identity=_integers(identities),
        )


@dataclass(frozen=True)
class Points(TensorFields):
    """Every row's responses, one row's after the other, with the score or label of those that have one."""

    responses: torch.Tensor  # (t,) int64; which response this is
    rows: torch.Tensor  # (t,) int64; which row of the data it belongs to, from 0 to c − 1
    response_weights: torch.Tensor  # (t,) float32; the weight of its row, divided by the row's number of responses
    targets: torch.Tensor  # (t,) float32; its score or label; 0 where there is none
    weights: torch.Tensor  # (t,) float32; weight in the batch's mean loss; 0 where there is no target
    row_weights: torch.Tensor  # (c,) float32; the weight of each row; they sum to 1
    row_indices: torch.Tensor  # (c,) int64; each row's position in the list that was collated
    identity: torch.Tensor  # (c,) int64; of each row; or (0,)

    @classmethod
    def collate(cls, placed: Sequence[PlacedRow], texts: Digests | None) -> Points:
        """Collect every row's responses, whether they have a target or not. Those that have share the row's weight.

        Args:
            texts: Of each row the digests of its texts; None: nothing is drawn by them.
        """
        targets, weights = [], []
        for row in placed:
            given = row.comparison.targets or [math.nan] * len(row.responses)
            scored = sum(not math.isnan(target) for target in given)
            targets += [0.0 if math.isnan(target) else target for target in given]
            weights += [0.0 if math.isnan(target) else row.weight / scored for target in given]
        return cls(
            responses=_integers([response for row in placed for response in row.responses]),
            rows=_integers([number for number, row in enumerate(placed) for _ in row.responses]),
            response_weights=_floats([row.weight / len(row.responses) for row in placed for _ in row.responses]),
            targets=_floats(targets),
            weights=_floats(weights),
            row_weights=_floats([row.weight for row in placed]),
            row_indices=_integers([row.index for row in placed]),
            identity=_integers([row_identity(row.comparison, own) for row, own in zip(placed, texts or ())]),
        )


@dataclass(frozen=True)
class Batch(TensorFields):
    """The tokens of a batch, what was judged of its responses, and the weight of its mean loss in the step's."""

    tokens: Tokens
    pairs: Pairs
    lists: Lists
    points: Points
    blocks: Blocks
    weight: float = 1.0

    def packed(self) -> PackedBatch:
        """The same batch in one tensor."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight"}
        tensors = {(name, f.name): getattr(part, f.name) for name, part in parts.items() for f in fields(part)}
        places, size = {}, 0
        for key, tensor in tensors.items():
            places[key] = _Place(size, tensor.dtype, tuple(tensor.shape))
            size += ALIGNMENT * -(-tensor.numel() * tensor.element_size() // (8 * ALIGNMENT))
        buffer = torch.zeros(size, dtype=torch.int64)
        for key, tensor in tensors.items():
            places[key].of(buffer).copy_(tensor)
        return PackedBatch(buffer, places, self.weight)


ALIGNMENT = 2  # of 8 bytes: kernels read 16 at once


class _Place(NamedTuple):
    """Where a tensor lies in a buffer of int64."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor, a view of the buffer."""
        count = math.prod(self.shape)
        words = -(-count * self.dtype.itemsize // 8)
        return buffer[self.start : self.start + words].view(self.dtype)[:count].view(self.shape)


@dataclass(frozen=True)
class PackedBatch:
    """A batch in one tensor: one open file between processes and one copy to a device, where a batch has 32.

    buffer: the bytes of all tensors, int64. places: part and field → where its tensor lies. weight: of the batch.
    """

    buffer: torch.Tensor
    places: dict[tuple[str, str], _Place]
    weight: float

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. The copy may still be under way when this returns."""
        buffer = self.buffer.to(device, non_blocking=True)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for (part, name), place in self.places.items():
            found.setdefault(part, {})[name] = place.of(buffer)
        return Batch(
            tokens=Tokens(**found["tokens"]),
            pairs=Pairs(**found["pairs"]),
            lists=Lists(**found["lists"]),
            points=Points(**found["points"]),
            blocks=Blocks(**found["blocks"]),
            weight=self.weight,
        )

    def pin_memory(self) -> PackedBatch:
        """The same in page-locked memory, from which a GPU can copy while the CPU goes on."""
        return replace(self, buffer=self.buffer.pin_memory())


def _integers(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
