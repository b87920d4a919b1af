# SPDX-License-Identifier: Apache-2.0
"""What a run writes down as it goes: ``metrics.jsonl``, and TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path

from reward_model.common.errors import UserError


def write_text(path: Path, text: str, mode: str = "w") -> None:
    """Raises UserError if it cannot be written."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class Records:
    """The first rank's lines of a run.

    folder: of ``metrics.jsonl``; None: none is written. monitor: DeepSpeed's, which knows TensorBoard.
    """

    def __init__(self, folder: Path | None, monitor, is_first: bool):
        self.folder, self.monitor, self.is_first = folder, monitor, is_first

    def add(self, values: dict) -> None:
        """A line of ``metrics.jsonl``; its numbers go to TensorBoard under ``split/name``."""
        if not self.is_first:
            return
        if self.folder:
            write_text(self.folder / "metrics.jsonl", json.dumps(values) + "\n", mode="a")
        if self.monitor.enabled:
            numbers = {k: v for k, v in values.items() if isinstance(v, float) and k != "epoch"}
            self.monitor.write_events(
                [(f"{values['split']}/{name}", number, values["step"]) for name, number in numbers.items()]
            )
