# SPDX-License-Identifier: Apache-2.0
"""``reward-model report``: a page of a run, or of several, with charts, mistakes and settings."""

from __future__ import annotations

import argparse

from reward_model.common.errors import UserError
from reward_model.common.logging import logger, show_messages
from reward_model.config.groups import require_page
from reward_model.config.parser import build_parser


def main(arguments: list[str]) -> int:
    """Write the page, and say where.

    Raises:
        UserError: a folder that is none of a run, several runs without ``--out``, or a file that cannot be written.
    """
    parser = build_parser([], prog="reward-model report", description=__doc__.split("``: ")[1])
    _add_flags(parser)
    options = parser.parse_args(arguments)
    require_page("--out", options.out)
    show_messages()
    from reward_model.reporting.report import report

    try:
        path = report(options.runs, options.out)
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror}") from error
    logger.info(f"report: {path}")
    return 0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The output folder of a run; several are overlaid.")
    parser.add_argument(
        "--out", metavar="FILE", help="The page to write. Without it, report.html in the folder of the one run."
    )
