# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed configuration of a run: a ZeRO file, with what the flags say filled in.

DeepSpeed drops a nested "auto" without a word, so here every "auto" is filled or refused, and a file that says
something else than a flag is an error that names both.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from reward_model.common.errors import UserError
from reward_model.common.logging import say

ZERO_FOLDER = Path(__file__).resolve().parent / "zero"  # package data: an installed package has it too
OFFLOADS = ("offload_optimizer", "offload_param")
OURS = {  # sections that the trainer provides itself
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
}


def build_config(options: argparse.Namespace, world_size: int, hidden_size: int, vocab_size: int = 0) -> dict:
    """Read the ZeRO file that the flags choose, and fill it in.

    Args:
        options: of :func:`reward_model.config.options.parse`, ``dtype`` resolved. Updated where the file decides:
            batch size, accumulation, clipping, dtype and stage, if their flags were not given.
        world_size: processes.
        hidden_size: h of the model, from which ZeRO's bucket sizes follow as in Transformers' integration: h² elements
            to reduce at once, 0.9·h² to fetch ahead, 10·h to keep on every rank.
        vocab_size: rows of the embedding, most often the largest weight: an NVMe buffer holds a rank's part of it.

    Raises:
        UserError: no such file, not JSON, a contradiction, an "auto" that nothing fills.
    """
    path = _path(options)
    config = _read(path)
    for section, flags in OURS.items():
        if section in config:
            raise UserError(f"{path}: remove the section {section}; {flags} set it")
    zero = _section(config, "zero_optimization", path)
    for name in OFFLOADS:
        if not isinstance(zero.get(name) or {}, dict):
            raise UserError(f"{path}: zero_optimization.{name} is not an object")
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if "offload" in options.explicit and not offloads:
        raise UserError(f"--offload and {path}: the file has no offload_optimizer with a device")
    options.offload = offloads
    _agree(options, "zero_stage", zero, "stage", path, lambda v: v in range(4))
    _agree(options, "per_device_train_batch_size", config, "train_micro_batch_size_per_gpu", path, _is_count)
    _agree(options, "gradient_accumulation_steps", config, "gradient_accumulation_steps", path, _is_count)
    _agree(options, "max_grad_norm", config, "gradient_clipping", path, lambda v: v >= 0)
    _set_dtype(options, config, path)

    total = options.per_device_train_batch_size * options.gradient_accumulation_steps * world_size
    if config.get("train_batch_size", "auto") not in ("auto", total):
        raise UserError(
            f"{path}: train_batch_size {config['train_batch_size']} is not {total}: --per_device_train_batch_size "
            f"{options.per_device_train_batch_size} × --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps} × {world_size} processes"
        )
    config["train_batch_size"] = total
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = _ranks_per_node(world_size, path)
    _set_nvme(options, zero, world_size, hidden_size, vocab_size, path)
    config.setdefault("steps_per_print", 2**31 - 1)  # our own log says more
    if options.enable_tensorboard:
        if "tensorboard" in config:
            there = _section(config, "tensorboard", path).get("output_path")
            raise UserError(
                f"--enable_tensorboard with --tensorboard_path {options.tensorboard_path} and the section tensorboard "
                f"with output_path {there} in {path}: keep one"
            )
        config["tensorboard"] = {
            "enabled": True,
            "output_path": f"{options.tensorboard_path}/ds_tensorboard_logs/",
            "job_name": "step2_model_tensorboard",
        }
    _refuse_auto(config, path)
    return config


def _path(options: argparse.Namespace) -> Path:
    """The file that the flags choose; a bare name that is no file here is one of ours."""
    if not options.deepspeed_config:
        return ZERO_FOLDER / f"zero{options.zero_stage}{'_offload' if options.offload else ''}.json"
    path = Path(options.deepspeed_config)
    if path.exists() or path.name != options.deepspeed_config:
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
        say(f"{path.name}: one node, so no second copy of the weights (hpZ): it only spares traffic between nodes")
        return 1
    return local


def _set_nvme(options, zero: dict, world_size: int, hidden_size: int, vocab_size: int, path: Path) -> None:
    """The folder and the buffers of what goes to NVMe."""
    auto_paths = 0
    for name in OFFLOADS:
        part = zero.get(name) or {}
        if part.get("device") != "nvme":
            continue
        if part.get("nvme_path", "auto") == "auto":
            if not options.nvme_path:
                raise UserError(f"{path}: {name} goes to NVMe: name a folder there with --nvme_path")
            # a folder for each run: DeepSpeed empties what it finds, and two runs may share a disk
            run = f"zero-{os.environ.get('MASTER_ADDR', 'localhost')}-{os.environ.get('MASTER_PORT', 0)}"
            part["nvme_path"] = str(Path(options.nvme_path).resolve() / run)
            auto_paths += 1
        if part.get("buffer_size") == "auto":
            # the embedding with some added tokens, or else a wide MLP's matrix
            part["buffer_size"] = -(-max(vocab_size + 256, 8 * hidden_size) * hidden_size // world_size)
    if options.nvme_path and not auto_paths:
        raise UserError(
            f'--nvme_path {options.nvme_path} and {path}: the file puts nothing on NVMe with nvme_path "auto"; '
            "--deepspeed_config zero3_nvme.json does"
        )


def _read(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed configuration {path} is not a JSON object")
    return config


def _section(config: dict, name: str, path: Path) -> dict:
    section = config.setdefault(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is not an object")
    return section


def _agree(options, flag: str, section: dict, key: str, path: Path, is_valid: Callable[[float], bool]) -> None:
    """Let a flag and a key of the file be one number: the flag's where it is given or the file says nothing."""
    value = section.get(key, "auto")
    if value != "auto":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
            raise UserError(f"{path}: {key} {json.dumps(value)} is not a value that --{flag} could have")
        if value != getattr(options, flag) and flag in options.explicit:
            raise UserError(f"--{flag} {getattr(options, flag)} and {key} {value} in {path}: make them one")
        setattr(options, flag, value)
    section[key] = getattr(options, flag)


def _is_count(value: float) -> bool:
    return isinstance(value, int) and value >= 1


def _set_dtype(options: argparse.Namespace, config: dict, path: Path) -> None:
    if "bfloat16" in config:
        raise UserError(f"{path}: write bf16 in place of the old name bfloat16")
    half = {"bf16": _section(config, "bf16", path), "fp16": _section(config, "fp16", path)}
    enabled = {name: section.get("enabled", "auto") for name, section in half.items()}
    if list(enabled.values()) == [True, True]:
        raise UserError(f"{path} enables both bf16 and fp16: choose one")
    allowed = {name for name, value in enabled.items() if value is True}
    if not allowed:
        allowed = {"fp32"} | {name for name, value in enabled.items() if value == "auto"}
    if options.dtype not in allowed:
        if "dtype" in options.explicit:
            words = {True: "enabled", False: "disabled"}
            said = ", ".join(f"{name} {words[value]}" for name, value in enabled.items() if value in words)
            raise UserError(f"--dtype {options.dtype} and {said} in {path}: make them one")
        options.dtype = allowed.pop() if len(allowed) == 1 else "fp32"
    for name, section in half.items():
        section["enabled"] = options.dtype == name
    if options.dtype == "fp16" and options.zero_stage == 0:
        # DeepSpeed 0.18.3 to 0.19.8: backward does not scale the loss, step unscales
        options.zero_stage = config["zero_optimization"]["stage"] = 1
        say("float16 at ZeRO stage 0 divides gradients by the loss scale in DeepSpeed 0.18.3 to 0.19.8: using stage 1")


def _refuse_auto(value, path: Path, where: str = "") -> None:
    if value == "auto":
        raise UserError(f'{path}: no flag fills the "auto" at {where}; write a value')
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        _refuse_auto(inner, path, f"{where}.{key}" if where else str(key))
