# SPDX-License-Identifier: Apache-2.0
"""One voice for all ranks, and libraries that speak only when something is wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings


def say(message: str) -> None:
    """Print a line on the first rank, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        from tqdm import tqdm

        tqdm.write(message)


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
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


@contextlib.contextmanager
def hushed(debug: bool):
    """Keep back what DeepSpeed prints while it is imported and compiles an op, unless ``debug``; an error shows it."""
    if debug:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
