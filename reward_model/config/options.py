# SPDX-License-Identifier: Apache-2.0
"""The flags of ``main.py``: upstream step 2's, under their names, and ours."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from reward_model.common.errors import UserError
from reward_model.common.logging import say
from reward_model.config.objectives import ALIASES, LIST_LOSSES, PAIR_LOSSES, POINT_LOSSES, PRIOR_SMALLEST, kind_of
from reward_model.reward_model import LOSS_LEVELS, SCORE_PENALTIES

SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
POOLINGS = ("last", "mean", "own")
LOSSES = (*PAIR_LOSSES, *LIST_LOSSES, *POINT_LOSSES)
TAKES_MARGIN = ("logistic", "scaled", "hinge")
MARGINS = ("column", "small", "large")
MERGES = ("batch", "prompt")
BATCH_ELEMENTS = ("pair", "prompt")
SAVE_FORMATS = ("hf", "dschat", "both")
TRACES = ("config.json", "metrics.jsonl", "run.json", "model.safetensors", "pytorch_model.bin", "checkpoints")
EXAMPLE = "deepspeed main.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static --output_dir output"


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as one line, without the page of usage."""

    def error(self, message: str):
        raise UserError(f"{' '.join(message.split())} (--help lists the flags)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something; a help text in brackets names its own."""

    def _get_help_string(self, action):
        silent = action.default in (None, []) or action.default is False or "[" in action.help
        return action.help if silent else super()._get_help_string(action)


def build_parser() -> Parser:
    """Every flag of upstream's ``step2_reward_model_finetuning/main.py``, and what this trainer adds."""
    parser = Parser(
        description="Train a reward model on preference pairs, ranked lists or scores with DeepSpeed.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
        formatter_class=Help,
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        nargs="+",
        default=["Dahoas/rm-static"],
        metavar="PATH",
        help="hub names, files (.jsonl .json .parquet .csv, also .gz) or folders with train and eval files",
    )
    data.add_argument("--eval_data_path", nargs="+", default=[], metavar="PATH", help="rows to evaluate on instead")
    data.add_argument("--data_split", help="upstream's shares of its three steps, e.g. 2,4,4: takes the second")
    data.add_argument("--data_output_path", help="cache of tokenised rows [~/.cache/dschat-reward]")
    data.add_argument("--max_seq_len", type=positive_int, default=512, help="longest text, in tokens")
    data.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="what to do with an unusable row")
    data.add_argument("--num_proc", type=natural, default=0, help="processes that tokenise; 0: by cores and rows")
    data.add_argument("--add_eot_token", action="store_true", help="add <|endoftext|> as a token and end texts with it")

    model = parser.add_argument_group("model")
    model.add_argument("--model_name_or_path", required=True, help="a pretrained model: a folder or a hub name")
    model.add_argument("--dropout", type=probability, help="for every dropout of the model; not given: as configured")
    model.add_argument("--pooling", choices=POOLINGS, help="where a text is scored [decoder: last, encoder: own head]")
    model.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations, to save memory")
    model.add_argument("--lora_dim", type=natural, default=0, help="above 0: LoRA adapters of this dimension")
    model.add_argument("--lora_alpha", type=positive, help="LoRA's scale is alpha / dimension [the dimension: scale 1]")
    model.add_argument("--lora_module_name", help="LoRA on layers whose name contains this [every linear layer]")
    model.add_argument("--only_optimize_lora", action="store_true", help="always so with --lora_dim")
    model.add_argument("--num_padding_at_beginning", type=int, default=0, help="not needed here: lengths end a text")

    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss",
        nargs="+",
        default=["logistic"],
        metavar="NAME",
        help=f"of pairs: {', '.join(PAIR_LOSSES)}; of ranked lists: {', '.join(LIST_LOSSES)}; of scores or "
        f"labels: {', '.join(POINT_LOSSES)}; one of each kind at most, each row with what it has [logistic]",
    )
    loss.add_argument(
        "--loss_weight", nargs="+", type=positive, default=[], metavar="NUMBER", help="of each --loss [1 each]"
    )
    loss.add_argument("--loss_level", choices=LOSS_LEVELS, default="sequence", help="token: mean over the answers")
    loss.add_argument(
        "--margin",
        metavar="NUMBER|column|small|large",
        help="a number, the data's margin column, or Llama 2's margins from its rating column [0; --loss hinge: 1]",
    )
    loss.add_argument(
        "--label_smoothing",
        default="0",
        metavar="NUMBER|column",
        help="share of flipped labels assumed, to 0.5; column: 1 − the data's probability column [0]",
    )
    loss.add_argument("--focal_gamma", type=not_negative, default=2.0, help="of --loss focal; 0: logistic")
    loss.add_argument("--huber_delta", type=positive, default=1.0, help="of --loss huber: linear from this error on")
    loss.add_argument(
        "--prior_beta",
        nargs=2,
        type=number,
        default=(20.0, -15.0),
        metavar=("B1", "B3"),
        help="of --loss prior_*: the gap's bound is B1 / likeness + B3 [20 -15]",
    )
    loss.add_argument("--prior_model", help="of --loss prior_cosine: encoder of sentences, a folder or a hub name")
    loss.add_argument("--length_penalty", type=not_negative, default=0.0, help="weight of (score-length correlation)²")
    loss.add_argument("--score_penalty", choices=SCORE_PENALTIES, help="keep scores near zero")
    loss.add_argument("--score_penalty_weight", type=not_negative, default=0.01, help="weight of --score_penalty")
    loss.add_argument("--compute_fp32_loss", action="store_true", help="always so here")

    train = parser.add_argument_group("training")
    train.add_argument(
        "--per_device_train_batch_size",
        type=positive_int,
        default=16,
        help="pairs; with losses of lists or scores, rows; with --batch_element prompt, prompts",
    )
    train.add_argument("--per_device_eval_batch_size", type=positive_int, default=16, help="pairs, or scored answers")
    train.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="per step")
    train.add_argument("--num_train_epochs", type=positive_int, default=1, help="passes over the data")
    train.add_argument("--learning_rate", type=positive, default=5e-5, help="highest, after the warm-up")
    train.add_argument("--head_learning_rate", type=positive, help="of what scores the backbone's states [as above]")
    train.add_argument("--lora_learning_rate", type=positive, default=5e-4, help="of LoRA's adapters")
    train.add_argument("--weight_decay", type=not_negative, default=0.0, help="of matrices")
    train.add_argument("--max_grad_norm", type=not_negative, default=1.0, help="gradient clipping; 0: none")
    train.add_argument("--lr_scheduler_type", choices=SCHEDULERS, default="cosine", help="course")
    train.add_argument("--num_warmup_steps", type=natural, default=0, help="steps")
    train.add_argument("--seed", type=seed, default=1234, help="of everything random")
    train.add_argument("--eval_interval", type=natural, default=0, help="evaluate every so many steps; 0: each epoch")
    train.add_argument("--eval_iters", type=natural, default=0, help="batches per evaluation; 0: the whole set")

    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--merge",
        choices=MERGES,
        default="batch",
        help="rows with the same prompt are computed together: those that meet in a batch, or all, brought together",
    )
    batches.add_argument(
        "--batch_element",
        choices=BATCH_ELEMENTS,
        default="pair",
        help="with --merge prompt, what the batch size counts and what weighs the same: a pair, or a prompt's pairs",
    )
    batches.add_argument("--max_responses", type=natural, default=16, help="answers of a prompt in one row, at most")
    batches.add_argument(
        "--tokens_per_batch",
        type=natural,
        default=0,
        help="tokens of a forward pass, pads included, at most; a step has as many passes as it needs; 0: no limit",
    )
    batches.add_argument("--group_by_length", action="store_true", help="rows of similar length in a batch")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", help="model, metrics and report; not given: nothing is kept")
    output.add_argument(
        "--normalize_scores",
        metavar="train|eval|PATH",
        help="save a head whose scores on these rows have standard deviation 1, and their mean in config.json",
    )
    output.add_argument(
        "--save_format", choices=SAVE_FORMATS, default="hf", help="dschat: what upstream's step 3 loads"
    )
    output.add_argument("--enable_tensorboard", action="store_true", help="write events for TensorBoard")
    output.add_argument("--tensorboard_path", default="step2_tensorboard", help="folder of the events")
    output.add_argument("--debug", action="store_true", help="show tracebacks and DeepSpeed's own log")

    engine = parser.add_argument_group("DeepSpeed")
    engine.add_argument("--zero_stage", type=int, choices=range(4), default=0, help="what the processes share out")
    engine.add_argument("--offload", action="store_true", help="optimizer (and, stage 3, parameters) in host memory")
    engine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="[bf16 on a GPU that has it, fp32 on a CPU]")
    engine.add_argument("--deepspeed", action="store_true", help="always so here")
    engine.add_argument(
        "--deepspeed_config",
        metavar="FILE",
        help="a file, or the name of one of config/zero/: zero3_nvme.json, zeropp.json [by the flags above]",
    )
    engine.add_argument("--nvme_path", metavar="FOLDER", help="of zero3_nvme.json: a folder on each node's NVMe disk")
    engine.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="given by the launcher")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags → options; ``options.explicit`` holds the names that were given.

    Raises:
        UserError: an unknown flag or value, or two that contradict each other.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = {word.split("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)}
    options.explicit = {action.dest for action in parser._actions if given.intersection(action.option_strings)}
    _check(options)
    return options


def refuse_used_folder(folder: Path) -> None:
    """Raises UserError if another run left something in an output folder; a log file or the like may lie there."""
    left = [name for name in TRACES if (folder / name).exists()]
    if left:
        raise UserError(f"--output_dir {folder} holds another run ({', '.join(left)}): name a new folder")


def require_model_folder(name_or_path: str) -> None:
    """Raises UserError for what can only be a path and is no folder."""
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or " " in name_or_path
    if is_path and not Path(name_or_path).is_dir():
        raise UserError(f"--model_name_or_path {name_or_path}: no such folder")


def _check(options: argparse.Namespace) -> None:
    _check_loss(options)
    if options.offload and options.zero_stage == 0 and not options.deepspeed_config:
        raise UserError("--offload and --zero_stage 0: stage 0 offloads nothing; take --zero_stage 1, 2 or 3")
    if options.loss_level == "token" and {kind_of(name) for name in options.loss} != {"pairs"}:
        raise UserError(f"--loss_level token and --loss {' '.join(options.loss)}: only pairs have a loss per token")
    if options.loss_level == "token" and options.pooling not in (None, "last"):
        raise UserError(f"--loss_level token and --pooling {options.pooling}: only pooling last has a score per token")
    if options.score_penalty is None and "score_penalty_weight" in options.explicit:
        raise UserError("--score_penalty_weight without --score_penalty: name the penalty")
    if options.normalize_scores and not options.output_dir:
        raise UserError("--normalize_scores without --output_dir: it changes what is saved")
    if options.normalize_scores not in (None, "train", "eval"):
        is_name = "/" in options.normalize_scores or Path(options.normalize_scores).exists()
        if not is_name:
            raise UserError(f"--normalize_scores {options.normalize_scores}: give train, eval, or a path or hub name")
    if options.batch_element == "prompt" and options.merge != "prompt":
        raise UserError("--batch_element prompt needs --merge prompt, which brings a prompt's rows together")
    if options.max_responses < 2:
        raise UserError(f"--max_responses {options.max_responses}: give 2 or more, a pair has two")
    if options.lora_alpha and not options.lora_dim:
        raise UserError("--lora_alpha without --lora_dim: give the adapters' dimension")


def _check_loss(options: argparse.Namespace) -> None:
    """Fill in what the loss is made of."""
    options.loss = [ALIASES.get(name, name) for name in options.loss]
    for name in options.loss:
        if name not in LOSSES:
            raise UserError(f"--loss {name}: choose of {', '.join((*LOSSES, *ALIASES))}")
    kinds = [kind_of(name) for name in options.loss]
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--loss {' '.join(options.loss)}: name one loss at most for each of pairs, lists and scores")
    options.loss_weight = options.loss_weight or [1.0] * len(kinds)
    if len(options.loss_weight) != len(kinds):
        raise UserError(f"--loss_weight: {len(options.loss_weight)} numbers for {len(kinds)} losses")
    takes_margin = [name for name in options.loss if name in TAKES_MARGIN]
    if options.margin is not None and not takes_margin:
        raise UserError(f"--margin goes with --loss {', '.join(TAKES_MARGIN)}, not {' '.join(options.loss)}")
    if options.margin is None:
        options.margin = "1" if takes_margin == ["hinge"] else "0"
    if "scaled" in options.loss and options.margin not in MARGINS:
        raise UserError("--loss scaled weighs pairs by their own margins: add --margin column, small or large")
    if options.margin not in MARGINS:
        try:
            options.margin = number(options.margin)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--margin {options.margin}: give a number, column, small or large") from error
    if "label_smoothing" in options.explicit and "logistic" not in options.loss:
        raise UserError(f"--label_smoothing goes with --loss logistic, not {' '.join(options.loss)}")
    if options.label_smoothing != "column":
        try:
            share = number(options.label_smoothing)
        except argparse.ArgumentTypeError:
            share = math.nan
        if not 0.0 <= share <= 0.5:
            raise UserError(f"--label_smoothing {options.label_smoothing}: give a number from 0 to 0.5, or column")
        options.label_smoothing = share
    _check_own_flags(options)


def _check_own_flags(options: argparse.Namespace) -> None:
    """Refuse a flag of one loss where that loss is not."""
    for flag, names in (
        ("focal_gamma", ("focal",)),
        ("huber_delta", ("huber",)),
        ("prior_beta", ("prior_length", "prior_cosine")),
        ("prior_model", ("prior_cosine",)),
    ):
        if flag in options.explicit and not set(names) & set(options.loss):
            raise UserError(f"--{flag} goes with --loss {' or '.join(names)}, not {' '.join(options.loss)}")
    if "prior_cosine" in options.loss and not options.prior_model:
        raise UserError("--loss prior_cosine compares embeddings of answers: name their encoder with --prior_model")
    slope, shift = options.prior_beta
    if slope <= 0 or slope / (1 + PRIOR_SMALLEST) + shift <= 0:
        raise UserError(
            f"--prior_beta {slope:g} {shift:g}: B1 / 1.001 + B3 bounds the gap of like answers; more than 0"
        )


def explain_inherited(options: argparse.Namespace) -> None:
    """Say of flags that upstream needs and this trainer does not, that they change nothing."""
    notes = {
        "num_padding_at_beginning": "a text's length says where it ends, whatever it begins with",
        "compute_fp32_loss": "scores and loss are always computed in float32",
        "only_optimize_lora": "with --lora_dim the base is always frozen" if options.lora_dim else "there is no LoRA",
        "deepspeed": "this trainer always uses DeepSpeed",
    }
    if not options.lora_dim:
        notes |= dict.fromkeys(("lora_module_name", "lora_learning_rate"), "there is no LoRA without --lora_dim")
    for name, note in notes.items():
        if name in options.explicit:
            say(f"--{name} changes nothing here: {note}")


def cache_folder(options: argparse.Namespace) -> Path:
    """Where tokenised rows lie: private to the user, unlike upstream's folder under /tmp."""
    if options.data_output_path:
        return Path(options.data_output_path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dschat-reward"


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def probability(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive_int(text: str) -> int:
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def seed(text: str) -> int:
    if natural(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**32, where NumPy's seeds end")
    return int(text)
