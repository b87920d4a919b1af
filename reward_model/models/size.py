# SPDX-License-Identifier: Apache-2.0
"""Whether a model that a configuration describes can be the one whose weights lie beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, PretrainedConfig

from reward_model.common.errors import UserError, first_line

LEAST = 1e9  # parameters; below, Transformers itself says quickly which weights do not fit
PER_BYTE = 64  # parameters; weights of one bit have 8


def require_its_size(name_or_path: str, config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Count what a configuration would make, on PyTorch's device ``meta``, before any memory is taken for it.

    Raises:
        UserError: many times as many parameters as the folder's files have room for, or sizes that no tensor has.
    """
    files = [*Path(name_or_path).glob("*.safetensors"), *Path(name_or_path).glob("*.bin")]
    stored = sum(file.stat().st_size for file in files if file.is_file())
    if not stored:
        return  # a name of the hub, or a folder without weights, which will be said
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{name_or_path}: its config.json describes no model: {first_line(error)}") from error
    except Exception:  # Transformers says it better when it loads the model
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > max(LEAST, PER_BYTE * stored):
        raise UserError(
            f"{name_or_path}: its config.json describes a model of {parameters / 1e9:,.0f} billion parameters, and its "
            f"weights have {stored / 1e6:,.1f} MB: they do not belong together"
        )
