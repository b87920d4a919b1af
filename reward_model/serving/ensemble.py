# SPDX-License-Identifier: Apache-2.0
"""What several models make of pairs: each scores all of them, then the rows are written with their strengths.

The models come one after the other, so that one at a time is in memory. What a model makes of the rows is a file of
numbers, r(chosen) − r(rejected) of each row by each of its heads, in a folder beside the output. Each rank has a file
of its own, with every W-th block of rows, W the number of ranks; a block is scored as it would be alone, so that
neither the number of ranks nor an interruption changes a number. At the end the first rank reads the rows once more and
writes them.

Notation: m models, K heads of one of them, v votes (the heads of all models together), n rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext, join, prepare_environment
from reward_model.common.errors import UserError
from reward_model.common.files import flush_folder, remove_folder, write_whole
from reward_model.common.locking import locked
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.common.words import counted, in_common, without_numbers
from reward_model.config.ensemble import EnsembleConfig
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoded
from reward_model.data.files import loader_of
from reward_model.data.rows import PAIR
from reward_model.data.sources import amount_of, require_one_layout
from reward_model.data.strengths import COLUMNS, strengths_of_differences
from reward_model.data.training_rows import Stored, TrainingRows
from reward_model.inference import HUB_NAME, Reading, RewardScorer, load_to_read, require_head
from reward_model.serving.inputs import row_of
from reward_model.serving.output import fingerprint, require_same

BLOCK = 256  # rows, sorted by length among themselves
PARTS = ".parts"  # of the folder beside the output
NUMBER = np.dtype("<f8")
DECILES = 10
NOT_A_PAIR = "it has no chosen and rejected answer"


@dataclass(frozen=True)
class Judge:
    """A model, and which rows it judges, (n,) bool; None: all of them."""

    model: str
    rows: np.ndarray | None = None


def ensemble(models: str | Sequence[str], config: EnsembleConfig) -> dict[str, Any]:
    """Let each model judge all pairs of a data set, and write its rows with what they make of them together.

    Every process of a launch calls it. Columns and order of the rows stay; those of
    :mod:`reward_model.data.strengths` are added, or replaced where the row has them. A row without a pair is written as
    it is.

    >>> import reward_model
    >>> config = reward_model.EnsembleConfig(data=["train.jsonl"], output="judged.jsonl")
    >>> reward_model.ensemble(["one", "two", "three"], config)["below_zero"]  # doctest: +SKIP
    0.24

    Returns:
        The summary that ``--json`` prints; on ranks other than the first an empty dict.

    Raises:
        UserError: a model that does not load, data that cannot be read, or an output that is in use.
    """
    models = [models] if isinstance(models, str) else list(models)
    if not models:
        raise UserError("name the models: folders or hub names")
    if config.folds:
        raise UserError("folds is for the command, which trains their models: reward-model ensemble --folds")
    if twice := [model for model, count in Counter(models).items() if count > 1]:
        raise UserError(f"{twice[0]} is given twice: it would agree with itself")
    require_free(config)
    for model in models:  # before the first of them has judged everything
        if not Path(model).is_dir() and not HUB_NAME.fullmatch(model):
            raise UserError(f"{model}: no such folder")
        require_head(model, config.trust_remote_code)
    prepare_environment()
    return judge_with([Judge(model) for model in models], config, join(config.local_rank))


def output_of(config: EnsembleConfig) -> Path:
    """Where rows are written.

    Raises:
        UserError: no data, no name where none follows from the data, or one that is theirs or of another kind of file.
    """
    if not config.data:
        raise UserError("give --data: files, folders or hub names of rows")
    paths = [Path(amount_of(entry)[0]) for entry in config.data]
    if config.output:
        output = Path(config.output)
    elif len(paths) == 1 and (paths[0].is_file() or (loader_of(paths[0]) and not paths[0].is_dir())):  # or a typo
        output = paths[0].with_name(paths[0].name.split(".")[0] + ".strengths.jsonl")
    else:
        raise UserError("give --output: the data are not one file, beside which the rows would be written")
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: rows are written as JSON lines, in a file ending in .jsonl")
    for path in paths:
        if output.resolve() == path.resolve():
            raise UserError(f"--output {output} is the data: name another file")
        if path.is_dir() and path.resolve() in output.resolve().parents:
            raise UserError(f"--output {output} lies in {path}, and would be of the data: name a file elsewhere")
    return output


def require_free(config: EnsembleConfig) -> None:
    """Raises UserError: the output is there, or a run was interrupted and is not gone on with."""
    output = output_of(config)
    if output.exists():
        raise UserError(f"--output {output} is there: name another file, or remove it")
    parts = parts_of(output)
    if parts.exists() and any(parts.iterdir()) and not config.resume:
        raise UserError(f"{parts} is left of a run that was interrupted: --resume goes on with it, or remove it")


def rows_of(config: EnsembleConfig, chat: bool = False) -> TrainingRows:
    """The rows of ``--data``.

    Raises:
        UserError: they cannot be read, or not written to one file.
    """
    rows = TrainingRows.find(config.data, config.seed, config.names, config.split, chat)
    require_one_layout(rows.sources, output_of(config), chat)
    return rows


def identity_of(rows: TrainingRows) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {"rows": len(rows), "sha256": rows.sha256()}


def parts_of(output: Path) -> Path:
    """The folder in which work lies until the output is whole."""
    return output.with_name(output.name + PARTS)


def judge_with(judges: Sequence[Judge], config: EnsembleConfig, context: DistributedContext) -> dict[str, Any]:
    """Judge on all ranks, and write on the first; its summary, and nothing on the others."""
    output = output_of(config)
    parts = parts_of(output)
    read = cache(lambda chat: rows_of(config, chat))  # as some models read rows, and as others do
    rows = read(False)
    distributed.from_first(None)  # all have seen that the output is free before the first makes the folder
    with locked(parts, context, f"--output {output}"):
        given = distributed.from_first(identity_of(rows) if context.is_first else None)
        found = []
        for number, judge in enumerate(judges):
            logger.info(f"{judge.model}: model {number + 1} of {len(judges)}")
            scoring = Scoring.load(judge, config, context)
            if len(judges) == 1 and scoring.heads == 1:
                logger.warning("one model: strength_std is 0, and strength_agree 0 or 1")
            found.append(scoring.run(parts, number, given, read))
        of_ranks = distributed.gather_objects(found)  # and all files are whole
        of_models = {
            judge.model: list(notes_in_words([notes[number] for notes in of_ranks]))
            for number, judge in enumerate(judges)
        }
        for line in lines_of_models(of_models, is_of_all_rows=all(judge.rows is None for judge in judges)):
            logger.warning(line)
        return write(judges, found, config, rows, context.world_size) if context.is_first else {}


class Notes(NamedTuple):
    """What is told of a model's share of the rows.

    temperature, heads: of the model. cut: rows whose prompt lost its left. left: why rows were not judged, without
    numbers → how many, of the first its place and what it is called, and the reason with the numbers of all.
    """

    temperature: float
    heads: int
    cut: int
    left: dict[str, tuple[int, int, str, str]]


def notes_in_words(of_ranks: Sequence[Notes]) -> Iterator[str]:
    """The same of one model, from all ranks, in lines."""
    if cut := sum(notes.cut for notes in of_ranks):
        yield f"the prompts of {counted(cut, 'row')} lost their left, to fit the longest text (--max_seq_len)"
    for kind in dict.fromkeys(kind for notes in of_ranks for kind in notes.left):
        found = [notes.left[kind] for notes in of_ranks if kind in notes.left]
        _, first = min((place, origin) for _, place, origin, _ in found)
        reason = reduce(in_common, (each[3] for each in found))
        yield f"{counted(sum(each[0] for each in found), 'row')} not judged, {first} the first of them: {reason}"


def lines_of_models(said: dict[str, list[str]], is_of_all_rows: bool) -> Iterator[str]:
    """What is said of several models; of those that judged the same rows, what all have in common once.

    >>> list(lines_of_models({"a": ["one", "two"], "b": ["one"]}, is_of_all_rows=True))
    ['all models: one', 'a: two']
    """
    of_all = []
    if is_of_all_rows and len(said) > 1:
        of_all = [line for line in next(iter(said.values())) if all(line in lines for lines in said.values())]
    yield from (f"all models: {line}" for line in of_all)
    yield from (f"{model}: {line}" for model, lines in said.items() for line in lines if line not in of_all)


@dataclass(frozen=True)
class Scoring:
    """A model in memory that judges its share of the rows."""

    judge: Judge
    reward: RewardScorer
    reading: Reading
    config: EnsembleConfig
    context: DistributedContext

    @classmethod
    def load(cls, judge: Judge, config: EnsembleConfig, context: DistributedContext) -> Scoring:
        """Raises UserError: it does not load, or the attention that is wanted is not right for it."""
        device = context.device if config.device == "auto" else config.device
        reward, reading = load_to_read(
            judge.model, config.dtype, device, config.chat, config.chat_template, config.max_seq_len,
            config.trust_remote_code, novelty=False,
        )  # fmt: skip
        logger.info(reward.choose_attention(reading.max_seq_len, config.attention))
        return cls(judge, reward, reading, config, context)

    @property
    def heads(self) -> int:
        return self.reward.scorer.heads

    def run(self, parts: Path, number: int, given: dict[str, Any], read: Callable[[bool], TrainingRows]) -> Notes:
        """Write the differences of this rank's blocks of rows, those that are not there yet.

        Args:
            given: what tells these rows from others. read: the rows, by whether plain text becomes messages.

        Raises:
            UserError: what is there was begun with another model, other data, flags or ranks.
        """
        path = part_of(parts, number, self.context.rank)
        beside = path.with_suffix(".json")
        wanted = {"model": fingerprint(self.reward), "input": given, "flags": self._flags()}
        try:
            if path.exists() and beside.exists():
                require_same(path, _read(beside), wanted)
            else:
                path.unlink(missing_ok=True)
                write_whole(beside, json.dumps(wanted, indent=1) + "\n")
            return self._append(path, read(self.reading.chat))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error

    def _flags(self) -> dict[str, Any]:
        """That change a number, or which rank has it."""
        config, reading = self.config, self.reading
        found = {name: getattr(config, name) for name in ("columns", "chat_template", "dtype", "tokens_per_batch")}
        found |= {"chat": reading.chat, "max_seq_len": reading.max_seq_len, "ranks": self.context.world_size}
        if self.heads > 1:
            found["heads"] = self.heads
        if self.judge.rows is not None:
            found["rows"] = sha256_of_array(self.judge.rows)
        return found

    def _append(self, path: Path, rows: TrainingRows) -> Notes:
        size = BLOCK * self.heads * NUMBER.itemsize
        done = path.stat().st_size // size if path.exists() else 0
        left: dict[str, tuple[int, int, str, str]] = {}
        cut = 0
        with path.open("ab") as file:
            file.truncate(done * size)  # of a block that was not written to its end
            if done:
                logger.info(f"{path.name}: goes on after {counted(done * BLOCK, 'row')}")
            step = BLOCK * self.context.world_size
            shown = {"total": len(rows), "initial": min(done * step, len(rows)), "desc": "judging", "unit": "row"}
            bar = progress(**shown, disable=None if self.context.is_first else True)
            for start in range(done * step + BLOCK * self.context.rank, len(rows), step):
                block = list(rows.part(start, min(start + BLOCK, len(rows))))
                differences, reasons, shortened = self._differences(start, block)
                cut += shortened
                for at, reason in reasons:
                    kind, stored = without_numbers(reason), block[at]
                    mine = (0, start + at, rows.origin(stored.source, stored.number), reason)
                    count, place, origin, words = left.get(kind, mine)
                    left[kind] = (count + 1, place, origin, in_common(words, reason))
                file.write(differences.astype(NUMBER).tobytes())
                file.flush()
                bar.update(min(step, len(rows) - bar.n))
            bar.close()
            os.fsync(file.fileno())
        return Notes(self.reward.temperature, self.heads, cut, left)

    def _differences(self, start: int, block: list[Stored]) -> tuple[np.ndarray, list[tuple[int, str]], int]:
        """r(chosen) − r(rejected) of each row of a block by each head, (rows, K), NaN where there is none; why not, as
        place in the block and reason; and of how many rows the prompt was cut."""
        found = np.full((len(block), self.heads), np.nan)
        mine = [at for at in range(len(block)) if self.judge.rows is None or self.judge.rows[start + at]]
        reasons = []
        texts, places = [], []
        for at in mine:
            stored = block[at]
            row = row_of(
                stored.number, stored.row, stored.source, self.reading.chat, self.reward.tokenizer, to_score=False
            )
            if isinstance(row.texts, str):
                reasons.append((at, row.texts))
            elif tuple(row.texts.names) != PAIR:
                reasons.append((at, NOT_A_PAIR))
            else:
                texts.append(row.texts)
                places.append(at)
        good, cut = [], 0
        for at, each in zip(places, self.reward.encoded(texts, self.reading.max_seq_len)):
            if isinstance(each, BadRow):
                reasons.append((at, str(each)))
            elif reason := unusable(each):
                reasons.append((at, reason))
            else:
                assert isinstance(each, Encoded)
                good.append((at, each.row))
                cut += each.cut
        scores = self.reward.scores_of_heads([row for _, row in good], self.config.tokens_per_batch) if good else []
        for (at, _), (chosen, rejected) in zip(good, scores):
            if np.isfinite(chosen - rejected).all():
                found[at] = chosen - rejected
            else:
                reasons.append((at, "a score is not finite; --dtype fp32 has a wider range"))
        return found, reasons, cut


def unusable(pair: Encoded) -> str:
    """Why training would not take a pair that can be scored; empty: it would."""
    if any(pair.empty):
        return f"{PAIR[list(pair.empty).index(True)]} is empty once tokenized"
    return "chosen and rejected are equal once tokenized" if pair.row.responses[0] == pair.row.responses[1] else ""


def _read(beside: Path) -> dict[str, Any]:
    """What a part was begun with. Raises UserError: it is not JSON."""
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {beside} is not JSON") from error


def sha256_of_array(values: np.ndarray) -> str:
    """Of what is in it."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def part_of(parts: Path, number: int, rank: int) -> Path:
    """The file of a rank with the differences of a model."""
    return parts / f"differences-{number:03}-{rank:03}.f64"


class Parts:
    """The differences that all models and ranks have written, block by block.

    heads: of each model, (m,).
    """

    def __init__(self, folder: Path, heads: Sequence[int], ranks: int):
        self.ranks = ranks
        self.files = [[_numbers_in(part_of(folder, m, r), k) for r in range(ranks)] for m, k in enumerate(heads)]

    def of_block(self, start: int, size: int) -> np.ndarray:
        """Of rows from a place on, (v, rows); NaN where a model has none."""
        turn, rank = divmod(start // BLOCK, self.ranks)
        found = [files[rank][turn * BLOCK : turn * BLOCK + size] for files in self.files]
        assert all(len(each) == size for each in found)  # every rank has been through all of its rows
        return np.concatenate([each.T for each in found])

    def model(self, number: int) -> Iterator[np.ndarray]:
        """All numbers of a model that are not NaN, the mean over its heads, a part at a time."""
        for values in self.files[number]:
            for first in range(0, len(values), 1 << 16):
                part = values[first : first + (1 << 16)].mean(1)
                yield part[np.isfinite(part)]


def _numbers_in(path: Path, heads: int) -> np.ndarray:
    """(rows, K)."""
    return np.memmap(path, NUMBER, "r").reshape(-1, heads) if path.stat().st_size else np.zeros((0, heads), NUMBER)


def write(
    judges: Sequence[Judge], found: Sequence[Notes], config: EnsembleConfig, rows: TrainingRows, ranks: int
) -> dict[str, Any]:
    """Write the rows with their strengths, and say what these are like.

    Args:
        found: what is told of each model.

    Raises:
        UserError: no row was judged, or the output cannot be written.
    """
    output = output_of(config)
    heads = [notes.heads for notes in found]
    parts = Parts(parts_of(output), heads, ranks)
    of_models = [
        _about(judge.model, notes.heads, parts.model(number))
        for number, (judge, notes) in enumerate(zip(judges, found))
    ]
    scales = _scales(config, of_models, [notes.temperature for notes in found])
    of_votes = np.repeat(scales, heads)[:, None]
    tally = Tally()
    partial = parts_of(output) / "rows.jsonl"
    try:
        with partial.open("wb") as file:
            bar = progress(total=len(rows), desc="writing", unit="row")
            for start in range(0, len(rows), BLOCK):
                block = list(rows.part(start, min(start + BLOCK, len(rows))))
                strengths = strengths_of_differences(parts.of_block(start, len(block)) / of_votes, heads)
                for stored, *strength in zip(block, *(each.tolist() for each in strengths)):
                    file.write(tally.line(stored.columns(), strength))
                bar.update(len(block))
            bar.close()
            file.flush()
            os.fsync(file.fileno())
        if not len(tally.means):
            raise UserError(f"--data {' '.join(config.data)}: no row has a pair that a model could judge")
        os.replace(partial, output)
        flush_folder(output.parent)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    for line in tally.lines():
        logger.warning(line)
    with suppress(OSError):
        remove_folder(parts_of(output))
    models = [about | {"scale": float(scale)} for about, scale in zip(of_models, scales)]
    return {"output": str(output), "models": models} | tally.summary()


def _about(model: str, heads: int, differences: Iterator[np.ndarray]) -> dict[str, Any]:
    """Of one model: how many pairs it judged, its accuracy, a tie counting half, and the size of its differences, each
    the mean over its heads."""
    number, right, squares = 0, 0.0, 0.0
    for values in differences:
        number += len(values)
        right += float((values > 0).sum() + 0.5 * (values == 0).sum())
        squares += float((values**2).sum())
    known = {"accuracy": right / number, "root_mean_square": math.sqrt(squares / number)} if number else {}
    return {"model": model, "heads": heads, "judged": number} | known


def _scales(config: EnsembleConfig, of_models: Sequence[dict], temperatures: Sequence[float]) -> np.ndarray:
    """What the differences of each model are divided by, those of all of its heads alike, (m,)."""
    if config.scale == "temperature":
        for about, temperature in zip(of_models, temperatures):
            if temperature == 1:
                logger.warning(f"--scale temperature: {about['model']} was saved with none, and stays as it is")
        return np.asarray(temperatures, np.float64)
    sizes = np.asarray([about.get("root_mean_square", 1.0) or 1.0 for about in of_models], np.float64)
    if config.scale == "std":
        return sizes
    if sizes.max() > 3 * sizes.min():
        logger.warning(
            f"the differences of the models are {sizes.min():.3g} to {sizes.max():.3g} in size, so that the mean goes "
            "by the largest: --scale std or temperature evens that out"
        )
    return np.ones(len(of_models))


class Tally:
    """Counts rows while they are written. 24 bytes are kept of each row that was judged."""

    def __init__(self) -> None:
        self.rows = self.unreadable = self.replaced = 0
        self.means, self.stds, self.agrees = array("d"), array("d"), array("d")

    def line(self, row: dict | None, strength: list) -> bytes:
        """A row with its strength, as a line of JSON; empty: it is none.

        Args:
            strength: mean, std, agree, and how many models judged it.
        """
        if row is None:
            self.unreadable += 1
            return b""
        self.rows += 1
        self.replaced += any(name in row for name in COLUMNS)
        row = {name: value for name, value in row.items() if name not in COLUMNS}
        if strength[-1]:
            row |= dict(zip(COLUMNS, strength))
            for values, value in zip((self.means, self.stds, self.agrees), strength):
                values.append(value)
        return line_of_row(row)

    def lines(self) -> Iterator[str]:
        """What was left out or replaced."""
        if self.unreadable:
            yield f"{counted(self.unreadable, 'row')} could not be read, and left out"
        if missing := self.rows - len(self.means):
            yield f"{missing} of {counted(self.rows, 'row')} judged by no model, and written without strengths"
        if self.replaced:
            yield f"{counted(self.replaced, 'row')} had strengths, which were replaced"

    def summary(self) -> dict[str, Any]:
        """How the strengths are distributed, and how many of the pairs the models deny."""
        means, stds, agrees = (np.asarray(values) for values in (self.means, self.stds, self.agrees))
        order = np.argsort(means, kind="stable")
        deciles = [
            {
                "rows": len(part),
                "from": float(means[part[0]]),
                "to": float(means[part[-1]]),
                "mean": float(means[part].mean()),
                "std": float(stds[part].mean()),
                "agree": float(agrees[part].mean()),
            }
            for part in np.array_split(order, min(DECILES, len(order)))
        ]
        return {
            "rows": self.rows,
            "judged": len(means),
            "unreadable": self.unreadable,
            "mean": float(means.mean()),
            "below_zero": float((means < 0).mean()),
            "agree": float(agrees.mean()),
            "deciles": deciles,
        }


def line_of_row(row: dict) -> bytes:
    """Of JSON lines, with what the row has, also NaN and halves of characters."""
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")


def described(summary: dict[str, Any]) -> Iterator[str]:
    """A summary as text, in lines."""
    for each in summary["models"]:
        said = [counted(each["judged"], "pair")]
        if each["heads"] > 1:
            said.append(f"by {each['heads']} heads")
        if each["judged"]:
            said += [f"accuracy {each['accuracy']:.4f}", f"differences of size {each['root_mean_square']:.3g}"]
        yield f"{each['model']}: {', '.join(said)}"
    yield (
        f"{summary['judged']} of {counted(summary['rows'], 'row')} judged: mean strength {summary['mean']:.4g}, "
        f"{summary['below_zero']:.1%} below 0, {summary['agree']:.1%} of the votes for chosen"
    )
    yield f"{'tenth':>8} {'rows':>8} {'from':>10} {'to':>10} {'mean':>10} {'std':>10} {'agree':>7}"
    for number, each in enumerate(summary["deciles"], 1):
        numbers = " ".join(f"{each[name]:10.4g}" for name in ("from", "to", "mean", "std"))
        yield f"{number:>8} {each['rows']:>8} {numbers} {each['agree']:>7.1%}"
    yield f"written to {summary['output']}"
