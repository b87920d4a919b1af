# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: layers whose activations are computed again, and where their inputs wait for that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.models.scorer import Scorer


def recompute_layers(scorer: Scorer, reentrant: bool, has_frozen_base: bool, offload: bool) -> None:
    """Let each layer keep its input alone, and compute the rest again in the backward pass.

    Args:
        reentrant: PyTorch's older kind, for ZeRO 3: the other compares shapes of weights, which ZeRO 3 empties in
            between.
        has_frozen_base: LoRA will be added.
        offload: keep the inputs in the memory of the host.

    Raises:
        UserError: the model cannot do it.
    """
    try:
        scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant and has_frozen_base:
            scorer.backbone.enable_input_require_grads()
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {first_line(error)}") from error
    if offload and torch.cuda.is_available():
        keep_inputs_on_host(scorer)
    elif offload:
        logger.warning("--offload_activations changes nothing here: without a GPU they are in the host's memory anyway")


def keep_inputs_on_host(scorer: Scorer) -> None:
    """Move the inputs of recomputed layers to pinned memory of the host, and back when they are needed.

    Weights, masks and positions stay where they are. PyTorch copies beside other work of the host, but in the order of
    the GPU's own work.

    Raises:
        UserError: the model recomputes its layers in a manner of its own.
    """
    found = [module for module in scorer.modules() if hasattr(module, "_gradient_checkpointing_func")]
    if not found:
        raise UserError(
            f"--offload_activations: {type(scorer.unwrapped).__name__} recomputes its layers in a manner of its own; "
            "leave the flag out"
        )
    for module in found:
        module._gradient_checkpointing_func = _on_host(module._gradient_checkpointing_func)


def _on_host(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checkpoint)
    def checkpoint_on_host(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=True):
            return checkpoint(*args, **kwargs)

    return checkpoint_on_host
