# SPDX-License-Identifier: Apache-2.0
"""LoRA: adapters beside a model's linear layers, and the weights that they amount to."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.models.quantization import READ_ELSEWHERE, bits_of, how_quantized, is_quantized, is_transposed
from reward_model.models.scorer import SCORE_PAIRS, Scorer, count, gathered, head_layer
from reward_model.reward_model import RewardModel


def add_lora(scorer: Scorer, dim: int, alpha: float, module_name: str | None, dropout: float = 0.0) -> Scorer:
    """Freeze the backbone and put LoRA adapters (PEFT) beside its linear layers; the head stays trainable.

    Args:
        module_name: only layers whose name contains it; None: every linear layer of the backbone.
        dropout: the probability of dropout on what enters an adapter, in training.

    Raises:
        UserError: no such layer.
    """
    from peft import LoraConfig, get_peft_model

    model = scorer.unwrapped
    if isinstance(model, RewardModel):
        model.base_model_prefix = "rwtransformer"  # PEFT asks every model with a config for it
    if bits := bits_of(model):
        setattr(model, f"is_loaded_in_{bits}bit", True)  # as PEFT knows a quantized model
    inside = next(name for name, module in model.named_modules() if module is scorer.backbone)
    linear, odd = linear_layers(model, inside)
    targets = [name for name in linear if (module_name or "") in name]
    if not targets:
        if not linear:
            raise UserError(f"--lora_dim {dim}: {type(model).__name__} has no linear layer that an adapter fits")
        raise UserError(f"--lora_module_name {module_name}: in no layer's name; the layers are named like {linear[0]}")
    heads = [name for name, child in model.named_children() if name != inside and any(True for _ in child.parameters())]
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=heads,
        fan_in_fan_out=is_transposed(model.get_submodule(targets[0])),
        task_type=None if isinstance(model, RewardModel) else "SEQ_CLS",
    )
    with _targets_as_named():
        # adapters in the base's dtype: DeepSpeed refuses mixed ones under ZeRO 3
        scorer.model = get_peft_model(model, config, autocast_adapter_dtype=False)
    dtype = head_layer(scorer).weight.dtype
    for name, parameter in scorer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)  # PEFT's are in float32 beside quantized weights
    trained = sum(count(p) for p in scorer.parameters() if p.requires_grad)
    total = sum(count(p) for p in scorer.parameters())
    logger.info(
        f"LoRA: {len(targets)} layers, dimension {dim}; the base is frozen, {trained:,} of {total:,} parameters train"
    )
    say_without_adapter(scorer, odd, total)
    return scorer


@contextmanager
def _targets_as_named() -> Iterator[None]:
    """Keep PEFT from moving adapters from the linear layers of an MoE model, dense ones among them, to its experts.

    It does so for adapters that were made with Transformers 4, whose experts had linear layers of these names.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion  # Transformers 5 alone has it
    except ImportError:
        yield
        return
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def linear_layers(model: nn.Module, inside: str) -> tuple[list[str], list[str]]:
    """Names of the linear layers of a part of a model, and of those with a forward pass of their own.

    An adapter adds to what a linear layer gives. A router that gives several things takes none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(inside + ".")
    }
    odd = [name for name, module in layers.items() if not _gives_one_tensor(module)]
    if getattr(model.config.get_text_config(), "model_type", None) in READ_ELSEWHERE:
        odd += [name for name in layers if name.endswith(".out_proj")]
    return [name for name in layers if name not in odd], odd


@torch.no_grad()
def _gives_one_tensor(layer: nn.Module) -> bool:
    """Whether a linear layer, whatever its class has made of it, gives what a linear layer gives."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or is_quantized(layer):
        return True
    with gathered(list(layer.parameters())):
        try:
            given = layer(layer.weight.new_zeros(1, layer.in_features))
        except Exception:  # it takes something else
            return False
    return isinstance(given, torch.Tensor) and given.shape == (1, layer.out_features)


def say_without_adapter(scorer: Scorer, odd: list[str], total: int) -> None:
    """Say which weights that a user would expect to be adapted are not."""
    if odd:
        kind = type(scorer.unwrapped.get_submodule(odd[0])).__name__
        logger.warning(f"LoRA: {counted(len(odd), 'layer')} of the class {kind} get no adapter, {odd[0]} the first")
    stacked = stacked_weights(scorer.backbone)
    experts = [parameter for name, parameter in stacked.items() if "expert" in name]
    share = sum(map(count, experts or stacked.values())) / total
    what = "the experts' weights" if experts else f"{next(iter(stacked), '')} and its like"
    if share >= 0.01:
        frozen = "frozen, are not quantized" if bits_of(scorer.unwrapped) else "frozen"
        logger.warning(f"LoRA: {what}, {share:.0%} of the model, are {frozen} and get no adapter")


def stacked_weights(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices that lie outside linear layers, such as those of experts, and are no embeddings or convolutions."""
    others = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    found = {}
    for place, module in backbone.named_modules():
        if isinstance(module, others) or hasattr(module, "base_layer") or ".lora_" in f".{place}.":
            continue
        for name, parameter in module.named_parameters(place, recurse=False):
            if _dimensions(parameter) >= 2:
                found[name] = parameter
    return found


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


# fields of config.json that say what scores mean, what the model is, and how it is given a text: an adapter has none
OF_SCORES = (
    "score_mean",
    "score_std",
    "score_temperature",
    "score_temperature_fit",
    "score_thresholds",
    "lowest_grade",
    "score_heads",
    "score_beta",
    "reward_model",
    SCORE_PAIRS,
)
SCORES = "scores.json"  # has them beside an adapter
CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags:
- lora
- reward-model
---

# LoRA adapter of a reward model

The adapter has dimension {dim} and scale {scale:g}, and belongs to {base}. The folder above this one holds the same
model with the adapter merged, which Transformers loads by itself.
{quantized}
```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1{options})
model = PeftModel.from_pretrained(base, "adapter")
```
"""
OWN_CARD = CARD[: CARD.index("```python")].replace(", which Transformers loads by itself", "") + (
    "It was trained on a model that Transformers has no class for: load the folder above with "
    "`reward_model.inference.load`.\n"
)


ROUNDED = """
The adapter was trained beside a base in {bits} bits (bitsandbytes), and fits its rounded weights, which the folder
above holds too. Beside unrounded weights it gives other scores, by as much as rounding the base changes them.{more}
"""
ROUNDS_MORE = {
    4: "\nOn a CPU bitsandbytes multiplies in a way of its own, which moved a small model's by 2 % of their spread.",
    8: "\nTransformers' LLM.int8 also rounds what enters each layer, which changes scores about as much; the training "
    "did not.",
}


def save_adapter(scorer: Scorer, tokenizer, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the adapter alone, unless PEFT would put parts of it elsewhere when it loads it, which is said."""
    if moved := _moved_by_peft(scorer):
        logger.warning(
            f"no adapter/ is written: PEFT, when it loads one, moves those of layers such as {moved[0]} to the "
            "experts; the saved model has them merged"
        )
        return
    scorer.model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)  # with its template and its pad, so that a run can start from the adapter alone
    scale = {name: getattr(scorer.config, name) for name in OF_SCORES if hasattr(scorer.config, name)}
    (folder / SCORES).write_text(json.dumps(scale, indent=2) + "\n", encoding="utf-8")
    write_card(scorer, folder)


def _moved_by_peft(scorer: Scorer) -> list[str]:
    """Of the layers that have adapters those that PEFT takes for experts of Transformers 4 when it loads them."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return []
    config = copy.deepcopy(scorer.model.peft_config["default"])
    before = sorted(config.target_modules)
    try:
        convert_peft_config_for_transformers(config, model=scorer.unwrapped, conversions=None)
    except ValueError:  # it finds some of the layers that it would merge into one, and not all
        return before[:1]
    return [name for name in before if name not in config.target_modules]


def write_card(scorer: Scorer, folder: Path) -> None:
    """Fill in the README.md that PEFT leaves open in an adapter's folder."""
    config = scorer.model.peft_config["default"]
    card = OWN_CARD if isinstance(scorer.unwrapped, RewardModel) else CARD
    base = config.base_model_name_or_path or getattr(scorer.config, "_name_or_path", None) or "the base model"
    scale, quantized, options = config.lora_alpha / config.r, "", ""
    if bits := bits_of(scorer.unwrapped):
        quantized = ROUNDED.format(bits=bits, more=ROUNDS_MORE[bits])
        dtype = str(head_layer(scorer).weight.dtype).removeprefix("torch.")
        options = f', dtype="{dtype}", quantization_config={how_quantized(scorer.unwrapped)}'
    text = card.format(base=base, dim=config.r, scale=scale, quantized=quantized, options=options)
    (folder / "README.md").write_text(text, encoding="utf-8")


def merge_lora(scorer: Scorer, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A PEFT model's state dict → the base model's, W + alpha/r · B·A in float32, heads as trained."""
    config = scorer.model.peft_config["default"]
    scale = config.lora_alpha / config.r
    prefix = "base_model.model."
    merged = {}
    for name, weight in state.items():
        name = name.removeprefix(prefix)
        if ".lora_" in name or ".original_module." in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            a, b = (state[f"{prefix}{layer}.lora_{side}.default.weight"].float() for side in "AB")
            update = scale * (b @ a)  # (out, r) @ (r, in)
            transposed = is_transposed(scorer.unwrapped.get_submodule(layer).base_layer)
            weight = (weight.float() + (update.T if transposed else update)).to(weight.dtype)
        merged[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = weight
    return merged
