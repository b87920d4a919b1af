#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run a command of which nothing is left behind: what every launcher starts on a node.

    supervise.py [--lifeline] [--log FILE] [--reach ADDRESS] [--run NAME] [--finished FILE] [--host NUMBER]
                 [--grace SECONDS] [--pass_on] COMMAND...
    supervise.py --ask NAME      ask those that run here with --run NAME to save and to end, as their first signal does

When the command ends, or when this process is told to, all that descends from it is ended: processes that changed their
session too, as torchrun's do.

The first SIGTERM, SIGINT or SIGUSR1 asks the ranks, and nobody between, to save a checkpoint and to end: a launcher
that heard it would kill them after 30 seconds. The second one, SIGHUP, and the end of the lifeline end everything at
once; so does the first where no rank has begun.

The exit status is the command's, but
- 75 (EX_TEMPFAIL) if the run was interrupted and can be resumed: a rank said so, or interrupted.json does;
- 128 + N where signal N ended the first rank that failed, the command, or, by the second request, this process;
- 1 in place of 0 if the run has not come to its end.

--lifeline: standard input belongs to whoever started this, maybe on another machine, and its end is theirs.
--log FILE: what the command prints goes there too.
--reach ADDRESS: let gloo and NCCL use the network interface that leads there, unless their variables say another. A
    host often has several, and a hostname that resolves to none of them; DeepSpeed leaves the choice to the user.
--run NAME: a mark by which ps finds the process.
--finished FILE: what a run that came to its end leaves; interrupted.json beside it is what one leaves that can be
    resumed.
--host NUMBER: which of several hosts this is, from 0; only the first need see that file.
--grace SECONDS: from the first request to the end of those that have not ended [600].
--pass_on: the ranks are not here but known to the command: a first request goes to it as SIGUSR1, which srun hands on
    to its tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil  # comes with DeepSpeed

GRACE = 10.0  # seconds between the request to end and the end, of what has nothing to save
INTERRUPTED = 75  # <sysexits.h> EX_TEMPFAIL: the same command again goes on
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
SIOCGIFADDR = 0x8915  # <linux/sockios.h>
BUFFERS = "/dev/shm/deepspeed_allreduce_buffer_{user}_*_{port}_*"  # DeepSpeed's, on a CPU


def main() -> int:
    options = parse()
    if options.ask:
        return ask_others(options.ask)
    environment = dict(os.environ)
    if options.reach:
        try:
            interface = interface_to(options.reach)
        except OSError as error:
            print(f"error: no way to {options.reach} from {socket.gethostname()}: {error}", file=sys.stderr)
            return 1
        for name in INTERFACES if interface else ():
            environment.setdefault(name, interface)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the command become ours
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.ask(number))
    signal.signal(signal.SIGHUP, lambda number, _: stop.end(number))
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z would stop this, and the output of a run that goes on
    marks = Marks(options.finished, options.host == 0)
    try:
        log = open(options.log, "ab") if options.log else None  # noqa: SIM115
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if log else {}
        command = subprocess.Popen(
            options.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: be_deaf_to_requests(options.pass_on),
            **pipes,
        )
    except OSError as error:
        print(f"error: {error.filename or options.command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    copying = threading.Thread(target=copy, args=(command.stdout, log))
    if log:
        copying.start()
    if options.lifeline:
        threading.Thread(target=read_lifeline, args=(stop,), daemon=True).start()
    ranks = Ranks()
    wait_for_end(command, stop, ranks, options)
    end_descendants()
    ranks.look()
    status = command.wait()
    if log:
        copying.join()
    ranks.release_shared_memory()
    for line in (said := [*ranks.killed(), *marks.missing(status, stop, ranks)]):
        print(f"error: {line}", file=sys.stderr)
        if options.log:
            with contextlib.suppress(OSError), open(options.log, "a", encoding="utf-8") as file:
                file.write(f"error: {line}\n")
    return exit_status(status, stop, ranks, marks, bool(said), options.pass_on)


def ask_others(name: str) -> int:
    """Send the request to every supervise.py of this machine that has this --run; 1: there is none."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            is_ours = len(words) > 1 and Path(words[1]).name == "supervise.py"
            if is_ours and ("--run", name) in pairwise(words):
                process.send_signal(signal.SIGTERM)
                found += 1
    return 0 if found else 1


def be_deaf_to_requests(pass_on: bool) -> None:
    """In the command, before it begins: a terminal's Ctrl-C comes to supervise.py alone, and SIGUSR1, which SLURM sends
    to all processes of a step, does not end a launcher. Ranks have handlers of their own."""
    os.setpgrp()
    if not pass_on:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def wait_for_end(command: subprocess.Popen, stop: StopRequest, ranks: Ranks, options: argparse.Namespace) -> None:
    """Until the command has ended, or what was asked for is over."""
    deadline, launcher_is_gone = float("inf"), False
    while not stop.at_once and time.monotonic() < deadline:
        if command.poll() is not None:
            launcher_is_gone = True
            if not ranks.alive():  # else they are on their own now, and have something to save
                return
        ranks.look(wait=0.2)
        if deadline == float("inf") and (stop.asked or launcher_is_gone):
            if not ask_to_save(command, stop, ranks, options.pass_on):
                return
            deadline = time.monotonic() + seconds_left(options.grace)


def ask_to_save(command: subprocess.Popen, stop: StopRequest, ranks: Ranks, pass_on: bool) -> bool:
    """Pass a request on, once; whether there is anybody to wait for."""
    if pass_on and command.poll() is None:
        command.send_signal(signal.SIGUSR1)
        return True
    ranks.look()
    for rank in ranks.alive():
        with contextlib.suppress(OSError):
            os.kill(rank.process, signal.SIGTERM)
    if stop.asked and ranks.alive():
        print("asked the run to save a checkpoint and to end; a second signal ends it at once", file=sys.stderr)
    return bool(ranks.alive())


def seconds_left(grace: float) -> float:
    """The grace, but no longer than SLURM gives the job."""
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, min(grace, int(os.environ["SLURM_JOB_END_TIME"]) - time.time()))
    return grace


def exit_status(status: int, stop: StopRequest, ranks: Ranks, marks: Marks, is_faulty: bool, pass_on: bool) -> int:
    """That of the whole: see the top of this file."""
    if stop.at_once:
        return 128 + stop.number
    if ranks.interrupted() or (status and marks.interrupted()):
        return INTERRUPTED
    if stop.asked and not (pass_on and status > 0):
        is_whole = status == 0 and not is_faulty and (ranks.known or marks.finished)
        return 0 if is_whole else 128 + stop.number
    if first := status and ranks.first_signal():
        return 128 + first
    if is_faulty and status == 0:
        return 1
    return status if status >= 0 else 128 - status


@dataclass
class Rank:
    """A process of main.py under a launcher.

    descriptor: becomes readable at its end; None: the kernel (before Linux 5.3) has none.
    ended: what wait() would tell its parent; None: not yet, or nobody could know.
    """

    process: int
    rank: int
    port: str
    descriptor: int | None
    is_over: bool = False
    ended: int | None = None


class Ranks:
    """Those among the processes that descend from this one, with how they ended.

    They are other processes' children. The kernel tells when one ends, and its status until its parent asks for it.
    """

    def __init__(self):
        self.known: dict[int, Rank] = {}
        self.order: list[Rank] = []  # in which they ended
        self.next_look = 0.0

    def alive(self) -> list[Rank]:
        return [rank for rank in self.known.values() if not rank.is_over]

    def look(self, wait: float = 0.0) -> None:
        """Find new ones, now or every second, and see which ended; wait so many seconds for one to end."""
        if not wait or time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + 1.0
            for process in descendants():
                self._consider(process)
        poll = select.poll()
        for rank in self.alive():
            if rank.descriptor is not None:
                poll.register(rank.descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(wait * 1000)}
        for rank in self.alive():
            if rank.descriptor in ready or (rank.descriptor is None and has_ended(rank.process)):
                rank.ended, rank.is_over = left_status(rank.process), True
                self.order.append(rank)
                if rank.descriptor is not None:
                    os.close(rank.descriptor)

    def _consider(self, process: psutil.Process) -> None:
        if process.pid in self.known:
            return
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            if not any(Path(word).name == "main.py" for word in process.cmdline()[:4]):
                return
            values = process.environ()
            if "RANK" not in values or process.ppid() in self.known:  # a child of one, such as a data loader
                return
            descriptor = None
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(process.pid)
            self.known[process.pid] = Rank(process.pid, int(values["RANK"]), values.get("MASTER_PORT", ""), descriptor)

    def interrupted(self) -> bool:
        return any(rank.ended is not None and rank.ended == INTERRUPTED << 8 for rank in self.order)

    def first_failed(self) -> Rank | None:
        """The first that ended badly, as far as it is known: those after it may be ended by the launcher."""
        return next((rank for rank in self.order if rank.ended), None)

    def first_signal(self) -> int:
        """The signal that ended the first one that failed; 0: none did."""
        first = self.first_failed()
        return os.WTERMSIG(first.ended) if first and os.WIFSIGNALED(first.ended) else 0

    def killed(self) -> list[str]:
        """What to say of a rank that a signal ended."""
        number, first = self.first_signal(), self.first_failed()
        if not number:
            return []
        name = signal.Signals(number).name
        why = ""
        if number == signal.SIGKILL:
            why = "; the watchdog does that to a rank that stands still, as said above, the kernel when memory is out"
        return [f"rank {first.rank} (process {first.process}) was ended by {name}{why}"]

    def release_shared_memory(self) -> None:
        """Remove what DeepSpeed leaves of ranks that are gone: 66 MiB each, on a CPU."""
        for port in {rank.port for rank in self.known.values()}:
            for path in Path("/dev/shm").glob(Path(BUFFERS.format(user=os.getuid(), port=port)).name):
                path.unlink(missing_ok=True)


def stat(process: int) -> list[str]:
    """The fields of /proc/N/stat from the state on; none: there is no such process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def has_ended(process: int) -> bool:
    return stat(process)[:1] in ([], ["Z"], ["X"])


def left_status(process: int) -> int | None:
    """What wait() will tell the parent of a process that has ended; None: it has asked already."""
    fields = stat(process)
    return int(fields[49]) if fields and fields[0] in "ZX" else None


class Marks:
    """What main.py leaves in the output folder at its end.

    finished: the file of a run that came to its end; None: nobody asks.
    """

    def __init__(self, finished: str | None, is_first: bool):
        self.finished = Path(finished) if finished else None
        self.is_first = is_first
        self.before = self._interrupted_at()

    def _interrupted_at(self) -> tuple[int, int] | None:
        if self.finished:
            with contextlib.suppress(OSError):
                found = self.finished.with_name("interrupted.json").stat()
                return found.st_mtime_ns, found.st_ino
        return None

    def interrupted(self) -> bool:
        """Whether a run has left its word, since this began, that it can be resumed."""
        now = self._interrupted_at()
        return now is not None and now != self.before

    def missing(self, status: int, stop: StopRequest, ranks: Ranks) -> list[str]:
        """What to say of a command that ended as if all were well, and of a run that has not come to its end."""
        if status or stop.at_once or ranks.interrupted() or self.interrupted():
            return []
        if not self.finished or not self.is_first or self.finished.exists():
            return []
        return [f"the run ended with status 0 before its end: there is no {self.finished}"]


class StopRequest:
    """That the run shall end: asked, it saves first; at_once, it does not. By which signal."""

    def __init__(self):
        self.asked = self.at_once = False
        self.number = int(signal.SIGTERM)

    def ask(self, number: int = signal.SIGTERM) -> None:
        self.at_once = self.asked
        self.asked, self.number = True, int(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.at_once, self.number = True, int(number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--lifeline", action="store_true")
    parser.add_argument("--log")
    parser.add_argument("--reach")
    parser.add_argument("--run")
    parser.add_argument("--ask")
    parser.add_argument("--finished")
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--grace", type=float, default=600.0)
    parser.add_argument("--pass_on", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if bool(options.command) == bool(options.ask):
        parser.error("a command, or --ask")
    return options


def copy(output, log) -> None:
    """Everything that comes from a pipe, to the screen and a file."""
    while block := os.read(output.fileno(), 65536):
        for place in (log, sys.stdout.buffer):
            with contextlib.suppress(OSError):  # a full disk, a screen that is gone: the run goes on
                place.write(block)
                place.flush()


def read_lifeline(stop: StopRequest) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.end()


def end_descendants() -> None:
    """Ask all that descends from this process to end, and end what has not after GRACE seconds."""
    for how in ("terminate", "kill"):
        for process in descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, how)()
        deadline = time.monotonic() + GRACE
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.1)


def descendants() -> list[psutil.Process]:
    """Those that still run: what has ended waits for its parent to ask after it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def interface_to(address: str) -> str:
    """The network interface whose address this host would use to reach another; empty: none, or IPv6.

    Raises:
        OSError: the address cannot be resolved, or no route leads there.
    """
    family, *_, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    if family != socket.AF_INET:
        return ""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route and sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                return name
    return ""


if __name__ == "__main__":
    sys.exit(main())
