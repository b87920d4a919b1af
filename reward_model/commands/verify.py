# SPDX-License-Identifier: Apache-2.0
"""``reward-model verify``: does a saved model score the same everywhere, a line for each way in which others score.

reward-model verify output
reward-model verify output --data eval.jsonl --json
"""

from __future__ import annotations

import json

from reward_model.commands.evaluate import messages_aside
from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.parser import build_parser, read_words, split_at_flags
from reward_model.config.verification import VerifyConfig


def main(arguments: list[str]) -> int:
    """Verify, and print text or JSON; status 1 if any way gives other scores.

    Raises:
        UserError: no model there, or data that cannot be read.
    """
    parser = build_parser(
        [VerifyConfig],
        prog="reward-model verify",
        usage="%(prog)s FOLDER [--data PATH] [--json]",
        description="Score texts with a saved model in every way in which others would, and compare.",
        epilog="Exit status: 0, nothing differs beyond rounding; 1, something does.",
    )
    named, words = split_at_flags(arguments)
    (config,) = read_words(parser, words)[:1]
    if len(named) != 1:
        raise UserError("name the folder of one saved model before the flags")
    show_messages()
    from reward_model.training.verification import verify

    with messages_aside(config.json):
        found = verify(named[0], config)
    if config.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        print("\n".join(map(str, found.lines)))
        end = "nothing differs beyond rounding" if found.is_same else "scores differ, see above"
        if left := sum(line.status == "not verified" for line in found.lines):
            end += f"; {left} of {len(found.lines)} ways were not verified"
        print(f"\n{found.folder}: {end}")
    return 0 if found.is_same else 1
