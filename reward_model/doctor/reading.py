# SPDX-License-Identifier: Apache-2.0
"""Rows of data as text, without a model, a tokenizer or a chat template; each can be read again by its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reward_model.common.progress import progress
from reward_model.config.doctor import DoctorConfig
from reward_model.data.chats import in_plain
from reward_model.data.comparisons import BadRow
from reward_model.data.files import Source
from reward_model.data.preprocessing import read_text
from reward_model.data.rows import Texts
from reward_model.data.sources import Splits, amount_of, read_sources, take
from reward_model.data.strengths import MEAN, THEIRS, Strength, strength_of

TRAINING, EVALUATION = 0, 1  # the sets
SETS = ("training", "evaluation")
FIRST_AND_SECOND = (  # columns of layouts in which the answers stand in the order in which they were shown
    *(("response_a", "response_b"), ("conversation_a", "conversation_b")),
    *(("response_0", "response_1"), ("response_1", "response_2"), ("response1", "response2")),
    ("human_ref_A", "human_ref_B"),
)


class PlainWriter:
    """Stands where a tokenizer with a chat template would: writes each message as its role and what it says."""

    chat_template = "role: content"

    def apply_chat_template(self, chat: list[dict], add_generation_prompt: bool = False, **_: Any) -> str:
        written = "".join(f"\n\n{message['role']}: {_said(message)}" for message in chat)
        return written + ("\n\nassistant:" if add_generation_prompt else "")


def _said(message: dict) -> str:
    content = message.get("content")
    said = content if isinstance(content, str) else "" if content is None else json.dumps(content, default=str)
    if message.get("tool_calls"):
        said += json.dumps(message["tool_calls"], default=str, sort_keys=True)
    return said


PLAIN = PlainWriter()


@dataclass
class Row:
    """A row that was read.

    source, index: where it lies, to read it again. number: in its file, from 1. first_won: whether the answer that was
    shown first is the better one; None: nothing says which was.
    """

    source: int
    index: int
    number: int
    texts: Texts
    strength: Strength | None = None
    first_won: bool | None = None

    @property
    def answers(self) -> list[str]:
        return [whole[len(self.texts.prompt) :] for whole in self.texts.whole]


@dataclass(frozen=True)
class BadOne:
    """A row that cannot be used, and why."""

    source: int
    index: int
    number: int
    reason: str


@dataclass
class Data:
    """All sources of the training rows and of those to evaluate on.

    sets: of each source, ``TRAINING`` or ``EVALUATION``.
    """

    sources: list[Source] = field(default_factory=list)
    sets: list[int] = field(default_factory=list)
    chat: bool = False

    @classmethod
    def find(cls, paths: Sequence[str], config: DoctorConfig) -> Data:
        """The sources that a training with these paths would read.

        Raises:
            UserError: nothing there, or nothing readable.
        """
        splits = Splits(config.split, config.eval_split)
        found = cls(chat=config.chat)
        for entry in paths:
            path, amount = amount_of(entry)
            train, evaluation = read_sources(
                path, config.seed, hold_out=False, names=config.names, splits=splits, chat=config.chat
            )
            found._add(take(train, amount, config.seed, path), TRAINING)
            if not config.eval_data_path:
                found._add(evaluation, EVALUATION)
        for entry in config.evaluation_paths:
            path, amount = amount_of(entry)
            first, second = read_sources(
                path,
                config.seed,
                hold_out=False,
                names=config.names,
                splits=replace(splits, train=None),
                chat=config.chat,
            )
            found._add(take(second or first, amount, config.seed, path), EVALUATION)  # a file stands for all its rows
        return found

    def _add(self, sources: list[Source], of_set: int) -> None:
        self.sources += sources
        self.sets += [of_set] * len(sources)

    @cached_property
    def size(self) -> int:
        return sum(len(source.rows) for source in self.sources)

    def rows(self, desc: str = "reading") -> Iterator[Row | BadOne]:
        """All rows, one after the other.

        Raises:
            UserError: one that cannot be taken out of its file.
        """
        with progress(total=self.size, desc=desc, unit=" rows", leave=False) as bar:
            for place, source in enumerate(self.sources):
                for index, (number, stored) in enumerate(source.stored()):
                    yield self._row(place, index, number, stored)
                    bar.update()

    def row(self, place: int, index: int) -> Row | BadOne:
        """One that was read before."""
        source = self.sources[place]
        assert source.numbers is not None  # filled in when the object was made
        return self._row(place, index, int(source.numbers[index]), source.rows[index])

    def _row(self, place: int, index: int, number: int, stored: dict) -> Row | BadOne:
        source = self.sources[place]
        # a stand-in that has what reading asks of a tokenizer
        texts = read_text(source, stored, PLAIN, self.chat)
        if isinstance(texts, str):
            return BadOne(place, index, number, texts)
        return Row(place, index, number, texts, strength_in(source, stored), _first_won(source, stored))

    def name(self, place: int) -> str:
        """Of the file, without its folder."""
        return Path(self.sources[place].name).name

    def origin(self, place: int, number: int) -> str:
        """For messages: the file's name and the row's number in it."""
        return f"{self.name(place)}, row {number}"


def strength_in(source: Source, stored: dict) -> Strength | None:
    """What a row says of its strength; None: nothing."""
    if source.is_text:
        text = stored["json"]
        if f'"{MEAN}"' not in text and not any(name in text for name in (THEIRS[0], THEIRS[2])):
            return None  # most data sets: do not parse each row twice
    return strength_of(source.named(stored))


def pair_columns(source: Source) -> tuple[str, str] | None:
    """The columns whose answers stand in the order in which they were shown; None: the layout has none."""
    columns = source.layout.columns
    return next((pair for pair in FIRST_AND_SECOND if set(pair) <= columns), None)


def _first_won(source: Source, stored: dict) -> bool | None:
    columns = pair_columns(source)
    if columns is None:
        return None
    try:
        named = source.named(stored)
        chosen = source.read(stored).get("chosen")
        first, second = (_is_answer(in_plain(name, named.get(name)), chosen) for name in columns)
    except (BadRow, LookupError, TypeError, ValueError, AttributeError):
        return None
    return first if first != second else None


def _is_answer(value: Any, chosen: Any) -> bool:
    """Whether what a column holds is the chosen answer, which a layout may have made messages of."""
    if isinstance(value, str) and isinstance(chosen, str):
        return value.strip() == chosen.strip()
    if isinstance(value, str) and isinstance(chosen, list):  # the Chatbot Arena's: the texts of all turns
        said = [message["content"] for message in chosen if message.get("role") == "assistant"]
        try:
            return json.loads(value) == said
        except ValueError:
            return False
    return value == chosen
