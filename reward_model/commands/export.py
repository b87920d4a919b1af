# SPDX-License-Identifier: Apache-2.0
"""``reward-model export``: a model, an adapter or a checkpoint written in a form that another program reads.

reward-model export output model --to openrlhf
reward-model export output/checkpoints/step-00000500 model
"""

from __future__ import annotations

import argparse
from typing import get_args

from reward_model.common.logging import logger, show_messages
from reward_model.config.forms import Form
from reward_model.config.parser import build_parser


def main(arguments: list[str]) -> int:
    """Write a model into a new folder, and see to it that it loads and scores as it did.

    Raises:
        UserError: nothing there that can be exported, a form that the model has not, a folder that is in use, or a base
            model that is not where it was.
    """
    parser = build_parser([], prog="reward-model export", description=__doc__.split("``: ")[1].split("\n")[0])
    _add_flags(parser)
    options = parser.parse_args(arguments)
    show_messages()
    from reward_model.training.exporting import export

    described = export(
        options.folder,
        options.out,
        options.to,
        adapter=options.adapter,
        best=options.best,
        trust_remote_code=options.trust_remote_code,
    )
    logger.info(f"written to {options.out}: {described}")
    return 0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        help="A folder with a model, an adapter, or a checkpoint; of an output folder without a model the newest whole "
        "checkpoint.",
    )
    parser.add_argument("out", help="The folder to write, which is new or empty.")
    parser.add_argument(
        "--to",
        choices=get_args(Form),
        default="hf",
        help="hf: as Transformers loads it; hf4: the same, refused where Transformers 4 would read it otherwise; "
        "dschat: for DeepSpeed-Chat's step 3; sentence-transformers: modules whose embedding is the score; openrlhf: "
        "with the names that its loader reads.",
    )
    parser.add_argument("--adapter", action="store_true", help="Keep a LoRA adapter apart, in place of merging it.")
    parser.add_argument("--best", action="store_true", help="Take a checkpoint's best evaluation (--keep_best).")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that a saved model brings.")
