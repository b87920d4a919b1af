# SPDX-License-Identifier: Apache-2.0
"""A folder that one run at a time writes to, with all of its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: Path | None, context: DistributedContext, name: str) -> Iterator[None]:
    """Keep other runs out of a folder, and make it; removed if it is empty in the end. None: nothing is written.

    Args:
        name: of the flag that said which, and what it said.

    Raises:
        UserError: another run has it, or it cannot be made.
    """
    lock, problem = None, ""
    if folder and context.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK)
            lock.acquire(blocking=False)
        except Timeout:
            problem = f"{name}: another run is writing there; name another one, or wait for its end"
        except OSError as error:
            problem = f"{name}: {error.strerror}"
    if problem := distributed.first_text(problem):
        raise UserError(problem)
    try:
        yield
    finally:
        if lock and folder:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK]:  # nothing was done: leave nothing
                    (folder / LOCK).unlink()
                    folder.rmdir()
            lock.release()
