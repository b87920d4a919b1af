# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine, as /proc shows them: those that launched this one, and whether they are still there."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# a process whose command line has one of these words (a path's last part, or a module) starts ranks and waits for them
LAUNCHERS = ("deepspeed", "ds", "torchrun", "accelerate", "supervise.py")
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True)
class Process:
    """A process that is not mistaken for a later one of the same number.

    started: when, in the kernel's clock ticks since the machine started.
    """

    number: int
    started: int

    def is_there(self) -> bool:
        """Whether it has not ended."""
        found = stat(self.number)
        return found is not None and found[2] == self.started and found[0] not in "ZX"


def stat(number: int) -> tuple[str, int, int] | None:
    """A process's state (R, S, T, Z, …), its parent, and when it was started; None: there is none of this number."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # its name comes before, and may hold anything
    return fields[0], int(fields[1]), int(fields[19])


def numbers() -> list[int]:
    """Of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def this_process() -> Process:
    return named(os.getpid())


def named(number: int) -> Process:
    """The process that has this number now."""
    found = stat(number)
    return Process(number, found[2] if found else 0)


def place() -> str:
    """Where process numbers mean the same: a host, or a container on it."""
    inside = ""
    with suppress(OSError):
        inside = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {inside}"


def is_launcher(words: list[str]) -> bool:
    """Whether a command line is that of a launcher of ranks."""
    for index, word in enumerate(words[:6]):  # the interpreter and its options, then the program
        if index < 3 and Path(word).name in LAUNCHERS:
            return True
        if words[max(0, index - 1)] == "-m" and word.startswith(LAUNCHER_MODULES):
            return True
    return False


def command_line(number: int) -> list[str]:
    """Of a process; empty: it has ended."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def launchers() -> list[Process]:
    """The launchers that this process descends from, the nearest first; a shell or anything else ends the list."""
    found, number = [], os.getppid()
    while number > 1 and is_launcher(command_line(number)):
        found.append(named(number))
        parent = stat(number)
        number = parent[1] if parent else 0
    return found
