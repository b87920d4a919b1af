# SPDX-License-Identifier: Apache-2.0
"""The one error that a user is meant to read, and one voice for all ranks."""

from __future__ import annotations

import os


class UserError(Exception):
    """Something the user can mend: what was given, where, and what to do. Shown as one line, without a traceback."""


def say(message: str) -> None:
    """Print a line on the first rank, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        from tqdm import tqdm

        tqdm.write(message)


def first_line(error: BaseException) -> str:
    """An exception's first line that says something, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__
