# SPDX-License-Identifier: Apache-2.0
"""What a run can be told, in groups: each field is a flag of ``main.py``, a key of ``--config`` and a Python argument.

Flags that upstream's step 2 has keep their names and their meaning. A group checks its own values when it is made; what
two of them must agree on is checked in :mod:`reward_model.config.options`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from reward_model.common.errors import UserError
from reward_model.config.objectives import ALIASES, LIST_LOSSES, PAIR_LOSSES, POINT_LOSSES

Bounds = dict[str, tuple[float, float, bool]]
Dtype = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]  # Transformers' names
Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def flag(
    default: Any = MISSING,
    *,
    help: str,
    metavar: str | tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
    is_secret: bool = False,
) -> Any:
    """A field with its help; a list is given as a tuple, from which each object gets a list of its own.

    Args:
        aliases: other flags for it, as another program has them, with their hyphens.
        is_secret: the value is not shown where the object is.
    """
    metadata: dict[str, Any] = {"help": help} | ({} if metavar is None else {"metavar": metavar})
    metadata |= {"aliases": list(aliases)} if aliases else {}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not is_secret)


class Group:
    """Checks each value when the object is made.

    ``_bounds``: field → (lowest, highest, whether the lowest itself is allowed); no highest value is ever reached.
    """

    _argument_group_name: ClassVar[str]  # HfArgumentParser's name for the heading in --help
    _bounds: ClassVar[Bounds] = {}

    def __post_init__(self) -> None:
        """Raises UserError for a value that is out of its range or not among the choices; names the flag."""
        hints = get_type_hints(type(self))
        for each in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, each.name)
            if value is None:
                continue
            choices = _choices(hints[each.name])
            if choices and value not in choices:
                named = ", ".join(map(str, choices))
                raise UserError(f"--{each.name} {value}: choose from {named}")
            if each.name in self._bounds:
                for number in value if isinstance(value, list) else [value]:
                    _require_bounds(f"--{each.name}", number, *self._bounds[each.name])


def require_page(flag: str, path: str | None) -> None:
    """Raises UserError: a page would be written to a file that says it is something else."""
    if path is not None and Path(path).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{flag} {path}: a page of HTML is written; end it with .html")


MOST = 2**63  # a number of 64 bits


def _choices(hint: Any) -> tuple:
    """The values that a ``Literal``, or a ``Literal | None``, allows; empty: any."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return get_args(literals[0]) if literals else ()


def _require_bounds(name: str, value: float, low: float, high: float, reaches_low: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise UserError(f"{name} {value}: not a finite number")
    if abs(value) >= MOST:
        raise UserError(f"{name} {value}: beyond {MOST:.2g}")
    if value >= high:
        raise UserError(f"{name} {value}: not in [{low}, {high})")
    if value < low or (value == low and not reaches_low):
        raise UserError(f"{name} {value}: {'below' if reaches_low else 'not above'} {low:g}")


def seconds_of(limit: str) -> float:
    """The seconds of a ``--time_limit``: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``.

    >>> seconds_of("90"), seconds_of("1-00:00:30")
    (5400.0, 86430.0)

    Raises:
        UserError: it has another form, or is zero.
    """
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d))|(\d+)", limit)
    if not found:
        raise UserError(f"--time_limit {limit}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds, alone = (int(part or 0) for part in found.groups())
    total = 60.0 * alone + 86_400 * days + 3_600 * hours + 60 * minutes + seconds
    if not total:
        raise UserError(f"--time_limit {limit}: no time at all")
    return total


NUMBER = (-math.inf, math.inf, True)
NOT_NEGATIVE = (0, math.inf, True)
POSITIVE = (0, math.inf, False)
COUNT = (1, math.inf, True)


MOST_HEADS = 64  # a score's standard deviation over so many is known to 9 %
SET_NAME = re.compile(r"[\w.-]+", re.ASCII)  # of an evaluation set, which is a part of TensorBoard's tags


def set_of(entry: str) -> tuple[str | None, str]:
    """The name and the path of an entry of ``--eval_data_path``; None: it has no name, as a path that exists has none.

    >>> set_of("chat=eval/chat.jsonl"), set_of("owner/name")
    (('chat', 'eval/chat.jsonl'), (None, 'owner/name'))
    """
    name, equals, path = entry.partition("=")
    is_path = os.path.exists(entry) or os.path.exists(entry.rpartition(":")[0])  # year=2026/eval.jsonl:0.5
    return (name, path) if equals and not is_path else (None, entry)


@dataclass(frozen=True)
class DataConfig(Group):
    """Which rows a run reads, and how they become token ids."""

    _argument_group_name: ClassVar[str] = "data"
    _bounds: ClassVar[Bounds] = {
        "max_seq_len": COUNT,
        "num_proc": NOT_NEGATIVE,
        "max_train_samples": NOT_NEGATIVE,
        "max_eval_samples": NOT_NEGATIVE,
        "flip_share": (0, 1, True),
        "drop_share": (0, 1, True),
    }

    data_path: list[str] = flag(
        (),
        metavar="PATH",
        help="The training data: hub names (owner/name or owner/name/subset), files (.jsonl, .json, .parquet, .csv, "
        "also .gz), or folders that hold train and eval files. PATH:2000 takes so many rows, PATH:0.5 such a share. "
        "Required.",
    )
    eval_data_path: list[str] = flag(
        (),
        metavar="[NAME=]PATH",
        help="The rows to evaluate on. Without it, the evaluation split of the data or a tenth of the rows is used. "
        "Each NAME=PATH is a set with metrics of its own; what has no name is one set. The first set decides for "
        "--keep_best and --early_stop.",
    )
    meta_data: list[str] = flag(
        (),
        metavar="PATH",
        help="Texts of another distribution, such as a policy's: two answers to a prompt or more, without judgments. "
        "Before each step the weights move to where these differ more in score, the gradient is taken there, and the "
        "update is made where they were (MetaRM).",
    )
    columns: list[str] = flag(
        (),
        metavar="FIELD=COLUMN",
        help="The columns of your data that hold a field under another name, such as prompt=question chosen=answer_a.",
    )
    split: str | None = flag(
        None,
        metavar="NAME",
        help="The split to train on, such as train_prefs. Default: train. The rows to evaluate on are then those of "
        "test_prefs, eval_prefs or the like.",
    )
    eval_split: str | None = flag(
        None, metavar="NAME", help="The split to evaluate on. Default: eval, test, validation, valid or dev."
    )
    max_train_samples: int = flag(
        0,
        metavar="N",
        help="The most training rows, drawn at random after all have been tokenized; 0 takes all. PATH:N draws before.",
    )
    max_eval_samples: int = flag(
        0, metavar="N", help="The most rows to evaluate on, drawn at random; 0 takes all of them."
    )
    flip_share: float = flag(
        0.0,
        metavar="SHARE",
        help="Train this share of the pairs, those with the lowest strength_mean, with chosen and rejected swapped.",
    )
    drop_share: float = flag(
        0.0,
        metavar="SHARE",
        help="Leave this share of the training pairs out, those with the lowest strength_mean; beside --flip_share, "
        "those next above the swapped ones.",
    )
    chat: bool = flag(
        False,
        help="Put rows of plain text through the tokenizer's chat template, the prompt as the user's message and each "
        "answer as the assistant's. Turns after Human: and Assistant: become messages, too.",
    )
    chat_template: str | None = flag(
        None,
        metavar="FILE|human_assistant",
        help="A chat template in place of the tokenizer's own: a Jinja file, or ours that writes Human: and "
        "Assistant:. It is saved with the model.",
    )
    pair_encoding: bool | None = flag(
        None,
        help="Give the tokenizer prompt and response as a pair, with a separator between them, and segment ids where "
        "the model has them. Default: as a reward model was trained, else for encoders without --pooling mean and not "
        "for decoders. Rows that a chat template writes, and answers without a prompt, stay one text.",
    )
    data_split: str | None = flag(
        None,
        metavar="SHARES",
        help="Upstream's shares of the data for its three steps, such as 2,4,4; this trainer takes the second share. "
        "Without it, every row is used.",
    )
    data_output_path: str | None = flag(
        None, metavar="FOLDER", help="The cache of tokenized rows. Default: ~/.cache/dschat-reward."
    )
    max_seq_len: int = flag(
        512, metavar="TOKENS", help="The longest text in tokens; a longer one loses the left of its prompt."
    )
    on_bad_row: Literal["stop", "skip"] = flag(
        "stop", help="Whether a row that cannot be used stops the run, or is skipped and counted."
    )
    num_proc: int = flag(
        0, metavar="N", help="The number of processes that tokenize; 0 chooses by the number of cores and rows."
    )
    add_eot_token: bool = flag(False, help="Add <|endoftext|> to the tokenizer as one token, and end texts with it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip_share + self.drop_share >= 1:
            raise UserError(f"--flip_share {self.flip_share} and --drop_share {self.drop_share} leave no pair as it is")
        if self.pair_encoding and self.chat:
            raise UserError("--pair_encoding and --chat: the chat template writes each row as one text; leave one out")
        for part in self.columns:
            name, equals, column = part.partition("=")
            if not (name and equals and column):
                raise UserError(f"--columns {part}: write FIELD=COLUMN, such as prompt=question")
        seen: set[str] = set()
        for entry in self.eval_data_path:
            set_name, path = set_of(entry)
            if set_name is None:
                continue
            if not SET_NAME.fullmatch(set_name) or not path:
                raise UserError(
                    f"--eval_data_path {entry}: no such path, and no NAME=PATH, whose name has letters, digits, _ - ."
                )
            if set_name in seen:
                raise UserError(f"--eval_data_path {entry}: the name {set_name} is given twice")
            seen.add(set_name)

    @property
    def names(self) -> dict[str, str]:
        """Field → the column that holds it."""
        parts = (part.partition("=") for part in self.columns)
        return {name: column for name, _, column in parts}

    @property
    def eval_sets(self) -> dict[str, list[str]]:
        """Name → paths of each evaluation set that is named by path, in the order of the first; '' has no name."""
        sets: dict[str, list[str]] = {}
        for name, path in map(set_of, self.eval_data_path):
            sets.setdefault(name or "", []).append(path)
        return sets

    @property
    def cache_folder(self) -> Path:
        """Where tokenized rows lie: private to the user, unlike upstream's folder under /tmp."""
        if self.data_output_path:
            return Path(self.data_output_path)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dschat-reward"


@dataclass(frozen=True)
class ModelConfig(Group):
    """The pretrained model, its head, and what of it is trained."""

    _argument_group_name: ClassVar[str] = "model"
    _bounds: ClassVar[Bounds] = {
        "heads": (1, MOST_HEADS + 1, True),
        "dropout": (0, 1, True),
        "lora_dim": NOT_NEGATIVE,
        "lora_alpha": POSITIVE,
        "lora_dropout": (0, 1, True),
    }

    model_name_or_path: str = flag(metavar="MODEL", help="A pretrained model: a folder or a hub name. Required.")
    trust_remote_code: bool = flag(
        False, help="Run the code that a model from the hub or a folder brings. Look at it first."
    )
    new_head: bool = flag(False, help="Draw a new score head, whatever head the model has.")
    heads: int = flag(
        1,
        metavar="K",
        help="The number of score heads on the one backbone, each with its own initial weights and its own bootstrap "
        f"of the rows. The score is their mean, and their standard deviation goes with it. At most {MOST_HEADS}.",
    )
    dropout: float | None = flag(
        None,
        metavar="PROBABILITY",
        help="The probability of every dropout in the model. Without it, the model's own configuration decides.",
    )
    pooling: Literal["last", "mean", "classifier", "own"] | None = flag(
        None,
        help="Where a text is scored: at its last token (last), at the mean of its tokens (mean), or by the "
        "classification head that an encoder brings (classifier; own is its old name). Default: last for a decoder, "
        "classifier for an encoder.",
    )
    gradient_checkpointing: bool = flag(
        False, help="Recompute activations in the backward pass, which saves memory and costs a third more compute."
    )
    offload_activations: bool = flag(
        False,
        help="With --gradient_checkpointing: keep what layers are recomputed from in the memory of the host. It saves "
        "a GPU one hidden state a layer, and costs two copies of each.",
    )
    lora_dim: int = flag(
        0, metavar="R", help="The dimension of LoRA adapters beside the linear layers; 0 trains the whole model."
    )
    lora_alpha: float | None = flag(
        None, metavar="ALPHA", help="LoRA's updates are scaled by alpha / dimension. Default: the dimension, scale 1."
    )
    lora_module_name: str | None = flag(
        None,
        metavar="TEXT",
        help="Put adapters only on layers whose name contains this. Default: every linear layer of the backbone.",
    )
    lora_bits: Literal[4, 8] | None = flag(
        None, help="Load the frozen base of LoRA in 4 bits (QLoRA's NormalFloat) or 8, with bitsandbytes."
    )
    lora_dropout: float = flag(
        0.0, metavar="PROBABILITY", help="The probability of dropout on what enters LoRA adapters, in training alone."
    )
    only_optimize_lora: bool = flag(False, help="Upstream's flag, without effect: with LoRA the base is always frozen.")
    num_padding_at_beginning: int = flag(
        0, metavar="N", help="Upstream's flag, without effect: the length of a text says where it ends."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling == "own":
            object.__setattr__(self, "pooling", "classifier")  # the name until November 2026
        if self.offload_activations and not self.gradient_checkpointing:
            raise UserError("--offload_activations needs --gradient_checkpointing, whose layers' inputs it moves")
        if self.lora_alpha and not self.lora_dim:
            raise UserError("--lora_alpha without --lora_dim: give the adapters' dimension")
        if self.lora_dropout and not self.lora_dim:
            raise UserError("--lora_dropout without --lora_dim: give the adapters' dimension")
        if self.lora_bits and not self.lora_dim:
            raise UserError("--lora_bits without --lora_dim: a quantized base is frozen; give the adapters' dimension")


@dataclass(frozen=True)
class LossConfig(Group):
    """The objectives and the penalties; :func:`reward_model.config.loss.resolve_loss` makes a ``Loss`` of it."""

    _argument_group_name: ClassVar[str] = "loss"
    _bounds: ClassVar[Bounds] = {
        "loss_weight": POSITIVE,
        "focal_gamma": NOT_NEGATIVE,
        "huber_delta": POSITIVE,
        "prior_beta": NUMBER,
        "length_penalty": NOT_NEGATIVE,
        "score_penalty_weight": NOT_NEGATIVE,
        "head_anchor": NOT_NEGATIVE,
        "margin_scale": POSITIVE,
        "contrastive_weight": NOT_NEGATIVE,
        "contrastive_temperature": POSITIVE,
        "sft_weight": (0, 1, True),
    }

    loss: list[str] = flag(
        ("logistic",),
        metavar="NAME",
        help=f"The objectives. For pairs: {', '.join(PAIR_LOSSES)}; logistic is also called "
        f"{', '.join(ALIASES)}. For ranked lists: {', '.join(LIST_LOSSES)}. For "
        f"scores or labels: {', '.join(POINT_LOSSES)}. One of each kind at most; each row is learned from by those "
        "that suit it.",
    )
    loss_weight: list[float] = flag((), metavar="NUMBER", help="The weight of each objective. Default: 1 each.")
    loss_level: Literal["sequence", "token"] = flag(
        "sequence", help="Compare the scores at the end of the responses, or the mean over their tokens."
    )
    margin: str | None = flag(
        None,
        metavar="NUMBER|column|small|large|strength|similarity",
        help="By how much the better response should win: a number, the margin column of the data, Llama 2's small or "
        "large margins from its rating column, its strength_mean column (an ensemble's mean difference, which may be "
        "negative), or the more the more alike the model finds the two (similarity). Default: 0, and 1 for hinge.",
    )
    margin_scale: float = flag(
        1.0, metavar="MARGIN", help="The margin of two equal responses, with --margin similarity."
    )
    pair_weight: Literal["norm"] | None = flag(
        None,
        help="Weigh each pair's loss by the running mean of the distance between the hidden states of its two "
        "responses, divided by their distance (norm). Without it, pairs weigh the same.",
    )
    label_smoothing: str = flag(
        "0",
        metavar="NUMBER|column|strength",
        help="The share of flipped labels to assume, from 0 to 0.5; column takes 1 − the data's probability column, "
        "and strength 1 − σ(strength_mean) where that is below 0, else 0.",
    )
    focal_gamma: float = flag(2.0, metavar="GAMMA", help="The exponent of focal; 0 makes it logistic.")
    huber_delta: float = flag(1.0, metavar="DELTA", help="The error from which on huber is linear.")
    prior_beta: list[float] = flag(
        (20.0, -15.0),
        metavar="NUMBER",
        help="Two numbers B1 B3 of prior_length and prior_cosine, which bound the gap by B1 / similarity + B3.",
    )
    prior_model: str | None = flag(
        None, metavar="MODEL", help="The sentence encoder of prior_cosine: a folder or a hub name."
    )
    length_penalty: float = flag(
        0.0, metavar="WEIGHT", help="The weight of the squared correlation between score and length."
    )
    score_penalty: Literal["center", "l2", "zero_sum", "log_barrier", "centre"] | None = flag(
        None,
        help="A penalty that keeps scores near zero: on the sum of a pair's scores (center; centre is its old name), "
        "on the square of each score (l2), on the mean of a batch (zero_sum), or a wall at 5 and -5 (log_barrier). "
        "Without it, there is none.",
    )
    score_penalty_weight: float = flag(0.01, metavar="WEIGHT", help="The weight of --score_penalty.")
    head_anchor: float = flag(
        0.0,
        metavar="WEIGHT",
        help="With --heads: the weight of the squared distance of a head's weights from its initial weights, mean over "
        "the heads, which keeps heads apart where the data say little. RewardUQ's 0.5 is of a mean over the weights: "
        "divide it by the hidden size.",
    )
    contrastive_weight: float = flag(
        0.0,
        metavar="WEIGHT",
        help="The weight of a contrastive term: a second forward pass, with other dropout, has to find each hidden "
        "state of the first one among all of the micro-batch.",
    )
    contrastive: Literal["states", "difference"] = flag(
        "states",
        help="What is found again: the state of each response, or the difference between the states of each pair.",
    )
    contrastive_temperature: float = flag(
        0.05, metavar="TAU", help="What cosines of the contrastive term are divided by."
    )
    sft_weight: float = flag(
        0.0,
        metavar="ALPHA",
        help="The share of the loss that is a language model's of the chosen responses (GRM's is 0.01), by the "
        "language-model head of a pretrained decoder, which is kept while it trains and left out of the saved model.",
    )
    compute_fp32_loss: bool = flag(False, help="Upstream's flag, without effect: the loss is always in float32.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_penalty == "centre":
            object.__setattr__(self, "score_penalty", "center")  # the name until November 2026
        if len(self.prior_beta) != 2:
            raise UserError(f"--prior_beta: {len(self.prior_beta)} numbers; give two, B1 and B3")


@dataclass(frozen=True)
class BatchConfig(Group):
    """How rows become steps."""

    _argument_group_name: ClassVar[str] = "batches"
    _bounds: ClassVar[Bounds] = {
        "per_device_train_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "max_responses": NOT_NEGATIVE,
        "tokens_per_batch": NOT_NEGATIVE,
    }

    per_device_train_batch_size: int = flag(
        16,
        metavar="N",
        help="The size of a micro-batch on each GPU: in pairs; with objectives of lists or scores, in rows; with "
        "--batch_element prompt, in prompts.",
    )
    gradient_accumulation_steps: int = flag(1, metavar="N", help="The number of micro-batches in a step.")
    merge: Literal["batch", "prompt"] = flag(
        "batch",
        help="Rows of one prompt are encoded together: those that meet in a batch, or all of them, brought together.",
    )
    batch_element: Literal["pair", "prompt"] = flag(
        "pair",
        help="With --merge prompt: what the batch size counts and what weighs the same, a pair or all pairs of a "
        "prompt together.",
    )
    max_responses: int = flag(16, metavar="K", help="The most responses of a prompt that are encoded in one row.")
    tokens_per_batch: int = flag(
        0,
        metavar="TOKENS",
        help="The most tokens of a forward pass, pads included; a step has as many passes as it needs. 0: no limit.",
    )
    attention: Literal["auto", "timed", "slices", "flex", "varlen", "dense", "separate"] = flag(
        "auto",
        help="How texts stand in rows. slices (a CPU), flex (a GPU) and dense share prompts; varlen writes separate "
        "texts into one row without pads; separate gives each text a padded row. timed takes the fastest of those "
        "that give this model's own scores, by a few batches of the run. Default: auto, which is timed on a GPU, and "
        "on a CPU the first that is right.",
    )
    group_by_length: bool = flag(False, help="Draw batches from rows of similar length, so that there are fewer pads.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_element == "prompt" and self.merge != "prompt":
            raise UserError("--batch_element prompt needs --merge prompt, which brings a prompt's rows together")
        if self.max_responses < 2:
            raise UserError(f"--max_responses {self.max_responses}: give 2 or more, a pair has two")


@dataclass(frozen=True)
class TrainingConfig(Group):
    """The optimizer (AdamW) and how long it runs."""

    _argument_group_name: ClassVar[str] = "training"
    _bounds: ClassVar[Bounds] = {
        "num_train_epochs": COUNT,
        "max_steps": NOT_NEGATIVE,
        "learning_rate": POSITIVE,
        "head_learning_rate": POSITIVE,
        "lora_learning_rate": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "max_grad_norm": NOT_NEGATIVE,
        "num_warmup_steps": NOT_NEGATIVE,
        "warmup_ratio": (0, 1, True),
        "max_bad_steps": COUNT,
        "meta_rate": POSITIVE,
        "meta_batch_size": COUNT,
        "seed": (0, 2**32, True),  # NumPy takes no larger one
    }

    num_train_epochs: int = flag(1, metavar="N", help="The number of passes over the data.")
    max_steps: int = flag(
        0, metavar="N", help="The number of steps, in place of --num_train_epochs: as many passes as that takes."
    )
    learning_rate: float = flag(5e-5, metavar="RATE", help="The learning rate after the warm-up.")
    head_learning_rate: float | None = flag(
        None, metavar="RATE", help="The learning rate of the score head. Default: --learning_rate."
    )
    lora_learning_rate: float = flag(5e-4, metavar="RATE", help="The learning rate of LoRA adapters.")
    weight_decay: float = flag(0.0, metavar="DECAY", help="The weight decay of matrices; biases and norms have none.")
    optim: Optimizer = flag(
        "adamw_torch_fused",
        help="AdamW of PyTorch, or that of bitsandbytes, which keeps its moments in 8 bits: adamw_8bit, or "
        "paged_adamw_8bit, from which they move to the host where the GPU is full.",
    )
    normalize_before: bool = flag(
        False,
        help="Divide a new head before the first step, so that the scores of 256 training rows have standard deviation "
        "1, as OpenAI's first reward models began. Not with ZeRO 3. --normalize_scores does it to what is saved.",
    )
    max_grad_norm: float = flag(1.0, metavar="NORM", help="Gradients are clipped to this norm; 0 clips nothing.")
    lr_scheduler_type: Scheduler = flag("cosine", help="The learning-rate schedule after the warm-up.")
    num_warmup_steps: int = flag(0, metavar="N", help="The number of steps in which the learning rate rises from 0.")
    warmup_ratio: float = flag(
        0.0, metavar="SHARE", help="The share of all steps in which the learning rate rises from 0."
    )
    max_bad_steps: int = flag(
        3,
        metavar="K",
        help="End the run after so many steps in a row whose loss or gradient is not finite. Such a step is skipped, "
        "and its rows are written to metrics.jsonl.",
    )
    meta_rate: float | None = flag(
        None, metavar="RATE", help="How far the weights move for --meta_data. Default: --learning_rate."
    )
    meta_batch_size: int = flag(
        8, metavar="N", help="The number of prompts of --meta_data in a step, on all processes together."
    )
    seed: int = flag(1234, metavar="N", help="The seed of everything random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_warmup_steps and self.warmup_ratio:
            raise UserError("--warmup_ratio and --num_warmup_steps: give one of them")


@dataclass(frozen=True)
class EvaluationConfig(Group):
    """When held-out rows are scored, and how many."""

    _argument_group_name: ClassVar[str] = "evaluation"
    _bounds: ClassVar[Bounds] = {
        "per_device_eval_batch_size": COUNT,
        "eval_interval": NOT_NEGATIVE,
        "eval_iters": NOT_NEGATIVE,
        "early_stop": NOT_NEGATIVE,
        "score_limit": NOT_NEGATIVE,
    }

    per_device_eval_batch_size: int = flag(
        16, metavar="N", help="The size of an evaluation batch on each GPU, in pairs or scored responses."
    )
    eval_interval: int = flag(
        0,
        metavar="STEPS",
        help="Evaluate every so many steps, too, and not only before the first and after each epoch.",
    )
    eval_iters: int = flag(
        0, metavar="N", help="The number of batches in an evaluation; 0 evaluates on every held-out row."
    )
    keep_best: Literal["accuracy", "loss"] | None = flag(
        None,
        help="Save the weights of the evaluation with the highest accuracy, or the lowest loss, in place of the last.",
    )
    early_stop: int = flag(
        0,
        metavar="N",
        help="End the training after so many evaluations in a row that were no better than the best one before them, "
        "by what --keep_best names, or by the loss. 0 does not.",
    )
    score_limit: float = flag(
        32.0,
        metavar="SCORE",
        help="Warn of scores beyond this size, and of scores that grow while the accuracy does not. Beyond 32 the "
        "numbers of bfloat16 are 1/4 apart. 0 warns of neither.",
    )


TRACKERS = ("tensorboard", "wandb", "csv")  # Transformers' names for the first two


@dataclass(frozen=True)
class OutputConfig(Group):
    """What a run leaves behind, and what it shows."""

    _argument_group_name: ClassVar[str] = "output"
    _bounds: ClassVar[Bounds] = {"save_interval": NOT_NEGATIVE, "keep_checkpoints": COUNT}

    output_dir: str | None = flag(
        None, metavar="FOLDER", help="The folder of model, metrics and report. Without it, nothing is kept."
    )
    save_interval: int = flag(
        500,
        metavar="STEPS",
        help="Write a checkpoint every so many steps, from which an interrupted run goes on. 0 writes one only when "
        "the run is asked to stop. If any was written, the last step has one, too.",
    )
    keep_checkpoints: int = flag(2, metavar="K", help="The number of checkpoints that are kept, the newest ones.")
    resume: str = flag(
        "auto",
        metavar="auto|none|CHECKPOINT",
        help="auto goes on from the newest whole checkpoint in --output_dir, if a run of the same settings was "
        "interrupted there; none refuses a folder that holds a run; or name a checkpoint.",
    )
    resume_anyway: bool = flag(
        False, help="Resume although settings, data, model or versions differ from those of the checkpoint."
    )
    time_limit: str | None = flag(
        None,
        metavar="TIME",
        help="Write a checkpoint and end in time before this limit: minutes, HH:MM:SS or D-HH:MM:SS, as SLURM has it. "
        "Default: the end of the SLURM job, if there is one.",
    )
    normalize_scores: str | None = flag(
        None,
        metavar="train|eval|PATH",
        help="Save a head whose scores on these rows have standard deviation 1, and their mean in config.json.",
    )
    save_format: Literal["hf", "dschat", "both"] = flag(
        "hf", help="Save what Transformers loads, what upstream's step 3 loads, or both."
    )
    report_to: list[str] = flag(
        (),
        metavar="TRACKER",
        help=f"The trackers that get the numbers of the run, too: {', '.join(TRACKERS)}, or none. With "
        "WANDB_MODE=offline in the environment wandb keeps them on this disk.",
    )
    run_name: str | None = flag(
        None, metavar="NAME", help="The name of the run in Weights & Biases. Default: that of the output folder."
    )
    enable_tensorboard: bool = flag(False, help="Upstream's flag: the same as --report_to tensorboard.")
    tensorboard_path: str | None = flag(
        None,
        metavar="FOLDER",
        help="The folder of TensorBoard's events. Default: tensorboard in the output folder, or step2_tensorboard.",
    )
    push_to_hub: bool = flag(
        False, help="Push the saved model with its card to a repository of the Hugging Face hub when the run is over."
    )
    hub_model_id: str | None = flag(
        None, metavar="OWNER/NAME", help="The repository. Default: the output folder's name, under your own."
    )
    hub_private_repo: bool = flag(False, help="Let the repository be private if it is made.")
    hub_token: str | None = flag(
        None,
        metavar="TOKEN",
        help="A token that may write. Default: HF_TOKEN, or that of hf auth login. Other users of the machine can read "
        "command lines, and nothing keeps it.",
        is_secret=True,
    )
    debug: bool = flag(False, help="Show tracebacks and DeepSpeed's own log.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_limit is not None:
            seconds_of(self.time_limit)
        for name in self.report_to:
            if name not in (*TRACKERS, "none"):
                raise UserError(f"--report_to {name}: choose from {', '.join(TRACKERS)}, none")
        if "none" in self.report_to and (len(set(self.report_to)) > 1 or self.enable_tensorboard):
            raise UserError("--report_to none, and a tracker beside it (--enable_tensorboard is one): keep one of them")
        if "csv" in self.report_to and not self.output_dir:
            raise UserError("--report_to csv without --output_dir: its files lie there")
        if self.push_to_hub and not self.output_dir:
            raise UserError("--push_to_hub without --output_dir: what is pushed lies there")
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise UserError("--hub_model_id or --hub_private_repo without --push_to_hub: nothing would be pushed")

    @property
    def trackers(self) -> list[str]:
        """The names of the trackers that the flags ask for, each once."""
        asked = [*self.report_to, *["tensorboard"] * self.enable_tensorboard]
        return [name for name in TRACKERS if name in asked]

    @property
    def tensorboard_folder(self) -> str:
        """Where TensorBoard's events lie."""
        own = f"{self.output_dir}/tensorboard" if self.output_dir else "step2_tensorboard"  # upstream's name
        return self.tensorboard_path or own


@dataclass(frozen=True)
class EngineConfig(Group):
    """What DeepSpeed is told."""

    _argument_group_name: ClassVar[str] = "DeepSpeed"
    _bounds: ClassVar[Bounds] = {"sequence_parallel_size": COUNT, "hang_timeout": NOT_NEGATIVE}

    zero_stage: Literal[0, 1, 2, 3] = flag(
        0, help="What the GPUs divide among them: 0 nothing, 1 the optimizer, 2 gradients too, 3 parameters too."
    )
    offload: bool = flag(
        False, help="Keep the optimizer, and at stage 3 the parameters too, in the memory of the host."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto",
        help="The number format of weights and activations. auto is bf16 on a GPU that supports it, fp16 on one that "
        "does not, and fp32 on a CPU.",
    )
    sequence_parallel_size: int = flag(
        1,
        metavar="N",
        help="The number of neighboring processes that share each text, a part of its tokens each, for texts too long "
        "for one GPU; prompts are then not shared.",
    )
    tf32: bool = flag(
        False,
        help="With --dtype fp32 on a GPU since Ampere: multiply in TF32 while training, several times as fast and with "
        "11 significant bits.",
    )
    compile: bool = flag(
        False, help="Compile the layers by torch.compile, not with ZeRO 3. The first steps then take longer."
    )
    deepspeed: bool = flag(False, help="Upstream's flag, without effect: this trainer always uses DeepSpeed.")
    deepspeed_config: str | None = flag(
        None,
        metavar="FILE",
        help="A DeepSpeed configuration: a file, or the name of one of ours (zero3_nvme.json, zeropp.json, …). "
        "Default: the one that the flags above choose.",
    )
    nvme_path: str | None = flag(
        None, metavar="FOLDER", help="For zero3_nvme.json: a folder on the NVMe disk of each node."
    )
    # longer than what is silent for long: the 900 s that loading the saved model may take, and 840 s for the optimizer
    # of 7 B parameters, 84 GB, written as one file at 100 MB/s; shorter than the 1,800 s of DeepSpeed's collectives
    hang_timeout: int = flag(
        1200,
        metavar="SECONDS",
        help="End the run when a process has finished no micro-batch, evaluation batch or file for so long: it is "
        "named, and the stacks of all are printed. 0 waits for ever.",
    )
    local_rank: int = flag(-1, metavar="N", help="Given by the launcher.")


GROUPS = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "batches": BatchConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "output": OutputConfig,
    "engine": EngineConfig,
}
FLAGS = tuple(each.name for group in GROUPS.values() for each in fields(group))
