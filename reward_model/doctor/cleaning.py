# SPDX-License-Identifier: Apache-2.0
"""The training rows written once more, by strength: left out, swapped, with a probability, or with a margin."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from reward_model.common.errors import UserError
from reward_model.config.doctor import DoctorConfig
from reward_model.data.files import Source
from reward_model.data.layouts import SCORES
from reward_model.data.preprocessing import read_text
from reward_model.data.rows import Texts
from reward_model.data.sources import require_one_layout
from reward_model.data.strengths import AGREE, MEAN, THEIRS
from reward_model.doctor.findings import part
from reward_model.doctor.judgements import Judgements
from reward_model.doctor.ledger import Ledger
from reward_model.doctor.reading import PLAIN, TRAINING, pair_columns, strength_in
from reward_model.doctor.strengths import Strengths

PREFERENCES = ("preference_strength", "overall_preference", "preference")
WINNERS = ("winner", "preference", "preferred")
OF_THE_ORDER = ("margin", "rating", *("chosen_score", "rejected_score", "score_chosen", "score_rejected"))
DENY = (*OF_THE_ORDER, *(name for names in SCORES.values() for name in names), "score_A", "score_B")
THEIR_LABEL = "GPT4 label"  # of fnlp/hh-rlhf-strength-cleaned: 1, GPT-4 prefers chosen; 0, rejected; −1, not asked


@dataclass
class Cleaned:
    """What was written. kept_as_is: rows that are no pair, or have no strength. not_flipped: whose layout does not let
    their answers be swapped. flipped_above_zero: on whose order the models agree. too_small: flags whose share is less
    than half a pair."""

    path: str
    rows: int = 0
    written: int = 0
    unusable: int = 0
    removed: int = 0
    flipped: int = 0
    not_flipped: int = 0
    flipped_above_zero: int = 0
    removed_above_zero: int = 0
    softened: int = 0
    margins: int = 0
    margins_at_zero: int = 0
    repetitions: int = 0
    without_strength: int = 0
    lost_judgments: int = 0
    too_small: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        return dict(vars(self))

    def lines(self) -> list[str]:
        """What was done, counted."""
        said = [f"{self.path}: {part(self.written, self.rows, 'training row')} written"]
        for count, what in (
            (self.repetitions, "left out, as they repeat rows before them"),
            (self.removed, f"left out for their strength ({self.removed_above_zero:,} of them above 0)"),
            (self.flipped, f"swapped for their strength ({self.flipped_above_zero:,} of them above 0)"),
            (self.lost_judgments, "swapped ones lost a margin, rating or scores that deny the new order"),
            (self.not_flipped, "could not be swapped in their layout, and are as they were"),
            (self.softened, "have a new probability"),
            (self.margins, "have a new margin"),
            (self.margins_at_zero, "of these 0, as their strength is below it; --margin strength takes it as it is"),
            (self.without_strength, "without a strength are as they were"),
            (self.unusable, "left out, as they cannot be used"),
        ):
            if count:
                said.append(f"  {count:,} {what}")
        said += [f"  --{name}: the share is less than one pair, and nothing was done" for name in self.too_small]
        if self.flipped_above_zero or self.removed_above_zero:
            said.append("  the models agree with the labels of those above 0: a smaller share leaves them as they are")
        if self.flipped:
            said.append("  a pair that is there in both orders is a repetition once one of them is swapped: look again")
        return said


def write_cleaned(ledger: Ledger, strengths: Strengths, judged: Judgements, config: DoctorConfig) -> Cleaned:
    """Write the training rows as they are stored but for what the flags ask, each a line of JSON.

    Args:
        judged: in the training rows.

    Raises:
        UserError: no strengths, training rows of several layouts, or a file that cannot be written.
    """
    assert config.output
    empty = np.zeros(0, np.int64)
    flipped, removed = strengths.lowest(config.flip, config.remove) if config.needs_strengths else (empty, empty)
    data = ledger.data
    of_training = [source for source, of_set in zip(data.sources, data.sets) if of_set == TRAINING]
    require_one_layout(of_training, config.output, config.chat)
    rows = dict.fromkeys(flipped.tolist(), "flip") | dict.fromkeys(removed.tolist(), "remove")
    if config.drop_repetitions:  # whatever else would become of them
        rows |= dict.fromkeys(repetitions(judged), "repeat")
    known = {(ledger.of_row["source"][p], ledger.of_row["index"][p]): rows.get(p, "") for p in _of_training(ledger)}
    path = Path(config.output)
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(beside, path) as file:
            found = _write(file, data, known, config)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error
    found.too_small += [
        name for name, rows in (("flip", flipped), ("remove", removed)) if getattr(config, name) and not len(rows)
    ]
    return found


def repetitions(judged: Judgements) -> list[int]:
    """Rows all of whose judgements are there before, in the row itself or in others."""
    rows, pairs = np.unique(judged.rows, return_counts=True)
    again, repeated = np.unique(judged.rows[judged.repeated], return_counts=True)
    return again[repeated == pairs[np.searchsorted(rows, again)]].tolist()


def _of_training(ledger: Ledger) -> list[int]:
    return [place for place, of_set in enumerate(ledger.of_row["set"]) if of_set == TRAINING]


def _opened(beside: Path, path: Path) -> TextIO:
    return gzip.open(beside, "wt", encoding="utf-8") if path.suffix == ".gz" else beside.open("w", encoding="utf-8")


def _write(file: TextIO, data, known: dict[tuple[int, int], str], config: DoctorConfig) -> Cleaned:
    found = Cleaned(str(config.output))
    for place, source in enumerate(data.sources):
        if data.sets[place] != TRAINING:
            continue
        for index, (number, stored) in enumerate(source.stored()):
            found.rows += 1
            what = known.get((place, index))
            if what is None:
                found.unusable += 1
                continue
            row = _cleaned(source, stored, what, config, found, data.chat)
            if row is None:
                continue
            try:
                line = json.dumps(row, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise UserError(f"{source.name}, row {number}: it cannot be written as JSON: {error}") from error
            file.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")
            found.written += 1
    return found


def _cleaned(source: Source, stored: dict, what: str, config: DoctorConfig, found: Cleaned, chat: bool) -> dict | None:
    """A row as it is written; None: it is left out."""
    row = json.loads(stored["json"]) if source.is_text else dict(stored)
    strength = strength_in(source, stored)
    if what == "repeat":
        found.repetitions += 1
        return None
    if what == "remove":
        found.removed += 1
        found.removed_above_zero += bool(strength and strength.mean > 0)
        return None
    if not config.needs_strengths:
        return row
    if strength is None or not _is_pair(read_text(source, stored, PLAIN, chat)):
        found.without_strength += 1
        return row | ({"probability": row.get("probability")} if config.soften else {})
    if what == "flip":
        other = flipped(source, row, keeps_margin=config.margin)
        if other is not None and _is_swapped(source, stored, other, chat):
            found.flipped += 1
            found.flipped_above_zero += strength.mean > 0
            found.lost_judgments += any(row.get(name) is not None and other.get(name) is None for name in row)
            row, strength = other, strength.flipped()
        else:
            found.not_flipped += 1
    if config.soften:
        scaled = strength.mean / config.temperature
        row["probability"] = 1 / (1 + math.exp(-scaled)) if scaled > -700 else 0.0
        found.softened += 1
    if config.margin:
        row["margin"] = max(0.0, strength.mean)  # --margin column takes none below 0
        found.margins += 1
        found.margins_at_zero += strength.mean < 0
    return row


def _is_pair(texts: Texts | str) -> bool:
    return isinstance(texts, Texts) and len(texts.whole) == 2 and len(texts.judged["better"]) == 1


def _is_swapped(source: Source, stored: dict, other: dict, chat: bool) -> bool:
    """Whether the trainer reads the two answers of a row in the other order."""
    before = read_text(source, stored, PLAIN, chat)
    again = {"json": json.dumps(other, default=str)} if source.is_text else other
    after = read_text(replace(source, rows=None, numbers=None), again, PLAIN, chat)
    if not (_is_pair(before) and _is_pair(after)):
        return False
    assert isinstance(before, Texts) and isinstance(after, Texts)
    return _ordered(before) == _ordered(after)[::-1]


def _ordered(texts: Texts) -> list[str]:
    return [texts.whole[texts.judged[side][0]] for side in ("better", "worse")]


def flipped(source: Source, row: dict[str, Any], keeps_margin: bool = False) -> dict[str, Any] | None:
    """A row as stored, with its answers in the other order; None: its layout is none that could be swapped.

    Columns that belong to a side go with their answer; the strength and the probability are turned around; scores, a
    margin and a rating, which would deny the new order, are set to nothing.
    """
    pair = pair_columns(source)
    swapped = _other_judgment(source, row, pair) if pair else _other_side(source, row)
    if swapped is None:
        return None
    for name in DENY:
        if swapped.get(name) is not None:
            swapped[name] = None
    if isinstance(swapped.get("probability"), (int, float)):
        swapped["probability"] = 1 - swapped["probability"]
    for name in (MEAN, THEIRS[0]):
        if _number(swapped.get(name)) is not None:
            swapped[name] = -_number(swapped[name])  # type: ignore[operator]
    if _number(swapped.get(AGREE)) is not None:
        swapped[AGREE] = 1 - _number(swapped[AGREE])  # type: ignore[operator]
    if swapped.get(THEIR_LABEL) in (0, 1):
        swapped[THEIR_LABEL] = 1 - swapped[THEIR_LABEL]
    return swapped


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _other_side(source: Source, row: dict[str, Any]) -> dict[str, Any] | None:
    """Each column that names one side holds what the column that names the other side held."""
    names = {name: source.names.get(name, name) for name in ("chosen", "rejected")}
    partners = {names["chosen"]: names["rejected"], names["rejected"]: names["chosen"]}
    partners |= {"reject": "chosen", "chosen": "reject"} if "reject" in row and "rejected" not in row else {}
    partners |= {"response_j": "response_k", "response_k": "response_j"}
    for name in row:
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if re.search(rf"(?<![a-z]){one}(?![a-z])", name) and name.replace(one, other) in row:
                partners.setdefault(name, name.replace(one, other))
    found = {name: row[partners[name]] if partners.get(name) in row else value for name, value in row.items()}
    return found if found != row else None


def _other_judgment(source: Source, row: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any] | None:
    """The column that says which of two answers is better says the other one; the answers stay in their places."""
    found = dict(row)
    if "better_response_id" in row:
        return found | {"better_response_id": 1 - int(row["better_response_id"])}
    if "labels" in row and pair[0].startswith("human_ref"):
        return found | {"labels": 1 - int(float(row["labels"]))}
    for name in WINNERS:
        value = row.get(name)
        if isinstance(value, str) and (ending := re.fullmatch(r"(.*?)([abAB])\s*", value)):
            other = {"a": "b", "b": "a", "A": "B", "B": "A"}[ending[2]]
            return found | {name: ending[1] + other}
    if "winner_model_a" in row and "winner_model_b" in row:
        return found | {"winner_model_a": row["winner_model_b"], "winner_model_b": row["winner_model_a"]}
    for name in PREFERENCES:
        if (value := _number(row.get(name))) is not None:
            return found | {name: -value}
    return None
