# SPDX-License-Identifier: Apache-2.0
"""Random network distillation: how badly a network foretells what another one, of random weights, says of a state."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from reward_model.novelty.density import Density
from reward_model.novelty.exemplar import part_of

HIDDEN, OUTPUTS = 128, 32
STEPS, STATES, RATE = 1_000, 256, 1e-3  # of AdamW, whatever the number of texts


class RandomNetworkDistillation(Density):
    """mean_j (P(x)_j − T(x)_j)²: T is a random network, and P one that was trained to foretell it on training states.

    Burda et al. 2018 (arXiv 1810.12894) reward the error as curiosity; Yu, Wu and Block 2026 ("Caution", arXiv
    2604.04648) take λ times the error off the reward for best of N. Unlike in "Caution", whose target are the reward
    model's own features and whose predictor reads tokens (by a summary of the paper; it was not read whole), both
    networks here are given the frozen state. Units are standardized, and so are the target's outputs.
    """

    name: ClassVar[str] = "rnd"

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, target: nn.Sequential, predictor: nn.Sequential):
        """
        Args:
            mean, std: of each unit over the training states, (h,).
            target: (n, h) → (n, o), its outputs with mean 0 and variance 1 over the training states.
        """
        self.mean, self.std = mean, std
        self.target, self.predictor = (each.eval().requires_grad_(False) for each in (target, predictor))

    @classmethod
    def fit(cls, states: torch.Tensor, seed: int, heads: torch.Tensor | None = None) -> RandomNetworkDistillation:
        states = states.float()
        mean, std = states.mean(0), states.std(0, unbiased=False)
        std = torch.where(std > 1e-5 * std.mean(), std, std.mean().clamp_min(1e-30))
        known = (states - mean) / std
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            target, predictor = _target(known.shape[1]), _predictor(known.shape[1])
        with torch.no_grad():
            said = target(known)
            spread = said.std(0, unbiased=False).clamp_min(1e-6)
            target[2].weight.div_(spread[:, None])
            target[2].bias.sub_(said.mean(0)).div_(spread)
            said = target(known)
        optimizer = torch.optim.AdamW(predictor.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        with torch.enable_grad():
            for _ in range(STEPS):
                drawn = torch.randint(len(known), (STATES,), generator=generator)
                loss = (predictor(known[drawn]) - said[drawn]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return cls(mean, std, target, predictor)

    @torch.no_grad()
    def energy(self, states: torch.Tensor) -> torch.Tensor:
        device = states.device
        states = (states.float() - self.mean.to(device)) / self.std.to(device)
        return (self.predictor.to(device)(states) - self.target.to(device)(states)).square().mean(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"mean": self.mean, "std": self.std}
        for name, network in (("target", self.target), ("predictor", self.predictor)):
            found |= {f"{name}.{part}": value for part, value in network.state_dict().items()}
        return found

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> RandomNetworkDistillation:
        width = len(tensors["mean"])
        target, predictor = _target(width), _predictor(width)
        target.load_state_dict(part_of(tensors, "target."))
        predictor.load_state_dict(part_of(tensors, "predictor."))
        return cls(tensors["mean"], tensors["std"], target, predictor)


def _target(width: int) -> nn.Sequential:
    """Two layers of orthogonal weights, large enough that GELU bends what they give."""
    network = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUTPUTS))
    for layer in (network[0], network[2]):
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
    return network


def _predictor(width: int) -> nn.Sequential:
    """One layer more than the target, so that it can foretell it."""
    return nn.Sequential(
        nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUTPUTS)
    )
