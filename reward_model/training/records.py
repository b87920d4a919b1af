# SPDX-License-Identifier: Apache-2.0
"""What a run writes down as it goes: ``metrics.jsonl``, and what trackers are told."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

from reward_model.common.files import flush_file
from reward_model.common.logging import logger
from reward_model.training.trackers import Trackers


class Records:
    """The first rank's lines of a run.

    folder: of ``metrics.jsonl``; None: none is written. lines: that were added, those before a checkpoint too. told:
    what trackers know already of a run that goes on: kind and step of each line after its checkpoint. A line that a
    full disk refuses is kept, and written when there is room.
    """

    def __init__(self, folder: Path | None, trackers: Trackers, is_first: bool):
        self.folder, self.trackers, self.is_first = folder, trackers, is_first
        self.lines, self.waiting, self.said = 0, "", False
        self.told: set[tuple[str, int]] = set()

    @property
    def path(self) -> Path | None:
        return self.folder / "metrics.jsonl" if self.folder else None

    def add(self, values: dict) -> None:
        """A line of ``metrics.jsonl``; its numbers go to the trackers as ``split/name`` or ``split/set/name``."""
        self.lines += 1
        if not self.is_first:
            return
        self.waiting += json.dumps(values) + "\n"
        self._write()
        kind, step = _kind_of(values), values["step"]
        if (kind, step) not in self.told:
            numbers = {k: v for k, v in values.items() if isinstance(v, float) and k != "epoch"}
            self.trackers.write([(f"{kind}/{name}", number, step) for name, number in numbers.items()])

    def _write(self) -> None:
        """Write what waits, as far as the disk lets."""
        if self.path is None:
            self.waiting = ""
        if self.path is None or not self.waiting:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, self.waiting)
        except OSError as error:
            if not self.said:
                logger.warning(
                    f"{self.path}: {error.strerror}; the run goes on, and its lines are written when they can be"
                )
            self.said = True
            return
        self.waiting = ""

    def flush(self) -> None:
        """Have what was added on the disk."""
        if self.path is not None and self.is_first:
            self._write()
            with suppress(OSError):
                flush_file(self.path)

    def cut(self, lines: int) -> None:
        """Go back to the first ``lines`` lines, when a run goes on from a checkpoint or begins again."""
        self.lines = lines
        if self.path is None or not self.is_first or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            kept = [line for line in islice(file, lines) if line.endswith(b"\n")]
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # torn when the run was killed
                    values = json.loads(line)
                    self.told.add((_kind_of(values), values["step"]))
        if len(kept) < lines:
            logger.warning(f"{self.path} has {len(kept)} of the {lines} lines that the run had written")
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, kept)))


def _kind_of(values: dict) -> str:
    """What a line is about: its split and, if it has a name, the evaluation set."""
    return "/".join(values[name] for name in ("split", "set") if name in values)


def append(path: Path, text: str) -> None:
    """Add text to a file, or none of it. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        size, content = file.tell(), text.encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise
