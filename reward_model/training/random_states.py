# SPDX-License-Identifier: Apache-2.0
"""The random states of a process, as safetensors: PyTorch's on the CPU and on the device, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from reward_model.common.errors import UserError


def captured(device: torch.device) -> bytes:
    """The states of this process, to be restored by :func:`restore`."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([np.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([state["state"]["pos"], state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        tensors["device"] = torch.cuda.get_rng_state(device)
    return save(tensors)


def restore(content: bytes, device: torch.device) -> None:
    """Give this process states that were captured. Raises UserError for what is no such content."""
    try:
        tensors = load(content)
        version, *words = tensors["python"].tolist()
        gauss = tensors["python_gauss"].item()
        random.setstate((version, tuple(words), None if np.isnan(gauss) else gauss))
        position, has_gauss = tensors["numpy_position"].tolist()
        key = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, tensors["numpy_gauss"].item()))
        torch.set_rng_state(tensors["torch"])
        if device.type == "cuda" and "device" in tensors:
            torch.cuda.set_rng_state(tensors["device"], device)
    except Exception as error:  # safetensors, NumPy and torch each have their own
        raise UserError(f"the random states of the checkpoint cannot be restored: {error}") from error
