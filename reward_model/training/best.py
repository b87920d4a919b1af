# SPDX-License-Identifier: Apache-2.0
"""The weights of the best evaluation (``--keep_best``), and when no better one is to be expected (``--early_stop``)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reward_model.common.errors import UserError
from reward_model.common.files import flush_file, flush_folder
from reward_model.models.scorer import Scorer, gathered


@dataclass
class Best:
    """The best evaluation so far, by one of its metrics.

    by: ``accuracy``, of which more is better, or ``loss``. value, step: of the best; None: there was none yet.
    since: evaluations that were no better since.
    """

    by: str
    value: float | None = None
    step: int = 0
    since: int = 0

    def judge(self, metrics: dict[str, Any], step: int) -> bool:
        """Count an evaluation; whether it is the best one. That before the first step has no rank.

        Raises:
            UserError: it has no such metric, as without pairs.
        """
        value = metrics.get(self.by, metrics.get("point_loss") if self.by == "loss" else None)
        if value is None:
            raise UserError(f"--keep_best or --early_stop by {self.by}: the held-out rows have no pairs to tell it")
        if not step:
            return False
        better = self.value is None or (value > self.value if self.by == "accuracy" else value < self.value)
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    def state(self) -> dict[str, Any]:
        """For a checkpoint; :func:`Best` takes it back."""
        return asdict(self)


def trained_tensors(scorer: Scorer) -> dict[str, torch.Tensor]:
    """The parameters that train, by name."""
    return {name: each for name, each in scorer.named_parameters() if each.requires_grad}


def write_weights(scorer: Scorer, path: Path, is_writer: bool) -> str:
    """Write the weights that train to one file; every rank calls it. Why that failed, in a line; empty: it did not."""
    state = {}
    for name, parameter in trained_tensors(scorer).items():
        with gathered([parameter]):
            if is_writer:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not is_writer:
        return ""
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, beside)
        flush_file(beside)
        os.replace(beside, path)
        flush_folder(path.parent)
    except Exception as error:  # safetensors has its own for a write that failed
        beside.unlink(missing_ok=True)
        return f"{path}: {error}"
    return ""


@torch.no_grad()
def read_weights(scorer: Scorer, path: Path) -> None:
    """Give the model the weights of a file, whatever ZeRO has partitioned; every rank calls it."""
    with safe_open(path, "pt") as file:
        for name, parameter in trained_tensors(scorer).items():
            with gathered([parameter], modify=True):
                if parameter.numel():
                    parameter.copy_(file.get_tensor(name))
