# SPDX-License-Identifier: Apache-2.0
"""What the configuration makes of a data set: groups of rows, each epoch's plan for this rank, and the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from torch.utils.data import DataLoader

from reward_model.batching.batch import Batch
from reward_model.batching.collate import PlannedBatches, loader
from reward_model.batching.groups import RowGroups, row_sizes, rows_by_prompt, rows_to_evaluate, single_rows
from reward_model.batching.layout import Layout
from reward_model.batching.plan import BatchSpec, EpochPlan, MicroBatch, plan_evaluation
from reward_model.common.distributed import DistributedContext
from reward_model.config.groups import BatchConfig
from reward_model.data.comparisons import Comparisons

STEPS_TO_JUDGE_BY = 200  # enough for a share of pads to two digits


class Planner:
    """Deals rows out to steps and ranks."""

    def __init__(
        self,
        batches: BatchConfig,
        eval_batch_size: int,
        seed: int,
        context: DistributedContext,
        by_row: bool,
        identified: bool = False,
    ):
        """
        Args:
            eval_batch_size: of a rank, in judged pairs or scored responses.
            by_row: the batch size counts rows, not judged pairs.
            identified: something is drawn for pairs and rows, by what they are known by.
        """
        self.batches, self.eval_batch_size, self.seed = batches, eval_batch_size, seed
        self.context, self.by_row, self.identified = context, by_row, identified

    def training_groups(self, rows: Comparisons) -> RowGroups:
        """The training rows, those of a prompt brought together if that is wanted."""
        batches = self.batches
        if batches.merge == "batch":
            return single_rows(rows, self.by_row)
        most = batches.per_device_train_batch_size
        if batches.tokens_per_batch:
            most *= batches.gradient_accumulation_steps
        if batches.batch_element == "prompt":
            most = int(row_sizes(rows, self.by_row).sum())
        return rows_by_prompt(
            rows,
            batches.max_responses,
            most,
            self.seed,
            most_tokens=batches.tokens_per_batch,
            by_row=self.by_row,
        )

    def evaluation_groups(self, rows: Comparisons, most: int) -> RowGroups:
        """Rows to score without training, at most so many (0: all), those of a prompt brought together."""
        chosen = rows_to_evaluate(len(rows), most, self.seed)
        return rows_by_prompt(rows, self.batches.max_responses, self.eval_batch_size, self.seed, chosen)

    def epoch(self, groups: RowGroups, epoch: int, layout: str) -> EpochPlan:
        """This rank's share of an epoch."""
        spec, context = self._spec(self.batches.per_device_train_batch_size, layout), self.context
        return EpochPlan(groups, spec, context.data_rank, context.data_size, self.seed, epoch)

    def evaluation(self, groups: RowGroups, layout: str) -> list[list[MicroBatch]]:
        """This rank's share of an evaluation: one micro-batch at a time, equally many on every rank."""
        spec = self._spec(self.eval_batch_size, layout)
        return [[m] for m in plan_evaluation(groups, spec, self.context.data_rank, self.context.data_size)]

    def load(self, rows: Comparisons, plan: Sequence[list[MicroBatch]], layout: Layout, first: int = 0) -> DataLoader:
        """The batches of a plan, in its order, from its step ``first`` on."""
        return loader(
            PlannedBatches(rows, plan, layout, self.identified), on_gpu=self.context.device.type == "cuda", first=first
        )

    def first(self, rows: Comparisons, groups: RowGroups, layout: Layout, count: int = 3) -> list[Batch]:
        """The first micro-batches of this rank, at most so many."""
        plan = self.epoch(groups, 0, layout.kind)
        chosen = list(islice((micro_batch for step in plan for micro_batch in step), count))
        return PlannedBatches(rows, [chosen], layout, self.identified)[0]

    def advice(self, groups: RowGroups, layout: str) -> Iterator[str]:
        """What does not fit the token budget, and what pads cost where a flag would spare much of it."""
        spec, budget = self._spec(self.batches.per_device_train_batch_size, layout), self.batches.tokens_per_batch
        rows = groups.texts if layout == "separate" else 1
        over = (spec.width(groups) * rows > budget).sum() if budget else 0
        if over:
            longest = (spec.width(groups) * rows).max()
            what = "groups" if self.batches.merge == "prompt" else "rows"
            yield f"--tokens_per_batch {budget}: {over} {what} have more, up to {longest}, and stay whole"
        if spec.is_one_row or self.batches.group_by_length:
            return
        share = (self.context.data_rank, self.context.data_size, self.seed, 0)
        drawn, grouped = (
            EpochPlan(groups, replace(spec, by_length=by_length), *share).tokens(STEPS_TO_JUDGE_BY)
            for by_length in (False, True)
        )
        if grouped < 0.8 * drawn:
            yield f"pads: --group_by_length would compute {1 - grouped / drawn:.0%} fewer tokens"

    def _spec(self, micro_batch: int, layout: str) -> BatchSpec:
        batches = self.batches
        return BatchSpec(
            micro_batch=micro_batch,
            accumulation=batches.gradient_accumulation_steps,
            by_prompt=batches.batch_element == "prompt",
            layout=layout,
            tokens=batches.tokens_per_batch,
            by_length=batches.group_by_length,
        )
