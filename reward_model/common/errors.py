# SPDX-License-Identifier: Apache-2.0
"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: what was given, where, and what to do. Shown as one line, without a traceback."""


def first_line(error: BaseException) -> str:
    """An exception's first line that says something, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__
