# SPDX-License-Identifier: Apache-2.0
"""What the flags make of a data set: groups of rows, each epoch's plan for this rank, and the batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.utils.data import DataLoader

from reward_model.batching.collate import Layout, Loading, loader
from reward_model.batching.groups import Units, row_sizes, rows_by_prompt, rows_to_evaluate, single_rows
from reward_model.batching.plan import EpochPlan, MicroBatch, Rule, plan_evaluation
from reward_model.common.distributed import Place
from reward_model.data.comparisons import Comparisons

STEPS_TO_JUDGE_BY = 200  # enough for a share of pads to two digits


class Planner:
    """Deals rows out to steps and ranks as the flags say."""

    def __init__(self, options: argparse.Namespace, place: Place, by_row: bool):
        """
        Args:
            by_row: the batch size counts rows, not judged pairs.
        """
        self.options, self.place, self.by_row = options, place, by_row

    def training_groups(self, rows: Comparisons) -> Units:
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

    def evaluation_groups(self, rows: Comparisons, most: int) -> Units:
        """Rows to score without training, at most so many (0: all), those of a prompt brought together."""
        options = self.options
        chosen = rows_to_evaluate(len(rows), most, options.seed)
        return rows_by_prompt(rows, options.max_responses, options.per_device_eval_batch_size, options.seed, chosen)

    def epoch(self, groups: Units, epoch: int, layout: str) -> EpochPlan:
        """This rank's share of an epoch."""
        rule, place = self._rule(self.options.per_device_train_batch_size, layout), self.place
        return EpochPlan(groups, rule, place.rank, place.world_size, self.options.seed, epoch)

    def evaluation(self, groups: Units, layout: str) -> list[list[MicroBatch]]:
        """This rank's share of an evaluation: one micro-batch at a time, equally many on every rank."""
        rule = self._rule(self.options.per_device_eval_batch_size, layout)
        return [[m] for m in plan_evaluation(groups, rule, self.place.rank, self.place.world_size)]

    def load(self, rows: Comparisons, plan: Sequence[list[MicroBatch]], layout: Layout) -> DataLoader:
        """The batches of a plan, in its order."""
        return loader(Loading(rows, plan, layout), on_gpu=self.place.device.type == "cuda")

    def advice(self, groups: Units, layout: str) -> Iterator[str]:
        """What does not fit the token budget, and what pads cost where a flag would spare much of it."""
        rule, budget = self._rule(self.options.per_device_train_batch_size, layout), self.options.tokens_per_batch
        rows = groups.texts if layout == "separate" else 1
        over = (rule.width(groups) * rows > budget).sum() if budget else 0
        if over:
            longest = (rule.width(groups) * rows).max()
            what = "groups" if self.options.merge == "prompt" else "rows"
            yield f"--tokens_per_batch {budget}: {over} {what} have more, up to {longest}, and stay whole"
        if layout == "packed" or self.options.group_by_length:
            return
        share = (self.place.rank, self.place.world_size, self.options.seed, 0)
        drawn, grouped = (
            EpochPlan(groups, replace(rule, by_length=by_length), *share).tokens(STEPS_TO_JUDGE_BY)
            for by_length in (False, True)
        )
        if grouped < 0.8 * drawn:
            yield f"pads: --group_by_length would compute {1 - grouped / drawn:.0%} fewer tokens"

    def _rule(self, micro_batch: int, layout: str) -> Rule:
        options = self.options
        return Rule(
            micro_batch=micro_batch,
            accumulation=options.gradient_accumulation_steps,
            by_prompt=options.batch_element == "prompt",
            layout=layout,
            tokens=options.tokens_per_batch,
            by_length=options.group_by_length,
        )
