# SPDX-License-Identifier: Apache-2.0
"""What several models make of pairs: each scores all of them, then the rows are written with their strengths.

The models come one after the other, so that one at a time is in memory. What a model makes of the rows is a file of
numbers, r(chosen) − r(rejected) of each row, in a folder beside the output. Each rank has a file of its own, with every
W-th block of rows, W the number of ranks; a block is scored as it would be alone, so that neither the number of ranks
nor an interruption changes a number. At the end the first rank reads the rows once more and writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext, join, prepare_environment
from reward_model.common.errors import UserError
from reward_model.common.files import flush_folder, remove_folder, sha256_of, write_whole
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.common.words import counted
from reward_model.config.ensemble import EnsembleConfig
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoded
from reward_model.data.files import UNREADABLE, Source
from reward_model.data.rows import PAIR
from reward_model.data.strengths import COLUMNS, strengths_of_differences
from reward_model.inference import HUB_NAME, Reading, RewardScorer, load_to_read, require_head
from reward_model.serving.inputs import row_of, settled
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
    """Let each model judge all pairs of a file, and write its rows with what they make of them together.

    Every process of a launch calls it. Columns and order of the rows stay; those of
    :mod:`reward_model.data.strengths` are added, or replaced where the row has them. A row without a pair is written as
    it is.

    >>> import reward_model
    >>> config = reward_model.EnsembleConfig(data="train.jsonl", output="judged.jsonl")
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
    if len(models) == 1:
        logger.warning("one model: strength_std is 0, and strength_agree 0 or 1")
    require_free(config)
    for model in models:  # before the first of them has judged everything
        if not Path(model).is_dir() and not HUB_NAME.fullmatch(model):
            raise UserError(f"{model}: no such folder")
        require_head(model, config.trust_remote_code)
    prepare_environment()
    return judge_with([Judge(model) for model in models], config, join(config.local_rank))


def require_free(config: EnsembleConfig) -> None:
    """Raises UserError: the data are not there, the output is, or a run was interrupted and is not gone on with."""
    data, output = config.paths()
    if not data.is_file():
        raise UserError(f"--data {data}: no such file")
    if output.exists():
        raise UserError(f"--output {output} is there: name another file, or remove it")
    parts = parts_of(output)
    if parts.exists() and any(parts.iterdir()) and not config.resume:
        raise UserError(f"{parts} is left of a run that was interrupted: --resume goes on with it, or remove it")


def parts_of(output: Path) -> Path:
    """The folder in which work lies until the output is whole."""
    return output.with_name(output.name + PARTS)


def judge_with(judges: Sequence[Judge], config: EnsembleConfig, context: DistributedContext) -> dict[str, Any]:
    """Judge on all ranks, and write on the first; its summary, and nothing on the others."""
    data, output = config.paths()
    parts = parts_of(output)
    distributed.from_first(None)  # all have seen that the output is free before the first makes the folder
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    given = {"bytes": data.stat().st_size, "sha256": sha256_of(data)}
    found = []
    for number, judge in enumerate(judges):
        logger.info(f"{judge.model}: model {number + 1} of {len(judges)}")
        found.append(Scoring.load(judge, config, context).run(parts, number, given))
    of_ranks = distributed.gather_objects(found)  # and all files are whole
    for number, judge in enumerate(judges):
        for line in notes_in_words([notes[number] for notes in of_ranks]):
            logger.warning(f"{judge.model}: {line}")
    temperatures = [notes.temperature for notes in found]
    return write(judges, temperatures, config, context.world_size) if context.is_first else {}


class Notes(NamedTuple):
    """What is told of a model's share of the rows.

    temperature: of the model. cut: rows whose prompt lost its left. left: why rows were not judged → how many, and the
    number of the first.
    """

    temperature: float
    cut: int
    left: dict[str, tuple[int, int]]


def notes_in_words(of_ranks: Sequence[Notes]) -> Iterator[str]:
    """The same of one model, from all ranks, in lines."""
    if cut := sum(notes.cut for notes in of_ranks):
        yield f"the prompts of {counted(cut, 'row')} lost their left, to fit the longest text (--max_seq_len)"
    for reason in dict.fromkeys(reason for notes in of_ranks for reason in notes.left):
        found = [notes.left[reason] for notes in of_ranks if reason in notes.left]
        first = min(number for _, number in found)
        count = sum(count for count, _ in found)
        yield f"{counted(count, 'row')} not judged, row {first} the first of them: {reason}"


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
            config.trust_remote_code,
        )  # fmt: skip
        if (heads := getattr(reward.scorer, "heads", 1)) > 1:
            logger.warning(f"{judge.model} has {heads} heads and counts as one model, by the mean of their scores")
        logger.info(reward.choose_attention(reading.max_seq_len, config.attention))
        return cls(judge, reward, reading, config, context)

    def run(self, parts: Path, number: int, given: dict[str, Any]) -> Notes:
        """Write the differences of this rank's blocks of rows, those that are not there yet.

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
            return self._append(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error

    def _flags(self) -> dict[str, Any]:
        """That change a number, or which rank has it."""
        config, reading = self.config, self.reading
        found = {name: getattr(config, name) for name in ("columns", "chat_template", "dtype", "tokens_per_batch")}
        found |= {"chat": reading.chat, "max_seq_len": reading.max_seq_len, "ranks": self.context.world_size}
        if self.judge.rows is not None:
            found["rows"] = sha256_of_array(self.judge.rows)
        return found

    def _append(self, path: Path) -> Notes:
        done = path.stat().st_size // (BLOCK * NUMBER.itemsize) if path.exists() else 0
        left: Counter[str] = Counter()
        first: dict[str, int] = {}
        cut = 0
        source, stored = settled(str(self.config.data), self.config.names, self.reading.chat)
        with path.open("ab") as file:
            file.truncate(done * BLOCK * NUMBER.itemsize)  # of a block that was not written to its end
            if done:
                logger.info(f"{path.name}: goes on after {counted(done * BLOCK, 'row')}")
            bar = progress(desc="judging", unit="row", disable=None if self.context.is_first else True)
            for start, block in blocks(stored):
                turn, rank = divmod(start // BLOCK, self.context.world_size)
                if rank == self.context.rank and turn >= done:
                    differences, reasons, shortened = self._differences(start, block, source)
                    cut += shortened
                    for at, reason in reasons:
                        left[reason] += 1
                        first.setdefault(reason, at)
                    file.write(differences.astype(NUMBER).tobytes())
                    file.flush()
                bar.update(len(block))
            bar.close()
            os.fsync(file.fileno())
        return Notes(self.reward.temperature, cut, {reason: (left[reason], first[reason]) for reason in left})

    def _differences(
        self, start: int, block: list[tuple[int, dict]], source: Source
    ) -> tuple[np.ndarray, list[tuple[int, str]], int]:
        """r(chosen) − r(rejected) of each row of a block, NaN where there is none; why not, as row and reason; and of
        how many rows the prompt was cut."""
        found = np.full(len(block), np.nan)
        mine = [at for at in range(len(block)) if self.judge.rows is None or self.judge.rows[start + at]]
        reasons = []
        texts, places = [], []
        for at in mine:
            row = row_of(*block[at], source, self.reading.chat, self.reward.tokenizer)
            if isinstance(row.texts, str):
                reasons.append((row.number, row.texts))
            elif tuple(row.texts.names) != PAIR:
                reasons.append((row.number, NOT_A_PAIR))
            else:
                texts.append(row.texts)
                places.append(at)
        good, cut = [], 0
        for at, each in zip(places, self.reward.encoded(texts, self.reading.max_seq_len)):
            if isinstance(each, BadRow):
                reasons.append((block[at][0], str(each)))
            else:
                assert isinstance(each, Encoded)
                good.append((at, each.row))
                cut += each.cut
        scores = self.reward.score_rows([row for _, row in good], self.config.tokens_per_batch) if good else []
        for (at, _), (chosen, rejected) in zip(good, scores):
            if math.isfinite(chosen - rejected):
                found[at] = chosen - rejected
            else:
                reasons.append((block[at][0], "a score is not finite; --dtype fp32 has a wider range"))
        return found, reasons, cut


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


def blocks(stored: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, list[tuple[int, dict]]]]:
    """The rows in blocks, each with the place of its first row, from 0."""
    start = 0
    while block := list(islice(stored, BLOCK)):
        yield start, block
        start += len(block)


class Parts:
    """The differences that all models and ranks have written, block by block."""

    def __init__(self, folder: Path, models: int, ranks: int):
        self.ranks = ranks
        self.files = [[_numbers_in(part_of(folder, m, r)) for r in range(ranks)] for m in range(models)]

    def of_block(self, start: int, size: int) -> np.ndarray:
        """Of rows from a place on, (models, rows); NaN where a model has none."""
        turn, rank = divmod(start // BLOCK, self.ranks)
        found = [files[rank][turn * BLOCK : turn * BLOCK + size] for files in self.files]
        assert all(len(each) == size for each in found)  # every rank has been through all of its rows
        return np.stack(found)

    def model(self, number: int) -> Iterator[np.ndarray]:
        """All numbers of a model that are not NaN, a part at a time."""
        for values in self.files[number]:
            for first in range(0, len(values), 1 << 16):
                part = np.asarray(values[first : first + (1 << 16)])
                yield part[np.isfinite(part)]


def _numbers_in(path: Path) -> np.ndarray:
    return np.memmap(path, NUMBER, "r") if path.stat().st_size else np.zeros(0, NUMBER)


def write(judges: Sequence[Judge], temperatures: Sequence[float], config: EnsembleConfig, ranks: int) -> dict[str, Any]:
    """Write the rows with their strengths, and say what these are like.

    Raises:
        UserError: no row was judged, or the output cannot be written.
    """
    data, output = config.paths()
    parts = Parts(parts_of(output), len(judges), ranks)
    of_models = [_about(judge.model, parts.model(number)) for number, judge in enumerate(judges)]
    scales = _scales(config, of_models, temperatures)
    tally = Tally()
    partial = parts_of(output) / "rows.jsonl"
    try:
        with partial.open("wb") as file:
            source, stored = settled(str(data), config.names, chat=False)
            bar = progress(desc="writing", unit="row")
            for start, block in blocks(stored):
                differences = parts.of_block(start, len(block)) / scales[:, None]
                rows = [fields_of(row, source) for _, row in block]
                for row, *strength in zip(rows, *(each.tolist() for each in strengths_of_differences(differences))):
                    file.write(tally.line(row, strength))
                bar.update(len(block))
            bar.close()
            file.flush()
            os.fsync(file.fileno())
        if not tally.rows:
            raise UserError(f"--data {data} holds no rows")
        if not len(tally.means):
            raise UserError(f"--data {data}: no row has a pair that a model could judge")
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


def _about(model: str, differences: Iterator[np.ndarray]) -> dict[str, Any]:
    """Of one model: how many pairs it judged, its accuracy, a tie counting half, and the size of its differences."""
    count, right, squares = 0, 0.0, 0.0
    for values in differences:
        count += len(values)
        right += float((values > 0).sum() + 0.5 * (values == 0).sum())
        squares += float((values**2).sum())
    known = {"accuracy": right / count, "root_mean_square": math.sqrt(squares / count)} if count else {}
    return {"model": model, "judged": count} | known


def _scales(config: EnsembleConfig, of_models: Sequence[dict], temperatures: Sequence[float]) -> np.ndarray:
    """What each model's differences are divided by, (models,)."""
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
        self.rows = self.unreadable = self.replaced = self.by_some = 0
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


def fields_of(stored: dict, source: Source) -> dict | None:
    """The columns of a row, as its file has them; None: it cannot be read."""
    row = json.loads(stored["json"]) if source.is_text else stored
    return None if UNREADABLE in row else row


def line_of_row(row: dict) -> bytes:
    """Of JSON lines, with what the row has, also NaN and halves of characters."""
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")


def described(summary: dict[str, Any]) -> Iterator[str]:
    """A summary as text, in lines."""
    for each in summary["models"]:
        accuracy = f"accuracy {each['accuracy']:.4f}, differences of size {each['root_mean_square']:.3g}"
        yield f"{each['model']}: {counted(each['judged'], 'pair')}" + (f", {accuracy}" if each["judged"] else "")
    yield (
        f"{summary['judged']} of {counted(summary['rows'], 'row')} judged: mean strength {summary['mean']:.4g}, "
        f"{summary['below_zero']:.1%} below 0, {summary['agree']:.1%} of the votes for chosen"
    )
    yield f"{'tenth':>8} {'rows':>8} {'from':>10} {'to':>10} {'mean':>10} {'std':>10} {'agree':>7}"
    for number, each in enumerate(summary["deciles"], 1):
        numbers = " ".join(f"{each[name]:10.4g}" for name in ("from", "to", "mean", "std"))
        yield f"{number:>8} {each['rows']:>8} {numbers} {each['agree']:>7.1%}"
    yield f"written to {summary['output']}"
