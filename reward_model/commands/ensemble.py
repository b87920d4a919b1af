# SPDX-License-Identifier: Apache-2.0
"""``reward-model ensemble``: how strongly several models prefer the chosen answers of pairs, written beside the rows.

reward-model ensemble one two three --data train.jsonl --output judged.jsonl
torchrun --nproc_per_node 8 -m reward_model ensemble one two three --data train.jsonl --output judged.jsonl
reward-model ensemble --folds 5 --data train.jsonl --output judged.jsonl -- --model_name_or_path MODEL
"""

from __future__ import annotations

import json
import os

from reward_model.commands.evaluate import messages_aside, models_of
from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.ensemble import EnsembleConfig
from reward_model.config.parser import build_parser, read_words


def main(arguments: list[str]) -> int:
    """Judge, write the rows, and print a summary.

    Raises:
        UserError: models, data or flags of a training that cannot be used.
    """
    parser = build_parser(
        [EnsembleConfig],
        prog="reward-model ensemble",
        usage="%(prog)s MODEL [MODEL …] --data PATH … [FLAG [VALUE …] …]\n"
        "       %(prog)s --folds K --data PATH … [FLAG [VALUE …] …] -- FLAGS OF THE TRAINING",
        description="Let several models judge pairs, and write the rows as JSON lines with strength_mean (of chosen "
        "minus rejected), strength_std, strength_agree (the share that prefers chosen) and strength_models.",
        epilog="Exit status: 0; 75, --folds was asked to end, and goes on with --resume; else, an error.\n"
        "example: reward-model ensemble one two three --data train.jsonl --output judged.jsonl",
    )
    at = arguments.index("--") if "--" in arguments else len(arguments)
    models, words = models_of(arguments[:at])
    config = read_words(parser, words)[0]
    training = arguments[at + 1 :]
    if training and not config.folds:
        raise UserError("flags after -- are those of the training of --folds, which is not given")
    if config.folds and models:
        raise UserError(f"--folds trains its own models: leave {models[0]} out")
    if not config.folds and not models:
        raise UserError("name the models before the flags: folders or hub names; or train them by --folds")
    show_messages()
    from reward_model.common.distributed import end
    from reward_model.common.orphans import end_with_the_launcher

    end_with_the_launcher()  # ranks that went on would write what --resume goes on with
    from reward_model.serving.ensemble import described, ensemble

    with messages_aside(config.json):
        if config.folds:
            from reward_model.commands.folds import cross_fit

            summary = cross_fit(config, training)
        else:
            summary = ensemble(models, config)
    if os.environ["RANK"] == "0":
        print(json.dumps(summary, ensure_ascii=False) if config.json else "\n" + "\n".join(described(summary)))
    end()
    return 0
