# SPDX-License-Identifier: Apache-2.0
"""``reward-model doctor``: what is wrong with training data, before anything is trained.

reward-model doctor train.jsonl --eval_data_path eval.jsonl --report doctor.html
reward-model doctor with_strengths.jsonl --flip 0.1 --remove 0.1 --output cleaned.jsonl
"""

from __future__ import annotations

import json

from reward_model.commands.evaluate import messages_aside
from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.doctor import DoctorConfig
from reward_model.config.parser import build_parser, read_words, split_at_flags


def main(arguments: list[str]) -> int:
    """Examine, and print text or JSON; 1 where a finding hurts and no cleaned set was asked for.

    Raises:
        UserError: data that cannot be read, or a file that cannot be written.
    """
    parser = build_parser(
        [DoctorConfig],
        prog="reward-model doctor",
        usage="%(prog)s DATA [DATA …] [FLAG [VALUE …] …]",
        description="Look at preferences before training, without a model: duplicates, contradictions, what is in both "
        "sets, biases of length, place and style, rows that cannot be used; and, where the pairs have strengths, which "
        "are suspicious, and a cleaned set.",
        epilog="Exit status: 0, nothing hurts; 1, something does, or with --strict is doubtful, or the data cannot be "
        "read; with --output, 0 once the cleaned set is written, unless --strict is given.\n"
        "example: reward-model doctor train.jsonl --eval_data_path eval.jsonl --report doctor.html",
    )
    data, words = split_at_flags(arguments)
    (config,) = read_words(parser, words)[:1]
    if not data:
        raise UserError("name the data before the flags: files, folders or hub names")
    show_messages()
    from reward_model.doctor.api import examine

    with messages_aside(config.json):
        found = examine(data, config)
    if config.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print("\n" + "\n".join(found.lines()))
    was_asked_to_clean = config.cleans and not config.strict  # and has: what the data were like is no failure
    return 0 if was_asked_to_clean or found.is_healthy(config.strict) else 1
