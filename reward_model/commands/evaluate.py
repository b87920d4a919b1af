# SPDX-License-Identifier: Apache-2.0
"""``reward-model evaluate``: how right one or several models are on some data, how sure that is, and what it means.

reward-model evaluate output --data eval.jsonl
torchrun --nproc_per_node 8 -m reward_model evaluate output other/model --data chat=chat.jsonl math=math.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.config.groups import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, DataConfig, Group, flag, set_of

LONGEST = 4_096  # tokens, where neither a run nor the model says less


@dataclass(frozen=True)
class EvaluateConfig(Group):
    """What to evaluate on, and how."""

    _argument_group_name: ClassVar[str] = "evaluation"
    _bounds: ClassVar[Bounds] = {
        "batch_size": COUNT, "tokens_per_batch": NOT_NEGATIVE, "max_seq_len": COUNT, "max_samples": NOT_NEGATIVE,
        "temperature": POSITIVE, "num_proc": NOT_NEGATIVE,
    }  # fmt: skip

    data: list[str] = flag(
        (),
        metavar="[NAME=]PATH",
        aliases=("--dataset", "--eval_data_path"),
        help="The data: files, folders (their evaluation files) or hub names, as main.py takes them, and the published "
        "files of benchmarks. Entries with a name are sets of their own. Required.",
    )
    split: str | None = flag(None, metavar="NAME", help="The split of a hub name or a folder. Default: eval, test, ….")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag; subset=COLUMN names subsets.")
    chat: bool | None = flag(
        None, help="Put rows of plain text through the chat template. Default: as the run that trained the model."
    )
    chat_template: str | None = flag(
        None, metavar="FILE|human_assistant", help="A chat template in place of the tokenizer's own."
    )
    max_seq_len: int | None = flag(
        None,
        metavar="TOKENS",
        aliases=("--max_length",),
        help=f"The longest text; a longer one loses the left of its prompt. Default: as the run that trained the "
        f"model, or what the model takes, up to {LONGEST:,}.",
    )
    max_samples: int = flag(0, metavar="N", help="The most rows of a set, drawn at random; 0 takes all.")
    on_bad_row: Literal["stop", "skip"] = flag("stop", help="Stop at a row that cannot be used, or skip and count it.")
    batch_size: int = flag(32, metavar="N", help="The pairs that a process scores at once.")
    tokens_per_batch: int = flag(0, metavar="TOKENS", help="The most tokens of a forward pass, pads included.")
    attention: Literal["auto", "timed", "slices", "flex", "varlen", "dense", "separate"] = flag(
        "auto", help="How texts stand in rows; as main.py's flag."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", aliases=("--torch_dtype",), help="Of the weights. Default: as saved, and float32 on a CPU for float16."
    )
    temperature: float | None = flag(
        None, metavar="T", help="Judge σ(gap / T), in place of the temperature that the model was saved with."
    )
    seed: int = flag(0, metavar="N", help="Of what is drawn: resamples, halves and folds.")
    json: bool = flag(False, help="Print one object of JSON in place of text.")
    output_dir: str | None = flag(
        None, metavar="FOLDER", help="Write evaluation.json there, and results in rewardbench's form where they fit."
    )
    report: str | None = flag(None, metavar="PAGE.html", help="Write what was found as a page with charts.")
    load_json: bool = flag(False, help="rewardbench's flag, without effect: files are known by what is in them.")
    trust_remote_code: bool = flag(False, help="Run the code that a model brings. Look at it first.")
    data_output_path: str | None = flag(None, metavar="FOLDER", help="The cache of tokenized rows.")
    num_proc: int = flag(0, metavar="N", help="The processes that tokenize; 0 chooses.")
    local_rank: int = flag(-1, metavar="N", help="Set by launchers.")
    debug: bool = flag(False, help="Show tracebacks, and what libraries print.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UserError("give --data: files, folders or hub names")
        DataConfig(columns=self.columns)  # refuses what is no FIELD=COLUMN

    @property
    def sets(self) -> dict[str, list[str]]:
        """Name → paths, in the order of the first; '' has no name."""
        found: dict[str, list[str]] = {}
        for name, path in map(set_of, self.data):
            found.setdefault(name or "", []).append(path)
        return found


@dataclass(frozen=True)
class Evaluations:
    """What an evaluation came to.

    assessments: of each model on each set, as ``evaluation.json`` has them. comparisons: of each two models on each
    set. benchmarks: of each model, the numbers of each benchmark among the data.
    """

    assessments: list[dict] = field(default_factory=list)
    comparisons: list[dict] = field(default_factory=list)
    benchmarks: list[dict] = field(default_factory=list)

    def to_json(self) -> dict:
        return dict(vars(self))


def main(arguments: list[str]) -> int:
    """Evaluate, and print text or JSON.

    Raises:
        UserError: a model or data that cannot be used.
    """
    from reward_model.common import distributed
    from reward_model.common.logging import show_messages
    from reward_model.config.parser import build_parser, read_words

    parser = build_parser(
        [EvaluateConfig],
        prog="reward-model evaluate",
        usage="%(prog)s MODEL [MODEL …] --data [NAME=]PATH … [FLAG [VALUE …] …]",
        description="Evaluate reward models: accuracy with its interval, calibration, length, subsets, lists, baselines.",
        epilog="example: reward-model evaluate output --data my.jsonl --json > evaluation.json",
    )
    words, models = _models_first(arguments)
    if any(word in ("-h", "--help") for word in arguments):
        parser.parse_args(["--help"])
    config = read_words(parser, words)[0]
    if not models:
        raise UserError("name a model: a folder or a hub name, before the flags")
    show_messages()
    distributed.prepare_environment()
    with _messages_aside(config.json):
        found = evaluate(models, config)
    if distributed_rank() == 0:
        _show(found, config)
    distributed.end()
    return 0


def _models_first(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags, and the models: the words before the first flag, and those of --model, which is rewardbench's name."""
    models: list[str] = []
    words = list(arguments)
    while words and not words[0].startswith("-"):
        models.append(words.pop(0))
    while "--model" in words:
        at = words.index("--model")
        words.pop(at)
        while at < len(words) and not words[at].startswith("-"):
            models.append(words.pop(at))
    return words, models


def evaluate(models: Sequence[str], config: EvaluateConfig) -> Evaluations:
    """Score the sets with each model, and say what follows; every process of a launch calls it.

    >>> import reward_model
    >>> found = reward_model.evaluate(["demo/output"], reward_model.EvaluateConfig(data=["demo/data"]))  # doctest: +SKIP
    >>> found.assessments[0]["accuracy"]["value"]  # doctest: +SKIP
    0.9767

    Raises:
        UserError: a model that does not load or has no score head, or data that cannot be used.
    """
    from reward_model.common import distributed

    distributed.prepare_environment()
    context = distributed.join(config.local_rank)
    found = Evaluations()
    judged: dict[str, list] = {name: [] for name in config.sets}
    for model in models:
        with _loaded(model, config, context) as judge:
            for name, paths in config.sets.items():
                judged[name].append(judge(name, paths, found))
    for name, of_models in judged.items():
        for (one, first), (other, second) in combinations(zip(models, of_models), 2):
            found.comparisons.extend(_compare(name, one, first, other, second, config.seed))
    if config.output_dir and context.is_first:
        _write(found, Path(config.output_dir))
    return found
