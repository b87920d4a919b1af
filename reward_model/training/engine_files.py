# SPDX-License-Identifier: Apache-2.0
"""How DeepSpeed writes and reads the files of a checkpoint: hashed, flushed, and read without running anything."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from reward_model.common.errors import UserError
from reward_model.training.checkpoint import Writer


def allow_deepspeed_types() -> None:
    """Let ``torch.load(weights_only=True)`` restore the few plain objects that DeepSpeed puts beside its tensors.

    Each of them holds numbers; restoring one runs no code that a file brings.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def load_file(path: str, map_location: Any = "cpu", mapped: bool = False) -> Any:
    """What a file of DeepSpeed's has.

    Args:
        mapped: its tensors stay on the disk until they are read; for a file that outlives them.

    Raises:
        UserError: it holds more than tensors and numbers.
    """
    allow_deepspeed_types()
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # a pickle; an archive of another form
        raise UserError(
            f"{path} holds more than tensors and numbers, and is not read: no run of ours wrote it"
        ) from error


def engine_files() -> Any:
    """What DeepSpeed's engine calls to write and read files, in place of its own, which neither flushes nor checks.

    A function, since DeepSpeed says what it finds of the machine when it is imported.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class EngineFiles(CheckpointEngine):
        """writer: of the checkpoint that is being written."""

        def __init__(self) -> None:
            self.name = type(self).__name__
            self.writer: Writer | None = None

        def create(self, info: Any) -> None:
            """Nothing to prepare."""

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """The writer makes folders, and keeps what stands in the way."""

        def save(self, state_dict: Any, path: str) -> None:
            """Write a file; a full disk is kept by the writer, since an exception here would leave the other ranks."""
            assert self.writer is not None
            self.writer.write_tensors(path, state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            """Read a file that the manifest vouches for, all the same without running anything."""
            return load_file(path, map_location)

        def commit(self, info: Any) -> bool:
            """Nothing: :func:`reward_model.training.checkpoint.commit` renames, when the other files are there too."""
            return True

    return EngineFiles()
