# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files, folders, saved data sets, the hub, and the names that upstream's step 2 knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from reward_model.common.errors import UserError, first_line
from reward_model.common.hub import look_into_the_cache_alone
from reward_model.common.logging import logger
from reward_model.data.comparisons import BadRow
from reward_model.data.files import Source, loader_of, read_file
from reward_model.data.layouts import BY_NAME, NAMED, NO_REJECTED, OWN, Layout, layout_of, unread

EVAL_NAMES = ("eval", "evaluation", "test", "validation", "valid", "dev")
SAVED = ("dataset_dict.json", "state.json")  # of a folder that save_to_disk made
SHARD = re.compile(r"-\d+-of-\d+")
AMOUNT = re.compile(r"(?P<path>.+):(?P<amount>\d+(\.\d+)?)")
EVAL_SPLITS = {"stanfordnlp/SHP": "validation"}
EVAL_SPLITS |= {name: "dev" for name in BY_NAME if name.startswith("Cohere/miracl")}


@dataclass(frozen=True)
class Splits:
    """Names of the splits to train and to evaluate on; None: those that are called so."""

    train: str | None = None
    evaluation: str | None = None

    def evaluations(self) -> tuple[str, ...]:
        """Names under which the evaluation rows may be: those of test_prefs beside train_prefs."""
        if self.evaluation:
            return (self.evaluation,)
        ending = self.train.removeprefix("train") if self.train and self.train.startswith("train") else ""
        return tuple(name + ending for name in EVAL_NAMES if name + ending != self.train)


def read_sources(
    path: str,
    seed: int,
    data_split: str | None = None,
    hold_out: bool = True,
    names: dict[str, str] | None = None,
    splits: Splits = Splits(),
    chat: bool = False,
    first: int | None = None,
) -> tuple[list[Source], list[Source]]:
    """Training and evaluation rows of one ``--data_path`` entry, without the number or share at its end.

    Args:
        path: a file, a folder with train and eval files, a folder made by ``save_to_disk``, ``local/jsonfile``, or a
            hub name, which may end in the name of a subset.
        seed: of the shuffle behind ``data_split``.
        data_split: upstream's shares of its three steps, "2,4,4": the second is used. None: every row.
        hold_out: split a data set that upstream knows, and that has no evaluation rows, 9 to 1 as upstream does.
        names: field → the column that holds it.
        splits: of a folder or a hub name.
        chat: rows of plain text become messages.
        first: read no more than so many rows of each file.

    Returns:
        Two lists; the second is empty where the entry has no evaluation rows of its own.

    Raises:
        UserError: nothing there, nothing readable, or no preferences in it.
    """
    for name in NO_REJECTED:
        if name in path:
            raise UserError(f"data set {name} has no rejected answers: a reward model needs preferences")
    known = _known(path)
    splits = replace(splits, evaluation=splits.evaluation or EVAL_SPLITS.get(known))
    train, evaluation = _find(path, splits, first)
    for source in train + evaluation:
        if len(source.rows) == 0:
            raise UserError(f"{source.name} holds no rows")
        source.names = names_in(source, names or {})
        source.layout = _layout(path, source, chat)
    _say_layouts(path, train + evaluation)
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


def training_sources(
    paths: Iterable[str],
    seed: int,
    names: dict[str, str] | None = None,
    splits: Splits = Splits(),
    chat: bool = False,
) -> tuple[list[Source], list[Source]]:
    """The training rows of some ``--data_path`` entries, none of them held out, and the evaluation rows beside them.

    Args:
        paths: entries, each with the number or share at its end, if it has one; of a file all rows.
        seed: of the rows that a number or share takes.

    Raises:
        UserError: as :func:`read_sources`, or a split of files.
    """
    paths = list(paths)
    require_splits(paths, splits.train)
    train, evaluation = [], []
    for entry in paths:
        path, amount = amount_of(entry)
        first, second = read_sources(path, seed, None, False, names, splits, chat)
        train += take(first, amount, seed, path)
        evaluation += second
    return train, evaluation


def require_splits(paths: list[str], split: str | None) -> None:
    """Raises UserError: a split is named, and nothing of the data could have one."""
    if split and paths and all(os.path.isfile(amount_of(path)[0]) for path in paths):
        raise UserError(f"--split {split}: {paths[0]} is one file, which has no splits")


def require_one_layout(sources: list[Source], output: str | Path, chat: bool = False) -> None:
    """Raises UserError: the rows of some sources, written to one file as they are, would be read in another way.

    Args:
        chat: as the sources were read.
    """
    first = sources[0]
    if any(source.layout != first.layout or source.names != first.names for source in sources):
        raise UserError("--output: the data have several layouts, and a file has one: take them one by one")
    if _layout(str(output), first, chat) == first.layout:
        return
    known = next((name for name, layout in BY_NAME.items() if layout == first.layout), None)
    instead = f"let its path have {known} in it, by which these rows are read" if known else "give it another path"
    raise UserError(f"--output {output}: its rows would be read in another way than those of {first.name}; {instead}")


def raw_sources(path: str, split: str | None = None, first: int | None = None) -> list[Source]:
    """Every file of an entry, or every split of a hub name or saved data set, as it is stored, without a layout.

    Args:
        split: the one to read; None: all.
        first: read no more than so many rows of each file.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    if os.path.isfile(path):
        return [read_file(Path(path), first)]
    if os.path.isdir(path) and not any((Path(path) / name).is_file() for name in SAVED):
        return [read_file(each, first) for each in _files(Path(path))]
    loaded = _saved(Path(path)) if os.path.isdir(path) else _loaded(path)
    if split and split not in loaded:
        raise UserError(f"{path} has no split named {split}, only {', '.join(loaded)}")
    return [Source(f"{path}, split {name}", loaded[name]) for name in loaded if split in (None, name)]


def _find(path: str, splits: Splits, first: int | None) -> tuple[list[Source], list[Source]]:
    if path == "local/jsonfile":
        folder = _jsonfile_folder()
        return [read_file(folder / "train.json", first)], [read_file(folder / "eval.json", first)]
    if os.path.isfile(path):
        return [read_file(Path(path), first)], []
    return _read_folder(Path(path), splits, first) if os.path.isdir(path) else _read_hub(path, splits)


def amount_of(entry: str) -> tuple[str, float | None]:
    """A ``--data_path`` entry → its path, and how much of it is wanted: a number of rows, or a share below 1.

    >>> amount_of("train.jsonl:0.5"), amount_of("train.jsonl:2000"), amount_of("train.jsonl")
    (('train.jsonl', 0.5), ('train.jsonl', 2000.0), ('train.jsonl', None))

    Raises:
        UserError: no rows are wanted, or a fraction of one.
    """
    found = AMOUNT.fullmatch(entry)
    if found is None or os.path.exists(entry):
        return entry, None
    amount = float(found["amount"])
    if amount == 0 or (amount > 1 and amount % 1):
        raise UserError(
            f"{entry}: end it with a share up to 1.0, such as :0.5, or with a number of rows, such as :2000"
        )
    is_whole = amount == 1 and "." in found["amount"]
    return found["path"], None if is_whole else amount


def take(sources: list[Source], amount: float | None, seed: int, name: str) -> list[Source]:
    """So many of the rows of some sources, drawn at random, in the order that they have."""
    if amount is None:
        return sources
    sizes = [len(source.rows) for source in sources]
    total = sum(sizes)
    wanted = max(1, round(amount * total)) if amount < 1 else min(int(amount), total)
    if amount > total:
        logger.warning(f"{name}: {int(amount)} rows are wanted, and there are {total}")
    else:
        logger.info(f"{name}: {wanted} of {total} rows, drawn at random")
    drawn = np.sort(np.random.RandomState(seed).permutation(total)[:wanted])
    parts = np.split(drawn, np.searchsorted(drawn, np.cumsum(sizes)[:-1]))
    starts = np.cumsum([0, *sizes[:-1]])
    return [source.select(part - start) for source, part, start in zip(sources, parts, starts) if len(part)]


def names_in(source: Source, names: dict[str, str]) -> dict[str, str]:
    """Those of ``names`` whose column a source has.

    Raises:
        UserError: no such field; the source has neither the column nor the field, or both.
    """
    columns = source.columns or source.rows.column_names
    for name, column in names.items():
        if name not in NAMED:
            raise UserError(f"--columns {name}={column}: no field {name}; there is {', '.join(NAMED)}")
        if column in columns and name in columns and column != name:
            raise UserError(f"--columns {name}={column}: {source.name} has a column {name}, too: keep one of them")
        if column not in columns and name not in columns:
            near = f"; it has {', '.join(columns)}"
            raise UserError(f"--columns {name}={column}: {source.name} has no such column{near}")
    return {name: column for name, column in names.items() if column in columns}


def _known(path: str) -> str:
    """The name of a data set that upstream knows by it; empty: it is none."""
    return next((name for name in BY_NAME if name in path), "")


def _layout(path: str, source: Source, chat: bool) -> Layout:
    """Of rows that are found under a path, which may name a data set that upstream knows."""
    if known := _known(path):
        return BY_NAME[known]
    for _, row in source.stored(None if source.is_text else 1):
        try:
            return layout_of(source.fields(), source.named(row), chat)
        except BadRow:
            continue  # it will be said of the row
    return OWN


def _say_layouts(path: str, sources: list[Source]) -> None:
    """How columns are read that have other names than ours, and which are not read, once each."""
    for layout in dict.fromkeys(str(source.layout) for source in sources):
        if layout:
            logger.info(f"{path}: read {layout}")
    found = dict.fromkeys(name for source in sources for name in unread(source.fields(), source.layout))
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


def _read_folder(folder: Path, splits: Splits, first: int | None) -> tuple[list[Source], list[Source]]:
    if any((folder / name).is_file() for name in SAVED):
        return _splits(str(folder), _saved(folder), splits)
    files = _files(folder)

    def named(names: tuple[str, ...]) -> list[Path]:
        # train.jsonl, train-00000-of-00003.parquet, data/train_pairs.json.gz, eval/part1.csv
        pattern = re.compile(rf"^({'|'.join(map(re.escape, names))})([^a-z]|$)", re.IGNORECASE)
        return [path for path in files if any(pattern.match(part) for part in path.relative_to(folder).parts)]

    evaluation = named(splits.evaluations())
    train = [path for path in named((splits.train or "train",)) if path not in evaluation]
    if not train and not splits.train and len(files) == 1 and not evaluation:  # pairs.jsonl
        train = files
    if not train:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:5]) or "no data file"
        wanted = splits.train or "train"
        raise UserError(f"{folder}: no file called {wanted}, {wanted}-… or {wanted}_… ({found} found); name the files")
    if splits.evaluation and not evaluation:
        raise UserError(f"{folder}: no file called {splits.evaluation}, {splits.evaluation}-… or {splits.evaluation}_…")
    kinds = dict.fromkeys(SHARD.split(str(path.relative_to(folder)))[0] for path in train)
    if len(kinds) > 1 and not splits.train:
        logger.warning(f"{folder}: trained on {', '.join(kinds)} together; --split names one of them")
    others = [str(path.relative_to(folder)) for path in files if path not in train + evaluation]
    if others:
        logger.warning(f"{folder}: files that are not read: {', '.join(others[:5])}{', …' if len(others) > 5 else ''}")
    return [read_file(path, first) for path in train], [read_file(path, first) for path in evaluation]


def _saved(folder: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder that save_to_disk made."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: {first_line(error)}") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _files(folder: Path) -> list[Path]:
    """The files of rows in a folder and those below it, also behind links; hidden ones are left out.

    Raises:
        UserError: a link to what is not there, a folder that cannot be listed, or what is no file and named like one.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in seen
        )
        for path in (Path(place, name) for name in names if name[0] != "."):
            if path.is_symlink() and not path.exists() and (loader_of(path) or not path.suffix):
                raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there")
            if loader_of(path) and path.exists() and not path.is_file():
                raise UserError(f"{path} is named like a file of rows, and is none that could be read twice")
            if loader_of(path):
                found.append(path)
    return sorted(found)


def _raise(error: OSError):
    raise UserError(f"{error.filename}: {error.strerror}") from error


def _read_hub(name: str, splits: Splits) -> tuple[list[Source], list[Source]]:
    return _splits(name, _loaded(name), splits)


def _loaded(name: str) -> dict[str, datasets.Dataset]:
    """The splits of a hub name."""
    if name.startswith((".", "/", "~")) or loader_of(Path(name)):
        raise UserError(f"{name}: no such file or folder")
    owner, *rest = name.split("/")
    repository = ["/".join([owner, *rest[:1]]), *rest[1:]]  # owner/name/subset
    look_into_the_cache_alone()
    try:
        return datasets.load_dataset(*repository)
    except Exception as error:
        raise UserError(f"{name}: no such file or folder, and the hub says: {first_line(error)}") from error


def _splits(name: str, loaded: dict, splits: Splits) -> tuple[list[Source], list[Source]]:
    for wanted in (splits.train, splits.evaluation):
        if wanted and wanted not in loaded:
            raise UserError(f"{name} has no split named {wanted}, only {', '.join(loaded)}")
    split = splits.train or "train"
    if split not in loaded:
        candidates = [each for each in loaded if each.startswith("train")] or [
            each for each in loaded if each not in EVAL_NAMES
        ]
        if len(candidates) != 1:
            raise UserError(f"{name} has no split named train, only {', '.join(loaded)}; take one with --split")
        split = candidates[0]
    train = [Source(f"{name}, split {split}", loaded[split])]
    for each in replace(splits, train=split).evaluations():
        if each in loaded and each != split:
            return train, [Source(f"{name}, split {each}", loaded[each])]
    return train, []
