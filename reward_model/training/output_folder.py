# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run, and what it says of the run."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import reward_model
from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.settings import Settings
from reward_model.models import saving
from reward_model.models.loading import DTYPES
from reward_model.models.scorer import Scorer, count
from reward_model.training import resume, verify
from reward_model.training.checkpoint import remove_unfinished
from reward_model.training.data import Data
from reward_model.training.model_card import where_from
from reward_model.training.resume import FINISHED, INTERRUPTED, hash_of_model, hash_of_rows, hash_of_sets

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "peft")  # whose versions run.json has


def described_by(settings: Settings, context: DistributedContext, data: Data) -> dict[str, Any]:
    """What ``run.json`` says, by which a run that goes on is known; on every rank what the first one finds."""
    content = {}
    if context.is_first and settings.output.output_dir:
        content = {
            "train": hash_of_rows(data.train),
            "evaluation": hash_of_sets(data.evaluation),
            "model": hash_of_model(settings.model.model_name_or_path),
        }
        if data.meta is not None:
            content["meta"] = hash_of_rows(data.meta)
    versions = {"reward_model": reward_model.__version__, "python": platform.python_version()}
    uses_bits = settings.model.lora_bits or settings.training.optim != "adamw_torch_fused"
    packages = (*PACKAGES, "bitsandbytes") if uses_bits else PACKAGES
    versions |= {name: metadata.version(name) for name in packages}
    values = json.loads(resume.described(settings, context.world_size, versions, content))
    special = {
        name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(data.special).items()
    }
    return distributed.from_first(values | {"special": special, "data": where_from(settings, data)})


def open_folder(
    folder: Path,
    context: DistributedContext,
    scorer: Scorer,
    settings: Settings,
    data: Data,
    described_run: dict[str, Any],
) -> None:
    """Write ``run.json`` into the output folder, while an error costs nothing yet, and remove what an end left there.

    Raises:
        UserError: it cannot be written, there is no room for the model, or the model cannot be saved.
    """
    size = sum(count(p) for p in scorer.parameters()) * torch.finfo(DTYPES[settings.engine.dtype]).bits // 8
    if settings.output.save_format != "hf":
        saving.require_dschat(scorer, data.tokenizer)
    problem = ""
    if context.is_first:
        for name in (FINISHED, INTERRUPTED):
            (folder / name).unlink(missing_ok=True)
        if left := remove_unfinished(folder):
            logger.warning(f"removed from {folder / 'checkpoints'}: {counted(len(left), 'checkpoint')} left unfinished")
        saving.require_space(folder, size * (2 if settings.output.save_format == "both" else 1))
        try:
            write_whole(folder / "run.json", json.dumps(described_run, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {folder / 'run.json'}: {error.strerror}") from error
        trust = settings.model.trust_remote_code
        problem = verify.rehearse(data.held_out, scorer.config, data.tokenizer, data.special, trust)
    if problem := distributed.first_text(problem):
        raise UserError(f"the model could not be saved after the training: {problem}")


def mark(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Say in a file of the folder how the run ended, once all else is on the disk; a full disk is said."""
    try:
        write_whole(folder / name, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        logger.warning(f"{folder / name}: {error.strerror}")
