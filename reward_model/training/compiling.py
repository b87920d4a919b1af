# SPDX-License-Identifier: Apache-2.0
"""Layers by ``torch.compile``, each by itself and in place, so that names of weights stay as they are."""

from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.common.errors import UserError
from reward_model.models.attention import SLICES, sliced_attention
from reward_model.models.scorer import Scorer, layers_of

OLDEST_TORCH = (2, 6)  # 2.4 broke each layer into twelve pieces and failed on recomputed ones; 2.13 and 2.15 compile


def require_whole_layers(zero_stage: int) -> None:
    """Raises UserError where torch would compile pieces of layers: an old torch, or ZeRO 3 with its hooks inside."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise UserError(f"--compile needs torch 2.6 or later, this is {torch.__version__}; leave it out")
    if zero_stage == 3:
        raise UserError(
            "--compile and ZeRO 3: DeepSpeed gathers weights within each layer, which torch compiles again and again "
            "until it gives up; take --zero_stage 2, or leave --compile out"
        )


def compile_layers(scorer: Scorer, recomputes: bool) -> str:
    """Compile the backbone's layers, for any number of rows and tokens; the first batches then take a minute or so.

    One compiled layer serves all that are alike. ``slices``, the attention of shared prompts on a CPU, loops over its
    segments in Python: the code before and after it is compiled, and nothing of a layer that is also recomputed.

    Args:
        recomputes: layers do, for ``--gradient_checkpointing``. The attention has been chosen.

    Returns:
        A line that says what will be compiled.

    Raises:
        UserError: recomputed layers with ``slices``, or a backbone without layers.
    """
    in_slices = scorer.backbone.config._attn_implementation == SLICES
    if in_slices and recomputes:
        raise UserError(
            "--compile and --gradient_checkpointing: on a CPU the attention of shared prompts is a loop, and a layer "
            "that is recomputed is compiled whole or not at all; leave one of the two out"
        )
    layers = layers_of(scorer)
    if not layers:
        raise UserError(f"--compile: {type(scorer.backbone).__name__} has no list of layers; leave it out")
    ALL_ATTENTION_FUNCTIONS.register(SLICES, torch.compiler.disable(sliced_attention))
    for layer in layers:
        layer.compile(dynamic=True)
    beside = ", but for the attention" if in_slices else ""
    return f"{len(layers)} layers are compiled{beside}: the first steps take longer"
