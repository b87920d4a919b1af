# SPDX-License-Identifier: Apache-2.0
"""Sums of a step over its micro-batches and all ranks.

Notation: p pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from reward_model.batching.batch import Batch
from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.training.health import Health
from reward_model.training.records import Records
from reward_model.training.skipping import Outcome

# chosen, rejected: sums of scores; computed: tokens and pads; passes: forward passes of all ranks; skipped, bad: ranks
# that say so of the step, which are all of them or none; asked: ranks that are asked to end
SUMS = (
    *("loss", "pairs", "correct", "chosen", "rejected", "tokens", "computed", "passes", "rows", "grad_norm"),
    *("skipped", "bad", "asked", "difference"),
)


class StepLog:
    """Reports each step one step late, so that no step waits for its numbers."""

    def __init__(self, context: DistributedContext, records: Records, bar: tqdm, health: Health):
        self.context, self.records, self.bar, self.health = context, records, bar, health
        self.sums = self._zeros()
        self.pending: tuple | None = None
        self.has_difference = False
        self.is_asked = False  # of any rank, to end the run
        self.seconds = 0.0  # of the last step
        self.clock = time.perf_counter()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(SUMS), dtype=torch.float64, device=self.context.device)

    def add(self, loss: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, batch: Batch) -> None:
        """Count a micro-batch: its weighted loss (0-d) and the scores of its winners and losers (p,)."""
        self.sums[0] += loss
        self.sums[7] += 1
        if self.context.sequence.rank:  # the first of its neighbors counts what they share
            return
        self.sums[6] += batch.tokens.input_ids.numel()
        if batch.weight:
            correct = (chosen > rejected).double() + 0.5 * (chosen == rejected)
            parts = (torch.ones_like(correct), correct, chosen, rejected)
            self.sums[1:5] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
            self.sums[5] += batch.tokens.attention_mask.sum()
            self.sums[8] += len(batch.points.row_weights)

    def add_difference(self, difference: torch.Tensor) -> None:
        """Count this rank's part of how far apart shifted texts are scored (0-d)."""
        self.has_difference = True
        self.sums[13] += difference

    def end_step(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        grad_norm,
        outcome: Outcome,
        rows: Callable[[], np.ndarray],
        is_asked: bool = False,
    ) -> None:
        """Begin to add up the ranks, and report the step before.

        Args:
            is_asked: this rank is asked to end the run, which all of them know one step later.
            grad_norm: of all ranks' gradients together; None: DeepSpeed keeps none at stage 0 in float32.
            outcome: what the optimizer did.
            rows: gives the rows of the step on all ranks, as indices.
        """
        self.sums[10] += outcome.skipped
        self.sums[11] += outcome.bad
        if grad_norm is not None:
            # DeepSpeed's is a tensor, and reading it would wait for the step
            self.sums[9] += grad_norm / self.context.world_size
        self.sums[12] += float(is_asked)  # to assign it would be a copy that the host waits for
        read = distributed.sum_for_later(self.sums)
        now = time.perf_counter()
        self.seconds, self.clock = now - self.clock, now
        ended = (step, epoch, self.seconds, read, learning_rate, grad_norm is not None, rows)
        self.flush()
        self.pending = ended
        self.sums = self._zeros()

    def flush(self) -> None:
        """Report the step that is pending, if there is one.

        Raises:
            UserError: it was the last of too many bad steps, or its loss is not finite and it was not skipped.
        """
        if self.pending is None:
            return
        step, epoch, seconds, read, learning_rate, has_norm, rows_of_step = self.pending
        self.pending = None
        loss, pairs, correct, chosen, rejected, tokens, computed, passes, rows, grad_norm, *flags = read()
        skipped, bad, asked, difference = flags
        self.is_asked = self.is_asked or asked > 0
        if not (math.isfinite(loss) or skipped):  # DeepSpeeds before 0.19 take such a step at some settings
            raise UserError(
                f"step {step}: the loss is {loss}, and this DeepSpeed did not skip the step; lower --learning_rate, or "
                "take --dtype bf16"
            )
        if bad or not math.isfinite(loss):
            self.health.skipped(step, loss, rows_of_step(), self.records)
            self.bar.update(step - self.bar.n)
            return
        values = {
            "split": "train",
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            "rows": int(rows),
            "pairs": int(pairs),
            "tokens": int(tokens),
            "padding": round(1 - tokens / computed, 4),
            "micro_batches": int(passes) // self.context.world_size,
            "rows_per_second": rows / seconds,
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if pairs:
            values["accuracy"] = correct / pairs
            values["gap"] = (chosen - rejected) / pairs
            values["chosen_mean"], values["rejected_mean"] = chosen / pairs, rejected / pairs
        if self.has_difference:
            values["meta_difference"] = difference
        if has_norm and math.isfinite(grad_norm):  # float16's overflows have none
            values["grad_norm"] = grad_norm
        self.records.add(values)
        self.health.tell(step, self.health.after_step(values), self.records)
        shown = {"loss": f"{loss:.3f}"}
        if pairs:
            shown |= {"acc": f"{values['accuracy']:.2f}", "gap": f"{values['gap']:.2f}"}
        shown |= {"pairs_s": f"{pairs / seconds:.0f}"} if pairs else {"rows_s": f"{rows / seconds:.0f}"}
        shown |= {"warnings": str(len(self.health.alarms))} if self.health.alarms else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def restart_clock(self) -> None:
        """Leave what happens in between, an evaluation say, out of the speed."""
        self.clock = time.perf_counter()
