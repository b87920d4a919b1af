# SPDX-License-Identifier: Apache-2.0
"""TF32: float32 products on the matrix units of a GPU, for the layers and for nothing that needs more digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from reward_model.common.logging import logger
from reward_model.models.scorer import Scorer, head_layer

SINCE = (8, 0)  # compute capability: Ampere


def why_no_tf32(dtype: str) -> str:
    """Why ``--tf32`` would change nothing on this device; empty: it would change something."""
    if dtype != "fp32":
        return f"the layers multiply in {dtype}, and the score head and positions stay in float32"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability() < SINCE:
        return f"{torch.cuda.get_device_name()} is older than compute capability {SINCE[0]}.{SINCE[1]}"
    return ""


def use_tf32(scorer: Scorer) -> None:
    """Let the scorer's layers multiply in TF32 while it trains; evaluations stay in float32, as a saved model scores.

    Two products stay exact: the score head's, and those that turn positions into angles. TF32 has 11 significant bits,
    so that position 2,049 would become 2,048 (Transformers' issue 48428).

    The setting is torch's older one: with the newer, ``torch.backends.cuda.matmul.fp32_precision``,
    ``torch.get_float32_matmul_precision`` raises an error in torch 2.13, and its compiler calls that.
    """

    def choose(*_) -> None:
        torch.set_float32_matmul_precision("high" if scorer.training else "highest")

    def be_exact(*_) -> None:
        torch.set_float32_matmul_precision("highest")

    scorer.register_forward_pre_hook(choose)
    for module in (head_layer(scorer), *_rotary(scorer)):
        module.register_forward_pre_hook(be_exact)
        module.register_forward_hook(choose, always_call=True)


def set_tf32(scorer: Scorer, dtype: str) -> None:
    """:func:`use_tf32`, or a line that says why it would change nothing."""
    if reason := why_no_tf32(dtype):
        logger.warning(f"--tf32 changes nothing here: {reason}")
    else:
        use_tf32(scorer)


def _rotary(scorer: Scorer) -> Iterator[nn.Module]:
    """Transformers' modules of rotary positions, which it names alike in all families."""
    return (module for module in scorer.backbone.modules() if "Rotary" in type(module).__name__)
