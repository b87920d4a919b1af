# SPDX-License-Identifier: Apache-2.0
"""The training loop: epochs of steps of micro-batches, with evaluations in between.

Notation: n responses, r tokens of the longest, p pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from reward_model.batching.batch import Batch
from reward_model.batching.groups import RowGroups
from reward_model.batching.planner import Planner
from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.common.pulse import beat
from reward_model.common.words import at_step, counted
from reward_model.config.settings import Settings
from reward_model.data.comparisons import Comparisons
from reward_model.evaluation.evaluate import Evaluation, described, evaluate
from reward_model.evaluation.scoring import Stopped
from reward_model.models.forward import ForwardPass
from reward_model.models.scorer import count
from reward_model.objectives.objective import Objective
from reward_model.training.best import Best
from reward_model.training.checkpointing import Checkpointer
from reward_model.training.health import Health, TooManyBadSteps, Watch, wrong_weights
from reward_model.training.records import Records
from reward_model.training.skipping import StepGuard, marked
from reward_model.training.step_log import StepLog
from reward_model.training.stopping import Interrupted, StopRequest
from reward_model.training.verify import MOST_WRITTEN, choose_texts, second_segment, whole

Rows = tuple[Comparisons, RowGroups]


class Trainer:
    """Takes an engine through the epochs.

    What a checkpoint stores of it besides the engine and the random states of each rank is :meth:`state`. Which rows a
    step holds follows from seed and epoch, so that a run goes on at any step without the batches before.
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
        train: Rows,
        held_out: dict[str, Rows],
        steps: tuple[list[int], int],
        checkpointer: Checkpointer,
        stop: StopRequest,
    ):
        """
        Args:
            engine: DeepSpeed's, around the scorer of ``forward``.
            train: rows to train on, and their groups.
            held_out: name → rows and groups of each evaluation set; the first one decides which weights are the best.
            steps: of each epoch, and those that are taken.
            stop: that the run shall end before that.
        """
        self.settings, self.context, self.engine, self.forward = settings, context, engine, forward
        self.objective, self.planner, self.records = objective, planner, records
        self.train_set, self.groups = train
        self.held_out = held_out
        self.ends, self.total_steps = list(accumulate(steps[0])), steps[1]
        self.checkpointer, self.stop = checkpointer, stop
        self.step, self.evaluated = 0, -1
        self.found = dict.fromkeys(held_out, Evaluation())
        by = settings.evaluation.keep_best or ("loss" if settings.evaluation.early_stop else None)
        self.best = Best(by) if by else None
        self.guard = StepGuard(engine)
        self.health = Health(Watch.of(settings, self.total_steps, self.train_set), self.where)

    @property
    def eval_set(self) -> Comparisons:
        """The rows of the first evaluation set."""
        return next(iter(self.held_out.values()))[0]

    @property
    def last(self) -> Evaluation:
        """What the last evaluation found in the first set."""
        return next(iter(self.found.values()))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name of an evaluation set → its metrics in the last evaluation."""
        return {name: found.metrics for name, found in self.found.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of the loop, as JSON has it; of the rest, what ``reward-model export`` needs."""
        thresholds = self.forward.scorer.thresholds
        texts = choose_texts(self.eval_set, parameters=1)[:MOST_WRITTEN]
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "metrics": self.metrics,
            "lines": self.records.lines,
            "attention": self.forward.attention.name,
            "best": self.best and self.best.state(),
            "lowest_grade": float(self.objective.lowest_grade),
            "thresholds": 0 if thresholds is None else sum(count(each) for each in thresholds.parameters()),
            "probe": [whole(text) for text in texts],
            "probe_second": [second_segment(text) for text in texts],
            "health": self.health.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where a run was when it wrote its :meth:`state`; the attention is chosen by whoever calls this."""
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.found = {name: Evaluation(state["metrics"].get(name, {})) for name in self.held_out}
        if self.best and state["best"] and state["best"]["by"] == self.best.by:
            self.best = Best(**state["best"])
        self.health.restore(state["health"])
        self.records.lines = state["lines"]  # to which train() cuts the file

    def train(self) -> None:
        """All epochs, with an evaluation before the first step, after each epoch, and every ``--eval_interval``.

        Raises:
            Interrupted: the run was asked to end, and can go on from a checkpoint.
            TooManyBadSteps: a checkpoint of the last good weights is written before.
            UserError: numbers that no training goes on from.
        """
        self.records.cut(self.records.lines)
        if line := self.doubt_early_stop():
            logger.warning(line)
        self.health.tell(self.step, self.health.before_training(self.train_set), self.records)
        self.evaluate_if_due()
        bar = progress(
            total=self.total_steps, initial=self.step, desc="training", unit="step", disable=not self.context.is_first
        )
        log = StepLog(self.context, self.records, bar, self.health)
        try:
            self.take_steps(log)
            log.flush()
        except TooManyBadSteps:
            self.save()  # the weights are good, and reward-model export makes a model of them
            raise
        bar.close()

    def take_steps(self, log: StepLog) -> None:
        """All steps that are left, each epoch's from where it was."""
        layout = self.forward.layout
        while self.step < self.total_steps and not self.is_good_enough:
            epoch = bisect_right(self.ends, self.step)
            done = self.step - (self.ends[epoch - 1] if epoch else 0)
            self.engine.train()
            plan = self.planner.epoch(self.groups, epoch, layout.kind)
            for index, batches in enumerate(self.planner.load(self.train_set, plan, layout, first=done), done):
                for batch in batches:
                    self.engine.set_gradient_accumulation_boundary(batch is batches[-1])
                    self.train_micro_batch(batch.to(self.context.device), log)
                self.step += 1
                rate, norm = self.engine.get_lr()[0], self.engine.get_global_grad_norm()
                rows, outcome = partial(plan.rows, index), self.guard.after_step()
                log.end_step(self.step, self.epoch, rate, norm, outcome, rows, self.stop.asked)
                self.end_step(log)
                if self.step == self.total_steps or self.is_good_enough:
                    break

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        epoch = bisect_right(self.ends, self.step)
        before = self.ends[epoch - 1] if epoch else 0
        whole = epoch == len(self.ends)
        return float(epoch) if whole else epoch + (self.step - before) / (self.ends[epoch] - before)

    @property
    def is_good_enough(self) -> bool:
        """Whether ``--early_stop`` ends the training."""
        most = self.settings.evaluation.early_stop
        return bool(most and self.best and self.best.since >= most)

    def doubt_early_stop(self) -> str:
        """Why ``--early_stop`` can end nothing, in a line; empty: it can."""
        most, interval = self.settings.evaluation.early_stop, self.settings.evaluation.eval_interval
        between = {end for end in self.ends if end < self.total_steps}
        between |= set(range(interval, self.total_steps, interval)) if interval else set()
        count = len(between)
        if not most or count > most:
            return ""
        return (
            f"--early_stop {most} can end nothing: {counted(count, 'evaluation')} between the first step and the last; "
            "give --eval_interval"
        )

    @property
    def is_evaluation_due(self) -> bool:
        """Whether held-out rows are scored after this step, and were not yet."""
        interval = self.settings.evaluation.eval_interval
        is_end = self.step in (0, self.total_steps) or self.step in self.ends
        return self.evaluated != self.step and (is_end or bool(interval and self.step % interval == 0))

    def end_step(self, log: StepLog) -> None:
        """After a step: its checkpoint, its evaluation, or the end of the run."""
        self.stop.step_seconds = max(self.stop.step_seconds, log.seconds)
        is_alone, is_last = self.context.world_size == 1, self.step == self.total_steps
        is_due = self.checkpointer.is_due(self.step) or (is_last and self.checkpointer.last_step > 0)
        if not (is_due or self.is_evaluation_due or log.is_asked or (is_alone and self.stop.asked)):
            return
        log.flush()  # after which all ranks know what was asked in this step
        is_asked = (log.is_asked or (is_alone and self.stop.asked)) and not is_last
        if is_due or is_asked:
            self.save()
        if is_asked:
            self.end_early()
        self.evaluate_if_due()
        self.engine.train()
        log.restart_clock()

    def save(self) -> None:
        """Write a checkpoint of this step, unless it has one."""
        if self.checkpointer.last_step != self.step:
            self.records.flush()
            self.checkpointer.save(self.step, self.state())
            self.stop.save_seconds = self.checkpointer.seconds

    def end_early(self) -> None:
        """End the run, which has a checkpoint of this step if one could be written.

        Raises:
            Interrupted: it has one.
            UserError: it has none.
        """
        what = f"step {self.step}: ended by {self.stop.reason if self.stop.asked else 'another rank'}"
        if self.checkpointer.last_step == self.step:
            raise Interrupted(f"{what}; the same command goes on from here")
        raise UserError(f"{what} before the end of the run, without a checkpoint of this step")

    def train_micro_batch(self, batch: Batch, log: StepLog) -> None:
        """Forward and backward pass of a batch on this device, and the optimizer's step if it is the last of one."""
        beat(f"a micro-batch of step {self.step + 1}")
        loss, chosen, rejected = self.loss(batch)
        # ranks that share texts have the same loss, and each a part of its gradient, of which all is the sum
        loss = marked(loss) * batch.weight / self.context.sequence.size
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
        loss = self.objective(batch, scores, every, self.forward.thresholds, self.forward.heads)
        if self.forward.anchor is not None:
            loss = loss + self.settings.loss.head_anchor * self.forward.anchor
        return loss, scores[batch.pairs.better], scores[batch.pairs.worse]

    def evaluate_if_due(self) -> None:
        """Score the evaluation rows if they are to be scored after this step.

        Raises:
            Interrupted: the run was asked to end meanwhile; when it goes on, the evaluation begins again.
        """
        if not self.is_evaluation_due:
            return
        try:
            self.evaluate()
        except Stopped:
            self.save()
            self.end_early()

    def evaluate(self) -> None:
        """Score the evaluation rows on all ranks, each once, and record the metrics of each whole set.

        Raises:
            UserError: a score is not finite.
            Stopped: the run shall end; nothing is recorded then, so that no set has its line twice.
        """
        found = {name: self.scored(name) for name in self.held_out}
        for name, each in found.items():
            if each is None:
                at = at_step(self.step, name)
                raise UserError(f"{at}: a held-out score is not finite; {self.why_not_finite()}")
            self.found[name] = each
        self.evaluated = self.step
        for name, each in self.found.items():
            of_set = {"set": name} if name else {}
            where = {"split": "eval", "step": self.step} | of_set | {"epoch": round(self.epoch, 4)}
            self.records.add(where | each.metrics)
            logger.info(f"{at_step(self.step, name)}: {described(each.metrics, self.objective.names)}")
            alarms = self.health.after_evaluation(self.step, each.metrics, each.scores, name)
            self.health.tell(self.step, alarms, self.records)
        if self.best and self.best.judge(self.last.metrics, self.step) and self.settings.evaluation.keep_best:
            self.checkpointer.save_best(self.best)
        if self.is_good_enough and self.best:
            logger.info(
                f"step {self.step}: no better {self.best.by} in {self.best.since} evaluations since step "
                f"{self.best.step}, and the training ends here"
                + ("" if self.settings.evaluation.keep_best else "; --keep_best would save the weights of that step")
            )

    def evaluate_again(self) -> None:
        """Score the evaluation rows with the weights that are saved; where that fails, what was found before counts."""
        for name in self.held_out:
            self.found[name] = self.scored(name) or self.found[name]

    def scored(self, name: str) -> Evaluation | None:
        """The rows of an evaluation set, scored; None: a score is not finite."""
        layout, (rows, groups) = self.forward.layout, self.held_out[name]
        plan = self.planner.evaluation(groups, layout.kind)
        batches = self.planner.load(rows, plan, layout)
        return evaluate(self.forward, self.objective, rows, plan, batches, self.context, lambda: self.stop.asked)

    def why_not_finite(self) -> str:
        """What the weights say of scores that are not finite, and what to do; all ranks call it."""
        weights = distributed.first_text(wrong_weights(self.forward.scorer))
        dtype, rate = self.settings.engine.dtype, self.settings.training.learning_rate
        if weights and not self.step:
            return f"nothing was trained yet, and the model's weights hold what is no number: {weights}"
        if weights:
            return f"the weights hold what is no number: {weights}; lower --learning_rate ({rate:g})"
        others = " or ".join(name for name in ("fp32", "bf16") if name != dtype)
        lower = f", or lower --learning_rate ({rate:g})" if self.step else ""
        return f"every weight is finite, so numbers grow too large on the way in {dtype}: take --dtype {others}{lower}"

    def where(self, rows: np.ndarray) -> dict[str, list[int]]:
        """The files of training rows, given as indices, and their numbers there."""
        return self.train_set.origins.select(rows).by_file()
