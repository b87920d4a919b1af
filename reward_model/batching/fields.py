# SPDX-License-Identifier: Apache-2.0
"""Dataclasses of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

Self = TypeVar("Self", bound="TensorFields")  # typing.Self needs Python 3.11


@dataclass(frozen=True)
class TensorFields:
    """A dataclass whose fields are tensors, dataclasses of this kind, or plain values, which stay as they are."""

    def to(self: Self, device: torch.device) -> Self:
        """The same values on a device. The copy may still be under way when this returns."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self: Self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        def changed(value):
            if isinstance(value, TensorFields):
                return value._map(change)
            return change(value) if isinstance(value, torch.Tensor) else value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})
