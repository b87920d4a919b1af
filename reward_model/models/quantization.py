# SPDX-License-Identifier: Apache-2.0
"""A frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314) by bitsandbytes, and the weights that it stands for.

4 bits: NormalFloat in blocks of 64, whose scales are in 8 bits. 8 bits: each row of a weight divided by its largest
entry, as LLM.int8 (arXiv 2208.07339) does. In both, products are in the run's dtype with the dequantized weight, which
is also what is merged and saved: so the saved model scores as the trained one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.models.scorer import Scorer, count, head_layer

BLOCK, SCALES = 64, 256  # bitsandbytes': weights that share a scale in 4 bits, and scales that share one themselves
READ_ELSEWHERE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # kernels read out_proj's weight
CLASSES = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers
KINDS = ("Params4bit", "Int8Params")  # bitsandbytes' parameters


def is_quantized(layer: nn.Module) -> bool:
    """Not so a LoRA layer around one, whose ``weight`` is that of its base."""
    return type(layer._parameters.get("weight")).__name__ in KINDS


def bits_of(model: nn.Module) -> int | None:
    """4 or 8 of a model with quantized layers; None: it has none."""
    kinds = {type(layer.weight).__name__ for layer in model.modules() if is_quantized(layer)}
    return 4 if KINDS[0] in kinds else 8 if kinds else None


def how_quantized(model: nn.Module) -> dict[str, Any]:
    """What ``from_pretrained`` takes as ``quantization_config`` to load the same base."""
    found = next(module.quantized_by for module in model.modules() if hasattr(module, "quantized_by"))
    return {name: value for name, value in found.to_diff_dict().items() if not name.startswith("_")}


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is saved as (in, out), as that of GPT-2's ``Conv1D``, quantized or not."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def quantizable(model: nn.Module, backbone: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a backbone that can be quantized, by their names in the model.

    Not a layer with a forward pass of its own, one with a single output, which is a score head, or one whose weight a
    kernel reads directly.
    """
    inside = {id(module) for module in backbone.modules()}
    by_kernel = getattr(backbone.config.get_text_config(), "model_type", None) in READ_ELSEWHERE
    found = {}
    for name, module in model.named_modules():
        if id(module) in inside and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            if outputs > 1 and not (by_kernel and "out_proj" in name):
                found[name] = module
    return found


def quantizing(
    auto_class, config: PretrainedConfig, bits: int, dtype: torch.dtype, device: str, **options: Any
) -> dict:
    """Arguments with which ``auto_class.from_pretrained`` quantizes what it loads, and puts it on a device.

    Args:
        bits: 4 or 8. dtype: of products. device: such as ``cuda:0``; bitsandbytes' weights are made where they stay.
        options: of ``auto_class.from_config``.
    """
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, **options)
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    kept = sorted(linear - set(quantizable(model, model.base_model)))
    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["bnb_4bit_compute_dtype"] = dtype
    return {
        "quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=kept),
        "device_map": {"": device},
    }


def prepare_quantized(model: Any, bits: int, dtype: torch.dtype) -> None:
    """Make what was loaded with :func:`quantizing` a model that trains, scores and is saved like others.

    Transformers forgets that it is quantized, since it is saved dequantized; the card of the adapter says how it was.
    """
    model.quantized_by = model.hf_quantizer.quantization_config
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):  # Transformers 4 has the other one
        if hasattr(model.config, name):
            delattr(model.config, name)
    for layer in model.modules():
        if type(layer).__name__ in CLASSES and not is_quantized(layer):
            layer.__class__ = nn.Linear  # the checkpoint had no weight for it: a new one is not quantized
    for layer in filter(is_quantized, model.modules()):
        layer.compute_dtype = dtype
        if bits == 4:
            # on a CPU with AVX-512 an evaluation would round the scales to bfloat16, for good, and training after it
            # would find no gradient
            layer.support_avx512bf16_for_cpu = False
        else:
            # LLM.int8 also rounds what a layer multiplies with, and no saved model could score as it does
            layer.forward = functools.partial(_times_int8, layer)


def say_quantized(scorer: Scorer, bits: int) -> None:
    """Say which share of a model's weights is quantized.

    Raises:
        UserError: none is.
    """
    layers = [module for module in scorer.modules() if is_quantized(module)]
    if not layers:
        raise UserError(f"--lora_bits {bits}: {type(scorer.unwrapped).__name__} has no linear layer to quantize")
    share = sum(count(layer.weight) for layer in layers) / sum(map(count, scorer.parameters()))
    dtype = str(head_layer(scorer).weight.dtype).removeprefix("torch.")
    logger.info(f"base: {len(layers)} linear layers, {share:.0%} of the weights, in {bits} bits; the others in {dtype}")


class _Int8Product(torch.autograd.Function):
    """x Wᵀ, of which nothing but W in 8 bits is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _from_int8(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ _from_int8(weight, scale, gradient.dtype), None, None


def _from_int8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of −127 to 127 and the largest entry of each row, (out,), → the weight, (out, in)."""
    return (weight * (scale.float() / 127)[:, None]).to(dtype)


def _int8_parts(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data, scale


def _times_int8(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    product = _Int8Product.apply(x, *_int8_parts(layer))
    return product if layer.bias is None else product + layer.bias


@torch.no_grad()
def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantized layer multiplies with, in the run's dtype and in the shape that the model had."""
    if type(layer.weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    else:
        weight = _from_int8(*_int8_parts(layer), layer.compute_dtype)
    return weight.T if is_transposed(layer) else weight


def quantized_bytes(layer: nn.Module, bits: int) -> int:
    """What a linear layer's weight takes in 4 or 8 bits, with its scales.

    >>> quantized_bytes(nn.Linear(4096, 4096), 4) / 4096**2
    0.515869140625
    """
    size = layer.weight.numel()
    if bits == 8:
        return size + 4 * layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
    scales = math.ceil(size / BLOCK)
    return math.ceil(size / 2) + scales + 4 * math.ceil(scales / SCALES)


def unpacked_bytes(layer: nn.Module, bits: int) -> int:
    """What such a weight takes while it computes: in the run's dtype, and of 8 bits first in float32."""
    width = layer.weight.itemsize
    return layer.weight.numel() * (width if bits == 4 or width == 4 else 4 + width)
