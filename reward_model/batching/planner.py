# SPDX-License-Identifier: Apache-2.0
"""What the flags make of a data set: groups of rows, each epoch's plan for this rank, and the batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.utils.data import DataLoader

from reward_model.batching.collate import PlannedBatches, loader
from reward_model.batching.groups import RowGroups, row_sizes, rows_by_prompt, rows_to_evaluate, single_rows
from reward_model.batching.layout import Layout
from reward_model.batching.plan import BatchSpec, EpochPlan, MicroBatch, plan_evaluation
from reward_model.common.distributed import DistributedContext
from reward_model.data.comparisons import Comparisons

STEPS_TO_JUDGE_BY = 200  # enough for a share of pads to two digits


class Planner:
    """Deals rows out to steps and ranks as the flags say."""

    def __init__(self, options: argparse.Namespace, context: DistributedContext, by_row: bool):
        """
        Args:
            by_row: the batch size counts rows, not judged pairs.
        """
        self.options, self.context, self.by_row = options, context, by_row

    def training_groups(self, rows: Comparisons) -> RowGroups:
        """The training rows, those of a prompt brought together if that is wanted."""
        options = self.options
        if options.merge == "batch":
            return single_rows(rows, self.by_row)
        most = options.per_device_train_batch_size
        if options.tokens_per_batch:
            most *= options.gradient_accumulation_steps
        if options.batch_element == "prompt":
            most = int(row_sizes(rows, self.by_row).sum())
        return rows_by_prompt(
            rows,
            options.max_responses,
            most,
            options.seed,
            most_tokens=options.tokens_per_batch,
            by_row=self.by_row,
        )

    def evaluation_groups(self, rows: Comparisons, most: int) -> RowGroups:
        """Rows to score without training, at most so many (0: all), those of a prompt brought together."""
        options = self.options
        chosen = rows_to_evaluate(len(rows), most, options.seed)
        return rows_by_prompt(rows, options.max_responses, options.per_device_eval_batch_size, options.seed, chosen)

    def epoch(self, groups: RowGroups, epoch: int, layout: str) -> EpochPlan:
        """This rank's share of an epoch."""
        spec, context = self._spec(self.options.per_device_train_batch_size, layout), self.context
        return EpochPlan(groups, spec, context.rank, context.world_size, self.options.seed, epoch)

    def evaluation(self, groups: RowGroups, layout: str) -> list[list[MicroBatch]]:
        """This rank's share of an evaluation: one micro-batch at a time, equally many on every rank."""
        spec = self._spec(self.options.per_device_eval_batch_size, layout)
        return [[m] for m in plan_evaluation(groups, spec, self.context.rank, self.context.world_size)]

    def load(self, rows: Comparisons, plan: Sequence[list[MicroBatch]], layout: Layout) -> DataLoader:
        """The batches of a plan, in its order."""
        return loader(PlannedBatches(rows, plan, layout), on_gpu=self.context.device.type == "cuda")

    def advice(self, groups: RowGroups, layout: str) -> Iterator[str]:
        """What does not fit the token budget, and what pads cost where a flag would spare much of it."""
        spec, budget = self._spec(self.options.per_device_train_batch_size, layout), self.options.tokens_per_batch
        rows = groups.texts if layout == "separate" else 1
        over = (spec.width(groups) * rows > budget).sum() if budget else 0
        if over:
            longest = (spec.width(groups) * rows).max()
            what = "groups" if self.options.merge == "prompt" else "rows"
            yield f"--tokens_per_batch {budget}: {over} {what} have more, up to {longest}, and stay whole"
        if layout == "packed" or self.options.group_by_length:
            return
        share = (self.context.rank, self.context.world_size, self.options.seed, 0)
        drawn, grouped = (
            EpochPlan(groups, replace(spec, by_length=by_length), *share).tokens(STEPS_TO_JUDGE_BY)
            for by_length in (False, True)
        )
        if grouped < 0.8 * drawn:
            yield f"pads: --group_by_length would compute {1 - grouped / drawn:.0%} fewer tokens"

    def _spec(self, micro_batch: int, layout: str) -> BatchSpec:
        options = self.options
        return BatchSpec(
            micro_batch=micro_batch,
            accumulation=options.gradient_accumulation_steps,
            by_prompt=options.batch_element == "prompt",
            layout=layout,
            tokens=options.tokens_per_batch,
            by_length=options.group_by_length,
        )
