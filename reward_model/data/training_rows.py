# SPDX-License-Identifier: Apache-2.0
"""The training rows of a data set as they are stored, for what writes them back: in one order, each with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow

from reward_model.common.logging import logger
from reward_model.data.files import UNREADABLE, Source
from reward_model.data.sources import Splits, training_sources

HASHED_AT_ONCE = 4_096  # rows


class Stored(NamedTuple):
    """A row: where it is from, its number there, from 1, and what is stored."""

    source: Source
    number: int
    row: dict

    def columns(self) -> dict | None:
        """As the file has them; None: the row cannot be read."""
        row = json.loads(self.row["json"]) if self.source.is_text else self.row
        return None if UNREADABLE in row else row


@dataclass(frozen=True)
class TrainingRows:
    """The rows of some sources, one after the other. Their text stays on the disk; 8 bytes a row are in memory."""

    sources: list[Source]

    @classmethod
    def find(
        cls, paths: list[str], seed: int, names: dict[str, str], split: str | None = None, chat: bool = False
    ) -> TrainingRows:
        """Those that a training with these entries of ``--data_path`` reads, none of them held out.

        Says which rows to evaluate on come with them, as these are not read.

        Raises:
            UserError: nothing there, or nothing readable.
        """
        found, others = training_sources(paths, seed, names, Splits(split), chat)
        if others:
            said = ", ".join(source.name for source in others)
            logger.info(f"{said}: rows to evaluate on, which are left out; --split takes another split")
        return cls(found)

    def __len__(self) -> int:
        return sum(len(source.rows) for source in self.sources)

    def __iter__(self) -> Iterator[Stored]:
        return iter(self.part(0, len(self)))

    def part(self, first: int, last: int) -> Iterator[Stored]:
        """The rows from one place up to another, which is not among them.

        Raises:
            UserError: one that cannot be taken out of its file.
        """
        start = 0
        for source in self.sources:
            end = start + len(source.rows)
            if first < end and start < last:
                begin = max(first, start) - start
                for number, row in source.stored(min(last, end) - start - begin, begin):
                    yield Stored(source, number, row)
            start = end

    def origin(self, source: Source, number: int) -> str:
        """For messages: the number of a row, and of which file where there are several."""
        return f"row {number}" if len(self.sources) == 1 else f"{Path(source.name).name}, row {number}"

    def sha256(self) -> str:
        """Of what is stored in all rows, in their order, whatever the files are called."""
        digest = hashlib.sha256()
        for source in self.sources:
            for table in source.rows.with_format("arrow").iter(batch_size=HASHED_AT_ONCE):
                sink = pyarrow.BufferOutputStream()
                plain = table.combine_chunks().replace_schema_metadata(None)  # its metadata say who wrote it
                with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
                    stream.write_table(plain)
                digest.update(sink.getvalue())
            numbers = np.asarray(source.numbers, np.int64)
            digest.update(numbers.tobytes())
        return digest.hexdigest()
