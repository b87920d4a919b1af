# SPDX-License-Identifier: Apache-2.0
"""What a run says, through the logger ``reward_model``, and libraries that speak only when something is wrong.

The first rank speaks for all. ``logging.getLogger("reward_model").setLevel(logging.ERROR)`` silences a library user's
run; a level or a handler that was set before is left as it is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from reward_model.common.errors import printable_lines

logger = logging.getLogger("reward_model")


class Console(logging.Handler):
    """Writes each message as a line of standard output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        screen = sys.stdout
        while isinstance(screen, Kept):  # our own messages are for now
            screen = screen.instead_of
        tqdm.write(self.format(record), file=screen)
        screen.flush()  # a server's or a job's log is read while it runs


class Kept(io.StringIO):
    """Keeps what others print.

    Args:
        instead_of: where it would have gone.
    """

    def __init__(self, instead_of: TextIO):
        super().__init__()
        self.instead_of = instead_of


class Unbroken(io.FileIO):
    """A file whose reader may go, or whose disk may be full: what cannot be written is dropped, and the run goes on."""

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[super().write(rest) or 0 :]
        return len(data)


def outlive_the_reader() -> None:
    """Let standard output and standard error of this process be :class:`Unbroken`, if they are still the process's."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__") and stream.fileno() in (1, 2):
            stream.flush()
            raw = Unbroken(stream.fileno(), "w", closefd=False)
            lasting = io.TextIOWrapper(
                raw,  # as python -u has it
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
                write_through=True,
            )
            setattr(sys, name, lasting)


def _is_of_first_rank(record: logging.LogRecord) -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable_lines(record.getMessage()), ()
    return True


logger.addFilter(_is_of_first_rank)
logger.addFilter(_make_printable)


def show_messages() -> None:
    """Let messages be seen, unless somebody has set up logging: then they go where that says."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(Console())
        logger.propagate = False


def quieten(debug: bool) -> None:
    """Lower the voices of DeepSpeed, Transformers and datasets, unless ``debug``; before they are imported."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|peft|deepspeed")
    # filters: DeepSpeed gives its logger a level of its own when it is imported, torch resets those of its loggers
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).addFilter(_is_error)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """:func:`quieten` for a while, in a process that is somebody else's: afterwards all is as it was."""
    if debug:
        yield
        return
    from transformers.utils import logging as theirs

    verbosity, shows_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quieten(debug)
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
        try:
            yield
        finally:
            theirs.set_verbosity(verbosity)
            if shows_bars:
                theirs.enable_progress_bar()


@contextlib.contextmanager
def hushed(debug: bool) -> Iterator[None]:
    """Keep back what DeepSpeed prints while it is imported and compiles an op, unless ``debug``; an error shows it."""
    if debug:
        yield
        return
    kept = Kept(sys.stdout)
    try:
        with contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
            yield
    except BaseException:
        sys.stderr.write(kept.getvalue())
        raise
