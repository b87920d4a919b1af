# SPDX-License-Identifier: Apache-2.0
"""Ranks do not outlive their launcher: when deepspeed, torchrun or supervise.py is gone, they save and end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from reward_model.common.distributed import release_shared_memory
from reward_model.common.processes import Process, launchers

LOOKS_EVERY = 1.0  # seconds


def end_with_the_launcher() -> None:
    """Ask this process to end, as SIGTERM does, once a launcher that it descends from has ended.

    One that has not ended after ``GRACE`` seconds of the environment (600) is ended. Without a launcher nothing is
    watched: ``nohup python main.py &`` outlives its shell.
    """
    if above := launchers():
        threading.Thread(target=_watch, args=(above,), name="launchers", daemon=True).start()


def _watch(above: list[Process]) -> None:
    while not (gone := [each for each in above if not each.is_there()]):
        time.sleep(LOOKS_EVERY)
    if os.environ.get("RANK", "0") == "0":
        print(f"the launcher, process {gone[0].number}, is gone: this run ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("GRACE") or 600))
    release_shared_memory()
    os._exit(1)
