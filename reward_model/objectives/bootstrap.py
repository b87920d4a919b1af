# SPDX-License-Identifier: Apache-2.0
"""How often each of several heads sees a row: a bootstrap without a second pass over the data.

Notation: m rows or judged pairs, K heads.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from reward_model.batching.identity import seeded

BITS = 53  # of a uniform number
MOST = 18  # draws of one row; P(as many or more) is 6e-17, less than a number of 53 bits can tell
# ⌊P(draw ≤ k) · 2⁵³⌋ of Poisson(1), P(draw = k) = 1 / (e·k!)
CUMULATED = [int(p * 2**BITS) for p in accumulate(math.exp(-1) / math.factorial(k) for k in range(MOST))]


class Bootstrap:
    """Poisson(1) weights by identity, seed and head: online bagging (Oza and Russell 2001, section 3).

    A bootstrap of n rows has each of them Binomial(n, 1/n) times, which tends to Poisson(1) as n grows, independently
    of all others, so that a row's weight needs nothing but the row. The weights have mean 1, and a head's loss is an
    unbiased mean over all rows. It is not divided by the sum of a batch's weights: which rows meet in a batch depends
    on the number of ranks, and a head that has drawn none of them would divide by 0.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._tensors: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def weights(self, identities: torch.Tensor, heads: int) -> torch.Tensor:
        """How often each head has drawn each row, (m, K) float32.

        Args:
            identities: (m,) int64.
            heads: K. The first K of more heads draw the same.
        """
        keys, bounds = self._kept(heads, identities.device)
        uniform = _shifted(_mix(_mix(identities[:, None] ^ keys)), 64 - BITS)
        return torch.bucketize(uniform, bounds, right=True).float()

    def _kept(self, heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A number of each head, (K,), and the bounds between draws, on a device: copied once, not for each batch."""
        if (heads, device) not in self._tensors:
            keys = [seeded(("bootstrap of head", head, "seed", self.seed)) for head in range(heads)]
            self._tensors[heads, device] = torch.tensor(keys, device=device), torch.tensor(CUMULATED, device=device)
        return self._tensors[heads, device]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014); products of int64 drop what is beyond 64 bits."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """64 bits as the int64 that has them."""
    return x - (1 << 64) if x >= 1 << 63 else x
