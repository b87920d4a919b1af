# SPDX-License-Identifier: Apache-2.0
"""Distances from a Gaussian that is fitted to the states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reward_model.novelty.density import Density, Whitening


@dataclass(frozen=True)
class Mahalanobis(Density):
    """(x − μ)ᵀ Σ⁻¹ (x − μ), with the mean μ and the shrunk covariance Σ of the training states (Lee et al. 2018)."""

    name: ClassVar[str] = "mahalanobis"
    whitening: Whitening

    @classmethod
    def fit(cls, states: torch.Tensor, seed: int, heads: torch.Tensor | None = None) -> Mahalanobis:
        """Nothing is drawn."""
        return cls(Whitening.of(states))

    def energy(self, states: torch.Tensor) -> torch.Tensor:
        return self.whitening.squared_distance(states)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.whitening.tensors()

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> Mahalanobis:
        return cls(Whitening.of_tensors(tensors))


@dataclass(frozen=True)
class RelativeMahalanobis(Mahalanobis):
    """The same, minus the distance from a background Gaussian: (x − μ)ᵀ Σ⁻¹ (x − μ) − (x − μ)ᵀ diag(Σ)⁻¹ (x − μ).

    Ren et al. 2021 (arXiv 2106.09022) subtract the distance from one Gaussian of all classes from that of a class.
    Preferences have no classes: both Gaussians are fitted to all training states, and the background is the one that
    knows of no correlations, as in Bai et al. 2022 (arXiv 2204.05862, section 5, "Simplified Relative Mahalanobis
    distance"). So what counts is how units go together, and not how large they are.
    """

    name: ClassVar[str] = "relative_mahalanobis"

    def energy(self, states: torch.Tensor) -> torch.Tensor:
        return super().energy(states) - self.whitening.standardized(states).square().sum(1)
