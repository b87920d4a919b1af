# SPDX-License-Identifier: Apache-2.0
"""Files of rows: JSON, JSON lines, CSV and Parquet, each also compressed with gzip but for the last."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from reward_model.common.errors import UserError, first_line, require_no_lfs_pointer
from reward_model.data.comparisons import BadRow
from reward_model.data.layouts import OWN, Layout, number_of

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
NUMBERS = (  # columns that a CSV file writes as text
    *("margin", "rating", "probability", "score", "label"),
    *("chosen_score", "rejected_score", "score_chosen", "score_rejected"),
)


ROWS_AT_ONCE = 64  # taken from a table together: one by one costs a hundred times as much
UNTAKEN = (ValueError, OverflowError, pyarrow.ArrowException)  # UnicodeDecodeError is a ValueError


@dataclass
class Source:
    """Rows of one file or of one split.

    name: for messages, ``train.jsonl`` or ``Dahoas/rm-static, split train``.
    rows: the rows as read; those of a text file as JSON, in one column ``json``.
    layout: how they say what the fields of :mod:`reward_model.data.rows` say.
    numbers: each row's number in the file or split, from 1.
    columns: of a text file, the fields of its first row; where a later row lacks one, it is None.
    names: field → the column that holds it, where that has another name.
    is_text: the rows are those of a text file.
    """

    name: str
    rows: datasets.Dataset
    layout: Layout = OWN
    numbers: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    is_text: bool = False

    def __post_init__(self):
        if self.numbers is None and self.rows is not None:
            self.numbers = np.arange(1, len(self.rows) + 1)

    def select(self, indices: np.ndarray) -> Source:
        assert self.numbers is not None  # filled in when the object was made
        return replace(self, rows=self.rows.select(indices), numbers=self.numbers[indices])

    def stored(self, most: int | None = None, start: int = 0) -> Iterator[tuple[int, dict]]:
        """The rows as stored, the first so many of them from a place on, each with its number.

        Raises:
            UserError: one that cannot be taken out of its file, such as text in Parquet that is not UTF-8; names it.
        """
        assert self.numbers is not None
        end = len(self.numbers) if most is None else min(len(self.numbers), start + most)
        for first in range(start, end, ROWS_AT_ONCE):
            places = range(first, min(first + ROWS_AT_ONCE, end))
            try:
                columns = self.rows[first : places.stop]
                rows: Iterable[dict] = (dict(zip(columns, values)) for values in zip(*columns.values()))
            except UNTAKEN:
                rows = map(self._taken, places)  # says which it is
            for place, row in zip(places, rows):
                yield int(self.numbers[place]), row

    def _taken(self, place: int) -> dict:
        assert self.numbers is not None
        try:
            return self.rows[place]
        except UNTAKEN as error:
            raise UserError(f"{self.name}, row {self.numbers[place]} cannot be read: {first_line(error)}") from error

    def named(self, row: dict) -> dict:
        """A row as stored, its columns under the names by which they are read.

        Raises:
            BadRow: it could not be read, has a key twice, or more cells than its file has columns.
        """
        if self.is_text:
            row = dict.fromkeys(self.columns) | json.loads(row["json"], object_pairs_hook=_once)
        if UNREADABLE in row:
            raise BadRow(str(row[UNREADABLE]))
        if BEYOND in row:
            raise BadRow(f"the row has more cells than the file has columns, {row[BEYOND]!r} the first of them")
        if self.names:
            row = dict(row)
            row |= {name: row.pop(column) for name, column in self.names.items() if column in row}
        return row

    def read(self, row: dict) -> dict:
        """A row as stored → its fields.

        Raises:
            BadRow: it does not have what its layout says.
        """
        found = self.layout.read(self.named(row))
        if loader_of(Path(self.name)) == "csv":  # whose numbers are text, under whichever name
            found |= {name: number_of(found[name]) for name in NUMBERS if isinstance(found.get(name), str)}
        return found

    def fields(self) -> list[str]:
        """The columns of the first row, under the names by which they are read."""
        columns = self.columns or self.rows.column_names
        named = {column: name for name, column in self.names.items()}
        return [named.get(column, column) for column in columns]


UNREADABLE = "\0unreadable"  # the key of a row that is none: why it could not be read
BEYOND = "\0beyond"  # the key under which a row holds what it has beyond the header of its CSV file
SPACE, COMMA, COLON = re.compile(r"\s*"), re.compile(r"\s*,?\s*"), re.compile(r"\s*:\s*")
UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8
DOCUMENTS = ("instances", "data", "rows", "examples")  # keys under which one JSON object holds all rows


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"{twice} is given twice")
    return found


def loader_of(path: Path) -> str | None:
    """Which reader of ``datasets`` a file's name asks for; None: it is no file of rows."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return LOADERS.get(suffixes[-1].lower()) if suffixes else None


def read_file(path: Path, first: int | None = None) -> Source:
    """One file. Text formats are parsed here, row by row: datasets guesses a column's type from its first megabytes,
    and then makes text of numbers, nothing of the answer "None", and dates of dates.

    Args:
        first: read no more than so many rows, and cache nothing.

    Raises:
        UserError: no such kind of file, or it cannot be read; names the file.
    """
    loader = loader_of(path)
    if loader is None:
        raise UserError(f"{path}: give a file ending in {', '.join(LOADERS)}, or one of these with .gz")
    require_no_lfs_pointer(path)
    try:
        if loader == "parquet":
            return Source(str(path), _parquet(path, first))
        rows = _lines(path, first)
    except Exception as error:  # datasets wraps what the generator, Arrow and gzip raise
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
            raise UserError(f"{path} holds no rows") from error
        raise UserError(f"{path}: {first_line(cause)}") from error
    numbers = np.asarray(rows.with_format("numpy")["number"][:])
    readable = (row for row in map(json.loads, rows["json"]) if UNREADABLE not in row)
    columns = tuple(name for name in next(readable, ()) if name != BEYOND)
    return Source(str(path), rows.remove_columns("number"), numbers=numbers, columns=columns, is_text=True)


def _parquet(path: Path, first: int | None) -> datasets.Dataset:
    if first is None:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    with pyarrow.parquet.ParquetFile(path) as file:
        batches = list(islice(file.iter_batches(batch_size=first), 1))
        return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=file.schema_arrow))


def _lines(path: Path, first: int | None) -> datasets.Dataset:
    features = datasets.Features({"json": datasets.Value("string"), "number": datasets.Value("int64")})
    if first is not None:
        found = list(islice(text_rows(str(path), ""), first))
        if not found:
            raise UserError("it holds no rows")
        return datasets.Dataset.from_list(found, features=features)
    return datasets.Dataset.from_generator(
        text_rows, features=features, gen_kwargs={"path": str(path), "content": _digest(path)}
    )


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes, and of this code: what tells a changed file, or another reading of it, from an old."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_rows(path: str, content: str) -> Iterator[dict]:
    """The rows of a .json, .jsonl or .csv file as JSON text, each with its number; ``content`` names the version read.

    One that cannot be read comes with the reason why, so that it is counted among the others.

    Raises:
        UserError: a file in which nothing says where a row begins; says in which line.
    """
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        if loader_of(Path(path)) == "csv":
            yield from _csv_rows(file)
            return
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            text = file.read()
            _parse(text, None)
            yield from _array_rows(text)
        elif _is_row(next((line for line in file if line.strip()), "{}")):
            file.seek(0)
            yield from line_rows(file)
        else:
            file.seek(0)
            yield from _rows_of_either(file.read())


def line_rows(lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(line, number)


def _rows_of_either(text: str) -> Iterator[dict]:
    """Rows of a text whose first line is none: objects over several lines, or lines of which the first is broken."""
    try:
        found = list(_document_rows(text))
    except UserError as error:
        found = list(line_rows(text.splitlines(keepends=True)))
        if 2 * sum(UNREADABLE in json.loads(row["json"]) for row in found) >= len(found):
            raise UserError(_undecoded(text) or str(error)) from error
    yield from found


def _row(text: str, number: int) -> dict:
    """A row's JSON text with its number, or why it cannot be read."""
    try:
        if reason := _undecoded(text):
            raise ValueError(reason)
        if not isinstance(json.loads(text.rstrip()), dict):  # a string without an end ends with the line
            raise ValueError("it is not an object")
    except json.JSONDecodeError as error:
        return _unreadable(f"it is not JSON: {_where(error)}", number)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list in a list in a list …
        return _unreadable(_nested(error), number)
    return {"json": text, "number": number}


def _undecoded(text: str) -> str:
    found = UNDECODED.search(text)
    return f"it is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start() + 1}" if found else ""


def _unreadable(reason: str, number: int) -> dict:
    return {"json": json.dumps({UNREADABLE: reason}), "number": number}


def _where(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _nested(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _csv_rows(file) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or []
    if UNDECODED.search("".join(names)):
        raise UserError("the names of its columns are not UTF-8")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"column {twice[0]} is given twice")
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            beyond = [cell for cell in row.pop(None, None) or [] if cell.strip()]
            if UNDECODED.search("".join(cell for cell in (*row.values(), *beyond) if cell)):
                yield _unreadable("it is not UTF-8", number)
                continue
            row |= {name: number_of(row[name]) for name in NUMBERS if name in row}
            row |= {BEYOND: beyond[0]} if beyond else {}
            yield {"json": json.dumps(row), "number": number}
    except csv.Error as error:
        raise UserError(f"row {number + 1} is not CSV: {error}") from error


def _parse(text: str, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"line {line or error.lineno} is not JSON: {_where(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON cannot be read: {_nested(error)}") from error


def _is_row(line: str) -> bool:
    """Whether a first line is a row, and not the beginning of an object over several, nor one that holds all rows."""
    try:
        return _rows_inside(json.loads(line)) is None
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True


def _rows_inside(row) -> str | None:
    """The key under which one object holds all rows.

    Raises:
        UserError: there are two.
    """
    lists = {name: row[name] for name in DOCUMENTS if isinstance(row, dict) and isinstance(row.get(name), list)}
    found = [name for name, rows in lists.items() if all(isinstance(each, dict) for each in rows)]
    if len(found) > 1:
        raise UserError(f"it has rows under {' and under '.join(found)}: keep one of them")
    return found[0] if found else None


def _document_rows(text: str) -> Iterator[dict]:
    """The rows of objects over several lines: each a row, or one that holds all of them."""
    values = list(_values(text, 0, SPACE))
    if len(values) == 1 and (name := _rows_inside(_parse(values[0], None))):
        places = [place for key, place in _members(text) if key == name]
        if len(places) > 1:
            raise UserError(f"{name} is given twice")
        yield from _array_rows(text, places[0])
        return
    for number, value in enumerate(values, 1):
        yield _row(value, number)


def _array_rows(text: str, start: int = 0) -> Iterator[dict]:
    """The rows of a JSON array that begins after a place of a text; each as it is written there."""
    for number, value in enumerate(_values(text, text.index("[", start) + 1, COMMA, "]"), 1):
        yield _row(value, number)


def _members(text: str) -> Iterator[tuple[str, int]]:
    """The keys of an object, each with the place at which its value begins."""
    decoder = json.JSONDecoder()
    at = SPACE.match(text, text.index("{") + 1).end()  # type: ignore[union-attr]
    while text[at] != "}":
        key, end = decoder.raw_decode(text, at)
        place = COLON.match(text, end).end()  # type: ignore[union-attr]
        yield key, place
        _, end = decoder.raw_decode(text, place)
        at = COMMA.match(text, end).end()  # type: ignore[union-attr]


def _values(text: str, at: int, between: re.Pattern, closing: str = "") -> Iterator[str]:
    """JSON values from a place of a text on, as they are written, up to the end or the bracket that closes them.

    Raises:
        UserError: something that is no JSON; says in which line.
    """
    decoder = json.JSONDecoder()
    while True:
        found = between.match(text, at)
        at = found.end() if found else at
        if at == len(text) or text[at] == closing:
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"line {error.lineno} is not JSON: {_where(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {text.count(chr(10), 0, at) + 1} cannot be read: {_nested(error)}") from error
        yield text[at:end]
        at = end
