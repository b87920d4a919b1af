# SPDX-License-Identifier: Apache-2.0
"""PyTorch's lock around the compilation of an op, which does not outlive its process.

PyTorch makes a file ``lock`` in the op's folder and removes it at the end; who is killed in between leaves it, and
every later process waits for it for ever, without a word (pytorch issue 189245). Here a process of ours also holds a
kernel lock (``flock``) on a file beside it, which the kernel takes back from whoever dies. A ``lock`` that is found
while holding that one belongs to nobody of ours; if no process has it open, to nobody at all.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.processes import numbers

QUIET = 5.0  # seconds of waiting without a word
PATIENCE = 1800.0  # seconds; an op is compiled in half a minute, on a busy machine in some


def outlive_killed_compilations() -> None:
    """Use this lock from here on in this process."""
    cpp_extension.FileBaton = CompileLock


class CompileLock(FileBaton):
    """In place of PyTorch's; ``wait`` never has to wait."""

    ours: int | None = None

    def try_acquire(self) -> bool:
        """Wait for whoever compiles this op; True: it is for this process to compile.

        Raises:
            UserError: it takes too long.
        """
        waited = self._hold()
        if os.path.exists(self.lock_file_path):
            self._outwait_strangers()
        elif waited:  # another rank has just compiled it
            self._let_go()
            return False
        return bool(super().try_acquire())

    def release(self) -> None:
        super().release()
        self._let_go()

    def _hold(self) -> bool:
        """Take the kernel's lock; whether another process had it."""
        self.ours = os.open(f"{self.lock_file_path}.held", os.O_CREAT | os.O_RDWR, 0o666)
        patience, waited = Patience(self.lock_file_path), False
        while True:
            try:
                fcntl.flock(self.ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return waited
            except BlockingIOError:
                waited = True
                patience.wait()

    def _let_go(self) -> None:
        if self.ours is not None:
            os.close(self.ours)
            self.ours = None

    def _outwait_strangers(self) -> None:
        patience = Patience(self.lock_file_path)
        while os.path.exists(self.lock_file_path):
            if not in_use(self.lock_file_path):
                # whichever rank it is, and also while others are kept quiet
                print(
                    f"{self.lock_file_path}: left by a process that was killed, removed",
                    file=sys.__stderr__,
                    flush=True,
                )
                Path(self.lock_file_path).unlink(missing_ok=True)
                return
            patience.wait()


class Patience:
    """Waits, says so once, and not for ever."""

    def __init__(self, path: str):
        self.path, self.start, self.said = path, time.monotonic(), False

    def wait(self) -> None:
        """Raises UserError when it has taken too long."""
        took = time.monotonic() - self.start
        if took > PATIENCE:
            folder = os.path.dirname(self.path)
            raise UserError(
                f"another process has been compiling an op in {folder} for {took / 60:.0f} minutes: end it, or set "
                "TORCH_EXTENSIONS_DIR to another folder"
            )
        if took > QUIET and not self.said:
            self.said = True
            logger.info(f"waiting for a process that compiles an op in {os.path.dirname(self.path)}")
        time.sleep(0.1)


def in_use(path: str) -> bool:
    """Whether a process of this machine, as far as this user may look, has a file open or works in its folder.

    A compiler that outlives the process which started it does the latter.
    """
    folder = os.path.dirname(path)
    for number in numbers():
        if same(f"/proc/{number}/cwd", folder):
            return True
        with suppress(OSError):  # it has ended, or is another user's
            if any(same(f"/proc/{number}/fd/{name}", path) for name in os.listdir(f"/proc/{number}/fd")):
                return True
    return False


def same(link: str, path: str) -> bool:
    try:
        return os.path.samefile(link, path)
    except OSError:  # one of them has ended, or is another user's
        return False
