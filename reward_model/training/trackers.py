# SPDX-License-Identifier: Apache-2.0
"""Trackers that are told the numbers of a run: TensorBoard, Weights & Biases, CSV, Comet, by DeepSpeed's monitors.

DeepSpeed's engine would write to them as well, at steps that count samples, of which Weights & Biases then drops ours.
Therefore the monitors are made here, and the engine has none. One that fails in the middle of a run is left out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError, first_line, masked
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.training.stopping import Interrupted

SECTIONS = {  # of DeepSpeed's configuration → its module in deepspeed.monitor, and the class there
    "tensorboard": ("tensorboard", "TensorBoardMonitor"),
    "wandb": ("wandb", "WandbMonitor"),
    "csv_monitor": ("csv_monitor", "csvMonitor"),
    "comet": ("comet", "CometMonitor"),
}
KEPT = "trackers.json"  # in the output folder: by what a tracker knows the run when it goes on
PATIENCE = 60.0  # seconds for Weights & Biases to send what is left at the end
Event = tuple[str, float, int]  # tag, number, step


class Trackers:
    """Those of a run that work, on its first rank; elsewhere none.

    monitors: name → DeepSpeed's monitor. opened: the run of Weights & Biases is ours to finish.
    """

    def __init__(self, monitors: dict[str, Any] | None = None):
        self.monitors, self.opened = monitors or {}, False

    @classmethod
    def start(
        cls,
        sections: dict[str, Any],
        context: DistributedContext,
        folder: Path | None,
        run_name: str | None,
        values: dict[str, Any],
        goes_on: bool,
    ) -> Trackers:
        """Begin what DeepSpeed's configuration enables; every rank calls it.

        Args:
            sections: DeepSpeed's configuration.
            folder: of the output. A run of Weights & Biases lies there, and goes on by the id that is kept there.
            run_name: in Weights & Biases.
            values: the settings of the run.
            goes_on: the run goes on from a checkpoint, which a tracker that is out of reach does not hinder.

        Raises:
            UserError: one cannot begin, as without a login.
        """
        self, problem = cls(), ""
        asked = [name for name in SECTIONS if (sections.get(name) or {}).get("enabled")] if context.is_first else []
        for name in asked:
            try:
                if name == "wandb":
                    self._start_wandb(sections, folder, run_name, values)
                else:
                    self.monitors[name] = _monitor(name, sections)
            except Exception as error:  # whatever a tracker raises
                if goes_on:
                    logger.warning(f"{name}: {first_line(error)}; the run goes on without it")
                else:
                    problem = problem or f"--report_to {name}: {first_line(error)}"
        if problem := distributed.first_text(problem):
            self.close(1)
            raise UserError(problem)
        return self

    def _start_wandb(
        self, sections: dict[str, Any], folder: Path | None, run_name: str | None, values: dict[str, Any]
    ) -> None:
        """The run of Weights & Biases by its own environment, since DeepSpeed's monitor passes nothing else on."""
        import wandb

        is_theirs = wandb.run is not None  # somebody's script has begun one, as in a sweep
        defaults: dict[str, str | None] = {}
        if folder:
            defaults = {"WANDB_NAME": folder.resolve().name, "WANDB_DIR": str(folder), "WANDB_RESUME": "allow"}
            defaults["WANDB_RUN_ID"] = _kept_id(folder)
        names = {name: os.environ.get(name) or value for name, value in defaults.items()}
        names |= {"WANDB_NAME": run_name} if run_name else {}
        with _environment({name: value for name, value in names.items() if value}), _no_secrets_in_arguments():
            self.monitors["wandb"] = _monitor("wandb", sections)
        self.opened, run = not is_theirs, wandb.run
        if folder and run and not is_theirs:
            write_whole(folder / KEPT, json.dumps({"wandb": run.id}) + "\n")
        wandb.config.update(values, allow_val_change=True)

    def write(self, events: list[Event]) -> None:
        """Tell numbers to all; one that cannot take them is named once, and left out from then on."""
        for name, monitor in list(self.monitors.items()):
            try:
                if events:
                    monitor.write_events(events)
            except Exception as error:  # a disk that is full, a network that is gone, or a fault of the tracker's
                del self.monitors[name]
                logger.warning(f"{name}: {first_line(error)}; the run goes on without it")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.close(0 if kind in (None, Interrupted) else 1)

    def close(self, status: int = 0) -> None:
        """Have on the disk, or where it is sent to, what was told; the run ends with this status."""
        for name, monitor in self.monitors.items():
            with suppress(Exception):
                if name == "tensorboard":
                    monitor.summary_writer.close()
        if self.opened:
            import wandb

            def finish() -> None:
                with suppress(Exception):
                    wandb.finish(exit_code=status)

            finishing = threading.Thread(target=finish, name="wandb.finish", daemon=True)
            finishing.start()
            finishing.join(PATIENCE)  # a run that was asked to end has little time
            if finishing.is_alive():
                logger.warning(f"wandb: not all was sent within {PATIENCE:.0f} s; wandb sync sends the rest")
        self.monitors, self.opened = {}, False


def _monitor(name: str, sections: dict[str, Any]) -> Any:
    """DeepSpeed's monitor of a section."""
    from deepspeed.monitor.config import get_monitor_config

    module, kind = SECTIONS[name]
    config = getattr(get_monitor_config({name: sections[name]}), name)
    monitor = getattr(import_module(f"deepspeed.monitor.{module}"), kind)(config)
    if name == "csv_monitor":  # those that are there have their header
        monitor.filenames = [path.stem for path in Path(monitor.log_dir).glob("*.csv")]
    return monitor


def _kept_id(folder: Path) -> str | None:
    """The run of Weights & Biases that a folder's run has; None: it has none yet."""
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """With these variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _no_secrets_in_arguments() -> Iterator[None]:
    """Weights & Biases keeps the command line of the process with the run: without a token in it."""
    before = sys.argv
    sys.argv = without_tokens(before)
    try:
        yield
    finally:
        sys.argv = before


def without_tokens(words: list[str]) -> list[str]:
    """A command line without the value of ``--hub_token``, and without what looks like a token elsewhere.

    >>> without_tokens(["--hub_token", "abc", "--seed", "1"]), without_tokens(["--hub-token=abc"])
    (['--hub_token', '***', '--seed', '1'], ['--hub-token=***'])
    """
    found: list[str] = []
    for word in words:
        flag, equals, _ = word.partition("=")
        follows = bool(found) and found[-1].replace("-", "_") == "__hub_token"
        if follows:
            word = "***"
        elif equals and flag.replace("-", "_") == "__hub_token":
            word = f"{flag}=***"
        found.append(masked(word))
    return found
