# SPDX-License-Identifier: Apache-2.0
"""What the files of a run say of it, as far as they are there and whole.

Notation: s training steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reward_model.common.errors import UserError
from reward_model.common.words import counted

METRICS, SETTINGS, ASSESSMENT = "metrics.jsonl", "run.json", "evaluation.json"
FINISHED, INTERRUPTED = "finished.json", "interrupted.json"  # marks of a run's end
# what the page shows of a step; the rest of its line is not kept, as a run may have a million of them
OF_A_STEP = (
    *("epoch", "loss", "accuracy", "learning_rate", "grad_norm", "chosen_mean", "rejected_mean", "padding"),
    *("tokens_per_second", "rows_per_second", "rows"),
)
FIRST_LINES = 5  # that could not be read, named one by one


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    name: of the folder. settings: of ``run.json``, with ``given`` and ``versions`` taken out. steps: numbers of the
    steps (s,), increasing. columns: name → numbers of these steps (s,), NaN where a step has none. evaluations: name of
    an evaluation set, empty for the only one → its lines, by step. alarms: their lines. skipped: steps whose loss or
    gradient was not finite. assessments, comparisons: of ``evaluation.json``. end: how the run ended, in words.
    problems: what could not be read, in sentences.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    assessments: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    end: str = ""
    is_whole: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def is_of_assessments(self) -> bool:
        """Whether the folder has assessments, and nothing of a run."""
        return bool(self.assessments) and not (self.settings or len(self.steps) or self.evaluations)

    @property
    def last_step(self) -> int:
        """The last one that was taken, skipped or evaluated; 0: none."""
        evaluated = (int(lines[-1]["step"]) for lines in self.evaluations.values())
        return max((int(self.steps[-1]) if len(self.steps) else 0), *self.skipped[-1:], *evaluated, 0)

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets, of evaluations and of assessments; one without a name is ""."""
        return list(dict.fromkeys([*self.evaluations, *map(set_of, self.assessments)]))

    @property
    def seconds(self) -> float:
        """The time that training steps took, without evaluations and checkpoints; NaN: no step says its speed."""
        rows, speed = self.column("rows"), self.column("rows_per_second")
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = rows / speed
        seconds = seconds[np.isfinite(seconds)]
        return float(seconds.sum()) if len(seconds) else math.nan

    def column(self, name: str) -> np.ndarray:
        """A number of each step (s,); NaN: the step has none."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))


def read_run(folder: Path, name: str = "", has_ended: bool = False) -> Run:
    """Read a run's folder. What is missing, half written or broken is left out, and said in ``problems``.

    Args:
        folder: a run's output folder.
        name: to show; empty: the folder's own.
        has_ended: the run is at its end, and will leave the mark of it.

    Raises:
        UserError: no such folder, or it has nothing of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the output folder of a run")
    problems: list[str] = []
    settings = _read_object(folder / SETTINGS, problems)
    found = _read_json(folder / ASSESSMENT, problems, f"no {ASSESSMENT}, so that figures of single answers are missing")
    assessments, comparisons = (_objects(found, name) for name in ("assessments", "comparisons"))
    lines = list(_read_lines(folder / METRICS, problems))
    if not (lines or settings or assessments):
        raise UserError(f"{folder}: no {METRICS}, {SETTINGS} or {ASSESSMENT} there that can be read: no run's folder")
    steps, columns = _columns([line for line in lines if line["split"] == "train"])
    given, versions = settings.pop("given", []), settings.pop("versions", {})
    end, is_whole = _end_of(folder, has_ended)
    return Run(
        name=name or folder.resolve().name,
        settings=settings,
        given=[each for each in given if isinstance(each, str)] if isinstance(given, list) else [],
        versions=versions if isinstance(versions, dict) else {},
        steps=steps,
        columns=columns,
        evaluations=_by_set(line for line in lines if line["split"] == "eval"),
        alarms=[line for line in lines if line["split"] == "alarm" and isinstance(line.get("message"), str)],
        skipped=sorted({line["step"] for line in lines if line["split"] == "bad_step"}),
        assessments=assessments,
        comparisons=comparisons,
        end=end,
        is_whole=is_whole,
        problems=problems,
    )


def set_of(values: dict[str, Any]) -> str:
    """The name of the evaluation set that a line or an assessment is of; empty: the only one."""
    name = values.get("set")
    return name if isinstance(name, str) else ""


def number(value: Any) -> float:
    """A number of a JSON file; NaN: it is none.

    >>> number(2), number(None), number("2"), number(True)
    (2.0, nan, nan, nan)
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan
    except OverflowError:  # of more than 308 digits
        return math.nan


def numbers(values: Any) -> np.ndarray:
    """A list of a JSON file as numbers (n,), NaN for what is none; anything else is empty."""
    return np.array([number(value) for value in values] if isinstance(values, list) else [], dtype=np.float64)


def _read_json(path: Path, problems: list[str], absent: str = "") -> Any:
    """The content of a JSON file; None: it cannot be read, which ``problems`` then says."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"There is {absent or f'no {path.name}'}.")
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}.")
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is no JSON, or half written; it was left out.")
    return None


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    found = _read_json(path, problems)
    return found if isinstance(found, dict) else {}


def _objects(found: Any, name: str) -> list[dict[str, Any]]:
    """The objects in a list of a file; none where it has no such list."""
    parts = found.get(name) if isinstance(found, dict) else None
    return [each for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []


def _read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` that say what they are of, and of which step."""
    broken: list[int] = []
    number_of_line, text = 0, ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number_of_line, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if _is_of_step(line):
                    yield line
                else:
                    broken.append(number_of_line)
    except FileNotFoundError:
        problems.append(f"There is no {METRICS}, so that nothing is known of the training.")
    except OSError as error:
        problems.append(f"{METRICS} could not be read to its end: {error.strerror}.")
    if broken and broken[-1] == number_of_line and not text.endswith("\n"):
        broken.pop()
        problems.append(f"The last line of {METRICS} is half written; it was left out.")
    if broken:
        more = ", …" if len(broken) > FIRST_LINES else ""
        named = f"{', '.join(map(str, broken[:FIRST_LINES]))}{more}"
        problems.append(f"{counted(len(broken), 'line')} of {METRICS} could not be read: {named}.")


def _is_of_step(line: Any) -> bool:
    if not (isinstance(line, dict) and isinstance(line.get("split"), str)):
        return False
    step = line.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53  # as JavaScript counts


def _columns(lines: list[dict[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps of training lines, increasing, and their numbers; of lines of the same step the last one counts."""
    steps = np.array([line["step"] for line in lines], dtype=np.int64)
    _, places = np.unique(steps[::-1], return_index=True)
    places = len(steps) - 1 - places
    columns = {}
    for name in OF_A_STEP:
        values = np.array([number(line.get(name)) for line in lines], dtype=np.float64)[places]
        if np.isfinite(values).any():
            columns[name] = values
    return steps[places], columns


def _by_set(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(set_of(line), {})[line["step"]] = line
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in found.items()}


def _end_of(folder: Path, has_ended: bool) -> tuple[str, bool]:
    """How a run ended, in words, and whether it was at its end."""
    if has_ended or (folder / FINISHED).is_file():
        return "finished", True
    if (folder / INTERRUPTED).is_file():
        mark = _read_object(folder / INTERRUPTED, [])
        by = f" by {mark['signal']}" if isinstance(mark.get("signal"), str) and mark["signal"] else ""
        return f"interrupted{by}; the same command goes on", False
    return "no mark of an end: it is running, or was killed", False
