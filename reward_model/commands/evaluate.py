# SPDX-License-Identifier: Apache-2.0
"""``reward-model evaluate``: how right one or several models are on some data, how sure that is, and what it means.

reward-model evaluate output --data eval.jsonl
torchrun --nproc_per_node 8 -m reward_model evaluate output other/model --data chat=chat.jsonl math=math.jsonl
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence

from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.evaluation import EvaluateConfig
from reward_model.config.parser import build_parser, read_words, split_at_flags


def main(arguments: list[str]) -> int:
    """Evaluate, and print text or JSON.

    Raises:
        UserError: a model or data that cannot be used.
    """
    parser = build_parser(
        [EvaluateConfig],
        prog="reward-model evaluate",
        usage="%(prog)s MODEL [MODEL …] --data [NAME=]PATH … [FLAG [VALUE …] …]",
        description="Evaluate reward models: accuracy and how sure it is, calibration, length, lists, benchmarks.",
        epilog="example: reward-model evaluate output --data my.jsonl --json > evaluation.json",
    )
    models, words = models_of(arguments)
    config = read_words(parser, words)[0]
    if not models:
        raise UserError("name a model before the flags: a folder or a hub name")
    show_messages()
    from reward_model.common.distributed import end
    from reward_model.common.orphans import end_with_the_launcher
    from reward_model.judging.api import evaluate

    end_with_the_launcher()
    with messages_aside(config.json):
        found = evaluate(models, config)
    if os.environ["RANK"] == "0":
        _show(found, config.json)
    end()
    return 0


def models_of(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models, which are the words before the first flag and those of rewardbench's --model; and the other words."""
    models, words = split_at_flags(arguments)
    while "--model" in words:
        at = words.index("--model")
        words.pop(at)
        while at < len(words) and not words[at].startswith("-"):
            models.append(words.pop(at))
    return models, words


@contextlib.contextmanager
def messages_aside(is_json: bool) -> Iterator[None]:
    """With --json: what is said meanwhile goes to standard error, so that standard output holds the object alone."""
    with contextlib.redirect_stdout(sys.stderr) if is_json else contextlib.nullcontext():
        yield


def _show(found, is_json: bool) -> None:
    from reward_model.evaluation.benchmarks import described
    from reward_model.evaluation.words import compared_lines, lines_of

    if is_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    blocks = [list(lines_of(each)) for each in found.assessments]
    blocks += [[each["model"], *described(each)] for each in found.benchmarks]
    blocks += [list(compared_lines(each)) for each in found.comparisons]
    print("\n" + "\n\n".join("\n".join(block) for block in blocks))
