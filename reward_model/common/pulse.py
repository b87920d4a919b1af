# SPDX-License-Identifier: Apache-2.0
"""That this process gets on: what its main thread did last, for whoever watches it (training/watchdog.py).

The main thread calls :func:`beat` whenever something is done that cannot take long: a micro-batch, a batch of an
evaluation, a file. It costs nothing to speak of, and without a watcher it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pulse:
    """beats: how often there was a sign of life. did: what began with the last one.

    is_main: this process is main.py, which may be ended, and not somebody's notebook.
    """

    beats: int = 0
    did: str = "nothing"
    is_main: bool = False


pulse = Pulse()


def beat(did: str) -> None:
    """Give a sign of life.

    Args:
        did: what begins now, such as "a micro-batch of step 57".
    """
    pulse.did = did
    pulse.beats += 1
