# SPDX-License-Identifier: Apache-2.0
"""Code that a model brings runs only where ``--trust_remote_code`` says so, and nobody is asked on standard input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def never_asking(trust_remote_code: bool) -> Iterator[None]:
    """While it lasts, Transformers refuses a model's code where it would ask whether to run it.

    It asks where nobody says yes or no to it, as its own classes do when they build the parts of a model, and takes the
    answer from standard input: ``yes | python main.py`` would have said yes.
    """
    from transformers import dynamic_module_utils as theirs

    before = theirs.TIME_OUT_REMOTE_CODE
    if not trust_remote_code:
        theirs.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer; 0 is what its own tests take: none is read
    try:
        yield
    finally:
        theirs.TIME_OUT_REMOTE_CODE = before
