# SPDX-License-Identifier: Apache-2.0
"""``reward-model novelty fit``: how far texts are from the training data, fitted once and given with each score.

reward-model novelty fit output --data train.jsonl
"""

from __future__ import annotations

import difflib
import json

from reward_model.commands.evaluate import messages_aside
from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.common.words import counted
from reward_model.config.novelty import NoveltyConfig
from reward_model.config.parser import build_parser, read_words, split_at_flags

SUBCOMMANDS = ("fit",)


def main(arguments: list[str]) -> int:
    """Fit, and say to what.

    Raises:
        UserError: no model there, or data that cannot be used.
    """
    parser = build_parser(
        [NoveltyConfig],
        prog="reward-model novelty",
        usage="%(prog)s fit MODEL --data PATH … [FLAG [VALUE …] …]",
        description="Fit novelty to the texts that a model was trained on. score, evaluate and serve then give it "
        "beside each score: the share of held-out training texts that are less novel, 0 to 1.",
        epilog="example: reward-model novelty fit output --data train.jsonl --method exemplar",
    )
    named, words = split_at_flags(arguments)
    if named and named[0] not in SUBCOMMANDS:
        near = difflib.get_close_matches(named[0], SUBCOMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there is {' and '.join(SUBCOMMANDS)}: fit MODEL --data …"
        raise UserError(f"reward-model novelty has no command {named[0]}; {meant}")
    (config,) = read_words(parser, words)[:1]
    if len(named) != 2:
        raise UserError("give fit and the folder of one model before the flags: fit MODEL --data …")
    show_messages()
    from reward_model.judging.novelty import fit_novelty

    with messages_aside(config.json):
        found = fit_novelty(named[1], config)
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    size = f"{counted(found['texts'], 'text')}, {found['held_out']} held out by {found['by']}"
    left = found["found"] - found["texts"] - found["held_out"]
    print(f"{found['method']} fitted to {size}: {found['file']}")
    print(f"a text is called novel where its novelty is {found['threshold']:g} or more")
    if left:
        print(f"{counted(left, 'different text')} beyond --max_texts {config.max_texts} were not looked at")
    return 0
