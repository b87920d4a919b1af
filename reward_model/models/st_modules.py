# SPDX-License-Identifier: Apache-2.0
"""Sentence-Transformers' modules: the form of a model that Transformers has no classification class for.

A backbone as ``AutoModel`` loads it, a pooling, and a dense layer with one output, so that the embedding of a text is
its score: ``SentenceTransformer(folder).encode(text)``, and vLLM's ``embed``. The dense layer takes the mean of a
normalized model as its bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reward_model.common.errors import UserError, first_line
from reward_model.models.scorer import Scorer, first_position
from reward_model.reward_model import RewardModel

MODULES = "modules.json"
POOLING, DENSE = "1_Pooling", "2_Dense"
KINDS = ("Transformer", "Pooling", "Dense")
MODES = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}  # our name → the key of its config
NAMES = {"mean": "mean", "lasttoken": "last"}  # as Sentence-Transformers has spelt it since version 5.3
IDENTITY = "torch.nn.modules.linear.Identity"


def require_modules(scorer: Scorer, flag: str) -> None:
    """Raises UserError if a model has a head that is no dense layer over a pooling."""
    if scorer.pooling not in MODES:
        raise UserError(
            f"{flag}: {type(scorer.unwrapped).__name__} has a classification head, and is no embedding with a dense "
            "layer; CrossEncoder of Sentence-Transformers reads --to hf"
        )


def write_modules(scorer: Scorer, tokenizer, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write backbone, pooling and dense layer; the tokenizer lies there already.

    Args:
        state: all weights of the model, on the host.
    """
    model, backbone = scorer.unwrapped, scorer.backbone
    is_ours = isinstance(model, RewardModel)
    prefix = "rwtransformer." if is_ours else f"{model.base_model_prefix}."
    inner = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    backbone.save_pretrained(folder, state_dict=inner)
    weight = state["v_head.weight" if is_ours else "score.weight"].float()
    tensors = {"linear.weight": weight.contiguous()}
    mean = getattr(scorer.config, "score_mean", None)
    if mean is not None:
        tensors["linear.bias"] = torch.tensor([-mean], dtype=torch.float32)
    width = weight.shape[1]
    dense = {"in_features": width, "out_features": 1, "bias": mean is not None, "activation_function": IDENTITY}
    # vLLM takes the first key that is true for the pooling
    pooling = {"word_embedding_dimension": width} | {key: name == scorer.pooling for name, key in MODES.items()}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(KINDS, ("", POOLING, DENSE)))
    ]
    for path, content in (
        (MODULES, modules),
        ("sentence_bert_config.json", {"max_seq_length": _longest(scorer, tokenizer), "do_lower_case": False}),
        (f"{POOLING}/config.json", pooling),
        (f"{DENSE}/config.json", dense),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / DENSE / "model.safetensors", metadata={"format": "pt"})


def _longest(scorer: Scorer, tokenizer) -> int | None:
    """Tokens that the model takes, beyond which Sentence-Transformers cuts; None: as its own rule finds."""
    positions = getattr(scorer.config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [positions - first_position(scorer), tokenizer.model_max_length]
    return min((int(limit) for limit in limits if 0 < limit < 10**9), default=None)


def pooling_in(folder: Path) -> str | None:
    """How the modules of a folder pool tokens, ``mean`` or ``last``; None: it holds no model of this form."""
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or [_kind(each) for each in modules] != list(KINDS) or modules[0].get("path"):
        return None
    pooling, dense = (_read(folder / str(each.get("path")) / "config.json") for each in modules[1:])
    if not isinstance(pooling, dict) or not isinstance(dense, dict):
        return None
    if dense.get("out_features") != 1 or dense.get("activation_function") != IDENTITY or dense.get("use_residual"):
        return None
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in pooling:
        return NAMES.get(pooling["pooling_mode"]) if isinstance(pooling["pooling_mode"], str) else None
    return next((name for name, key in MODES.items() if modes == [key]), None)


def read_dense(folder: Path) -> tuple[torch.Tensor, float | None]:
    """The dense layer's weight, (1, h), and its bias; None: it has none.

    Raises:
        UserError: it cannot be read, or is of another shape.
    """
    place = folder / str(_read(folder / MODULES)[2]["path"]) / "model.safetensors"
    try:
        tensors = load_file(place)
    except Exception as error:  # OSError, and safetensors' own
        raise UserError(f"{place} cannot be read: {first_line(error)}") from error
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.dim() != 2 or len(weight) != 1 or (bias is not None and bias.shape != (1,)):
        raise UserError(f"{place} is no linear layer with one output")
    return weight.float(), None if bias is None else float(bias)


def _kind(module: Any) -> str:
    """The class of a module, wherever the version of Sentence-Transformers that wrote it has it."""
    name = str(module.get("type", "")) if isinstance(module, dict) else ""
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else ""


def _read(path: Path) -> Any:
    """What a JSON file holds; None: nothing readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
