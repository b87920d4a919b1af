# SPDX-License-Identifier: Apache-2.0
"""One shape for all data: a prompt, its responses, and what was judged of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import datasets
import numpy as np
import pyarrow

from reward_model.common.errors import printable

GRADES = {  # Llama 2's, arXiv 2307.09288, table 27; as numbers they are its large margins, a third of them its small
    "significantly better": 3.0,
    "better": 2.0,
    "slightly better": 1.0,
    "negligibly better": 0.0,
    "unsure": 0.0,
    "negligibly better / unsure": 0.0,
}

SWAPPED: dict[str, Callable] = {  # what is said of the order of a pair → what is said of the other order
    "margin": lambda value: -value,
    "rating": lambda value: value * math.nan,
    "probability": lambda value: 1 - value,
    "strength": lambda value: -value,
    "ranks": lambda value: 1 - value,
}


class BadRow(Exception):
    """Why a row cannot be used."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


@dataclass(frozen=True)
class Comparison:
    """A prompt, K responses, and what was judged of them.

    prompt: ids that every response shares, the longest common prefix of the jointly tokenized texts.
    responses: K lists of ids that follow it; each ends with an end token.
    better, worse: judged pairs as indices into ``responses``; better[i] beat worse[i].
    margin: by how much, one number per judged pair; NaN where the row says nothing.
    prompt_hash: equal for rows that were asked the same; None: unlike any other.
    rating: Llama 2's grade of each judged pair, 3 (significantly better) to 0; NaN or none at all: not said.
    probability: that better beats worse, per judged pair; NaN or none at all: not said.
    strength: by how much an ensemble of models scores better above worse, in the mean, per judged pair; none at all:
        not said.
    similarity: cosine of the embeddings of a judged pair's answers; none at all: not computed.
    ranks: of the responses, 0 the best, equal where tied; none at all: the row says no order.
    targets: score or label of each response; NaN or none at all: not said.
    prompt_tokens: of what was asked; the responses may go on alike. None: the whole prompt.
    two_segments: prompt and response are a pair for the tokenizer, whose second segment begins after ``prompt_tokens``.
    subset: the part of its data set that the row belongs to, for evaluations; empty: the row says none.
    """

    prompt: list[int]
    responses: list[list[int]]
    better: list[int] = field(default_factory=list)
    worse: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    prompt_hash: int | None = None
    rating: list[float] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    two_segments: bool = False
    subset: str = ""

    @property
    def tokens(self) -> int:
        """Tokens to compute when the responses share the prompt."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def asked(self) -> int:
        """Tokens of what was asked."""
        return len(self.prompt) if self.prompt_tokens is None else self.prompt_tokens

    def text(self, k: int) -> Comparison:
        """The whole text of one response, without what was judged of it."""
        ids = [*self.prompt, *self.responses[k]]
        return Comparison(ids[: self.asked], [ids[self.asked :]], two_segments=self.two_segments)

    def swapped(self) -> Comparison:
        """The same answers, judged the other way round, with all that is said of the order of one judged pair.

        The answers keep their places, scores and labels. A margin and a strength change their sign, a probability
        becomes one minus it, ranks change places; the grade of the better answer is none of the other.
        """
        said: dict[str, Any] = {name: [new(value) for value in getattr(self, name)] for name, new in SWAPPED.items()}
        return replace(self, better=self.worse, worse=self.better, **said)

    @classmethod
    def of_ids(cls, ids: list[int], second: int = 0) -> Comparison:
        """One whole text, of which so many last tokens are the second segment of a pair; 0: it is one segment."""
        begin = len(ids) - second if second else 0
        return cls(ids[:begin], [ids[begin:]], two_segments=second > 0)


@dataclass(frozen=True)
class Origins:
    """Where rows were read: names of files or splits, which of them each row is of, and its number there, (r,)."""

    names: tuple[str, ...]
    sources: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, name: str, numbers: np.ndarray) -> Origins:
        """Rows of one file."""
        return cls((name,), np.zeros(len(numbers), np.int32), np.asarray(numbers, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Origins]) -> Origins:
        """One part's rows after the other."""
        names = [name for part in parts for name in part.names]
        first = np.cumsum([0, *(len(part.names) for part in parts)])
        sources = [part.sources + start for part, start in zip(parts, first)]
        return cls(tuple(names), np.concatenate(sources), np.concatenate([part.numbers for part in parts]))

    def select(self, indices: np.ndarray) -> Origins:
        """Some of the rows, in this order."""
        return Origins(self.names, self.sources[indices], self.numbers[indices])

    def by_file(self) -> dict[str, list[int]]:
        """Name → the numbers of its rows, in rising order."""
        found: dict[str, list[int]] = {}
        for source in np.unique(self.sources):
            numbers = self.numbers[self.sources == source].tolist()
            name = self.names[source]
            found[name] = sorted(found.get(name, []) + numbers)
        return found


class Comparisons:
    """A sequence of Comparisons in an Arrow file; reads one from disk when asked for it.

    For each of them, (r,) int64: ``lengths`` of the longest text, ``tokens`` of the prompt and all responses,
    ``prompt_tokens`` of what was asked (the responses may go on alike), ``pairs`` judged. What planning needs lies in
    memory, 8 bytes a number; the tokens stay in the file.

    origins: where each row was read; without it they are rows of a table, numbered from 1.
    swapped: (r,) bool, rows of one judged pair that are read with their order swapped; None: none.
    """

    def __init__(self, table: datasets.Dataset, origins: Origins | None = None, swapped: np.ndarray | None = None):
        self.table = table
        self.swapped = swapped
        self.origins = origins or Origins.of("table", np.arange(1, len(table) + 1))
        self.lengths = self._numbers("length")
        self.tokens = self._numbers("tokens")
        self.prompt_tokens = self._numbers("prompt_tokens")
        self.pairs = np.asarray(self._arrow("better").value_lengths(), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Comparison:
        row = self.table[int(index)]
        found = Comparison(**{f.name: row[f.name] for f in fields(Comparison) if f.name in row})
        return found.swapped() if self.swapped is not None and self.swapped[index] else found

    def _arrow(self, column: str) -> pyarrow.Array:
        if self.swapped is None or column not in (*SWAPPED, "better", "worse"):
            return self._stored(column)
        values = self._stored(column)
        numbers, counts = np.asarray(values.flatten()), np.asarray(values.value_lengths(), dtype=np.int64)
        if column in SWAPPED:
            other = SWAPPED[column](numbers)
        else:
            other = np.asarray(self._stored("worse" if column == "better" else "better").flatten())
        found = np.where(np.repeat(self.swapped, counts), other, numbers).astype(numbers.dtype)
        ends = pyarrow.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(found))

    def _stored(self, column: str) -> pyarrow.Array:
        values = self.table.with_format("arrow")[column][:]
        return values.combine_chunks() if isinstance(values, pyarrow.ChunkedArray) else values

    def _numbers(self, column: str) -> np.ndarray:
        return np.asarray(self._arrow(column), dtype=np.int64)

    def prompt_hashes(self) -> np.ndarray:
        """Equal numbers, equal prompts. (r,)"""
        return self._numbers("prompt_hash")

    def texts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each whole text, one row's after the other, a hash and its tokens, (t,); texts of each row, (r,)."""
        hashes = self._arrow("text_hashes")
        lengths = self._arrow("text_lengths").flatten()
        first, second, third = (
            np.asarray(values, dtype=np.int64) for values in (hashes.flatten(), lengths, hashes.value_lengths())
        )
        return first, second, third

    def cut(self) -> np.ndarray:
        """Whether each row lost a part of its prompt. (r,)"""
        return np.asarray(self.table["cut"][:], dtype=bool)

    def targets(self) -> np.ndarray:
        """Score or label of every response, one row's after the other; NaN where there is none. (t,)"""
        return np.asarray(self._arrow("targets").flatten(), dtype=np.float64)

    def subsets(self) -> np.ndarray:
        """The subset of each row, text; empty where it says none. (r,)"""
        return np.array(self._arrow("subset").to_pylist(), dtype=np.str_)

    def numbers(self, column: str) -> np.ndarray:
        """What a column of lists holds, one row's after the other, int64."""
        return np.asarray(self._arrow(column).flatten(), dtype=np.int64)

    def floats(self, column: str) -> np.ndarray:
        """The same as float64."""
        return np.asarray(self._arrow(column).flatten(), dtype=np.float64)

    def filled(self, column: str, counts: np.ndarray, absent: float) -> np.ndarray:
        """The same of a column that has no numbers in some rows, float64, with ``absent`` in their place.

        Args:
            counts: how many numbers each row has where it has them, (r,).
        """
        values = self._arrow(column)
        present = np.asarray(values.value_lengths(), dtype=np.int64) > 0
        found = np.full(int(counts.sum()), absent, np.float64)
        found[np.repeat(present, counts)] = np.asarray(values.flatten(), dtype=np.float64)
        return found

    def select(self, indices: np.ndarray) -> Comparisons:
        swapped = None if self.swapped is None else self.swapped[indices]
        return Comparisons(self.table.select(indices), self.origins.select(indices), swapped)

    def with_swapped(self, indices: np.ndarray) -> Comparisons:
        """With the order of some rows swapped, each of which judges one pair."""
        swapped = np.zeros(len(self), bool)
        swapped[indices] = True
        return Comparisons(self.table, self.origins, swapped if self.swapped is None else swapped ^ self.swapped)

    def with_similarity(self, cosines: np.ndarray) -> Comparisons:
        """With a cosine for each judged pair, one row's after the other."""
        values = np.split(cosines.astype(np.float32), np.cumsum(self.pairs)[:-1])
        table = self.table.add_column("similarity", [v.tolist() for v in values])
        return Comparisons(table, self.origins, self.swapped)


def answers(row: Comparison) -> str:
    """How many there are, in words."""
    count = len(row.targets)
    return "one answer" if count == 1 else f"{ {2: 'two', 3: 'three', 4: 'four'}.get(count, count) } answers"


def common_prefix(first: Sequence, second: Sequence) -> int:
    """How many items, ids or characters, two sequences begin with in common."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second))
