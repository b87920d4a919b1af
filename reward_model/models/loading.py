# SPDX-License-Identifier: Apache-2.0
"""A pretrained model, from a folder or the hub, with a score head: its own or a new one."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.config.options import require_model_folder
from reward_model.models.scorer import (
    Scorer,
    init_head,
    multiply_in_float32,
)
from reward_model.reward_model import RewardModel


def load_for_training(
    name_or_path: str,
    dtype: torch.dtype | str,
    seed: int,
    pooling: str | None = None,
    dropout: float | None = None,
    expect_head: bool = False,
) -> Scorer:
    """A pretrained model with a score head, new or its own.

    Args:
        pooling: ``last``, ``mean`` or None: last for a decoder, an encoder's own head.
        dropout: for every dropout that the model's config names; None: as configured.
        seed: of a new head, N(0, 1/(h+1)²) as in OpenRLHF: the first scores lie near 0 and the first loss near log 2.
        expect_head: a model without a head of its own is an error.

    Raises:
        UserError: no model there, or weights missing.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, num_labels=1)
        labels = _labels_of_head(PretrainedConfig.get_config_dict(name_or_path)[0])
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        raise UserError(f"no model in {name_or_path}: {first_line(error)}") from error
    if dropout is not None:
        set_dropout(config, dropout)
    has_class = type(config) in AutoModelForSequenceClassification._model_mapping
    if labels != 1 and pooling != "mean" and is_deepspeed_zero3_enabled():
        raise UserError(
            f"{name_or_path} is a classifier of {labels} labels: Transformers cannot put a new head on it at "
            "ZeRO stage 3; take --zero_stage 2, or --pooling mean"
        )
    if pooling != "mean" and has_class:
        # never where it is not needed: under ZeRO 3 every weight has the shape (0,) when Transformers 4.56 and 4.57
        # compare, so that they drop the whole checkpoint
        ignore = {"ignore_mismatched_sizes": True} if labels != 1 else {}
        model, missing = _from_pretrained(AutoModelForSequenceClassification, name_or_path, config, dtype, **ignore)
        prefix = model.base_model_prefix + "."
        absent = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
        new_head = any(not name.startswith(prefix) for name in missing)
        is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
        if pooling == "last" and not is_decoder:
            raise UserError(f"--pooling last: {type(model).__name__} has a head of its own; leave the flag out")
        scorer = Scorer(model, "last" if is_decoder else "classifier")
        multiply_in_float32(model)
    else:
        backbone, absent = _from_pretrained(AutoModel, name_or_path, config, dtype, **no_pooler(config))
        scorer = on_drop_in(backbone, pooling or "last")
        new_head = True
    if absent:
        raise UserError(f"{name_or_path} lacks {len(absent)} of the model's weights, {absent[0]} the first of them")
    if new_head and expect_head:
        raise UserError(f"{name_or_path} has no trained score head")
    if new_head and scorer.pooling != "classifier":
        init_head(scorer, seed)
    logger.info(
        f"model: {type(scorer.unwrapped).__name__}, pooling {scorer.pooling}, {'new' if new_head else 'loaded'} head"
    )
    return scorer


def on_drop_in(backbone: nn.Module, pooling: str) -> Scorer:
    """A model without a head under the drop-in's; its pad rule stays unused, since lengths say where a text ends."""
    return Scorer(RewardModel(backbone, SimpleNamespace(pad_token_id=None)), pooling)


def _labels_of_head(config: dict) -> int:
    """How many labels a checkpoint's own classification head has by its config.json; 1 where there is no such head."""
    if not any(name.endswith("Classification") for name in config.get("architectures") or []):
        return 1
    return len(config.get("id2label") or ()) or config.get("num_labels") or 2  # 2 is the default, not written down


def _from_pretrained(auto_class, name_or_path: str, config, dtype: torch.dtype, **kwargs):
    try:
        model, info = auto_class.from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise UserError(f"cannot load the weights of {name_or_path}: {first_line(error)}") from error
    # of another shape: names in Transformers 4, a name and two shapes in 5
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return model, sorted(set(info["missing_keys"]) | mismatched)


def no_pooler(config) -> dict:
    """AutoModel gives BERT's kind a pooling layer that a mean over tokens leaves unused."""
    model_class = AutoModel._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Write one probability to every dropout that a config names (layerdrop, which skips layers, is another thing)."""
    for name, value in list(config.to_dict().items()):
        is_dropout = "drop" in name or name.endswith("_pdrop")
        if is_dropout and "layerdrop" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_config(name_or_path: str):
    """Raises UserError where there is no model."""
    require_model_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        place = "" if Path(name_or_path).is_dir() else "no such folder here, and from the hub: "
        raise UserError(f"--model_name_or_path {name_or_path}: {place}{first_line(error)}") from error


def is_reward_model(config) -> bool:
    """Whether a config says that its model has been trained to give one score."""
    names = config.architectures or []
    return config.num_labels == 1 and any(name.endswith(("Classification", "RewardModel")) for name in names)
