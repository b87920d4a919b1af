# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed configuration of a run: a ZeRO file, with what the flags say filled in.

DeepSpeed drops a nested "auto" without a word, so here every "auto" is filled or refused, and a file that says
something else than a flag is an error that names both.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import hushed, logger
from reward_model.config.groups import Dtype, EngineConfig, OutputConfig
from reward_model.config.options import RunConfig

SMALLEST_SIDE = 4096  # side² elements: 32 MiB in 16 bits, as much as PyTorch's DDP sends at once (25 MiB)
ZERO_FOLDER = Path(__file__).resolve().parent / "zero"  # package data: an installed package has it too
PROJECT = "dschat-reward"  # in Weights & Biases, unless WANDB_PROJECT names one
MONITORS = {"csv": "csv_monitor"}  # names of trackers → sections of DeepSpeed's monitor, where they differ
OFFLOADS = ("offload_optimizer", "offload_param")
OURS = {  # sections that the trainer provides itself
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
}


@dataclass(frozen=True)
class DeepSpeedSetup:
    """DeepSpeed's configuration, and the values on which it and the flags agreed."""

    config: dict[str, Any]
    zero_stage: Literal[0, 1, 2, 3]
    offload: bool
    dtype: Dtype
    micro_batch: int
    accumulation: int
    max_grad_norm: float

    @property
    def zero(self) -> dict[str, Any]:
        """The section ``zero_optimization``."""
        return self.config["zero_optimization"]


def set_up_deepspeed(
    config: RunConfig, dtype: Dtype, world_size: int, hidden_size: int, vocab_size: int = 0, on_gpu: bool = False
) -> DeepSpeedSetup:
    """Read the ZeRO file that the flags choose, and fill it in.

    Where a flag was not given, the file decides: batch size, accumulation, clipping, dtype and stage.

    Args:
        dtype: what ``--dtype auto`` means on this machine.
        world_size: the number of processes.
        hidden_size: h of the model, from which ZeRO's bucket sizes follow as in Transformers' integration: h² elements
            to reduce at once, 0.9·h² to fetch ahead, 10·h to keep on every rank; h² is 4096² at least.
        vocab_size: rows of the embedding, most often the largest weight: an NVMe buffer holds a rank's part of it.
        on_gpu: the run is on GPUs.

    Raises:
        UserError: no such file, not JSON, a contradiction, an "auto" that nothing fills, or what DeepSpeed refuses.
    """
    path = _path(config.engine)
    content = _read(path)
    for section, flags in OURS.items():
        if section in content:
            raise UserError(f"{path}: remove the section {section}; {flags} set it")
    zero = _section(content, "zero_optimization", path)
    offload = _offloads(config, zero, path)

    def agree(flag: str, section: dict, key: str, is_valid: Callable[[Any], bool]) -> Any:
        return _agree(config, flag, section, key, path, is_valid)

    stage = agree("zero_stage", zero, "stage", lambda v: v in range(4))
    micro_batch = agree("per_device_train_batch_size", content, "train_micro_batch_size_per_gpu", _is_count)
    accumulation = agree("gradient_accumulation_steps", content, "gradient_accumulation_steps", _is_count)
    max_grad_norm = agree("max_grad_norm", content, "gradient_clipping", lambda v: v >= 0)
    dtype = _set_dtype(config, dtype, content, path)
    _require_checked_gradients(dtype, content, path)
    if dtype == "fp16" and stage == 0:
        # DeepSpeed 0.18.3 to 0.19.8: backward does not scale the loss, step unscales
        stage = zero["stage"] = 1
        logger.warning(
            "float16 at ZeRO stage 0 divides gradients by the loss scale in DeepSpeed 0.18.3 to 0.19.8: using stage 1"
        )
    if dtype == "bf16" and stage == 0 and on_gpu:
        # one wait for every parameter tensor: some 290 a step for a model of 8 billion
        stage = zero["stage"] = 1
        logger.warning("bfloat16 at ZeRO stage 0 waits for the GPU at each tensor in DeepSpeed: using stage 1")
    _set_batch_size(content, micro_batch, accumulation, world_size, path)
    _set_sizes(zero, world_size, hidden_size, path)
    _set_nvme(config.engine.nvme_path, zero, world_size, hidden_size, vocab_size, path)
    content.setdefault("steps_per_print", 2**31 - 1)  # our own log says more
    content.setdefault(
        "timers", {"throughput": {"enabled": False}}
    )  # DeepSpeed's waits for the GPU twice a micro-batch
    if config.training.optim != "adamw_torch_fused":
        _allow_optimizer(config.training.optim, content, path)
    _set_trackers(config.output, content, path)
    _refuse_auto(content, path)
    if config.engine.deepspeed_config:
        require_accepted(path, content)
    return DeepSpeedSetup(content, stage, offload, dtype, micro_batch, accumulation, max_grad_norm)


def _require_checked_gradients(dtype: Dtype, content: dict, path: Path) -> None:
    """Steps whose gradients are not finite are skipped only where DeepSpeed looks at them."""
    section, key = {"bf16": ("bf16", "check_grad_overflow"), "fp32": ("zero_optimization", "compute_grad_norm")}.get(
        dtype, ("fp16", "")
    )
    if content[section].get(key) is False:
        raise UserError(
            f"{path}: with {section}.{key} false, a gradient that is not finite reaches the weights; leave it out"
        )


def _allow_optimizer(optim: str, content: dict, path: Path) -> None:
    """ZeRO takes optimizers that DeepSpeed has not tested only with leave."""
    if content.setdefault("zero_allow_untested_optimizer", True) is not True:
        raise UserError(f"--optim {optim} and {path}: write zero_allow_untested_optimizer true, or leave the key out")


def _offloads(config: RunConfig, zero: dict, path: Path) -> bool:
    """Whether the file puts the optimizer elsewhere."""
    for name in OFFLOADS:
        if not isinstance(zero.get(name) or {}, dict):
            raise UserError(f"{path}: zero_optimization.{name} is not an object")
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if "offload" in config.given and config.engine.offload != offload:
        if offload:
            raise UserError(f"--offload false and {path}: the file has an offload_optimizer with a device")
        raise UserError(f"--offload and {path}: the file has no offload_optimizer with a device")
    return offload


def _set_batch_size(content: dict, micro_batch: int, accumulation: int, world_size: int, path: Path) -> None:
    total = micro_batch * accumulation * world_size
    if content.get("train_batch_size", "auto") not in ("auto", total):
        raise UserError(
            f"{path}: train_batch_size {content['train_batch_size']} is not {total}: --per_device_train_batch_size "
            f"{micro_batch} × --gradient_accumulation_steps {accumulation} × {world_size} processes"
        )
    content["train_batch_size"] = total


def _set_sizes(zero: dict, world_size: int, hidden_size: int, path: Path) -> None:
    """ZeRO's buckets, and the group of ranks that holds a second copy."""
    bucket = max(hidden_size, SMALLEST_SIDE) ** 2
    sizes = {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": int(0.9 * bucket),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = _ranks_per_node(world_size, path)


def _set_trackers(output: OutputConfig, content: dict, path: Path) -> None:
    """A section of DeepSpeed's monitor for each tracker that the flags ask for."""
    board = output.tensorboard_folder
    sections: dict[str, dict[str, Any]] = {  # the names in TensorBoard's path are upstream's
        "tensorboard": {"output_path": f"{board}/ds_tensorboard_logs/", "job_name": "step2_model_tensorboard"},
        "wandb": {"project": os.environ.get("WANDB_PROJECT") or PROJECT, "team": os.environ.get("WANDB_ENTITY")},
        "csv": {"output_path": str(output.output_dir), "job_name": "csv"},
    }
    for name in output.trackers:
        key = MONITORS.get(name, name)
        if key in content:
            there = _section(content, key, path).get("output_path")
            flag = f"--tensorboard_path {board} (--enable_tensorboard, --report_to)" if name == "tensorboard" else ""
            raise UserError(
                f"{flag or f'--report_to {name}'} and the section {key}{f' with output_path {there}' if there else ''} "
                f"in {path}: keep one"
            )
        content[key] = {"enabled": True} | sections[name]


def _path(engine: EngineConfig) -> Path:
    """The file that the flags choose; a bare name that is no file here is one of ours."""
    if not engine.deepspeed_config:
        return ZERO_FOLDER / f"zero{engine.zero_stage}{'_offload' if engine.offload else ''}.json"
    path = Path(engine.deepspeed_config)
    if path.exists() or path.name != engine.deepspeed_config:
        return path
    ours = sorted(file.name for file in ZERO_FOLDER.glob("*.json"))
    if path.name not in ours:
        raise UserError(f"--deepspeed_config {path}: No such file here, and {ZERO_FOLDER.name}/ has {', '.join(ours)}")
    return ZERO_FOLDER / path


def _ranks_per_node(world_size: int, path: Path) -> int:
    """Ranks that hold a whole copy of the weights (hpZ): a node's, or 1, which is none, where there is one node."""
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or (world_size == 1))
    if not local:
        raise UserError(
            f"{path}: neither LOCAL_WORLD_SIZE nor LOCAL_SIZE says how many processes a node has: write a number in "
            "place of zero_hpz_partition_size's auto"
        )
    if world_size % local:
        raise UserError(
            f"{path}: {world_size} processes are not {local} on each node: zero_hpz_partition_size wants nodes alike"
        )
    if local == world_size:
        logger.info(
            f"{path.name}: one node, so no second copy of the weights (hpZ): it only spares traffic between nodes"
        )
        return 1
    return local


def _set_nvme(
    nvme_path: str | None, zero: dict, world_size: int, hidden_size: int, vocab_size: int, path: Path
) -> None:
    """The folder and the buffers of what goes to NVMe."""
    auto_paths = 0
    for name in OFFLOADS:
        part = zero.get(name) or {}
        if part.get("device") != "nvme":
            continue
        if part.get("nvme_path", "auto") == "auto":
            if not nvme_path:
                raise UserError(f"{path}: {name} goes to NVMe: name a folder there with --nvme_path")
            # a folder for each run: DeepSpeed empties what it finds, and two runs may share a disk
            run = f"zero-{os.environ.get('MASTER_ADDR', 'localhost')}-{os.environ.get('MASTER_PORT', 0)}"
            part["nvme_path"] = str(Path(nvme_path).resolve() / run)
            auto_paths += 1
        if part.get("buffer_size") == "auto":
            # the embedding with some added tokens, or else a wide MLP's matrix
            part["buffer_size"] = -(-max(vocab_size + 256, 8 * hidden_size) * hidden_size // world_size)
    if nvme_path and not auto_paths:
        raise UserError(
            f'--nvme_path {nvme_path} and {path}: the file puts nothing on NVMe with nvme_path "auto"; '
            "--deepspeed_config zero3_nvme.json does"
        )


def _read(path: Path) -> dict:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"DeepSpeed configuration {path}: {twice[0]} is given twice")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"DeepSpeed configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed configuration {path} is not a JSON object")
    return config


def require_accepted(path: str | Path, content: dict[str, Any]) -> None:
    """Have DeepSpeed read a configuration that is filled in, before a model is loaded for it.

    Args:
        path: of the file, for the message.

    Raises:
        UserError: DeepSpeed does not take it; names the key without which it would.
    """
    content = {key: value for key, value in content.items() if key != "train_batch_size"}  # checked here, for all ranks
    if complaint := _complaint(content):
        place = _place_of_complaint(content)
        at = f" at {'.'.join(place)}" if place else ""
        raise UserError(f"{path}: DeepSpeed refuses it{at}: {complaint}")


def _complaint(content: dict[str, Any]) -> str:
    """What DeepSpeed has against a configuration; empty: nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig  # half a second, and it writes to the terminal

    try:
        with hushed(debug=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            DeepSpeedConfig(copy.deepcopy(content))
    except Exception as error:  # AssertionError, ValueError, TypeError, KeyError, pydantic's own, …
        if callable(errors := getattr(error, "errors", None)):  # pydantic's: a line for each, and one before them
            return "; ".join(f"{each['msg']}, given {each.get('input')!r}"[:200] for each in errors()[:2])
        return first_line(error) if str(error) else type(error).__name__
    return ""


def _place_of_complaint(content: dict[str, Any]) -> list[str]:
    """The keys, from the outermost on, that lead to what DeepSpeed complains of: it does not without the last."""
    place: list[str] = []
    inner: Any = content
    while isinstance(inner, dict):
        found = next((key for key in inner if not _complaint(_without(content, [*place, key]))), None)
        if found is None:
            return place
        place, inner = [*place, found], inner[found]
    return place


def _without(content: dict[str, Any], place: list[str]) -> dict[str, Any]:
    """A configuration that lacks the key at one place."""
    key, *rest = place
    if not rest:
        return {name: value for name, value in content.items() if name != key}
    return content | {key: _without(content[key], rest)}


def read_file(engine: EngineConfig) -> dict[str, Any]:
    """The ZeRO file that the flags choose, as it is."""
    return _read(_path(engine))


def _section(config: dict, name: str, path: Path) -> dict:
    section = config.setdefault(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is not an object")
    return section


def _agree(config: RunConfig, flag: str, section: dict, key: str, path: Path, is_valid: Callable[[Any], bool]) -> Any:
    """Let a flag and a key of the file be one number: the flag's where it is given or the file says nothing."""
    value, asked = section.get(key, "auto"), config.values()[flag]
    if value == "auto":
        value = asked
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
        raise UserError(f"{path}: {key} {json.dumps(value)} is not a value that --{flag} could have")
    elif value != asked and flag in config.given:
        raise UserError(f"--{flag} {asked} and {key} {value} in {path}: make them one")
    section[key] = value
    return value


def _is_count(value: float) -> bool:
    return isinstance(value, int) and value >= 1


def _set_dtype(config: RunConfig, default: Dtype, content: dict, path: Path) -> Dtype:
    """Enable one of the half formats, or none; which dtype that is."""
    if "bfloat16" in content:
        raise UserError(f"{path}: write bf16 in place of the old name bfloat16")
    half: dict[Dtype, dict] = {"bf16": _section(content, "bf16", path), "fp16": _section(content, "fp16", path)}
    enabled = {name: section.get("enabled", "auto") for name, section in half.items()}
    if list(enabled.values()) == [True, True]:
        raise UserError(f"{path} enables both bf16 and fp16: choose one")
    allowed: set[Dtype] = {name for name, value in enabled.items() if value is True}
    if not allowed:
        allowed = {name for name, value in enabled.items() if value == "auto"} | {"fp32"}
    asked = config.engine.dtype
    dtype: Dtype = default if asked == "auto" else asked
    if dtype not in allowed:
        if asked != "auto":
            words = {True: "enabled", False: "disabled"}
            said = ", ".join(f"{name} {words[value]}" for name, value in enabled.items() if value in words)
            raise UserError(f"--dtype {dtype} and {said} in {path}: make them one")
        dtype = allowed.pop() if len(allowed) == 1 else "fp32"
    for name, section in half.items():
        section["enabled"] = dtype == name
    return dtype


def _refuse_auto(value, path: Path, where: str = "") -> None:
    if value == "auto":
        raise UserError(f'{path}: no flag fills the "auto" at {where}; write a value')
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        _refuse_auto(inner, path, f"{where}.{key}" if where else str(key))
