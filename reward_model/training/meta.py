# SPDX-License-Identifier: Apache-2.0
"""MetaRM: before each step the weights move to where shifted texts differ more in score, and come back for the update.

MetaRM (arXiv 2405.00438; Secrets of RLHF II, arXiv 2401.06080, section 3.2 and algorithm 1, which were read):

1. θ' = θ + η ∇J(θ) on a few prompts of the shifted data, J of :func:`reward_model.objectives.terms.difference_loss`;
2. the gradient of the run's own loss is taken at θ';
3. the optimizer updates θ with it.

The paper's η is not in what was read. There is no second derivative: step 2's gradient is by θ', as in the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from reward_model.batching.collate import collate
from reward_model.common.distributed import DistributedContext
from reward_model.common.logging import logger
from reward_model.common.pulse import beat
from reward_model.data.comparisons import Comparisons
from reward_model.models.forward import ForwardPass
from reward_model.objectives.terms import difference_loss

STREAM = 0x6D657461  # beside the seed: other draws than those of anything else


class MetaStep:
    """Moves the weights that train, and brings them back to the bit.

    Which rows a step has follows from the seed and its number, whatever the number of processes, each of which takes a
    part of them. The weights have to be whole on each process (ZeRO 0 to 2). It takes one forward and backward pass
    over these rows, their gradients summed over the processes, and a copy of the weights.
    """

    def __init__(
        self,
        rows: Comparisons,
        forward: ForwardPass,
        context: DistributedContext,
        rate: float,
        prompts: int,
        seed: int,
    ):
        """
        Args:
            rows: the shifted texts, two answers or more in each.
            rate: η.
            prompts: rows of a step, on all processes together.
            seed: of the run.
        """
        self.rows, self.forward, self.context, self.rate, self.seed = rows, forward, context, rate, seed
        self.prompts = min(prompts, len(rows))
        self.kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.is_told = False

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step (from 0), on all processes: each row once before any comes again."""
        return list(self._drawn(step * self.prompts, (step + 1) * self.prompts))

    def _drawn(self, begin: int, end: int) -> Iterator[int]:
        count = len(self.rows)
        for passes in range(begin // count, (end - 1) // count + 1):
            order = np.random.default_rng([self.seed, STREAM, passes]).permutation(count)
            yield from order[max(0, begin - passes * count) : end - passes * count].tolist()

    def ascend(self, step: int) -> torch.Tensor:
        """Move the weights for a step (from 0); every rank calls it.

        Returns:
            This rank's part of J before that, 0-d, whose sum over the ranks is J.
        """
        beat(f"the shifted texts of step {step + 1}")
        assert not self.kept
        trained = [each for each in self.forward.scorer.parameters() if each.requires_grad]
        mine = self.rows_of(step)[self.context.rank :: self.context.world_size]
        gradients: tuple[torch.Tensor | None, ...] = (None,) * len(trained)
        difference = torch.zeros((), device=self.context.device)
        if mine:
            value = self._difference(mine)
            # not by the engine, whose backward pass is a step's; no weight gets a gradient
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            difference = value.detach()
        self._move(trained, gradients)
        return difference

    def _difference(self, mine: list[int]) -> torch.Tensor:
        """The part of J of some rows, as the model is trained: with dropout."""
        batch = collate([self.rows[i] for i in mine], self.forward.layout).to(self.context.device)
        engine, self.forward.module = self.forward.module, self.forward.scorer
        try:
            scores = self.forward(batch, batch.tokens.ends)
        finally:
            self.forward.module = engine
        points = batch.points
        found = difference_loss(scores[points.responses], points.rows, len(points.row_weights))
        return found.sum() / self.prompts

    @torch.no_grad()
    def _move(self, trained: list[nn.Parameter], gradients: tuple[torch.Tensor | None, ...]) -> None:
        moved = asked = 0
        for parameter, gradient in zip(trained, gradients):
            whole = torch.zeros_like(parameter, dtype=torch.float32)
            if gradient is not None:
                whole += gradient
            torch.distributed.all_reduce(whole)
            self.kept.append((parameter, parameter.clone()))
            parameter.copy_(parameter.float() + self.rate * whole)
            if not self.is_told:
                asked += int((whole != 0).sum())
                moved += int((parameter != self.kept[-1][1]).sum())
        if not self.is_told:
            self.is_told = True
            self._tell(moved, asked)

    def _tell(self, moved: int, asked: int) -> None:
        """How many of the weights that have a gradient moved, which rounding leaves few of in half precision."""
        if not asked:
            logger.warning("--meta_data: no weight has a gradient: the scores of these texts are equal, or not finite")
            return
        line = f"--meta_data: {moved / asked:.1%} of the weights with a gradient moved towards the shifted texts"
        if moved < 0.5 * asked:
            dtype = str(self.forward.dtype).removeprefix("torch.")
            logger.warning(f"{line}; the others are rounded back in {dtype}: raise --meta_rate, or take --dtype fp32")
        else:
            logger.info(line)

    @torch.no_grad()
    def come_back(self) -> None:
        """Give the weights what they were, before the optimizer's step."""
        for parameter, before in self.kept:
            parameter.copy_(before)
        self.kept.clear()
