# SPDX-License-Identifier: Apache-2.0
"""Reading the forms of a saved model that are not Transformers' own.

Sentence-Transformers' modules, DeepSpeed-Chat's, and one of ours in which models were saved until November 2026.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from huggingface_hub import load_torch_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig

from reward_model.common.errors import UserError, why_not
from reward_model.models.heads import read_pickled, say_bias
from reward_model.models.saving import DSCHAT_WEIGHTS
from reward_model.models.scorer import Scorer, embedding_name, embedding_rows, head_layer, multiply_in_float32
from reward_model.models.size import require_its_size
from reward_model.models.st_modules import pooling_in, read_dense
from reward_model.reward_model import RewardModel

Form = Literal["modules", "own", "dschat"]
BACKBONE = "rwtransformer."
OWN_WEIGHTS = "reward_model{suffix}.safetensors"
OWN_CONFIG = "reward_model.json"


def form_of(folder: Path, wanted: str | None = None) -> Form | None:
    """Which of these forms a folder holds; None: neither, or Transformers' beside it.

    Args:
        wanted: ``hf`` or ``dschat`` of a folder that holds two; None: ``dschat`` only where there is nothing else.
    """
    has_own = (folder / OWN_CONFIG).is_file()
    has_other = has_own or any(folder.glob("*.safetensors"))
    if (folder / DSCHAT_WEIGHTS).is_file() and (wanted == "dschat" or (wanted is None and not has_other)):
        return "dschat" if any(name.startswith(BACKBONE) for name in _dschat_state(folder)) else None
    if has_own:
        return "own"
    return "modules" if pooling_in(folder) else None


def pooling_of(folder: Path, form: Form) -> str:
    """Where a model in one of these forms scores a text."""
    if form == "own":
        return json.loads((folder / OWN_CONFIG).read_text())["pooling"]
    return (pooling_in(folder) or "last") if form == "modules" else "last"


def load_form(
    folder: Path,
    form: Form,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    dropout: float | None = None,
) -> Scorer:
    """A model in one of these forms, with the head that it was trained with.

    Args:
        dtype: of the weights; None: as saved.
        dropout: for every dropout that the config names; None: as configured.

    Raises:
        UserError: the weights do not fit the config.
    """
    with _whole_weights():
        config = _config(folder, trust_remote_code, dropout)
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code} | no_pooler(config)
        if form == "modules":
            return _load_modules(folder, config, options)
        scorer = on_drop_in(AutoModel.from_config(config, **options), pooling_of(folder, form))
        if form == "own":
            load_torch_model(scorer.model, folder, strict=True, filename_pattern=OWN_WEIGHTS)
            return as_classifier(scorer)
        state = _dschat_state(folder)
        embedding = state.get(f"{BACKBONE}{embedding_name(scorer)}")
        rows = embedding_rows(scorer) if embedding is None else len(embedding)
        if rows != embedding_rows(scorer):
            scorer.model.rwtransformer.resize_token_embeddings(rows, mean_resizing=False)
    try:
        scorer.model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder / DSCHAT_WEIGHTS} does not fit its config.json: {' '.join(str(error).split())}"
        ) from error
    return as_classifier(scorer)


def as_classifier(scorer: Scorer) -> Scorer:
    """The same weights under Transformers' class, where it has one that scores the last token; else as it is."""
    model = scorer.unwrapped
    kind = AutoModelForSequenceClassification._model_mapping.get(type(scorer.config), None)
    if not isinstance(model, RewardModel) or scorer.pooling != "last" or kind is None:
        return scorer
    scorer.config.num_labels = 1
    with torch.device("meta"):  # its weights are replaced
        classed = kind(scorer.config)
    if type(classed.base_model) is not type(scorer.backbone) or not isinstance(
        getattr(classed, "score", None), nn.Linear
    ):
        return scorer
    setattr(classed, classed.base_model_prefix, scorer.backbone)
    classed.score = nn.Linear(model.v_head.in_features, 1, bias=False, dtype=model.v_head.weight.dtype)
    with torch.no_grad():
        classed.score.weight.copy_(model.v_head.weight)
    multiply_in_float32(classed)
    return Scorer(classed, "last")


def _dschat_state(folder: Path) -> dict[str, torch.Tensor]:
    state = read_pickled(folder / DSCHAT_WEIGHTS)
    # before October 2023 upstream spelt it otherwise
    return {name.replace("rwtranrsformer.", BACKBONE, 1): weight for name, weight in state.items()}


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Under ZeRO 3 Transformers makes partitioned weights, into which no file can be read; DeepSpeed does it later."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def _config(folder: Path, trust: bool, dropout: float | None) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # OSError, ValueError, KeyError
        raise UserError(f"no model in {folder}: {why_not(error)}") from error
    require_its_size(str(folder), config, trust)
    if dropout is not None:
        set_dropout(config, dropout)
    return config


def _load_modules(folder: Path, config: PretrainedConfig, options: dict) -> Scorer:
    """Sentence-Transformers' modules under the drop-in's head.

    Raises:
        UserError: weights are missing, or the dense layer is not as wide as the model.
    """
    try:
        backbone, info = AutoModel.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except Exception as error:  # OSError, RuntimeError, safetensors' own
        raise UserError(f"cannot load the weights of {folder}: {why_not(error)}") from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise UserError(f"{folder} lacks {len(lacking)} of the model's weights, {lacking[0]} the first of them")
    scorer = on_drop_in(backbone, pooling_in(folder) or "mean")
    weight, bias = read_dense(folder)
    head = head_layer(scorer)
    if weight.shape != head.weight.shape:
        raise UserError(
            f"{folder}: its dense layer takes {weight.shape[1]} numbers, and the model gives {head.in_features}"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
    mean = getattr(config, "score_mean", None)
    if bias is not None and (mean is None or not math.isclose(bias, -mean, rel_tol=1e-4)):
        say_bias({"the bias of the dense layer": torch.tensor([bias])})
    return as_classifier(scorer)


def on_drop_in(backbone: nn.Module, pooling: str) -> Scorer:
    """A model without a head under the drop-in's; its pad rule stays unused, since lengths say where a text ends.

    Raises:
        UserError: the model does not say how wide its hidden states are.
    """
    try:
        return Scorer(RewardModel(backbone, SimpleNamespace(pad_token_id=None)), pooling)
    except ValueError as error:  # its config names no hidden size
        raise UserError(str(error)) from error


def no_pooler(config) -> dict:
    """AutoModel gives BERT's kind a pooling layer that a mean over tokens leaves unused."""
    model_class = AutoModel._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    takes_it = model_class and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Write one probability to every dropout that a config names (layerdrop, which skips layers, is another thing)."""
    for name, value in list(config.to_dict().items()):
        is_dropout = "drop" in name or name.endswith("_pdrop")
        if is_dropout and "layerdrop" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)
