# SPDX-License-Identifier: Apache-2.0
"""Keeps a step whose loss or gradient is not finite from the weights, without a wait of the host for the GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Outcome(NamedTuple):
    """What became of a step, each 1 or 0; a tensor where only the GPU knows it yet.

    skipped: the optimizer left weights, moments and its count of steps as they were. bad: its numbers were wrong, and
    not merely too large for float16's loss scale, which falls and tries again.
    """

    skipped: torch.Tensor | float
    bad: torch.Tensor | float


def marked(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is NaN where it is not finite itself. 0-d

    A loss can be NaN while its gradient is finite, and only gradients reach the other ranks before the step.
    """
    return loss * (1 + 0 * loss.detach())  # 0 · inf and 0 · NaN are NaN; times 1 is exact


class StepGuard:
    """Skips the optimizer's step, on all ranks alike, where a gradient is not finite.

    Where DeepSpeed wraps the optimizer (ZeRO 1 to 3, half precision) it does so itself, and its learning-rate schedule
    then stands still: here it goes on, so that a step is a step at every stage. In float32 at stage 0 nothing wraps
    the optimizer. Gradients are summed over the ranks by then, so that each rank decides alike from its own. PyTorch's
    fused AdamW skips by itself where its ``found_inf``, which the device computes, is 1. The optimizers of bitsandbytes
    do not: there the host waits for the gradients, and takes them away.
    """

    def __init__(self, engine):
        """
        Args:
            engine: DeepSpeed's.
        """
        self.engine = engine
        self.found_inf: torch.Tensor | None = None
        self.scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
        if self.scaler is not None and getattr(self.scaler, "dynamic", False):
            self.scaler.raise_error_at_min_scale = False  # the steps are counted, and the run ended, in StepLog
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            engine.optimizer.register_step_pre_hook(self._look_at_gradients)
        self.room = self._room_of_scale()

    @torch.no_grad()
    def _look_at_gradients(self, optimizer: torch.optim.Optimizer, *_) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in weights])
        self.found_inf = (~torch.stack(norms).isfinite().all()).float()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self.found_inf
        elif self.found_inf:
            for weight in weights:
                weight.grad = None

    def _room_of_scale(self) -> tuple[float, int]:
        """By how much float16's loss scale can fall yet: the scale, and overflows until it falls next."""
        return getattr(self.scaler, "cur_scale", 0.0), getattr(self.scaler, "cur_hysteresis", 0)

    def after_step(self) -> Outcome:
        """What became of the step that the engine has just taken."""
        if self.found_inf is not None:
            return Outcome(self.found_inf, self.found_inf)
        before, self.room = self.room, self._room_of_scale()
        if not getattr(self.engine.optimizer, "overflow", False):
            return Outcome(0.0, 0.0)
        if self.engine.fp16_enabled():
            return Outcome(1.0, 0.0 if self.room < before else 1.0)
        self.engine.lr_scheduler.step()
        return Outcome(1.0, 1.0)
