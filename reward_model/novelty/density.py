# SPDX-License-Identifier: Apache-2.0
"""What every method of novelty has in common: it is fitted to states, and then gives each state an energy.

Notation: n texts, h hidden units, k directions, K heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

MOST_DIRECTIONS = 512  # h × 512 float32 are 8 MB at h = 4,096; the directions beyond share one variance


class Density(ABC):
    """A method: what it has learned of states. The higher an energy, the less a state is like those it was fitted to.

    An energy has no unit that methods share: :class:`reward_model.novelty.fitted.Novelty` makes it a quantile.
    """

    name: ClassVar[str]
    needs_heads: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fit(cls, states: torch.Tensor, seed: int, heads: torch.Tensor | None = None) -> Density:
        """Learn from states.

        Args:
            states: (n, h), of any float type.
            seed: of what is drawn; nothing is drawn from PyTorch's global state.
            heads: the weights of several score heads, (K, h); None: there is one.
        """

    @abstractmethod
    def energy(self, states: torch.Tensor) -> torch.Tensor:
        """The energy of each of some states (n, h), (n,) float32, on their device."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it has learned, by name."""

    @classmethod
    @abstractmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> Density:
        """The same method again. Raises KeyError or RuntimeError: these are no tensors of it."""


@dataclass(frozen=True)
class Whitening:
    """Coordinates in which the training states have mean 0 and variance 1 in every direction.

    Each unit is first divided by its standard deviation. The covariance of what results, which is a correlation matrix,
    is shrunk towards a multiple of the identity, since there are often fewer texts than hidden units.

    mean, std: of each unit, (h,). directions: unit vectors by falling variance, (h, k), k at most 512.
    variances: along them, (k,). rest: the variance of every direction beyond, ().
    """

    mean: torch.Tensor
    std: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, most: int = MOST_DIRECTIONS) -> Whitening:
        """Of states (n, h)."""
        states = states.double()
        mean, std = states.mean(0), states.std(0, unbiased=False)
        typical = std.mean().clamp_min(torch.finfo(torch.float32).tiny)
        std = torch.where(std > 1e-5 * typical, std, typical)  # a unit that never moves has no scale of its own
        variances, directions = torch.linalg.eigh(shrunk_covariance((states - mean) / std))
        variances, directions = variances.flip(0).clamp_min(1e-12), directions.flip(1)
        beyond = variances[most:]
        rest = beyond.mean() if len(beyond) else variances[-1]
        found = mean, std, directions[:, :most].contiguous(), variances[:most].contiguous(), rest
        return cls(*(each.float() for each in found))

    def standardized(self, states: torch.Tensor) -> torch.Tensor:
        """States (n, h), each unit with mean 0 and standard deviation 1 over the training states."""
        mean, std = self.mean.to(states.device), self.std.to(states.device)
        return (states.float() - mean) / std

    def __call__(self, states: torch.Tensor, directions: int) -> torch.Tensor:
        """The first of the whitened coordinates of states (n, h), (n, directions)."""
        chosen, variances = self.directions[:, :directions], self.variances[:directions]
        return self.standardized(states) @ (chosen / variances.sqrt()).to(states.device)

    def squared_distance(self, states: torch.Tensor) -> torch.Tensor:
        """Mahalanobis' squared distance of states (n, h) from the mean, (n,)."""
        standardized = self.standardized(states)
        along = standardized @ self.directions.to(states.device)
        beyond = (standardized.square().sum(1) - along.square().sum(1)).clamp_min(0)
        is_all = self.directions.shape[0] == self.directions.shape[1]
        distance = (along.square() / self.variances.to(states.device)).sum(1)
        return distance if is_all else distance + beyond / self.rest.to(states.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"whitening.{each.name}": getattr(self, each.name) for each in fields(self)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> Whitening:
        """Raises KeyError: one is missing."""
        return cls(*(tensors[f"whitening.{each.name}"] for each in fields(cls)))


def shrunk_covariance(centered: torch.Tensor) -> torch.Tensor:
    """The covariance of n vectors of mean 0, shrunk towards the identity: δ·μ·I + (1 − δ)·S, (h, h).

    S = XᵀX / n, μ = tr S / h, and δ = min(b², d²) / d² with d² = ‖S − μI‖² and b² = Σ ‖xxᵀ − S‖² / n²: Ledoit and Wolf
    2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3 (from memory).

    Args:
        centered: (n, h), float64.
    """
    count, width = centered.shape
    covariance = centered.T @ centered / count
    level = covariance.trace() / width
    identity = torch.eye(width, dtype=centered.dtype)
    apart = (covariance - level * identity).square().sum()
    noise = (centered.square().sum(1).square().sum() / count - covariance.square().sum()) / count
    share = (noise.clamp_min(0) / apart).clamp_max(1) if apart > 0 else torch.ones((), dtype=centered.dtype)
    return share * level * identity + (1 - share) * covariance
