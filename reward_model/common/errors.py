# SPDX-License-Identifier: Apache-2.0
"""The one error that a user is meant to read, and what is found of a file before it is read."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


class UserError(Exception):
    """Something the user can mend: what was given, where, and what to do. Shown as one line, without a traceback."""


def first_line(error: BaseException) -> str:
    """An exception's first line that says something, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__


def why_not(error: BaseException) -> str:
    """An error of Transformers in a line that says what to do."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "it brings code of its own, which runs only with --trust_remote_code; look at it first"
    return first_line(error)


def require_no_lfs_pointer(path: Path) -> None:
    """Raises UserError for a file that a clone without Git LFS has left as a pointer."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned")
