# SPDX-License-Identifier: Apache-2.0
"""Memory of a model's activations without the memory: the model is built and run on PyTorch's device ``meta``.

Notation: b rows, s tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.common.errors import UserError, why_not
from reward_model.common.remote_code import never_asking
from reward_model.config.groups import ModelConfig
from reward_model.models.loading import DTYPES
from reward_model.models.lora import add_lora
from reward_model.models.many_heads import Heads, set_heads
from reward_model.models.quantization import quantizable, quantized_bytes, unpacked_bytes
from reward_model.models.saved_forms import no_pooler, on_drop_in, set_dropout
from reward_model.models.scorer import Scorer, head_layer, layers_of
from reward_model.planning.model_states import Counts
from reward_model.reward_model import ValueHead

ATTENTION = "reward_model_plan"  # its name among Transformers' attention functions
MEASURED_LAYERS = (2, 4)  # a model of more layers follows from these two


class _Attention(torch.autograd.Function):
    """Keeps for its backward pass what a GPU's fused kernels keep: no s × s numbers."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


def _attention(module, query, key, value, attention_mask, **others):
    out = _Attention.apply(query, key, value)
    return out[..., : value.shape[-1]].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class _Head(ValueHead):
    """The drop-in's head on a device that has no autocast."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class _Heads(Heads, _Head):
    """Several heads there."""


class Meter(TorchDispatchMode):
    """Bytes of all storages that operations make, while they live: ``now``, and the most, ``peak``."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live: dict[int, weakref.ref | None] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return

        def end(_) -> None:
            self.now -= size
            del self.live[key]

        self.live[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors leave the device, and come back as new ones: what ``save_on_cpu`` does on a GPU."""

    def __init__(self) -> None:
        super().__init__(lambda tensor: (tensor.shape, tensor.dtype, tensor.device), self._come_back)

    @staticmethod
    def _come_back(kept: tuple[torch.Size, torch.dtype, torch.device]) -> torch.Tensor:
        shape, dtype, device = kept
        return torch.empty(shape, dtype=dtype, device=device)


def build_on_meta(config: PretrainedConfig, options: ModelConfig, dtype: str, anchored: bool = False) -> Scorer:
    """The scorer that :func:`reward_model.training.engine.build_scorer` would load, without its weights.

    Args:
        anchored: several heads keep the weights that they begin with, for ``--head_anchor``.

    Raises:
        UserError: Transformers cannot build it.
    """
    config.num_labels = 1
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    has_class = options.pooling != "mean" and type(config) in AutoModelForSequenceClassification._model_mapping
    auto_class, others = (AutoModelForSequenceClassification, {}) if has_class else (AutoModel, no_pooler(config))
    others |= {"trust_remote_code": options.trust_remote_code}
    try:
        with never_asking(options.trust_remote_code), torch.device("meta"):
            model = auto_class.from_config(config, dtype=DTYPES[dtype], **others)
            if has_class:
                is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
                scorer = Scorer(model, "last" if is_decoder else "classifier")
            else:
                scorer = on_drop_in(model, options.pooling or "last")
        layer = head_layer(scorer)
        layer.__class__ = _Head
        if options.heads > 1:
            set_heads(scorer, layer.weight.new_empty(options.heads, layer.in_features), None, anchored)
            layer.__class__ = _Heads
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"--model_name_or_path {options.model_name_or_path}: {why_not(error)}") from error
    scorer.backbone.set_attn_implementation(ATTENTION)
    if options.lora_dim:
        with torch.device("meta"):
            add_lora(scorer, options.lora_dim, options.lora_dim, options.lora_module_name, options.lora_dropout)
        for parameter in scorer.parameters():  # PEFT gives adapters the base's dtype, but not on this device
            parameter.data = parameter.data.to(DTYPES[dtype])
    return scorer.train()


def passes(scorer: Scorer, rows: int, length: int) -> tuple[int, int]:
    """Bytes that are kept after a forward pass in training, and the most until the end of the backward pass.

    That counts gradients of activations too, and those of one parameter at a time: DeepSpeed's states have the rest.
    """
    known = [*scorer.parameters(), *scorer.buffers()]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in known if p.requires_grad]
    ids = torch.zeros(rows, length, dtype=torch.int64, device=known[0].device)
    mask, at = torch.ones_like(ids), ids[:, 0] + length - 1
    with Meter([*known, ids, mask, at]) as meter:
        found = scorer(ids, mask, at)
        scores = found if scorer.heads == 1 else found[0]  # beside them those of every head, and how far these moved
        kept = meter.now
        scores.sum().backward()
    for hook in hooks:
        hook.remove()
    return kept, meter.peak


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def inputs_on_host(counts: Counts, rows: int, length: int, width: int) -> int:
    """Bytes of pinned host memory for the inputs of all layers, with ``--offload_activations``.

    PyTorch takes pinned memory in powers of two, so that is up to twice the size of the inputs.

    Args:
        width: bytes of a number.
    """
    return counts.layers << (rows * length * counts.hidden * width - 1).bit_length()


def activations(scorer: Scorer, rows: int, length: int, checkpointing: bool, offload: bool = False) -> int:
    """Bytes of activations and their gradients, at most, for rows of s tokens: all layers are alike, so few are run.

    Args:
        checkpointing: layers are computed again in the backward pass.
        offload: what they are computed from waits on the host, see :func:`inputs_on_host`.

    Raises:
        UserError: a model that cannot recompute its activations.
    """
    if checkpointing:
        try:
            scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {why_not(error)}") from error
    if offload:
        _keep_elsewhere(scorer)
    layers = layers_of(scorer)
    every, found = list(layers), []
    counts = MEASURED_LAYERS if len(every) > MEASURED_LAYERS[1] else (len(every),)
    for count in counts:
        del layers[count:]
        try:
            found.append(passes(scorer, rows, length)[1])
        except (NotImplementedError, RuntimeError) as error:  # experts that are chosen by the numbers
            name = type(scorer.unwrapped).__name__
            raise UserError(f"{name} cannot be run without its weights: {why_not(error)}") from error
        layers.extend(every[count:])
    if checkpointing:
        scorer.unwrapped.gradient_checkpointing_disable()
    if len(counts) == 1:
        return found[0]
    return found[0] + (found[1] - found[0]) * (len(every) - counts[0]) // (counts[1] - counts[0])


def _keep_elsewhere(scorer: Scorer) -> None:
    """As :func:`reward_model.training.recompute.keep_inputs_on_host` does, until checkpointing is enabled anew."""

    def around(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint_elsewhere(*args: Any, **kwargs: Any) -> Any:
            with _Elsewhere():
                return checkpoint(*args, **kwargs)

        return checkpoint_elsewhere

    for module in scorer.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = around(module._gradient_checkpointing_func)


def count_parameters(scorer: Scorer, bits: int | None = None) -> Counts:
    """Of a model that ZeRO has not partitioned; bits: those in which the frozen linear layers would be loaded."""
    config = scorer.config.get_text_config()
    linear = quantizable(scorer, scorer.backbone).values() if bits else ()
    frozen = [layer for layer in linear if not layer.weight.requires_grad]
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in scorer.modules()]
    heads = sum(p.numel() for p in head_layer(scorer).parameters())
    kept = [b for module in scorer.modules() if isinstance(module, Heads) for b in module.buffers(recurse=False)]
    return Counts(
        total=sum(p.numel() for p in scorer.parameters()),
        trained=sum(p.numel() for p in scorer.parameters() if p.requires_grad),
        largest=max(own),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        layers=len(layers_of(scorer)),
        quantized=sum(layer.weight.numel() for layer in frozen),
        packed=sum(quantized_bytes(layer, bits) for layer in frozen if bits),
        heads=heads if scorer.heads > 1 else 0,
        initial=sum(buffer.numel() for buffer in kept),
        unpacked=max((unpacked_bytes(layer, bits) for layer in frozen if bits), default=0),
    )
