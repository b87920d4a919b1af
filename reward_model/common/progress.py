# SPDX-License-Identifier: Apache-2.0
"""Progress bars, which in a log file are lines."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Lines:
    """Standard error for a progress bar that no one sees moving: each state a line of its own."""

    def write(self, text: str) -> None:
        if state := text.strip("\r\n "):
            sys.stderr.write(state + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(*args, **kwargs) -> tqdm:
    """A progress bar; in a log file a line every ten seconds, not ten a second."""
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    return tqdm(*args, **kwargs, mininterval=10.0, delay=10.0, file=Lines(), position=0)
