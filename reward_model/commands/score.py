# SPDX-License-Identifier: Apache-2.0
"""``reward-model score``: the scores of a file or of standard input, line by line.

reward-model score output answers.jsonl > scores.jsonl
zcat answers.jsonl.gz | reward-model score output - --best | head
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from reward_model.common.errors import UserError
from reward_model.common.logging import logger, show_messages
from reward_model.common.progress import progress
from reward_model.common.words import counted
from reward_model.config.parser import build_parser, read_words
from reward_model.config.scoring import ScoreConfig
from reward_model.serving.inputs import STDIN, Stdin
from reward_model.serving.output import Begun, begin, identity, line_of, require_free
from reward_model.serving.stream import Scoring


def main(arguments: list[str]) -> int:
    """Score, and print JSON lines; 1 where a row could not be scored.

    Raises:
        UserError: a model or an input that cannot be used.
    """
    parser = build_parser(
        [ScoreConfig],
        prog="reward-model score",
        usage="%(prog)s MODEL [FILE|-] [FLAG [VALUE …] …]",
        description="Score rows (a prompt with a pair, a list or one response, texts or chats) or lines of text. One "
        "line of JSON a row, in the order of the input: score or scores; raw, before the mean is taken off, if the "
        "model has one; probability that the first of two is better; cut, where the prompt lost its left; or error.",
        epilog="Exit status: 0; 1, some rows could not be scored, and their lines say why, or nothing could be.\n"
        "example: reward-model score output answers.jsonl --best",
    )
    named, words = _named(arguments)
    (config,) = read_words(parser, words)[:1]
    if not named:
        raise UserError("name a model before the flags: a folder or a hub name")
    if len(named) > 2:
        raise UserError(f"{named[2]}: give one model and one file")
    if config.resume and not config.output:
        raise UserError("--resume needs --output, whose lines it goes on with")
    result = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # messages
        show_messages()
        return _run(named[0], named[1] if len(named) == 2 else STDIN, config, result)


def _named(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the flags."""
    words = list(arguments)
    named: list[str] = []
    while words and (words[0] == STDIN or not words[0].startswith("-")):
        named.append(words.pop(0))
    return named, words


def _run(model: str, file: str, config: ScoreConfig, result) -> int:
    if file != STDIN and not Path(file).exists():
        raise UserError(f"{file}: no such file")  # before the model is loaded
    if file == STDIN and sys.stdin.isatty():
        raise UserError("nothing to score: give a file, or pipe rows into standard input")
    if config.output:
        require_free(Path(config.output), config.resume)
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
    if cut:
        what = f"the prompts of {counted(cut, 'row')} lost their left"
        logger.warning(f"{what}, to fit {scoring.reading.max_seq_len} tokens (--max_seq_len)")
    if errors:
        logger.error(f"{errors} of {counted(rows, 'row')} could not be scored; their lines say why")
    return 1 if errors else 0


FLUSHED = 64  # lines, after which a reader sees them
