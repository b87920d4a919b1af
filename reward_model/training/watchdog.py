# SPDX-License-Identifier: Apache-2.0
"""A rank that stands still ends the run, by name, instead of holding the others for ever.

Each rank's main thread gives a sign of life for every micro-batch, evaluation batch and saved file (common/pulse.py). A
thread of its own tells them to the store at which the ranks met; the first rank's reads what all have told. When a rank
has given no sign for ``--hang_timeout`` seconds, the first rank names the one that all wait for: one whose threads do
not run either (it was stopped), else the one that has done least. Every rank then writes what its threads are doing to
the log and ends; a stopped one is ended by those beside it. A rank that hears nothing of the first one, which may be
the stopped one, decides by itself a little later.

Time in which a process does not run does not count for it: a run that is stopped as a whole and continued goes on.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from reward_model.common.distributed import DistributedContext, release_shared_memory
from reward_model.common.processes import Process, place, this_process
from reward_model.common.pulse import beat, pulse

LOST = 5  # rounds without a word after which a process does not run
ENDS_WITH = 1  # the exit status
COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")  # who stands in one waits for others

_runs = itertools.count()  # a process may train several times, and the store stays
_current: list[Watchdog] = []
R = TypeVar("R")


def start(timeout: int, context: DistributedContext) -> None:
    """Watch this rank from here on; every rank calls it.

    Args:
        timeout: seconds without a sign of life that end the run; 0: none do.
    """
    run = next(_runs)
    if timeout and (context.world_size > 1 or pulse.is_main):
        beat("the start of the training")
        _current.append(Watchdog(timeout, context.rank, context.world_size, f"watchdog/{run}"))
        _current[-1].start()


def stop() -> None:
    """Watch no longer."""
    while _current:
        _current.pop().stop()


def while_it_runs(function: Callable[..., R]) -> Callable[..., R]:
    """A function after which nothing is watched any more, however it ends."""

    @functools.wraps(function)
    def watched(*args, **kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            stop()

    return watched


@dataclass
class Seen:
    """What the first rank knows of another: what it told, the rounds since a word, the seconds since a sign of life."""

    told: dict[str, Any]
    wordless: int = 0
    silent: float = 0.0

    def hear(self, told: dict[str, Any], seconds: float) -> None:
        """Take what it tells now, ``seconds`` of this process after the last time."""
        self.wordless = 0 if told["word"] != self.told["word"] else self.wordless + 1
        self.silent = 0.0 if told["beats"] != self.told["beats"] else self.silent + seconds
        self.told = told


class Watchdog:
    """Two threads of a rank: one tells the store, which may not answer; the other watches the main thread and that one.

    Args:
        timeout: seconds without a sign of life.
        key: before every key in the store.
    """

    def __init__(self, timeout: int, rank: int, world_size: int, key: str):
        self.timeout, self.rank, self.world_size, self.key = timeout, rank, world_size, key
        self.every = min(5.0, max(0.2, timeout / 20))
        self.over = threading.Event()
        self.verdict = ""
        self.words = 0  # rounds of the thread that tells
        self.told: list[dict[str, Any]] = []  # by the first rank and those of this machine; to the first by all
        self.main_thread = threading.main_thread().ident
        self.process, self.place = this_process(), place()

    def start(self) -> None:
        """Begin to watch."""
        jobs = [self._watch] + [self._tell] * (self.world_size > 1)
        for job in jobs:
            threading.Thread(target=job, name=f"watchdog {job.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer; the others learn that this rank has come to its end."""
        self.over.set()

    def _word(self) -> dict[str, Any]:
        """What this rank tells the others."""
        stands, waits = where(self.main_thread)
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "place": self.place,
            "process": self.process.number,
            "started": self.process.started,
            "word": self.words,
            "beats": pulse.beats,
            "did": pulse.did,
            "stands": stands,
            "waits": waits,
        }

    # the thread that tells

    def _tell(self) -> None:
        try:
            self._talk()
        except Exception as error:  # the store is gone, and with it the process that held it
            if not self.over.is_set():
                print(f"watchdog of rank {self.rank}: no store any more ({error})"[:200], file=sys.stderr, flush=True)

    def _talk(self) -> None:
        from torch.distributed import TCPStore

        # a connection of its own: the main thread's may wait for something
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(60, 2 * self.timeout)),
        )
        ranks = range(self.world_size) if self.rank == 0 else self._neighbors()
        keys = [f"{self.key}/{rank}" for rank in ranks]
        verdict = f"{self.key}/verdict"
        seen: dict[int, Seen] = {}
        last = time.monotonic()
        while not self.over.is_set():
            self.words += 1
            store.set(f"{self.key}/{self.rank}", json.dumps(self._word()))
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self.every), now
            if store.check(keys):
                self.told = [json.loads(text) for text in store.multi_get(keys)]
            if self.rank == 0 and self.told:
                for told in self.told:
                    seen.setdefault(told["rank"], Seen(told)).hear(told, seconds)
                if line := self._judge(list(seen.values())):
                    store.set(verdict, line)
            if store.check([verdict]):
                self.verdict = store.get(verdict).decode()
                return
            self.over.wait(self.every)
        if not self.verdict:
            store.set(f"{self.key}/{self.rank}", json.dumps(self._word() | {"ended": True}))

    def _neighbors(self) -> list[int]:
        """The first rank, and the ranks of this machine."""
        local, size = int(os.environ["LOCAL_RANK"]), os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        first = self.rank - local
        return sorted({0, *range(first, min(self.world_size, first + int(size or 1)))})

    def _judge(self, seen: list[Seen]) -> str:
        """Which rank holds the run, as JSON for all; empty: none does."""
        seen = [each for each in seen if not each.told.get("ended")]
        if not any(each.silent >= self.timeout for each in seen):
            return ""
        stopped = [each for each in seen if each.wordless >= LOST]
        # those that wait in a collective wait for the others
        late = min(seen, key=lambda each: (each.told["waits"], each.told["beats"], each.told["rank"]))
        guilty = (stopped or [late])[0]
        return json.dumps({"told": guilty.told, "runs": not stopped, "silent": guilty.silent, "by": self.rank})

    # the thread that watches

    def _watch(self) -> None:
        patience = self.timeout + (LOST + 3) * self.every if self.world_size > 1 else self.timeout
        beats, word, silent, wordless, last = pulse.beats, -1, 0.0, 0.0, time.monotonic()
        while not self.over.wait(self.every):
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self.every), now
            silent = 0.0 if pulse.beats != beats else silent + seconds
            first = next((told for told in self.told if told["rank"] == 0), self._word())
            wordless = 0.0 if first["word"] != word else wordless + seconds
            beats, word = pulse.beats, first["word"]
            if self.verdict:
                self._end(**json.loads(self.verdict))
            elif silent >= patience:  # and the first rank has not spoken
                if self.rank and wordless > LOST * self.every:
                    self._end(first, runs=False, silent=wordless, by=self.rank)
                self._end(self._word(), runs=True, silent=silent, by=self.rank)

    def _end(self, told: dict[str, Any], runs: bool, silent: float, by: int) -> None:
        """Say it, write down what the threads do, end a stopped process beside this one, and end this one."""
        if by == self.rank:
            print(f"error: {described(told, runs, silent)}", file=sys.stderr, flush=True)
        print(f"rank {self.rank}: what its threads are doing", file=sys.stderr, flush=True)
        with suppress(Exception):
            faulthandler.dump_traceback(file=2, all_threads=True)
        release_shared_memory()  # now: a launcher may end this process as soon as it misses the other one
        guilty = Process(told["process"], told["started"])
        if not runs and told["place"] == self.place and guilty.number != self.process.number and guilty.is_there():
            with suppress(OSError):
                os.kill(guilty.number, signal.SIGKILL)
        if self.rank == 0 and self.world_size > 1:
            time.sleep(2 * self.every + 0.5)  # the others read it, maybe from this very process
        os._exit(ENDS_WITH)


def described(told: dict[str, Any], runs: bool, silent: float) -> str:
    """Which rank stood still, where, and what it did last, in a line."""
    who = f"rank {told['rank']} (host {told['host']}, process {told['process']})"
    what = f"last began {told['did']}"
    if not runs:
        return f"{who} does not run: stopped, or its machine is; it {what}; the run ends (--hang_timeout)"
    return (
        f"{who} has done nothing for {silent:.0f} s: it {what} and stands in {told['stands']}; the run ends "
        "(--hang_timeout, 0 waits for ever)"
    )


def where(thread: int | None) -> tuple[str, bool]:
    """The innermost line of Python of a thread, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no Python code", False
    at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
    inner: Any = frame
    while inner is not None:
        if any(part in inner.f_code.co_filename for part in COLLECTIVE):
            return at, True
        inner = inner.f_back
    return at, False
