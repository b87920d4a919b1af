# SPDX-License-Identifier: Apache-2.0
"""A fitted method beside its model: energies as quantiles of held-out training texts, and the file.

``MODEL/novelty/novelty.safetensors`` has a folder of its own, since vLLM reads every ``*.safetensors`` that lies beside
``config.json`` as weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from reward_model.common.errors import UserError, first_line
from reward_model.models.saving import NOVELTY
from reward_model.models.scorer import Scorer, head_layer
from reward_model.novelty.density import Density
from reward_model.novelty.distillation import RandomNetworkDistillation
from reward_model.novelty.exemplar import ExemplarClassifier
from reward_model.novelty.gaussian import Mahalanobis, RelativeMahalanobis
from reward_model.novelty.spread import SpreadOfHeads

FORMAT = 1
MOST_QUANTILES = 1_001
SAMPLE = 4_096  # numbers of each weight, evenly spread: another training moves them all
METHODS: dict[str, type[Density]] = {
    each.name: each
    for each in (Mahalanobis, RelativeMahalanobis, ExemplarClassifier, RandomNetworkDistillation, SpreadOfHeads)
}


@dataclass(frozen=True)
class Novelty:
    """How new a text is to a model: the share of held-out training texts whose energy is lower, 0 to 1.

    A text beyond all of them has 1, however far beyond; ``density.energy`` tells such texts apart.

    quantiles: energies of held-out texts at evenly spaced levels, (q,) float64, rising. threshold: the novelty from
    which on a text is said to be novel. fingerprint: of the weights, see :func:`fingerprint`. about: what it was
    fitted to.
    """

    density: Density
    quantiles: torch.Tensor
    threshold: float
    fingerprint: str
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, density: Density, held_out: torch.Tensor, threshold: float, fingerprint: str, about: dict) -> Novelty:
        """Calibrate a fitted method by states that it has not seen, (n, h)."""
        energies = density.energy(held_out).double()
        levels = torch.linspace(0, 1, min(len(energies), MOST_QUANTILES), dtype=torch.float64)
        return cls(density, torch.quantile(energies, levels), threshold, fingerprint, about)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """The novelty of states (n, h), (n,) float32, on their device; 1 where an energy is no number."""
        energies = torch.nan_to_num(self.density.energy(states).double(), nan=torch.inf)
        quantiles = self.quantiles.to(states.device)
        above = torch.searchsorted(quantiles, energies, right=True)
        low, high = (above - 1).clamp(0, len(quantiles) - 1), above.clamp(0, len(quantiles) - 1)
        width = (quantiles[high] - quantiles[low]).clamp_min(torch.finfo(torch.float64).tiny)
        part = ((energies - quantiles[low]) / width).clamp(0, 1)
        found = (low + torch.where(high > low, part, torch.zeros_like(part))) / max(1, len(quantiles) - 1)
        return torch.where(above == 0, torch.zeros_like(found), found).clamp(0, 1).float()

    def is_novel(self, novelty: Sequence[float]) -> list[bool]:
        """Whether each of some texts is novel: whether its novelty has come to the threshold."""
        return [each >= self.threshold for each in novelty]

    def save(self, folder: Path) -> Path:
        """Write the file beside a model; a crash leaves the old one or the new.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.density.tensors().items()}
        tensors["quantiles"] = self.quantiles
        said = {
            "format": FORMAT,
            "method": self.density.name,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            "about": self.about,
        }
        file = folder / NOVELTY
        try:
            file.parent.mkdir(exist_ok=True)
            beside = file.with_name(f".{file.name}.partial")
            beside.write_bytes(save(tensors, {"novelty": json.dumps(said)}))
            os.replace(beside, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from error
        return file


def read_novelty(folder: Path, scorer: Scorer) -> Novelty | None:
    """What was fitted to a loaded model; None: nothing lies beside it.

    Raises:
        UserError: the file cannot be read, or belongs to other weights.
    """
    file = folder / NOVELTY
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["novelty"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
        if said["format"] != FORMAT:
            raise UserError(f"{file} is of another version of this package: fit it again")
        quantiles = tensors.pop("quantiles")
        density = METHODS[said["method"]].of_tensors(tensors)
        found = Novelty(density, quantiles, float(said["threshold"]), said["fingerprint"], said["about"])
    except UserError:
        raise
    except Exception as error:  # whatever a file that is no such file makes safetensors, JSON and PyTorch raise
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    if found.fingerprint != fingerprint(scorer):
        raise UserError(
            f"{file} was fitted to other weights or another --dtype: run reward-model novelty fit again, or remove it"
        )
    return found


def fingerprint(scorer: Scorer) -> str:
    """A hash of up to ``SAMPLE`` numbers of each weight of the backbone, and of the head.

    Numbers are taken as float32, so that a model that is saved in float16 and loaded as float32 has the same.
    """
    digest = hashlib.sha256(scorer.pooling.encode())
    weights = sorted(scorer.backbone.state_dict().items())
    for name, weight in [*weights, ("head", head_layer(scorer).weight)]:
        values = weight.detach().flatten()
        values = values[:: max(1, -(-len(values) // SAMPLE))].float().cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
