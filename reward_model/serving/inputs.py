# SPDX-License-Identifier: Apache-2.0
"""What is scored, row by row: files and streams of any length, of which no more is kept than one row."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from reward_model.common.errors import UserError, first_line, printable, require_no_lfs_pointer
from reward_model.common.logging import logger
from reward_model.config.scoring import STDIN
from reward_model.data.chats import is_chat
from reward_model.data.comparisons import BadRow
from reward_model.data.files import Source, line_rows, loader_of, text_rows
from reward_model.data.layouts import CHATS, layout_of
from reward_model.data.rows import PAIR, Texts, read_row, texts_to_score
from reward_model.data.sources import names_in

ROWS_TO_KNOW_BY = 100  # in which one that can be read is looked for: it tells how the others are written


def _decoded(file) -> io.TextIOWrapper:
    """What is not UTF-8 becomes halves of characters, which are said of their row."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


class Stdin:
    """The lines of standard input, of which the first can be looked at before."""

    def __init__(self) -> None:
        self.file = _decoded(sys.stdin.buffer)
        self.first: str | None = None

    def identity(self) -> dict:
        """A hash of the first line: the rest is not there yet."""
        self.first = self.file.readline()
        return {"name": STDIN, "first line": _hash(self.first)}

    def __iter__(self) -> Iterator[str]:
        if self.first is not None:
            yield self.first
        yield from self.file


Rows = str | Path | Stdin | Iterable[dict | str]


class Row(NamedTuple):
    """A row of the input.

    number: of the row, or of its line. texts: to score, or why it cannot be. answers: as the row has them.
    """

    number: int
    texts: Texts | str
    answers: list


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_rows(
    given: Rows,
    tokenizer,
    lines: bool = False,
    names: dict[str, str] | None = None,
    chat: bool = False,
    skip: int = 0,
) -> Iterator[Row]:
    """The rows of a file, of standard input (``-``), or of Python: dicts or, with ``lines``, texts.

    Args:
        tokenizer: its chat template writes chats.
        skip: so many rows are passed over.
        lines: there is a text a line, which is scored as it is.
        names: field → the column that holds it.
        chat: rows of text go through the chat template.

    Raises:
        UserError: no such file, or one of a kind that cannot be read.
    """
    given = Stdin() if given == STDIN else given
    if lines:
        return (_line(number, text, tokenizer) for number, text in islice(enumerate(_texts(given), 1), skip, None))
    return _with_layout(given, names or {}, chat, tokenizer, skip)


def name_of(given: Rows) -> str:
    """For messages."""
    if given == STDIN or isinstance(given, Stdin):
        return "standard input"
    return str(given) if isinstance(given, (str, Path)) else "rows"


def _is_text(given: Rows) -> bool:
    """Whether rows come as JSON text."""
    if isinstance(given, Stdin):
        return True
    return isinstance(given, (str, Path)) and loader_of(Path(given)) != "parquet"


# --- texts, one a line ---


def _line(number: int, text: str, tokenizer) -> Row:
    try:
        if not text.strip():
            raise BadRow("the line is empty")
        return Row(number, texts_to_score("", [text], tokenizer), [text])
    except BadRow as problem:
        return Row(number, str(problem), [])


def _texts(given: Rows) -> Iterator[str]:
    if isinstance(given, (str, Path, Stdin)):
        with _lines(given) as found:
            yield from (line.rstrip("\r\n") for line in found)
        return
    for text in given:
        if not isinstance(text, str):
            raise UserError("with lines, every row is a text")
        yield text


@contextmanager
def _lines(given: str | Path | Stdin) -> Iterator[Iterable[str]]:
    """Raises UserError: a file that cannot be opened, or read to its end."""
    if isinstance(given, Stdin):
        yield given
        return
    path = Path(given)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield _decoded(file)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from error


# --- rows of JSON lines, CSV and Parquet ---


def _stored(given: Rows) -> Iterator[tuple[int, dict]]:
    """Numbers and rows as they are stored: those of a text file as JSON in one column ``json``."""
    if not isinstance(given, (str, Path, Stdin)):
        for number, row in enumerate(given, 1):
            if not isinstance(row, dict):
                raise UserError(f"row {number} is {type(row).__name__}, not a dict; lines takes texts")
            yield number, row
        return
    loader = None if isinstance(given, Stdin) else _loader(Path(given))
    if loader == "parquet":
        yield from _parquet_rows(Path(str(given)))
    elif loader:
        try:
            yield from ((row["number"], row) for row in text_rows(str(given), ""))
        except (OSError, EOFError) as error:  # gzip's, in the middle of a file
            raise UserError(f"{given}: {first_line(error)}") from error
    else:
        with _lines(given) as lines:
            yield from ((row["number"], row) for row in line_rows(lines))


def _loader(path: Path) -> str | None:
    """Which reader a file wants; None: a pipe, which has JSON lines."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one of its files")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        return None
    require_no_lfs_pointer(path)
    loader = loader_of(path)
    if loader is None:
        raise UserError(f"{path}: give a file ending in .jsonl, .json, .csv or .parquet, or --lines for texts")
    return loader


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}, after row {number}: {first_line(error)}") from error


def _with_layout(given: Rows, names: dict[str, str], chat: bool, tokenizer, skip: int) -> Iterator[Row]:
    """Read rows by the layout of the first that can be read."""
    source, stored = settled(given, names, chat)
    for number, row in islice(stored, skip, None):
        yield row_of(number, row, source, chat, tokenizer)


def settled(given: Rows, names: dict[str, str], chat: bool) -> tuple[Source, Iterator[tuple[int, dict]]]:
    """How rows are to be read, by the first that can be, and each row's number with the row as it is stored.

    Raises:
        UserError: no such file, or one of a kind that cannot be read.
    """
    source, stored = Source(name_of(given), None, is_text=_is_text(given)), _stored(given)
    first = list(islice(stored, ROWS_TO_KNOW_BY))
    _settle(source, first, names, chat)
    return source, chain(first, stored)


def _settle(source: Source, first: list[tuple[int, dict]], names: dict[str, str], chat: bool) -> None:
    for _, row in first:
        try:
            source.columns = tuple(source.named(row))
        except BadRow:
            continue  # it is said of the row
        source.names = names_in(source, names)
        source.layout = layout_of(source.fields(), source.named(row), chat)
        if str(source.layout):
            logger.info(f"{source.name}: read {source.layout}")
        return


def row_of(number: int, stored: dict, source: Source, chat: bool, tokenizer, to_score: bool = True) -> Row:
    """A row as it is stored → its texts, or why it cannot be scored; without ``to_score``, or trained on."""
    try:
        fields = _with_answer(source.read(stored))
        texts = read_row(fields, tokenizer, chat, to_score)
        return Row(number, texts, _answers(fields))
    except BadRow as problem:
        return Row(number, str(problem), [])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = printable(f"the row lacks what its layout needs ({type(error).__name__}: {error})")
        return Row(number, reason, [])


def _with_answer(row: dict) -> dict:
    """A row that is a whole chat and no more has that to score."""
    if any(row.get(name) is not None for name in (*PAIR, "response", "responses")):
        return row
    whole = next((row[name] for name in CHATS if is_chat(row.get(name))), None)
    whole = whole or (row.get("prompt") if is_chat(row.get("prompt")) else None)
    if whole is None or whole[-1]["role"] != "assistant":
        return row
    return {name: value for name, value in row.items() if name != "prompt"} | {"response": whole}


def _answers(row: dict) -> list:
    """As :func:`reward_model.data.rows.read_row` takes them."""
    if all(row.get(name) not in (None, "") for name in PAIR):
        return [row[name] for name in PAIR]
    if row.get("responses") is not None:
        return row["responses"]
    return [row["response"]] if row.get("response") is not None else [row.get(name) for name in PAIR]
