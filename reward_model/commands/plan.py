# SPDX-License-Identifier: Apache-2.0
"""``reward-model plan``: memory and communication of a run, and the line that launches it.

reward-model plan --model_name_or_path meta-llama/Llama-2-7b-hf --gpus 8 --gpu_memory 80
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reward_model.common.errors import UserError, printable_lines
from reward_model.config.options import RunConfig
from reward_model.config.parser import build_parser, given_names, read_words, run_parser
from reward_model.config.planning import PlanConfig

SHARED_FLAGS = (  # with main.py
    "model_name_or_path",
    "per_device_train_batch_size",
    "max_seq_len",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "offload_activations",
    "tf32",  # this and what follows changes no memory that is counted
    "compile",
    "attention",
    "lora_dim",
    "lora_module_name",
    "lora_dropout",
    "lora_bits",
    "optim",
    "dtype",
    "pooling",
    "dropout",
    "heads",
    "head_anchor",
)


def parse(arguments: Sequence[str]) -> tuple[PlanConfig, RunConfig]:
    """The command line → the GPUs, and what of a run changes its needs, by the flags that main.py has for it.

    Raises:
        UserError: an unknown flag or value, or two that contradict each other.
    """
    parser = build_parser(
        [PlanConfig],
        prog="reward-model plan",
        usage="%(prog)s --model_name_or_path MODEL [--gpus N] [--gpu_memory GIB] [FLAG [VALUE …] …]",
        description="Estimate memory and communication of a run for every ZeRO setting; prints the line to launch.",
        epilog="example: reward-model plan --model_name_or_path meta-llama/Llama-2-7b-hf --gpus 8 --gpu_memory 80",
    )
    of_run = parser.add_argument_group("run", "as main.py has them")
    actions = {action.dest: action for action in run_parser()._actions}
    actions["model_name_or_path"].option_strings.append("--model")
    for name in SHARED_FLAGS:
        of_run._add_action(actions[name])
    cluster, run = read_words(parser, arguments, last_wins=True)
    given = given_names(parser, arguments)
    if "lora_module_name" in given and not run.lora_dim:
        raise UserError("--lora_module_name without --lora_dim: give the adapters' dimension")
    values = {name: getattr(run, name) for name in SHARED_FLAGS if name in given}
    if values.get("dtype", "auto") == "auto":
        values["dtype"] = "bf16"
    return cluster, RunConfig.of(**values)


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; the exit status is 1 if nothing fits."""
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    from reward_model.planning.lines import show

    lines = show(*asked)
    while True:
        try:
            print(printable_lines(next(lines)), flush=True)
        except StopIteration as end:
            return 0 if end.value else 1
