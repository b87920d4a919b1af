# SPDX-License-Identifier: Apache-2.0
"""That a run shall end before its time: a signal, or a limit that comes near."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reward_model.config.groups import seconds_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 3.0  # seconds in which a launcher and a process group may deliver one request twice
RESERVE = 30.0  # seconds kept for what cannot be foreseen, besides a save and two steps


class Interrupted(Exception):
    """A run was asked to end and did so; where it goes on from, in a line."""


class StopRequest:
    """Whether this process was asked to end, or its time is nearly up.

    signal: the name of the one that asked; empty: none has.
    """

    def __init__(self, time_limit: str | None = None):
        self.signal, self.asked_at = "", 0.0
        self.save_seconds = self.step_seconds = 0.0
        self.limit = _seconds_left(time_limit)
        self.end = None if self.limit is None else time.monotonic() + self.limit

    @property
    def asked(self) -> bool:
        """Whether it is time to save and end."""
        return bool(self.signal) or self.is_late

    @property
    def is_late(self) -> bool:
        """Whether the limit is so near that a save, which takes half as long again as the last one, just fits."""
        if self.end is None or self.limit is None:
            return False
        reserve = min(RESERVE + 1.5 * self.save_seconds + 2 * self.step_seconds, self.limit / 2)
        return time.monotonic() > self.end - reserve

    @property
    def reason(self) -> str:
        """What asked, for a line."""
        return self.signal or "the time limit"

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take signals as requests; a second one, seconds after the first, does what it would have done before."""
        if threading.current_thread() is not threading.main_thread():  # only the main one may say what a signal does
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def hear(number: int, frame: Any) -> None:
            now = time.monotonic()
            if not self.signal:
                self.signal, self.asked_at = signal.Signals(number).name, now
            elif now - self.asked_at >= SAME_REQUEST:
                for each, handler in before.items():
                    signal.signal(each, handler)
                os.kill(os.getpid(), number)

        for number in SIGNALS:
            signal.signal(number, hear)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _seconds_left(time_limit: str | None) -> float | None:
    """Until a limit, or the end of the SLURM job; None: there is neither."""
    if time_limit is not None:
        return seconds_of(time_limit)
    try:
        end = float(os.environ["SLURM_JOB_END_TIME"])  # seconds since 1970, by the clock of now
    except (KeyError, ValueError):
        return None
    return max(0.0, end - time.time())
