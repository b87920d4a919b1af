# SPDX-License-Identifier: Apache-2.0
"""What a loss of hidden states needs of a model, by the model's configuration alone, before anything is read."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from reward_model.common.errors import UserError
from reward_model.config.groups import ModelConfig
from reward_model.config.loss import Loss
from reward_model.models.language_head import require_language_head
from reward_model.models.saved_forms import set_dropout


def require_what_terms_need(loss: Loss, model: ModelConfig, config: PretrainedConfig) -> None:
    """See to it that the terms of a loss have something to learn from in a model.

    A configuration that names no dropout says nothing of it: then the start of the run tries two passes of the model.

    Args:
        config: of the model that ``model`` names.

    Raises:
        UserError: a contrastive term, and every dropout of the model is 0; or a language model's term, and the model
            has no language-model head that could be kept.
    """
    if loss.contrastive_weight and not model.lora_dropout:
        _require_dropout(model, config)
    if loss.sft_weight:
        require_language_head(model.model_name_or_path, config, model.trust_remote_code)


def _require_dropout(model: ModelConfig, config: PretrainedConfig) -> None:
    config = copy.deepcopy(config)
    if model.dropout is not None:
        set_dropout(config, model.dropout)
    found = _at_random(config.to_dict())
    if not found or any(found.values()):
        return
    whose = f"--dropout {model.dropout:g}" if model.dropout is not None else f"{model.model_name_or_path}"
    names = ", ".join(f"{name} 0" for name in sorted(found))
    raise UserError(
        f"--contrastive_weight: {whose} leaves no dropout ({names}), so that two passes give equal states: add "
        "--dropout 0.1, or --lora_dropout"
    )


def _at_random(values: dict[str, Any]) -> dict[str, float]:
    """What a configuration drops in training, layers included, or moves routers by, by its name; a text part's, too."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in ("text_config", "decoder", "text_encoder"):
            found |= _at_random(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found
