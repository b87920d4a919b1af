# SPDX-License-Identifier: Apache-2.0
"""What is kept of the rows once they have been read: numbers and hashes, so that a million pairs fit into memory.

Notation: r rows that can be used, p pairs that were judged in them, s styles.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from reward_model.common.words import in_common, without_numbers
from reward_model.data.preprocessing import is_glued
from reward_model.doctor.near import BINS, key_of, mixed, signature
from reward_model.doctor.reading import SETS, BadOne, Data, Row
from reward_model.doctor.style import STYLES, refuses, script_of, styles_of

KEPT_TEXTS = 20_000  # the last texts, of which nothing is computed again: those of a list's pairs follow each other
KEPT_ROWS = 100  # of a reason for which rows cannot be used
UNKNOWN = -1


class Facts(NamedTuple):
    """What is seen of one answer."""

    key: int
    length: int  # characters
    script: int
    styles: tuple[int, ...]
    refuses: bool


@dataclass
class Reasons:
    """Why rows cannot be used; reasons that differ in their numbers are one.

    By the reason without its numbers: count, of rows; words, with the numbers that all of them have; first, the first
    of them, as said in messages.
    """

    count: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, origin: str) -> None:
        kind = without_numbers(reason)
        self.count[kind] += 1
        self.words[kind] = in_common(self.words.get(kind, reason), reason)
        known = self.first.setdefault(kind, [])
        if len(known) < KEPT_ROWS:
            known.append(origin)

    def to_json(self) -> list[dict]:
        """Each reason, how many rows have it, and the first ``KEPT_ROWS`` of them; the most frequent first."""
        return [
            {"reason": self.words[kind], "count": count, "rows": self.first[kind]}
            for kind, count in self.count.most_common()
        ]

    @property
    def total(self) -> int:
        return sum(self.count.values())


class Signatures:
    """MinHash signatures of distinct texts by their key."""

    def __init__(self) -> None:
        self.keys, self.bytes = array("q"), bytearray()

    def add(self, key: int, text: str) -> None:
        found = signature(text)
        if found is not None:
            self.keys.append(key)
            self.bytes += found.tobytes()

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys (t,), sorted, and signatures (t, g)."""
        keys, places = np.unique(np.frombuffer(self.keys, np.int64), return_index=True)
        return keys, np.frombuffer(bytes(self.bytes), np.uint8).reshape(-1, BINS)[places]


class Ledger:
    """Filled row by row, then read as arrays.

    Of rows: source, index, number, prompt, and the set. Of pairs, as arrays (p,) of :meth:`pairs`: the row, keys of
    both answers, their lengths, scripts, whether they refuse, the position of the winner, strengths; (p, s) the sign of
    the difference in each style.
    """

    def __init__(self, data: Data):
        self.data = data
        self.reasons = {name: Reasons() for name in SETS}
        self.rows = Counter[str]()
        self.ties = Counter[str]()
        self.glued = Counter[str]()
        self.unjudged = Counter[str]()  # rows with a single answer, or without an order
        self.answers = Counter[str]()
        self.refusing = Counter[str]()
        self.scripts: list[str] = [""]
        self.script_counts = Counter[int]()
        self.of_row = {name: array(kind) for name, kind in (("source", "i"), ("index", "q"), ("number", "q"))}
        self.of_row |= {"prompt": array("q"), "set": array("b"), "script": array("h")}
        longs = ("row", "better", "worse")
        self.of_pair: dict[str, array] = {name: array("q") for name in longs}
        self.of_pair |= {name: array("i") for name in ("better_length", "worse_length")}
        self.of_pair |= {name: array("h") for name in ("better_script", "worse_script")}
        self.of_pair |= {name: array("b") for name in ("better_refuses", "worse_refuses", "position")}
        self.of_pair |= {name: array("d") for name in ("mean", "std", "agree")}
        self.styles = bytearray()
        self.prompts, self.texts = Signatures(), Signatures()
        self._facts = lru_cache(maxsize=KEPT_TEXTS)(self._look_at_answer)
        self._prompt = lru_cache(maxsize=KEPT_TEXTS)(self._look_at_prompt)

    def _look_at_answer(self, text: str) -> Facts:
        key = key_of(text)
        self.texts.add(key, text)
        return Facts(key, len(text.strip()), self._script(text), styles_of(text), refuses(text))

    def _look_at_prompt(self, text: str) -> tuple[int, int]:
        key = key_of(text)
        self.prompts.add(key, text)
        return key, self._script(text)

    def _script(self, text: str) -> int:
        name = script_of(text)
        if name not in self.scripts:
            self.scripts.append(name)
        return self.scripts.index(name)

    def add(self, row: Row | BadOne) -> None:
        """Take what is needed of a row."""
        of_set = self.data.sets[row.source]
        name = SETS[of_set]
        self.rows[name] += 1
        if isinstance(row, BadOne):
            self.reasons[name].add(row.reason, self.data.origin(row.source, row.number))
            return
        judged = row.texts.judged
        place = len(self.of_row["source"])
        prompt, script = self._prompt(row.texts.prompt)
        for key, value in (
            *(("source", row.source), ("index", row.index), ("number", row.number)),
            *(("prompt", prompt), ("set", of_set), ("script", script)),
        ):
            self.of_row[key].append(value)
        answers = [self._facts(text) for text in row.answers]
        self.answers[name] += len(answers)
        self.refusing[name] += sum(each.refuses for each in answers)
        if of_set == 0:
            self.script_counts.update(each.script for each in answers)
        self.glued[name] += is_glued(row.texts)
        if not judged.get("better"):
            is_tie = len(judged.get("ranks") or []) > 1
            self.ties[name] += is_tie
            self.unjudged[name] += not is_tie
        position = UNKNOWN if row.first_won is None else int(row.first_won)
        strength = row.strength if len(answers) == 2 else None  # of a list's many pairs it says nothing
        for i, j in zip(judged.get("better") or [], judged.get("worse") or []):
            self._add_pair(place, answers[i], answers[j], position, strength)

    def _add_pair(self, row: int, better: Facts, worse: Facts, position: int, strength) -> None:
        of = self.of_pair
        of["row"].append(row)
        of["position"].append(position)
        for side, facts in (("better", better), ("worse", worse)):
            of[side].append(facts.key)
            of[f"{side}_length"].append(facts.length)
            of[f"{side}_script"].append(facts.script)
            of[f"{side}_refuses"].append(facts.refuses)
        for name in ("mean", "std", "agree"):
            of[name].append(getattr(strength, name) if strength else math.nan)
        self.styles += bytes((one > other) - (one < other) + 1 for one, other in zip(better.styles, worse.styles))

    # as arrays

    def row_array(self, name: str) -> np.ndarray:
        column = self.of_row[name]
        return np.frombuffer(column, _KINDS[column.typecode]) if len(column) else np.zeros(0, _KINDS[column.typecode])

    def pair_array(self, name: str) -> np.ndarray:
        column = self.of_pair[name]
        return np.frombuffer(column, _KINDS[column.typecode]) if len(column) else np.zeros(0, _KINDS[column.typecode])

    def style_signs(self) -> np.ndarray:
        """1 where the better answer has more of a style, −1 where the worse has, (p, s)."""
        return np.frombuffer(bytes(self.styles), np.uint8).reshape(-1, len(STYLES)).astype(np.int8) - 1

    def pair_prompts(self) -> np.ndarray:
        return self.row_array("prompt")[self.pair_array("row")]

    def pair_sets(self) -> np.ndarray:
        return self.row_array("set")[self.pair_array("row")]

    def origin(self, row: int) -> str:
        return self.data.origin(self.of_row["source"][row], self.of_row["number"][row])

    def beside(self, row: int, other: int) -> str:
        """A row as it is called beside another one: by its number alone, if both are of one file."""
        same = self.of_row["source"][row] == self.of_row["source"][other]
        return f"row {self.of_row['number'][row]}" if same else self.origin(row)


_KINDS = {"q": np.int64, "i": np.int32, "h": np.int16, "b": np.int8, "d": np.float64}


def joint(*keys: np.ndarray) -> np.ndarray:
    """One key of several, in this order, (n,) uint64."""
    found = np.zeros(len(keys[0]), np.uint64)
    with np.errstate(over="ignore"):
        for each in keys:
            found = mixed(found * np.uint64(0x9E3779B97F4A7C15) + each.astype(np.uint64) + np.uint64(1))
    return found
