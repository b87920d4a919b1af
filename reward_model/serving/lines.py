# SPDX-License-Identifier: Apache-2.0
"""The scores of a file or of standard input, written line by line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, TextIO

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.common.words import counted
from reward_model.config.scoring import STDIN, ScoreConfig
from reward_model.serving.inputs import Stdin, name_of
from reward_model.serving.output import Begun, begin, identity, line_of, require_free
from reward_model.serving.stream import Scoring

FLUSHED = 64  # lines, after which a reader sees them


def score_lines(model: str, file: str, config: ScoreConfig, result: TextIO) -> int:
    """Score a file, or standard input, and write JSON lines to the file of ``--output`` or else to ``result``.

    Returns 1 where a row could not be scored, else 0.

    Raises:
        UserError: a model or an input that cannot be used, or an output file that is in use or cannot be written.
    """
    if config.output:
        require_free(Path(config.output), config.resume)  # before the model is loaded
    scoring = Scoring.load(model, config)
    given = Stdin() if file == STDIN else file
    if not config.output:
        try:
            return _write(scoring, given, Begun(result.buffer, 0, 0))
        except BrokenPipeError:  # whoever read it has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), result.fileno())  # for what Python flushes at the end
            return 0
    reward, reading = scoring.reward, scoring.reading
    begun = begin(
        Path(config.output), config.resume, identity(reward, reading.chat, reading.max_seq_len, config, given)
    )
    if begun.lines:
        logger.info(f"{config.output}: goes on after {counted(begun.lines, 'line')}")
    with begun.file:
        try:
            return _write(scoring, given, begun)
        except OSError as error:
            raise UserError(f"--output {config.output}: {error.strerror}") from error


def _write(scoring: Scoring, given: str | Stdin, begun: Begun) -> int:
    file: BinaryIO = begun.file
    rows, errors, cut = begun.lines, begun.errors, 0
    bar = progress(scoring.outcomes(given, skip=begun.lines), desc="scoring", unit="row", initial=begun.lines)
    for outcome in bar:
        file.write(line_of(outcome))
        rows, errors, cut = rows + 1, errors + ("error" in outcome), cut + ("cut" in outcome)
        if rows % FLUSHED == 0:
            file.flush()
    file.flush()
    if not rows:
        raise UserError(f"{name_of(given)} holds no rows")
    if cut:
        what = f"the prompts of {counted(cut, 'row')} lost their left"
        logger.warning(f"{what}, to fit {scoring.reading.max_seq_len} tokens (--max_seq_len)")
    if errors:
        logger.error(f"{errors} of {counted(rows, 'row')} could not be scored; their lines say why")
    return 1 if errors else 0
