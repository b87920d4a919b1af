# SPDX-License-Identifier: Apache-2.0
"""``reward-model score``: the scores of a file or of standard input, line by line.

reward-model score output answers.jsonl > scores.jsonl
zcat answers.jsonl.gz | reward-model score output - --best | head
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.parser import build_parser, read_words, split_at_flags
from reward_model.config.scoring import STDIN, ScoreConfig


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
        "model has one; std and lower, of several heads; novelty and novel, where that was fitted; probability that "
        "the first of two is better; cut, where the prompt lost its left; or error.",
        epilog="Exit status: 0; 1, some rows could not be scored, and their lines say why, or nothing could be.\n"
        "example: reward-model score output answers.jsonl --best",
    )
    named, words = split_at_flags(arguments)
    (config,) = read_words(parser, words)[:1]
    if not named:
        raise UserError("name a model before the flags: a folder or a hub name")
    if len(named) > 2:
        raise UserError(f"{named[2]}: give one model and one file")
    if config.resume and not config.output:
        raise UserError("--resume needs --output, whose lines it goes on with")
    file = named[1] if len(named) == 2 else STDIN
    if file != STDIN and not Path(file).exists():
        raise UserError(f"{file}: no such file")
    if file == STDIN and sys.stdin.isatty():
        raise UserError("nothing to score: give a file, or pipe rows into standard input")
    result = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # messages
        show_messages()
        from reward_model.serving.lines import score_lines

        return score_lines(named[0], file, config, result)
