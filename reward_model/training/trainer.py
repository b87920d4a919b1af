# SPDX-License-Identifier: Apache-2.0
"""The training loop: epochs of steps of micro-batches, with evaluations in between.

Notation: n responses, r tokens of the longest, p pairs.
"""

from __future__ import annotations

import torch

from reward_model.batching.batch import Batch
from reward_model.batching.groups import RowGroups
from reward_model.batching.planner import Planner
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.config.settings import Settings
from reward_model.data.comparisons import Comparisons
from reward_model.evaluation.evaluate import Evaluation, described, evaluate
from reward_model.models.forward import ForwardPass
from reward_model.objectives.objective import Objective
from reward_model.training.records import Records
from reward_model.training.step_log import StepLog


class Trainer:
    """Takes an engine through the epochs.

    What a resumed run would have to store of it: the engine (weights, optimizer, learning-rate schedule), ``step``, and
    the random states of each rank. Which rows a step holds follows from seed and epoch.
    """

    def __init__(
        self,
        settings: Settings,
        context: DistributedContext,
        engine,
        forward: ForwardPass,
        objective: Objective,
        planner: Planner,
        records: Records,
        rows: tuple[Comparisons, Comparisons],
        groups: tuple[RowGroups, RowGroups],
        total_steps: int,
    ):
        """
        Args:
            engine: DeepSpeed's, around the scorer of ``forward``.
            rows, groups: for training, and for evaluations.
            total_steps: of all epochs.
        """
        self.settings, self.context, self.engine, self.forward = settings, context, engine, forward
        self.objective, self.planner, self.records = objective, planner, records
        self.train_set, self.eval_set = rows
        self.groups, self.eval_groups = groups
        self.step, self.total_steps = 0, total_steps
        self.last = Evaluation()

    def train(self) -> None:
        """All epochs, with an evaluation before the first step, after each epoch, and every ``--eval_interval``."""
        layout, interval = self.forward.layout, self.settings.evaluation.eval_interval
        self.evaluate(epoch=0)
        bar = progress(total=self.total_steps, desc="training", unit="step", disable=not self.context.is_first)
        log = StepLog(self.context, self.records, bar)
        for epoch in range(self.settings.training.num_train_epochs):
            self.engine.train()
            plan = self.planner.epoch(self.groups, epoch, layout.kind)
            for done, batches in enumerate(self.planner.load(self.train_set, plan, layout), 1):
                for batch in batches:
                    self.engine.set_gradient_accumulation_boundary(batch is batches[-1])
                    self.train_micro_batch(batch.to(self.context.device), log)
                self.step += 1
                reached = epoch + done / len(plan)
                log.end_step(self.step, reached, self.engine.get_lr()[0], self.engine.get_global_grad_norm())
                if done == len(plan) or (interval and self.step % interval == 0):
                    log.flush()
                    self.evaluate(reached)
                    self.engine.train()
                    log.restart_clock()
        log.flush()
        bar.close()

    def train_micro_batch(self, batch: Batch, log: StepLog) -> None:
        """Forward and backward pass of a batch on this device, and the optimizer's step if it is the last of one."""
        loss, chosen, rejected = self.loss(batch)
        # ranks that share texts have the same loss, and each a part of its gradient, of which all is the sum
        loss = loss * batch.weight / self.context.sequence.size
        # DeepSpeed takes the mean over the ranks, and here the sum over all micro-batches is meant
        self.engine.backward(loss * self.context.world_size, scale_wrt_gas=False)
        self.engine.step()
        log.add(loss.detach(), chosen.detach(), rejected.detach(), batch)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mean loss of a batch (0-d), and the end scores of its winners and losers (p,); float32."""
        every = None
        if self.settings.loss.level == "token":
            every = self.forward(batch, batch.tokens.spans)  # (n, r)
            scores = every[:, -1]  # beyond its end a response repeats its last token
        else:
            scores = self.forward(batch, batch.tokens.ends)  # (n,)
        loss = self.objective(batch, scores, every, self.forward.thresholds)
        return loss, scores[batch.pairs.better], scores[batch.pairs.worse]

    def evaluate(self, epoch: float) -> None:
        """Score the evaluation rows on all ranks, each once, and record the metrics of the whole set.

        Raises:
            UserError: a score is not finite.
        """
        layout = self.forward.layout
        plan = self.planner.evaluation(self.eval_groups, layout.kind)
        batches = self.planner.load(self.eval_set, plan, layout)
        found = evaluate(self.forward, self.objective, batches, self.context)
        if found is None:
            advice = "lower --learning_rate, or take --dtype bf16"
            if not self.step:
                advice = "nothing was trained yet, so look for NaN in the model's weights, or take --dtype fp32 or bf16"
            raise UserError(f"step {self.step}: a held-out score is not finite; {advice}")
        self.last = found
        self.records.add({"split": "eval", "step": self.step, "epoch": round(epoch, 4)} | found.metrics)
        logger.info(f"step {self.step}: {described(found.metrics, self.objective.names)}")
