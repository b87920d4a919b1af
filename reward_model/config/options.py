# SPDX-License-Identifier: Apache-2.0
"""Flags, a file and Python arguments → one :class:`RunConfig`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from reward_model.common.errors import UserError, require_no_lfs_pointer
from reward_model.common.logging import logger
from reward_model.config.config_file import read_config_file
from reward_model.config.groups import (
    FLAGS,
    GROUPS,
    BatchConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OutputConfig,
    TrainingConfig,
)
from reward_model.config.loss import resolve_loss
from reward_model.config.model_folder import require_plausible_folder
from reward_model.config.objectives import ALIASES, kind_of
from reward_model.config.parser import HINT, given_names, read_words, require_known, run_parser, words_of

TRACES = ("config.json", "metrics.jsonl", "run.json", "model.safetensors", "pytorch_model.bin", "checkpoints")


@dataclass(frozen=True)
class RunConfig:
    """What a run was asked to do, consistent in itself; what only the machine and the model decide is still open.

    given: the names of the fields that somebody set; a DeepSpeed file may decide the others. Those that differ from
        their defaults are always among them, so that only one that was set to its default needs to be named.

    Raises:
        UserError: two values contradict each other.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        changed = {name for name, value in self.values().items() if value != DEFAULTS[name]}
        object.__setattr__(self, "given", self.given | changed)
        resolve_loss(self.loss, self.given)
        _require_agreement(self)

    @classmethod
    def of(cls, **values: Any) -> RunConfig:
        """A configuration from the names of flags, whichever group they belong to; ``config`` names a file of more.

        >>> RunConfig.of(model_name_or_path="facebook/opt-350m", learning_rate=1e-5).training.learning_rate
        1e-05

        Raises:
            UserError: an unknown name, a wrong value, or two that contradict each other.
        """
        for name in values:
            require_known(name, (*FLAGS, "config"), "")
        try:
            return parse(words_of(values))
        except UserError as error:
            raise UserError(str(error).removesuffix(HINT)) from None

    def values(self) -> dict[str, Any]:
        """The value of every flag."""
        return _values(*(getattr(self, group) for group in GROUPS))


def _values(*groups: Any) -> dict[str, Any]:
    return {each.name: getattr(group, each.name) for group in groups for each in fields(group)}


DEFAULTS = _values(*(group("") if group is ModelConfig else group() for group in GROUPS.values()))


def expand(words: Sequence[str]) -> list[str]:
    """A command line with what ``--config`` names in place of it, but for the flags that the line has, too.

    Raises:
        UserError: the file cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}{HINT}") from error
    if not found.config:
        return list(words)
    own = run_parser()
    return [*read_config_file(Path(found.config), own, given_names(own, rest)), *rest]


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """The flags of ``main.py``, and of the file that ``--config`` names, → a configuration.

    Raises:
        UserError: an unknown flag or value, or two that contradict each other.
    """
    parser, words = run_parser(), expand(sys.argv[1:] if arguments is None else arguments)
    groups = read_words(parser, words, last_wins=True)[: len(GROUPS)]
    return RunConfig(**dict(zip(GROUPS, groups)), given=given_names(parser, words))


def _require_agreement(config: RunConfig) -> None:
    """Raises UserError where values of two groups contradict each other."""
    engine, loss, output = config.engine, config.loss, config.output
    if engine.compile and engine.sequence_parallel_size > 1:
        raise UserError("--compile and --sequence_parallel_size were not tried together: leave one of them out")
    terms = resolve_loss(loss, config.given).terms
    if terms and engine.sequence_parallel_size > 1:
        raise UserError(f"{terms[0]} and --sequence_parallel_size were not tried together: leave one of them out")
    for name in ("meta_rate", "meta_batch_size"):
        if name in config.given and not config.data.meta_data:
            raise UserError(f"--{name} without --meta_data: name the shifted texts")
    for name, is_on in (("sequence_parallel_size", engine.sequence_parallel_size > 1), ("compile", engine.compile)):
        if config.data.meta_data and is_on:
            raise UserError(f"--meta_data and --{name} were not tried together: leave one of them out")
    if loss.sft_weight and config.model.pooling not in (None, "last"):
        raise UserError(
            f"--sft_weight and --pooling {config.model.pooling}: only a decoder that is scored at its last token has a "
            "language-model head to keep"
        )
    require_stage(config.model, config.training, engine.zero_stage, engine.offload)
    if engine.offload and engine.zero_stage == 0 and not engine.deepspeed_config:
        raise UserError("--offload and --zero_stage 0: stage 0 offloads nothing; take --zero_stage 1, 2 or 3")
    if engine.compile and config.model.offload_activations:
        raise UserError("--compile and --offload_activations: torch compiles no layer whose inputs move; leave one out")
    if loss.loss_level == "token" and config.model.pooling not in (None, "last"):
        pooling = config.model.pooling
        raise UserError(f"--loss_level token and --pooling {pooling}: only pooling last has a score per token")
    if loss.head_anchor and config.training.normalize_before:
        raise UserError(
            "--head_anchor and --normalize_before: heads are kept near what was drawn, and would be divided after "
            "that; leave one of them out"
        )
    if loss.head_anchor and config.model.heads == 1:
        raise UserError("--head_anchor keeps several heads apart: give --heads 2 or more")
    if loss.loss_level == "token" and config.model.heads > 1:
        raise UserError(
            f"--loss_level token and --heads {config.model.heads}: a score at every token by every head takes K times "
            "the memory of one, and was not tried; take --loss_level sequence"
        )
    if output.output_dir and output.save_format != "hf" and config.model.pooling not in (None, "last"):
        raise UserError(
            f"--save_format {output.save_format} and --pooling {config.model.pooling}: step 3 scores the last token"
        )
    if not output.output_dir:
        for name in ("resume_anyway", "time_limit"):
            if getattr(output, name):
                raise UserError(f"--{name} without --output_dir: checkpoints lie there")
        if output.resume not in ("auto", "none"):
            raise UserError(f"--resume {output.resume} without --output_dir: name the folder of the run")
        if config.evaluation.keep_best:
            raise UserError("--keep_best without --output_dir: it says which weights are saved")
    _require_ranked_pairs(config.data, loss)
    if output.normalize_scores and not output.output_dir:
        raise UserError("--normalize_scores without --output_dir: it changes what is saved")
    if output.normalize_scores not in (None, "train", "eval"):
        is_name = "/" in output.normalize_scores or Path(output.normalize_scores).exists()
        if not is_name:
            raise UserError(f"--normalize_scores {output.normalize_scores}: give train, eval, or a path or hub name")


def _require_ranked_pairs(data: DataConfig, loss: LossConfig) -> None:
    """Raises UserError where pairs are to be swapped or left out by strength, and the loss does not go with that."""
    flags = [f"--{name}" for name in ("flip_share", "drop_share") if getattr(data, name)]
    kinds = {kind_of(ALIASES.get(name, name)) for name in loss.loss}
    if flags and (kinds == {"points"} or "lists" in kinds):
        raise UserError(f"{flags[0]} goes with losses of pairs, not with --loss {' '.join(loss.loss)}")
    column = next((name for name in ("margin", "label_smoothing") if getattr(loss, name) in OF_THE_ORDER), None)
    if data.flip_share and column:
        raise UserError(
            f"--flip_share and --{column} {getattr(loss, column)}: that column speaks of the order before the swap; "
            f"leave one out, or take --{column} strength, whose sign follows"
        )


OF_THE_ORDER = ("column", "small", "large")  # what is read of a pair that says how sure its order is
LOWEST_BITSANDBYTES = (0, 50)


def require_stage(model: ModelConfig, training: TrainingConfig, stage: int, offload: bool) -> None:
    """Raises UserError where the ZeRO stage or offload excludes a quantized base, 8 bits or ``--normalize_before``."""
    if model.lora_bits and stage == 3:
        raise UserError(
            f"--lora_bits {model.lora_bits} and ZeRO stage 3: quantized weights are not partitioned here; take "
            "--zero_stage 2, where each GPU holds them whole"
        )
    if training.normalize_before and stage == 3:
        raise UserError(
            "--normalize_before and ZeRO stage 3: the head is divided before DeepSpeed has the weights, and at stage 3 "
            "no process can score by then; take --zero_stage 2"
        )
    if training.optim != "adamw_torch_fused" and offload:
        raise UserError(
            f"--optim {training.optim} and offload: DeepSpeed updates on the CPU with an optimizer of its own; leave "
            "one of them out"
        )


def require_bitsandbytes(model: ModelConfig, training: TrainingConfig) -> None:
    """Raises UserError if what needs bitsandbytes is asked for, and bitsandbytes is not there or is too old."""
    flag = f"--lora_bits {model.lora_bits}" if model.lora_bits else f"--optim {training.optim}"
    if not model.lora_bits and training.optim == "adamw_torch_fused":
        return
    lowest = ".".join(map(str, LOWEST_BITSANDBYTES))
    try:
        there = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise UserError(f"{flag} needs bitsandbytes: pip install 'bitsandbytes>={lowest}'") from None
    if tuple(int(part) for part in there.split(".")[:2]) < LOWEST_BITSANDBYTES:
        raise UserError(f"{flag}: bitsandbytes {there} is too old: pip install 'bitsandbytes>={lowest}'")


PACKAGES_OF_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def require_trackers(sections: dict[str, Any]) -> None:
    """Raises UserError if a tracker's package is not there.

    Args:
        sections: DeepSpeed's configuration.
    """
    for name, package in PACKAGES_OF_TRACKERS.items():
        if (sections.get(name) or {}).get("enabled"):
            try:
                metadata.version(package)  # a folder called wandb, as its runs leave one, can be imported, too
            except metadata.PackageNotFoundError:
                raise UserError(f"--report_to {name} needs a package that is not here: pip install {package}") from None


def read_run(path: Path) -> dict[str, Any]:
    """What a ``run.json`` says of the run that wrote it; empty: it is none that could be gone on from."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and "content" in values else {}


def require_usable_folder(output: OutputConfig) -> None:
    """Raises UserError for an output folder that holds what no run can go on from.

    Whether a run that lies there is one of these settings is found out later; a log file or the like may lie there.
    """
    folder = Path(output.output_dir or "")
    left = [name for name in TRACES if (folder / name).exists()] if output.output_dir else []
    if left and (output.resume == "none" or not read_run(folder / "run.json")):
        what = "holds a run, and --resume none goes on with none" if output.resume == "none" else "holds another run"
        raise UserError(f"--output_dir {folder} {what} ({', '.join(left)}): name a new folder")


def require_data(config: RunConfig) -> None:
    """Raises UserError if no training data is named."""
    if not config.data.data_path:
        raise UserError("--data_path is missing: name a file, a folder or a hub name, such as Dahoas/rm-static")


def require_model_folder(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Raises UserError for what can only be a path and is no folder, and for a folder that holds no real model."""
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or " " in name_or_path
    if is_path and not Path(name_or_path).is_dir():
        raise UserError(f"--model_name_or_path {name_or_path}: no such folder")
    if Path(name_or_path).is_dir():
        require_plausible_folder(Path(name_or_path), trust_remote_code)
        for pattern in ("*.json", "*.safetensors", "*.bin", "*.model"):
            for file in Path(name_or_path).glob(pattern):
                require_no_lfs_pointer(file)


def require_no_adapter(folder: Path) -> None:
    """Raises UserError for a LoRA adapter, which is no model; names what it belongs to."""
    file = folder / "adapter_config.json"
    if file.is_file() and not (folder / "config.json").is_file():
        try:
            base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or "its base model"
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is not the configuration of an adapter: {error}") from error
        merged = folder.resolve().parent
        where = f"start from {merged}, where it is merged" if (merged / "config.json").is_file() else "merge it first"
        raise UserError(f"{folder} is a LoRA adapter of {base}: {where}")


def explain_inherited(config: RunConfig) -> None:
    """Say of flags that upstream needs and this trainer does not, that they change nothing."""
    has_lora = config.model.lora_dim > 0
    notes = {
        "num_padding_at_beginning": "a text's length says where it ends, whatever it begins with",
        "compute_fp32_loss": "scores and loss are always computed in float32",
        "only_optimize_lora": "with --lora_dim the base is always frozen" if has_lora else "there is no LoRA",
        "deepspeed": "this trainer always uses DeepSpeed",
    }
    if not has_lora:
        notes |= dict.fromkeys(("lora_module_name", "lora_learning_rate"), "there is no LoRA without --lora_dim")
    for name, note in notes.items():
        if name in config.given:
            logger.warning(f"--{name} changes nothing here: {note}")
