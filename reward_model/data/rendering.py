# SPDX-License-Identifier: Apache-2.0
"""A chat template at work, with a bound on its time.

A template is a program that comes with a model. Transformers runs it in Jinja's sandbox, which keeps it from files and
from Python, but three nested loops of 99,999 turns are within its rules and take years.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import jinja2

LIMIT = 10.0  # seconds for one chat; a template of a hundred lines takes a thousandth of one
TRIES = 3  # chats that may take so long before a template is not run any more
PERIOD = 0.1  # seconds between two looks at the clock


class TemplateTooSlow(Exception):
    """A template that did not end within the limit."""


def render(tokenizer, chat: list[dict], **options) -> str:
    """What the tokenizer's chat template writes for a chat, special tokens included.

    Raises:
        TemplateTooSlow: it took longer than ``LIMIT``, or has done so before too often.
        Exception: whatever the template raises.
    """
    template = str(tokenizer.chat_template)
    if _raises_to_a_power(template):
        raise TemplateTooSlow("it raises a number to a power, which no chat needs and may take for ever")
    if _overrun[template] >= TRIES:
        raise TemplateTooSlow(f"it ran for more than {LIMIT:g} s {TRIES} times, and is not tried again")
    try:
        with _time_limit(LIMIT):
            return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except TemplateTooSlow:
        _overrun[template] += 1
        raise TemplateTooSlow(f"it ran for more than {LIMIT:g} s, as if its loops had no end") from None


@lru_cache
def _raises_to_a_power(template: str) -> bool:
    """Whether a template has the operator ``**``: one step of Python, which nothing can end before it is done."""
    if "**" not in template:
        return False
    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return False  # it will be said when it is run
    # after a bracket or a comma it unpacks keyword arguments
    pairs = zip([("", ""), *tokens], tokens)
    return any(token == ("operator", "**") and before[1] not in ("(", ",") for before, token in pairs)


# The clock of each thread that renders. Signals reach the main thread only, and rows are also scored in others.

_overrun: Counter[str] = Counter()
_ends: dict[int, float] = {}
_lock = threading.Lock()
_wake = threading.Event()
_watcher: threading.Thread | None = None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TemplateTooSlow in this thread unless what is inside ends in time. One long call in C is not ended."""
    global _watcher
    thread = threading.get_ident()
    with _lock:
        _ends[thread] = time.monotonic() + seconds
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="chat template's clock", daemon=True)
            _watcher.start()
    _wake.set()
    try:
        yield
    finally:
        with _lock:
            has_raised = _ends.pop(thread, None) is None
        if has_raised:
            # Raised too late to be noticed inside, it is noticed here. To take an exception back would leave Python's
            # mark that one is pending, with which 3.11 never enters a function under a debugger or coverage.
            for _ in range(100):
                pass


def _watch() -> None:
    while True:
        _wake.wait()
        time.sleep(PERIOD)
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, end in _ends.items() if end < now]:
                del _ends[thread]
                _raise_in(thread, TemplateTooSlow)
            if not _ends:
                _wake.clear()


def _raise_in(thread: int, error: type[Exception]) -> None:
    """Have Python raise an exception in another thread before its next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _forget() -> None:
    """In a process that was forked, which has no thread but one."""
    global _lock, _watcher
    _lock, _watcher = threading.Lock(), None
    _ends.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
