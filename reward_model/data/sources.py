# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files, folders, saved data sets, the hub, and the names that upstream's step 2 knows."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np

from reward_model.common.errors import UserError, first_line, require_no_lfs_pointer
from reward_model.common.logging import logger
from reward_model.data.rows import FIELDS, unread

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TRAIN_NAMES = ("train",)
EVAL_NAMES = ("eval", "test", "validation", "valid", "dev")
NUMBERS = (  # columns that a CSV file writes as text
    *("margin", "rating", "probability", "score", "label"),
    *("chosen_score", "rejected_score", "score_chosen", "score_rejected"),
)
NO_REJECTED = (  # names that upstream knows for its first step
    "pvduy/sharegpt_alpaca_oa_vicuna_format",
    "wangrui6/Zhihu-KOL",
    "Hello-SimpleAI/HC3-Chinese",
    "mkqa-Chinese",
    "mkqa-Japanese",
    "lmqg/qg_jaquad",
    "lmqg/qag_jaquad",
)


def as_it_is(row: dict) -> dict:
    return row


@dataclass
class Source:
    """Rows of one file or of one split.

    name: for messages, ``train.jsonl`` or ``Dahoas/rm-static, split train``.
    rows: the rows as read; those of a text file as JSON, in one column ``json``.
    adapt: row → a dict with the fields of :mod:`reward_model.data.rows`.
    numbers: each row's number in the file or split, from 1.
    columns: of a text file, the fields of its first row; where a later row lacks one, it is None.
    names: field → the column that holds it, where that has another name.
    """

    name: str
    rows: datasets.Dataset
    adapt: Callable[[dict], dict] = as_it_is
    numbers: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.numbers is None and self.rows is not None:
            self.numbers = np.arange(1, len(self.rows) + 1)

    def select(self, indices: np.ndarray) -> Source:
        assert self.numbers is not None  # filled in when the object was made
        return replace(self, rows=self.rows.select(indices), numbers=self.numbers[indices])

    def read(self, row: dict) -> dict:
        """A row as stored → its fields."""
        if list(row) == ["json"]:
            row = dict.fromkeys(self.columns) | json.loads(row["json"])
        if self.names:
            row = dict(row)
            row |= {name: row.pop(column) for name, column in self.names.items() if column in row}
        return self.adapt(row)

    def fields(self) -> list[str]:
        """The columns of the first row, under the names by which they are read."""
        columns = self.columns or self.rows.column_names
        named = {column: name for name, column in self.names.items()}
        return [named.get(column, column) for column in columns]


def read_sources(
    path: str,
    seed: int,
    data_split: str | None = None,
    hold_out: bool = True,
    names: dict[str, str] | None = None,
) -> tuple[list[Source], list[Source]]:
    """Training and evaluation rows of one ``--data_path`` entry.

    Args:
        path: a file, a folder with train and eval files, a folder made by ``save_to_disk``, ``local/jsonfile`` or a
            hub name.
        seed: of the shuffle behind ``data_split``.
        data_split: upstream's shares of its three steps, "2,4,4": the second is used. None: every row.
        hold_out: split a data set that upstream knows, and that has no evaluation rows, 9 to 1 as upstream does.
        names: field → the column that holds it.

    Returns:
        Two lists; the second is empty where the entry has no evaluation rows of its own.

    Raises:
        UserError: nothing there, nothing readable, or no preferences in it.
    """
    for name in NO_REJECTED:
        if name in path:
            raise UserError(f"data set {name} has no rejected answers: a reward model needs preferences")
    known = next((name for name in ADAPTERS if name in path), "")
    train: list[Source]
    evaluation: list[Source]
    if path == "local/jsonfile":
        folder = _jsonfile_folder()
        train, evaluation = [_read_file(folder / "train.json")], [_read_file(folder / "eval.json")]
    elif os.path.isfile(path):
        train, evaluation = [_read_file(Path(path))], []
    elif os.path.isdir(path):
        train, evaluation = _read_folder(Path(path), EVAL_SPLITS.get(known))
    else:
        train, evaluation = _read_hub(path, EVAL_SPLITS.get(known))
    for source in train + evaluation:
        source.adapt, source.names = ADAPTERS.get(known, as_it_is), _names_in(source, names or {})
        if len(source.rows) == 0:
            raise UserError(f"{source.name} holds no rows")
    _say_unread(path, [source for source in train + evaluation if source.adapt is as_it_is])
    if known and not evaluation and hold_out:
        whole = train
        train = [source.select(split_indices(len(source.rows), "9,1", 0, seed)) for source in whole]
        evaluation = [source.select(split_indices(len(source.rows), "9,1", 1, seed)) for source in whole]
        if not all(len(source.rows) for source in train + evaluation):
            raise UserError(f"{path} has too few rows to hold a tenth of them out: name some with --eval_data_path")
    if data_split is not None:
        train = [_phase_two(source, data_split, seed) for source in train]
        evaluation = [_phase_two(source, data_split, seed) for source in evaluation]
    return train, evaluation


def _names_in(source: Source, names: dict[str, str]) -> dict[str, str]:
    """Those of ``names`` whose column a source has.

    Raises:
        UserError: no such field; the source has neither the column nor the field, or both.
    """
    columns = source.columns or source.rows.column_names
    for name, column in names.items():
        if name not in FIELDS:
            raise UserError(f"--columns {name}={column}: no field {name}; there is {', '.join(FIELDS)}")
        if column in columns and name in columns and column != name:
            raise UserError(f"--columns {name}={column}: {source.name} has a column {name}, too: keep one of them")
        if column not in columns and name not in columns:
            near = f"; it has {', '.join(columns)}"
            raise UserError(f"--columns {name}={column}: {source.name} has no such column{near}")
    return {name: column for name, column in names.items() if column in columns}


def _say_unread(path: str, sources: list[Source]) -> None:
    """Name the columns that are not read, once."""
    found = dict.fromkeys(name for source in sources for name in unread(source.fields()))
    if found:
        logger.warning(f"{path}: columns that are not read: {', '.join(found)}")


def split_indices(size: int, shares: str, part: int, seed: int) -> np.ndarray:
    """Row numbers of one part of a shuffled data set, as upstream draws them.

    Args:
        size: rows in all.
        shares: comma-separated proportions, "2,4,4".
        part: which of them, from 0.

    Raises:
        UserError: shares that are not numbers, negative, or all zero, or too few of them.
    """
    try:
        proportions = np.array([float(share) for share in shares.split(",")])
    except ValueError:
        proportions = np.array([])
    if len(proportions) <= part or not np.isfinite(proportions).all() or proportions.min() < 0 or not proportions.any():
        raise UserError(f"--data_split {shares}: give the shares of upstream's three steps, such as 2,4,4")
    sizes = [round(share * size) for share in proportions / proportions.sum()]
    bounds = np.cumsum([0, *sizes])
    bounds[1:] -= bounds[-1] - size  # rounding: upstream takes the surplus from every bound
    order = np.random.RandomState(seed).permutation(size)
    return order[max(bounds[part], 0) : max(bounds[part + 1], 0)]


def _phase_two(source: Source, shares: str, seed: int) -> Source:
    picked = source.select(split_indices(len(source.rows), shares, 1, seed))
    logger.info(f"{source.name}: --data_split {shares} takes {len(picked.rows)} of {len(source.rows)} rows")
    if not len(picked.rows):
        raise UserError(f"{source.name}: --data_split {shares} leaves no rows of {len(source.rows)}")
    return picked


def _jsonfile_folder() -> Path:
    for folder in (Path.cwd() / "data", Path(__file__).resolve().parents[2] / "data"):
        if (folder / "train.json").is_file() and (folder / "eval.json").is_file():
            return folder
    raise UserError("local/jsonfile: put train.json and eval.json into a folder data/ where you start the run")


def _loader(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return LOADERS.get(suffixes[-1].lower()) if suffixes else None


def _read_file(path: Path) -> Source:
    """One file. Text formats are parsed here, row by row: datasets guesses a column's type from its first megabytes,
    and then makes text of numbers, nothing of the answer "None", and dates of dates."""
    loader = _loader(path)
    if loader is None:
        raise UserError(f"{path}: give a file ending in {', '.join(LOADERS)}, or one of these with .gz")
    require_no_lfs_pointer(path)
    try:
        if loader == "parquet":
            return Source(str(path), datasets.load_dataset("parquet", data_files=str(path), split="train"))
        rows = datasets.Dataset.from_generator(
            _text_rows,
            features=datasets.Features({"json": datasets.Value("string"), "number": datasets.Value("int64")}),
            gen_kwargs={"path": str(path), "content": _digest(path)},
        )
    except Exception as error:  # datasets wraps what the generator, Arrow and gzip raise
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
            raise UserError(f"{path} holds no rows") from error
        raise UserError(f"{path}: {first_line(cause)}") from error
    numbers = np.asarray(rows.with_format("numpy")["number"][:])
    return Source(str(path), rows.remove_columns("number"), numbers=numbers, columns=tuple(json.loads(rows[0]["json"])))


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes: what tells a changed file from an old one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text_rows(path: str, content: str) -> Iterator[dict]:
    """The rows of a .json, .jsonl or .csv file as JSON text, each with its number; ``content`` names the version read.

    Raises:
        UserError: a line that is not a JSON object; says which.
    """
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        if _loader(Path(path)) == "csv":
            csv.field_size_limit(2**31 - 1)
            reader = csv.DictReader(file, strict=True)
            number = 0
            try:
                for number, row in enumerate(reader, 1):
                    row.pop(None, None)  # cells beyond the header
                    row |= {name: _number(row[name]) for name in NUMBERS if name in row}
                    yield {"json": json.dumps(row), "number": number}
            except csv.Error as error:
                raise UserError(f"row {number + 1} is not CSV: {error}") from error
            return
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            for number, row in enumerate(_parse(file.read(), None), 1):
                _require_object(row, f"row {number}")
                yield {"json": json.dumps(row), "number": number}
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                _require_object(_parse(line, number), f"line {number}")
                yield {"json": line, "number": number}


def _parse(text: str, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"line {line or error.lineno} is not JSON: {error.msg} at column {error.colno}") from error


def _require_object(row, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object")


def _number(cell: str | None) -> float | str | None:
    """A CSV cell that should hold a number, or the word true or false; empty: none."""
    if not cell or not cell.strip():
        return None
    if cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    try:
        return float(cell)
    except ValueError:
        return cell


def _read_folder(folder: Path, eval_split: str | None) -> tuple[list[Source], list[Source]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise UserError(f"{folder}: {first_line(error)}") from error
        return _splits(str(folder), loaded if isinstance(loaded, dict) else {"train": loaded}, eval_split)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _loader(path)]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]

    def named(names):
        # train.jsonl, train-00000-of-00003.parquet, data/train_pairs.json.gz, eval/part1.csv
        pattern = re.compile(rf"^({'|'.join(names)})([^a-z]|$)", re.IGNORECASE)
        return [path for path in files if any(pattern.match(part) for part in path.relative_to(folder).parts)]

    evaluation = named((eval_split,) if eval_split else EVAL_NAMES)
    train = [path for path in named(TRAIN_NAMES) if path not in evaluation]
    if not train:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:5]) or "no data file"
        raise UserError(f"{folder}: no file whose name begins with train ({found} found)")
    return [_read_file(path) for path in train], [_read_file(path) for path in evaluation]


def _read_hub(name: str, eval_split: str | None) -> tuple[list[Source], list[Source]]:
    if name.startswith((".", "/", "~")) or _loader(Path(name)):
        raise UserError(f"--data_path {name}: no such file or folder")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        raise UserError(f"--data_path {name}: no such file or folder, and the hub says: {first_line(error)}") from error
    return _splits(name, loaded, eval_split)


def _splits(name: str, loaded: dict, eval_split: str | None) -> tuple[list[Source], list[Source]]:
    if "train" not in loaded:
        raise UserError(f"{name} has no split named train, only {', '.join(loaded)}")
    train = [Source(f"{name}, split train", loaded["train"])]
    for split in (eval_split,) if eval_split else EVAL_NAMES:
        if split in loaded:
            return train, [Source(f"{name}, split {split}", loaded[split])]
    return train, []


# Upstream's data sets: one row → prompt, chosen, rejected, in the words that DeepSpeed-Chat trains on.


def _dialogue(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": f" Human: {question} Assistant:", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _synthetic(row):
    return _dialogue(row["prompt"], row["chosen"], row["rejected"])


def _webgpt(row):
    # citations, "[1]", mean nothing without a browser; spaced ones first, as upstream does it
    answers = [re.sub(r"[(\[].*?[)\]]", "", re.sub(r" [(\[].*?[)\]]", "", row[f"answer_{i}"])) for i in (0, 1)]
    scores = float(row["score_0"]), float(row["score_1"])
    better = 0 if scores[0] >= scores[1] else 1
    pair = _dialogue(row["question"]["full_text"], answers[better], answers[1 - better])
    return pair | {"chosen_score": scores[better], "rejected_score": scores[1 - better]}  # equal: a tie


def _shp(row):
    answers = [row["human_ref_A"], row["human_ref_B"]]
    better = 0 if int(row["labels"]) == 1 else 1
    return _dialogue(row["history"], answers[better], answers[1 - better])


def _miracl(row):
    def first(passages):
        return passages[0]["text"] if passages else ""

    return _dialogue(row["query"], first(row["positive_passages"]), first(row["negative_passages"]))


def _jsonfile(row):
    texts = {name: row[name] for name in ("prompt", "chosen", "rejected") if isinstance(row.get(name), str)}
    return row | {name: f" {text}" for name, text in texts.items()}


ADAPTERS: dict[str, Callable[[dict], dict]] = {
    "Dahoas/rm-static": as_it_is,
    "Dahoas/full-hh-rlhf": as_it_is,
    "Dahoas/synthetic-instruct-gptj-pairwise": _synthetic,
    "yitingxie/rlhf-reward-datasets": as_it_is,
    "openai/webgpt_comparisons": _webgpt,
    "stanfordnlp/SHP": _shp,
    "Cohere/miracl-zh-queries-22-12": _miracl,
    "Cohere/miracl-ja-queries-22-12": _miracl,
    "local/jsonfile": _jsonfile,
}
EVAL_SPLITS = {"stanfordnlp/SHP": "validation"}
EVAL_SPLITS |= {name: "dev" for name in ADAPTERS if name.startswith("Cohere/miracl")}
