# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter with its score head as a model to start from: merged into its base, in a folder of the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from reward_model.common.errors import UserError, first_line
from reward_model.common.files import sha256_of
from reward_model.common.logging import logger
from reward_model.data.tokenizer import load_tokenizer
from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.models.lora import OF_SCORES, SCORES
from reward_model.models.many_heads import FILE, FOLDER, take_heads
from reward_model.models.scorer import Scorer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder holds an adapter, and no model beside it. OpenRLHF leaves the model's config.json there."""
    folder = Path(name_or_path)
    weights = {path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)}
    has_model = (folder / "config.json").is_file() and weights - {WEIGHTS, "adapter_model.bin", "training_args.bin"}
    return (folder / CONFIG).is_file() and not has_model


def merged_before(name_or_path: str) -> str:
    """Where the run that wrote an adapter has merged it, the folder above; empty: it is not there."""
    folder = Path(name_or_path).resolve()
    above = folder.parent
    has_model = (above / "config.json").is_file() and any(above.glob("*.safetensors"))
    return str(above) if folder.name == "adapter" and has_model else ""


def merged(name_or_path: str, cache: Path, trust_remote_code: bool = False) -> str:
    """The folder of a model that is an adapter's base with the adapter merged; made once, and found again.

    Args:
        cache: the folder of what is kept between runs.

    Raises:
        UserError: the adapter is of another kind, has no score head, or its base is not there.
    """
    folder = Path(name_or_path)
    base, digest = _base_of(folder), hashlib.sha256()
    beside = [name for name in (SCORES, f"{FOLDER}/{FILE}") if (folder / name).is_file()]
    for name in (CONFIG, WEIGHTS, *beside):
        digest.update(sha256_of(folder / name).encode())
    place = cache / "adapters" / digest.hexdigest()[:32]
    if not (place / "config.json").is_file():
        _merge(folder, base, place, trust_remote_code)
    logger.info(f"{folder} is a LoRA adapter of {base}: merged into {place}")
    return str(place)


def _base_of(folder: Path) -> str:
    """The name of what an adapter belongs to."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, kind, whole = (config.get(name) for name in ("base_model_name_or_path", "peft_type", "modules_to_save"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {first_line(error)}") from error
    if kind != "LORA" or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is not a LoRA adapter in safetensors: merge it into its base first")
    if not base:
        raise UserError(f"{folder / CONFIG} names no base model: merge the adapter into its base first")
    if not whole:
        raise UserError(f"{folder} is an adapter without a score head (modules_to_save): start from {base}")
    return str(base)


def _merge(folder: Path, base: str, place: Path, trust_remote_code: bool) -> None:
    from peft import PeftModel

    scorer = load_for_training(base, "auto", seed=0, trust_remote_code=trust_remote_code)
    try:
        scorer.model = PeftModel.from_pretrained(scorer.unwrapped, folder).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:  # PEFT's, for layers that are not there
        raise UserError(f"{folder} does not fit {base}: {first_line(error)}") from error
    tokenizer = load_tokenizer(
        str(folder) if (folder / "tokenizer_config.json").is_file() else base, trust_remote_code=trust_remote_code
    )
    tell_scores(scorer, folder)
    take_heads(scorer, folder)
    staging = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        saving.save(scorer, tokenizer, staging)
        os.replace(staging, place)
    except OSError:
        if not (place / "config.json").is_file():  # else another run was faster
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def tell_scores(scorer: Scorer, folder: Path) -> None:
    """Write what an adapter's scores mean to the config, in place of what those of its base meant.

    Raises:
        UserError: the adapter's file of that cannot be read.
    """
    saving.forget_scale(scorer.config)
    if not (folder / SCORES).is_file():  # of another trainer
        return
    try:
        values = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        for name in OF_SCORES:
            if name in values:
                setattr(scorer.config, name, values[name])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / SCORES} cannot be read: {first_line(error)}") from error
