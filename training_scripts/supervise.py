#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run a command of which nothing is left behind: what every launcher starts on a node.

    supervise.py [--lifeline] [--log FILE] [--reach ADDRESS] [--run NAME] COMMAND...

When the command ends, or when this process is told to, all that descends from it is ended: processes that changed their
session too, as torchrun's do. The exit status is the command's; 128 + N where signal N ended it or this process, as in
a shell, and 143 at the end of the lifeline.

--lifeline: standard input belongs to whoever started this, maybe on another machine, and its end is theirs.
--log FILE: what the command prints goes there too.
--reach ADDRESS: let gloo and NCCL use the network interface that leads there, unless their variables say another. A
    host often has several, and a hostname that resolves to none of them; DeepSpeed leaves the choice to the user.
--run NAME: a mark by which ps finds the process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import psutil  # comes with DeepSpeed

GRACE = 10.0  # seconds between the request to end and the end
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
SIOCGIFADDR = 0x8915  # <linux/sockios.h>


def main() -> int:
    options = parse()
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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stop.end(number))
    try:
        log = open(options.log, "ab") if options.log else None  # noqa: SIM115
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if log else {}
        command = subprocess.Popen(options.command, env=environment, stdin=subprocess.DEVNULL, **pipes)
    except OSError as error:
        print(f"error: {error.filename or options.command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    copying = threading.Thread(target=copy, args=(command.stdout, log))
    if log:
        copying.start()
    if options.lifeline:
        threading.Thread(target=wait_for_end_of_input, args=(stop,), daemon=True).start()
    while command.poll() is None and not stop.event.wait(0.2):
        pass
    end_descendants()
    status = command.wait()
    if log:
        copying.join()
    if stop.event.is_set():
        return 128 + stop.number
    return status if status >= 0 else 128 - status


class StopRequest:
    """That this process shall end, and by which signal."""

    def __init__(self):
        self.event, self.number = threading.Event(), int(signal.SIGTERM)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.number = int(number)
        self.event.set()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--lifeline", action="store_true")
    parser.add_argument("--log")
    parser.add_argument("--reach")
    parser.add_argument("--run")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    return options


def copy(output, log) -> None:
    """Everything that comes from a pipe, to the screen and a file."""
    while block := os.read(output.fileno(), 65536):
        for place in (log, sys.stdout.buffer):
            with contextlib.suppress(OSError):  # a full disk, a screen that is gone: the run goes on
                place.write(block)
                place.flush()


def wait_for_end_of_input(stop: StopRequest) -> None:
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
