# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the numbers of a run, found from those that it reports: steps that were skipped, and alarms.

Notation: n scores, p pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import at_step, counted
from reward_model.config.loss import Loss
from reward_model.config.objectives import kind_of
from reward_model.config.settings import Settings
from reward_model.data.comparisons import Comparisons
from reward_model.models.scorer import Scorer
from reward_model.training.records import Records

SHARE_BEYOND = 0.05  # of held-out scores that may lie beyond --score_limit: a few odd texts are no trend
GROWN = 2.0  # times the mean size of scores: a pair of gap Δ is then as sure as one of 2Δ was
EARLY = 0.25  # of --score_limit, 8 by default: below it growth is how a model learns; σ(8) is 0.9997
LONG = 50  # steps at least, and a tenth of the run, that a loss is watched before anything is said of it
ABOVE = 1.05  # times log 2
NEAR, STILL = 0.005, 0.02  # mean and standard deviation of losses around log 2: gaps of ±0.15 in batches of 16 pairs
MOST_TIES = 0.1  # of held-out pairs
MOST_TOLD = 5  # skipped steps that are told one by one
MOST_SHOWN = 8  # rows in a message
MANY_TIMES = 3  # --max_bad_steps: from then on a run of which more than half is skipped ends, however they are spread
FEW_ROWS = 3  # that all bad steps have in common, to be named as the cause


class TooManyBadSteps(UserError):
    """A run that skips one step after the other; its weights are those of the last good one."""


@dataclass(frozen=True)
class Alarm:
    """Something that looks wrong, and what to try.

    kind: a name, of which each is raised once in a run, or once for each evaluation set. set: the name of that; empty:
    it is of the training, or the set has no name.
    """

    kind: str
    message: str
    set: str = ""


@dataclass
class BadSteps:
    """The steps whose loss or gradient was not finite.

    count: of them all. in_a_row: those at the end. common: rows that each of them held; None: there was none yet.
    first_loss, last_loss: of good steps; None: there was none.
    """

    count: int = 0
    in_a_row: int = 0
    common: list[int] | None = None
    first_loss: float | None = None
    last_loss: float | None = None

    def good(self, loss: float) -> None:
        """A step was taken."""
        self.in_a_row = 0
        self.last_loss = loss
        if self.first_loss is None:
            self.first_loss = loss

    def bad(self, rows: np.ndarray) -> None:
        """A step was skipped, which had these rows."""
        self.count += 1
        self.in_a_row += 1
        held = set(rows.tolist())
        self.common = sorted(held if self.common is None else held.intersection(self.common))

    @property
    def culprits(self) -> list[int]:
        """Rows that are in every bad step, if there are several of these and few of those."""
        rows = self.common or []
        return rows if self.count > 1 and len(rows) <= FEW_ROWS else []


@dataclass
class Block:
    """Sums over some steps: of the loss, of its square."""

    steps: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, loss: float) -> None:
        self.steps += 1
        self.total += loss
        self.squares += loss * loss

    @property
    def mean(self) -> float:
        return self.total / self.steps

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.steps - self.mean**2))


@dataclass(frozen=True)
class Watch:
    """What a run is watched for.

    score_limit: of the size of a score; 0: none. knows_log_2: the loss of equal scores is log 2. warmup: steps of it.
    penalty: the flag that says how much it weighs; empty: there is none. largest_target: of scores that are learned.
    """

    learning_rate: float
    dtype: str
    max_bad_steps: int
    score_limit: float
    knows_log_2: bool
    total_steps: int
    warmup: int = 0
    penalty: str = ""
    largest_target: float = 0.0

    @classmethod
    def of(cls, settings: Settings, total_steps: int, train: Comparisons) -> Watch:
        """What the settings of a run, and its data, make of it."""
        training, loss = settings.training, settings.loss
        penalty = ""
        if loss.score_penalty and loss.score_penalty_weight:
            penalty = f"--score_penalty_weight ({loss.score_penalty_weight:g})"
        elif loss.length_penalty:
            penalty = f"--length_penalty ({loss.length_penalty:g})"
        is_learned = any(kind_of(name) == "points" for name in loss.weights)
        targets = train.targets() if is_learned else np.zeros(0)
        return cls(
            learning_rate=training.learning_rate,
            dtype=settings.engine.dtype,
            max_bad_steps=training.max_bad_steps,
            score_limit=settings.evaluation.score_limit,
            knows_log_2=knows_log_2(loss),
            total_steps=total_steps,
            warmup=training.num_warmup_steps or math.ceil(training.warmup_ratio * total_steps),
            penalty=penalty,
            largest_target=float(np.nanmax(np.abs(targets), initial=0.0)) if np.isfinite(targets).any() else 0.0,
        )


def knows_log_2(loss: Loss) -> bool:
    """Whether the loss of equal scores is log 2, and no less with any penalty: logistic, without a margin or a weight.

    A penalty of scores that are all 0 is 0; but the logarithmic barrier, which is negative there, is left out.
    """
    plain = loss.weights == {"logistic": 1.0} and loss.margin == 0 and not loss.terms
    return plain and loss.score_penalty != "log_barrier"


@dataclass
class Health:
    """Watches the numbers of a run; every rank sees the same ones and comes to the same.

    where: indices of rows → file → their numbers in it. What a checkpoint stores is :meth:`state`.
    """

    watch: Watch
    where: Callable[[np.ndarray], dict[str, list[int]]]
    bad_steps: BadSteps = field(default_factory=BadSteps)
    block: Block = field(default_factory=Block)
    best: dict[str, tuple[float, float]] = field(default_factory=dict)  # evaluation set → best accuracy, |score| then
    alarms: list[Alarm] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """All that it has seen, for a file of JSON."""
        return {
            "bad_steps": asdict(self.bad_steps),
            "block": asdict(self.block),
            "best": self.best,
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state` of an earlier run."""
        self.best = {name: (accuracy, size) for name, (accuracy, size) in state.get("best", {}).items()}
        self.bad_steps, self.block = BadSteps(**state["bad_steps"]), Block(**state["block"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        if self.bad_steps.in_a_row >= self.watch.max_bad_steps:
            self.bad_steps.in_a_row = 0  # that run ended by it, and this one looks at as many again

    # --- steps whose numbers are not finite ---

    def skipped(self, step: int, loss: float, rows: np.ndarray, records: Records) -> None:
        """Count a step that was skipped, and write down its rows.

        Args:
            rows: indices of the rows of the step on all ranks.

        Raises:
            TooManyBadSteps: it is the last of ``max_bad_steps`` in a row, or most steps so far were skipped.
        """
        bad, found = self.bad_steps, self.where(rows)
        bad.bad(rows)
        known = {"loss": loss} if math.isfinite(loss) else {}
        records.add({"split": "bad_step", "step": step, "in_a_row": bad.in_a_row} | known | {"rows": found})
        what = "gradient is not finite" if known else f"loss is {loss}"
        if bad.count <= MOST_TOLD:
            logger.warning(f"step {step}: the {what}, so the step was skipped; its rows: {rows_in_words(found)}")
        most = self.watch.max_bad_steps
        is_most = bad.count > MANY_TIMES * most and 2 * bad.count > step
        if bad.in_a_row >= most or is_most:
            how_many = f"{bad.count} of {step} steps" if is_most else f"{counted(bad.in_a_row, 'step')} in a row"
            raise TooManyBadSteps(
                f"step {step}: a loss or gradient was not finite in {how_many} "
                "(--max_bad_steps), which were skipped, so that the weights are those of the last good step; "
                f"likely cause: {self.likely_cause()}. A new run needs a new folder; reward-model export makes a model "
                "of the checkpoint that this one leaves"
            )

    def likely_cause(self) -> str:
        """Of the bad steps so far, and what to do, in words."""
        bad, rate = self.bad_steps, self.watch.learning_rate
        if bad.culprits:
            verb = "is" if len(bad.culprits) == 1 else "are"
            return f"{rows_in_words(self.where(np.array(bad.culprits)))} {verb} in each of these steps: look there"
        if self.watch.dtype == "fp16":
            return "numbers beyond 65,504, float16's largest: take --dtype bf16 or fp32"
        if bad.last_loss is None or bad.first_loss is None:
            return (
                "no step was good: look for wrong numbers in the rows, which are in metrics.jsonl, or take --dtype fp32"
            )
        if bad.last_loss > 2 * max(bad.first_loss, math.log(2)) or any(a.kind == "score_limit" for a in self.alarms):
            return f"--learning_rate {rate:g} is too high: the loss of the last good step was {bad.last_loss:.4g}"
        if bad.in_a_row > 1:  # of other rows each time
            return f"--learning_rate {rate:g} is too high; or else rows of those in metrics.jsonl"
        return f"a row, of those in metrics.jsonl; or else --learning_rate {rate:g} is too high"

    def summary(self) -> list[str]:
        """What a user has to know at the end of the run, in lines."""
        lines, bad = [f"warning: {alarm.message}" for alarm in self.alarms], self.bad_steps
        if bad.count:
            row = f"; {rows_in_words(self.where(np.array(bad.culprits)))} in each of them" if bad.culprits else ""
            lines.append(
                f"warning: {counted(bad.count, 'step')} skipped for a loss or gradient that was not finite{row}; "
                "the rows are in metrics.jsonl"
            )
        return lines

    # --- alarms ---

    def after_step(self, values: dict[str, Any]) -> list[Alarm]:
        """Look at a training step, as ``metrics.jsonl`` has it."""
        self.bad_steps.good(values["loss"])
        found = []
        means = [abs(values[name]) for name in ("chosen_mean", "rejected_mean") if name in values]
        if means and max(means) > self._limit():
            step = values["step"]
            found.append(self._beyond(step, f"training scores have a mean of {max(means):.4g}", at_step(step)))
        return self._new(found + self._loss_alarms(values["step"], values["loss"]))

    def _loss_alarms(self, step: int, loss: float) -> list[Alarm]:
        watch, block = self.watch, self.block
        if not watch.knows_log_2 or step <= watch.warmup:
            return []
        block.add(loss)
        if block.steps < max(LONG, watch.total_steps // 10):
            return []
        self.block = Block()
        steps, mean = f"over the last {block.steps} steps", block.mean
        rate = f"--learning_rate ({watch.learning_rate:g})"
        error = block.std / math.sqrt(block.steps)
        if mean > ABOVE * math.log(2) and mean - 3 * error > math.log(2):
            penalty = f" or {watch.penalty}" if watch.penalty else ""
            text = f"step {step}: the training loss was {mean:.4g} {steps}, above log 2 = 0.693, which equal scores get"
            return [Alarm("loss_above_log_2", f"{text}: lower {rate}{penalty}")]
        if abs(mean - math.log(2)) < NEAR and block.std < STILL:
            penalty = f", lower {watch.penalty}" if watch.penalty else ""
            text = f"step {step}: the training loss stayed at {mean:.3f} {steps}; log 2 = 0.693 is that of equal scores"
            look = "look whether chosen and rejected are what they should be"
            return [Alarm("loss_at_log_2", f"{text}: raise {rate}{penalty}, or {look}")]
        return []

    def after_evaluation(
        self, step: int, metrics: dict[str, Any], scores: dict[str, np.ndarray], name: str = ""
    ) -> list[Alarm]:
        """Look at an evaluation.

        Args:
            metrics: as ``metrics.jsonl`` has them.
            scores: name of a group, such as ``chosen``, → its scores (n,).
            name: of the evaluation set; empty: it has none.
        """
        at = at_step(step, name)
        sizes = np.abs(np.concatenate([np.zeros(0), *scores.values()]))
        found = []
        if len(sizes) and np.mean(sizes > self._limit()) > SHARE_BEYOND:
            found.append(self._beyond(step, f"held-out scores have a mean size of {sizes.mean():.4g}", at))
        if "accuracy" in metrics:
            found += self._growth(at, name, metrics["accuracy"], metrics["score_abs_mean"])
            if step:
                found += ties(at, metrics["accuracy"], scores["chosen"], scores["rejected"])
        return self._new([replace(alarm, set=name) for alarm in found])

    def _growth(self, at: str, name: str, accuracy: float, size: float) -> list[Alarm]:
        limit = self._limit()
        best, size_at_best = self.best.get(name, (-1.0, 0.0))
        if accuracy > best:
            self.best[name] = accuracy, size
        elif math.isfinite(limit) and size > max(GROWN * size_at_best, EARLY * limit):
            text = (
                f"{at}: the mean size of held-out scores has grown from {size_at_best:.4g} to {size:.4g}, "
                f"and the accuracy has not ({best:.4f}, now {accuracy:.4f})"
            )
            return [Alarm("score_growth", f"{text}: train for fewer epochs, or add --score_penalty l2")]
        return []

    def _limit(self) -> float:
        """Of the size of a score; targets of the data have to be within it."""
        return max(self.watch.score_limit, 2 * self.watch.largest_target) if self.watch.score_limit else math.inf

    def _beyond(self, step: int, what: str, at: str) -> Alarm:
        limit = self._limit()
        apart = 2.0 ** (math.floor(math.log2(limit)) - 7)
        text = f"{at}: {what}, beyond {limit:g} (--score_limit), where numbers of bfloat16 are {apart:g} apart"
        if not step:
            return Alarm("score_limit", f"{text}: so they come from the model; load it in float32")
        advice = f"lower --learning_rate ({self.watch.learning_rate:g}), or add --score_penalty l2"
        return Alarm("score_limit", f"{text}: {advice}")

    def _new(self, found: list[Alarm]) -> list[Alarm]:
        """Those that were not raised yet."""
        known = {(alarm.kind, alarm.set) for alarm in self.alarms}
        new = [alarm for alarm in found if (alarm.kind, alarm.set) not in known]
        self.alarms += new
        return new

    def tell(self, step: int, alarms: list[Alarm], records: Records) -> None:
        """Say alarms, and write them to ``metrics.jsonl``."""
        for alarm in alarms:
            logger.warning(alarm.message)
            of_set = {"set": alarm.set} if alarm.set else {}
            records.add({"split": "alarm", "step": step} | of_set | {"kind": alarm.kind, "message": alarm.message})

    def before_training(self, train: Comparisons) -> list[Alarm]:
        """Look at the training rows."""
        count = made_equal(train)
        if not count:
            return []
        text = f"{counted(count, 'training row')} became equal to a row of another prompt when its prompt was cut"
        return self._new([Alarm("made_equal", f"{text}: raise --max_seq_len")])


def ties(at: str, accuracy: float, chosen: np.ndarray, rejected: np.ndarray) -> list[Alarm]:
    """Whether many of p pairs have equal scores, so that the accuracy hardly depends on which answer is the better.

    Args:
        at: step and evaluation set, in words.
    """
    equal = int(np.sum(chosen == rejected))
    if equal <= MOST_TIES * len(chosen):
        return []
    text = (
        f"{at}: {equal} of {len(chosen)} held-out pairs have two equal scores: the accuracy is {accuracy:.4f}, "
        f"and {1 - accuracy:.4f} with chosen and rejected exchanged"
    )
    return [Alarm("ties", f"{text}: lower --learning_rate, take --dtype fp32, or look whether the answers differ")]


def made_equal(rows: Comparisons) -> int:
    """The number of rows whose texts, once their prompt was cut, are those of a row that was asked something else.

    The two texts of one row never become equal: only what they begin with in common is cut.
    """
    cut = rows.cut()
    if not cut.any():
        return 0
    hashes, _, counts = rows.texts()
    keys = np.add.reduceat(hashes, np.cumsum(counts) - counts)  # the same for the same texts in another order
    asked, times = np.unique(np.unique(np.stack([keys, rows.prompt_hashes()]), axis=1)[0], return_counts=True)
    return int(np.sum(cut & np.isin(keys, asked[times > 1])))


def wrong_weights(scorer: Scorer) -> str:
    """Which weights, of the part that this rank has of them, hold NaN or infinity, in words; empty: none does."""
    found = []
    for name, parameter in scorer.named_parameters():
        part = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO 3's part of it
        if not part.isfinite().all():
            found.append(f"{name.removeprefix('model.')} ({'NaN' if part.isnan().any() else 'infinity'})")
    more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return ", ".join(found[:MOST_SHOWN]) + more


def rows_in_words(found: dict[str, list[int]]) -> str:
    """Files and numbers of rows, the first of them.

    >>> rows_in_words({"a.jsonl": [3, 7], "b.jsonl": [1]})
    'a.jsonl, rows 3, 7; b.jsonl, row 1'
    """
    total, left, parts = sum(map(len, found.values())), MOST_SHOWN, []
    for name, numbers in found.items():
        shown, left = numbers[:left], max(0, left - len(numbers))
        if shown:
            parts.append(f"{name}, row{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}")
    more = f"; {total - MOST_SHOWN} more are in metrics.jsonl" if total > MOST_SHOWN else ""
    return "; ".join(parts) + more
