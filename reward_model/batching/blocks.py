# SPDX-License-Identifier: Apache-2.0
"""Which blocks of tokens see which, for FlexAttention: counted from where segments begin, before a GPU has to wait.

Notation: b rows, s tokens, z tokens of a block, n = s / z blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reward_model.batching.fields import TensorFields


@dataclass(frozen=True)
class Blocks(TensorFields):
    """For each block of queries, the blocks of keys that it sees in part, and those that it sees whole.

    As ``torch.nn.attention.flex_attention.BlockMask.from_kv_blocks`` takes them; all int32. Without blocks, empty.
    """

    part_number: torch.Tensor  # (b, 1, n) how many are seen in part
    part: torch.Tensor  # (b, 1, n, n) which: the first part_number of them
    whole_number: torch.Tensor  # (b, 1, n) how many are seen whole
    whole: torch.Tensor  # (b, 1, n, n) which

    @classmethod
    def none(cls) -> Blocks:
        """Of a batch whose attention asks for none."""
        return cls(*(torch.zeros(0, dtype=torch.int32) for _ in range(4)))

    @classmethod
    def of(cls, begin: np.ndarray, prompt_begin: np.ndarray, prompt_end: np.ndarray, size: int) -> Blocks:
        """Count what each block of queries sees of each block of keys.

        Args:
            begin, prompt_begin, prompt_end: As in ``Tokens``, (b, s). A token sees what comes from ``begin`` up to
                itself, and the tokens of its prompt.
            size: Tokens of a block, z; s is a multiple of it.
        """
        rows, width = begin.shape
        count = width // size
        edges = np.arange(0, width, size, dtype=np.int32)
        seen = np.zeros((rows, count, count), np.int64)
        for low, high in ((begin, np.arange(1, width + 1, dtype=np.int32)), (prompt_begin, prompt_end)):
            low, high = (np.broadcast_to(bound, begin.shape)[..., None] for bound in (low, high))
            overlap = (np.minimum(high, edges + size) - np.maximum(low, edges)).clip(min=0)  # (b, s, n)
            seen += overlap.reshape(rows, count, size, count).sum(2)
        is_whole = seen == size * size
        return cls(*_ordered((seen > 0) & ~is_whole), *_ordered(is_whole))


def _ordered(sees: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each block sees, (b, 1, n), and which, those first, (b, 1, n, n)."""
    which = np.argsort(~sees, axis=-1, kind="stable")
    return tuple(torch.from_numpy(each.astype(np.int32))[:, None] for each in (sees.sum(-1), which))
