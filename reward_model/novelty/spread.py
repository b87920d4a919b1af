# SPDX-License-Identifier: Apache-2.0
"""How far several score heads disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reward_model.common.errors import UserError
from reward_model.novelty.density import Density


@dataclass(frozen=True)
class SpreadOfHeads(Density):
    """The population standard deviation of the scores of K heads on one backbone; the states are not learned from.

    weights: of the heads, (K, h).
    """

    name: ClassVar[str] = "spread"
    needs_heads: ClassVar[bool] = True
    weights: torch.Tensor

    @classmethod
    def fit(cls, states: torch.Tensor, seed: int, heads: torch.Tensor | None = None) -> SpreadOfHeads:
        """Raises UserError: there is one head."""
        if heads is None or len(heads) < 2:
            raise UserError("--method spread: this model has one score head; train one with --heads, or take another")
        return cls(heads.detach().float().cpu())

    def energy(self, states: torch.Tensor) -> torch.Tensor:
        return (states.float() @ self.weights.to(states.device).T).std(1, unbiased=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights}

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> SpreadOfHeads:
        return cls(tensors["weights"])
