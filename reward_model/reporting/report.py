# SPDX-License-Identifier: Apache-2.0
"""The report of a run, of several, or of assessments alone, as one file of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.reporting.page import write_html
from reward_model.reporting.runs import read_run
from reward_model.reporting.words import told_apart

FILE = "report.html"
_OF_ASSESSMENTS = ("assessments", "comparisons")
MOST_RUNS = 16  # more would neither be told apart nor leave the page below 3 MB


def report(
    runs: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str] | None = None,
    has_ended: bool = False,
) -> Path:
    """Write the report of a run, or of several in one page, from what lies in their output folders.

    Read are ``metrics.jsonl``, ``run.json`` and ``evaluation.json``; what is missing or broken is left out, and the
    page says so. The file needs nothing but a browser, and no network.

    >>> import reward_model
    >>> reward_model.report("output")  # doctest: +SKIP
    PosixPath('output/report.html')

    Args:
        runs: output folders.
        out: the file to write; None: ``report.html`` in the folder of the one run.
        has_ended: the run is at its end, although it has not left the mark of it yet.

    Returns:
        The file.

    Raises:
        UserError: a folder that is none of a run; several runs without ``out``, or more than 16.
        OSError: the file cannot be written.
    """
    folders = [Path(each) for each in ([runs] if isinstance(runs, (str, PathLike)) else runs)]
    if not folders or len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs: a report is of 1 to {MOST_RUNS}")
    if out is None and len(folders) > 1:
        raise UserError("--out is missing: name the file in which several runs are compared, such as report.html")
    path = Path(out) if out is not None else folders[0] / FILE
    names = names_of(folders)
    found = [read_run(folder, name, has_ended) for folder, name in zip(folders, names)]
    if all(run.is_of_assessments for run in found):  # what `reward-model evaluate --output_dir` has written
        assessments, comparisons = ([each for run in found for each in getattr(run, name)] for name in _OF_ASSESSMENTS)
        return page_of_assessments(assessments, path, comparisons)
    _write(path, write_html(found))
    return path


def page_of_assessments(
    assessments: Sequence[dict[str, Any]], out: str | PathLike[str], comparisons: Sequence[dict[str, Any]] = ()
) -> Path:
    """Write the report of assessments whose runs are not known, such as those of ``reward-model evaluate``.

    Args:
        assessments: as in ``evaluation.json``; every key may be absent.
        out: the file to write.
        comparisons: of two models each, as in the ``evaluation.json`` of ``reward-model evaluate``.

    Returns:
        The file.

    Raises:
        UserError: no assessment, or more than 16.
        OSError: the file cannot be written.
    """
    if not assessments or len(assessments) > MOST_RUNS:
        raise UserError(f"{len(assessments)} assessments: a report is of 1 to {MOST_RUNS}")
    path = Path(out)
    _write(path, write_html([], assessments, comparisons))
    return path


def _write(path: Path, page: str) -> None:
    """Write the file, or leave nothing: what else a run writes may need the room."""
    try:
        write_whole(path, page)
    except OSError:
        with suppress(OSError):
            path.with_name(f".{path.name}.partial").unlink()
        raise


def names_of(folders: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as tell them apart.

    >>> names_of([Path("/a/one/output"), Path("/a/two/output")])
    ['one/output', 'two/output']
    """
    return told_apart([folder.resolve().parts for folder in folders])
