# SPDX-License-Identifier: Apache-2.0
"""The charts of training: loss, accuracy, scores, rates and speed, of one run or of several.

Notation: s steps, k of them that are drawn, e evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.reporting import colors
from reward_model.reporting.charts import Chart, Table
from reward_model.reporting.runs import Run, number, numbers
from reward_model.reporting.thinning import evenly, in_words, ranges, running_mean, thinned
from reward_model.reporting.words import shown

MOST_POINTS = 2_400  # of a line, over all runs together: 10 kB in float32 and base64
FEWEST_POINTS = 120
MOST_ROWS = 40  # of a table of steps
MOST_STRETCHES = 60  # of skipped steps that are marked
LOG_2 = math.log(2)
NEAR = 1.6  # times the largest score: a limit within that is drawn, one beyond it would press the lines flat


@dataclass(frozen=True)
class Held:
    """The evaluations of a run on one set. label: to show; steps (e,)."""

    label: str
    color: str
    lines: list[dict]

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the evaluations that have a finite number of this name."""
        values = np.array([number(line.get(name)) for line in self.lines])
        steps = np.array([line["step"] for line in self.lines], dtype=np.float64)
        known = np.isfinite(values)
        return steps[known], values[known]

    def quantiles(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (e,), and the 5, 25, 50, 75 and 95 % quantiles there (e, 5)."""
        found = [(line["step"], numbers(line.get(name))) for line in self.lines]
        known = [(step, values) for step, values in found if len(values) == 5 and np.isfinite(values).all()]
        return np.array([s for s, _ in known], dtype=np.float64), np.array([v for _, v in known]).reshape(-1, 5)


class Training:
    """The charts of some runs."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.is_one = len(runs) == 1
        self.most = max(FEWEST_POINTS, MOST_POINTS // max(1, len(runs)))
        self.palette = colors.Palette()  # keys: place of a run, and name of a set
        self.of_runs = [[self.palette.of(place, name) for name in run.sets or [""]] for place, run in enumerate(runs)]

    def charts(self) -> Iterator[Chart]:
        """Those that have anything to show."""
        found = [
            self.loss(),
            self.accuracy(),
            self.scores(),
            self.correlation(),
            self.calibration(),
            self.heads(),
            self.by_step("learning_rate", "Learning rate", "rate", ""),
            self.by_step("grad_norm", "Gradient norm", "norm, before it is clipped", "0.[00]a", self.clipping()),
            self.throughput(),
            self.pads(),
        ]
        yield from (chart for chart in found if not chart.is_empty)

    @property
    def thinning(self) -> str:
        """What was left out of the lines, in a sentence; empty: nothing."""
        most = max((len(run.steps) for run in self.runs), default=0)
        if most <= self.most:
            return ""
        return (
            f"Of up to {most:,} steps a line shows about {self.most:,}: the lowest and the highest of each "
            f"{2 * most / self.most:,.0f} in a row, so that no spike is lost; the running mean is over all of them."
        )

    # --- the charts ---

    def loss(self) -> Chart:
        chart = Chart("Loss", "step", "loss", "Held out: the plain logistic loss. Equal scores have log 2 = 0.693.")
        has_pairs = any(len(held.read("accuracy")[0]) for held in self._held())
        if not has_pairs:
            chart.caption = "Held out: the loss of the objective." if list(self._held()) else ""
        self._of_steps(chart, "loss")
        for held in self._held():
            x, y = held.read("loss")
            if len(x):
                self._evaluations(chart, held, x, y)
            else:
                self._evaluations(chart, held, *held.read("point_loss"))
        if chart.is_empty:
            return chart
        if has_pairs:
            chart.rule(LOG_2, "log 2: no preference")
        if not self.is_one:
            chart.caption += " Thin: running means of training; with dots: held out."
        if self.is_one and self.runs[0].skipped:
            skipped = self.runs[0].skipped
            for first, last in ranges(skipped)[:MOST_STRETCHES]:
                chart.shade(first, last, f"skipped: {in_words(skipped, 4)}", colors.WARNING)
        chart.see(np.zeros(1))
        chart.ticks("0.[000]")
        return chart

    def accuracy(self) -> Chart:
        chart = Chart(
            "Accuracy", "step", "share of pairs", "Pairs whose better answer has the higher score; a tie is half."
        )
        self._of_steps(chart, "accuracy")
        for held in self._held():
            self._evaluations(chart, held, *held.read("accuracy"))
        longer = [held.read("longer_wins_accuracy")[1][-1:] for held in self._held()]
        values = sorted({round(float(value), 3) for each in longer for value in each})
        said = " or ".join(f"{value:.3f}" for value in values)
        for value in values if len(values) <= 2 else []:
            chart.rule(value, f"longer answer wins: {said}")
        chart.ticks("0.[00]")
        return chart

    def scores(self) -> Chart:
        chart = Chart("Scale of the scores", "step", "score")
        held = list(self._held())
        if self.is_one and len(held) == 1:
            self._bands(chart, held[0])
            chart.caption = (
                "Held out: median, half and nine tenths of the scores. Thin lines: running mean of training."
            )
        else:
            chart.caption = "Held-out means; chosen as a line, rejected dashed."
            for each in held:
                for side, dash in (("chosen", "solid"), ("rejected", "dashed")):
                    x, y = each.read(f"{side}_mean")
                    if len(x):
                        label = f"{each.label}, {side}"
                        tooltips = [(label, "@y{0.000}"), ("step", "@x{0,0}")]
                        chart.line(x, y, label, each.color, dash=dash, tooltips=tooltips, is_alone=False)
        if self.is_one:
            for side, color in (("chosen", colors.CHOSEN), ("rejected", colors.REJECTED)):
                run, values = self.runs[0], running_mean(self.runs[0].column(f"{side}_mean"))
                kept = thinned(values, self.most)
                if len(kept):
                    chart.line(run.steps[kept], values[kept], f"{side}, training", color, width=1, alpha=0.75)
        for each in held if chart.is_empty else []:
            self._evaluations(chart, each, *each.read("rated_mean"))
            chart.caption = "Mean of the held-out scores."
        if not chart.is_empty:
            chart.tables += [
                self._table_of_evaluations(("chosen_mean", "rejected_mean", "score_abs_mean", "rated_mean"))
            ]
            self._limits(chart)
        return chart

    def correlation(self) -> Chart:
        chart = Chart("Correlation with the targets", "step", "Pearson's correlation", "Of held-out scores.")
        for held in self._held():
            self._evaluations(chart, held, *held.read("pearson"))
        chart.ticks("0.[00]")
        return chart

    def calibration(self) -> Chart:
        chart = Chart(
            *("Calibration over training", "step", "expected calibration error"),
            "Of σ(gap) as the probability that the better answer wins, before any temperature.",
        )
        for held in self._held():
            self._evaluations(chart, held, *held.read("calibration_error"))
        chart.see(np.zeros(1))
        chart.ticks("0.[00]")
        return chart

    def heads(self) -> Chart:
        """How far several heads are apart; empty: there is one."""
        chart = Chart("Spread of the heads", "step", "standard deviation")
        chart.caption = "Held out, means over pairs and answers: of the gaps by each head and, dashed, of the scores."
        for held in self._held():
            for name, what, dash in (("gap", "gaps", "solid"), ("score", "scores", "dashed")):
                x, y = held.read(f"{name}_heads_std")
                if not len(x):
                    continue
                label = f"{held.label}, {what}"
                tooltips = [(label, "@y{0.000}"), ("step", "@x{0,0}")]
                chart.line(x, y, label, held.color, dash=dash, tooltips=tooltips, is_alone=False)
                chart.dots(x, y, label, held.color, size=4, hollow=name == "score")
        if not chart.is_empty:
            chart.tables.append(self._table_of_evaluations(("gap_heads_std", "score_heads_std")))
            chart.see(np.zeros(1))
        return chart

    def clipping(self) -> float:
        """``--max_grad_norm`` of the one run; NaN: none."""
        limit = number(self.runs[0].settings.get("max_grad_norm")) if self.is_one else math.nan
        return limit if limit > 0 else math.nan

    def by_step(self, name: str, title: str, y: str, ticks: str, limit: float = math.nan) -> Chart:
        """A number of each step, as it is and as its running mean."""
        chart = Chart(title, "step", y)
        self._of_steps(chart, name)
        if chart.is_empty:
            return chart
        if math.isfinite(limit):
            chart.rule(limit, f"clipped to {limit:g}")
        chart.see(np.zeros(1))
        if ticks:
            chart.ticks(ticks)
        return chart

    def throughput(self) -> Chart:
        chart = self.by_step("tokens_per_second", "Throughput", "tokens per second", "0.[0]a")
        chart.caption = "Pads are not counted."
        if not any(run.column("padding").any() for run in self.runs):  # NaN, of a run that says nothing, is true
            chart.caption = "There was no pad."
        return chart

    def pads(self) -> Chart:
        """Of runs that have any."""
        if not any(np.nanmax(run.column("padding"), initial=0) > 0 for run in self.runs):
            return Chart("Share of pads", "step", "")
        return self.by_step("padding", "Share of pads", "of all positions computed", "0.[0]%")

    # --- their parts ---

    def _held(self) -> Iterator[Held]:
        """Evaluations by run and set, in colors of their own."""
        for place, run in enumerate(self.runs):
            for name, lines in run.evaluations.items():
                label = name or "held out"
                if not self.is_one:
                    label = f"{run.name}: {name}" if name else run.name
                yield Held(label, self.palette.of(place, name), lines)

    def _of_steps(self, chart: Chart, name: str) -> None:
        """Training's lines: every step faintly, and the running mean."""
        for place, run in enumerate(self.runs):
            values = run.column(name)
            kept = thinned(values, self.most)
            if not len(kept):
                continue
            steps, is_smooth, usual = run.steps[kept], name == "learning_rate", _usual(values)
            means = values if is_smooth else running_mean(values)
            label = "training" if self.is_one else run.name
            color = colors.INK if self.is_one else self.of_runs[place][0]  # of its first set
            if not is_smooth and self.is_one:
                alpha = 0.45 if len(kept) == len(values) else 0.3  # thinned, it is as dense as ink
                chart.line(steps, values[kept], "each step", colors.SLATE, width=1, alpha=alpha, seen=usual)
                place = kept[np.argmax(values[kept])]
                if values[place] > usual.max():
                    highest = f"Highest: {shown(values[place])} at step {run.steps[place]:,}"
                    chart.caption = f"{chart.caption} {highest}, beyond the picture.".strip()
            label = "running mean" if self.is_one and not is_smooth else label
            shown_as = "@{value}{0.[00000]e+0}" if is_smooth else "@{value}{0,0.[0000]}"
            # a name from outside stands where Bokeh writes text, not in a value, which it reads as HTML
            tooltips = [("step", "@x{0,0}"), (chart.title.lower() if self.is_one else run.name, shown_as)]
            if not is_smooth:
                tooltips.append(("running mean", "@y{0,0.[0000]}"))
            chart.line(
                *(steps, means[kept], label, color),
                width=1.6 if self.is_one else 1.3,
                alpha=1 if self.is_one else 0.8,
                seen=np.minimum(means[kept], usual.max()),
                tooltips=tooltips,
                is_alone=self.is_one,
                columns={"value": values[kept]},
            )
            places = np.flatnonzero(np.isfinite(values))
            places = places[evenly(len(places), MOST_ROWS if self.is_one else MOST_ROWS // 4)]
            rows = [[f"{run.steps[p]:,}", shown(values[p]), shown(means[p])] for p in places]
            note = f"{len(places)} of {len(run.steps):,} steps." if len(places) < len(run.steps) else ""
            columns = ("step", "training" if self.is_one else run.name, "running mean")
            chart.tables.append(Table(columns, rows, note))

    def _evaluations(self, chart: Chart, held: Held, x: np.ndarray, y: np.ndarray) -> None:
        if not len(x):
            return
        chart.line(x, y, held.label, held.color, width=2)
        chart.dots(
            *(x, y, held.label, held.color),
            size=6 if len(x) < 60 else 3,
            tooltips=[("evaluation, step", "@x{0,0}"), (chart.title.lower(), "@y{0.0000}")],
        )
        places = evenly(len(x), 200 if self.is_one else MOST_ROWS // 2)
        rows = [[f"{x[p]:,.0f}", shown(y[p])] for p in places]
        chart.tables.append(Table(("step", held.label), rows))

    def _bands(self, chart: Chart, held: Held) -> None:
        for side, color in (("chosen", colors.CHOSEN), ("rejected", colors.REJECTED)):
            x, found = held.quantiles(f"{side}_quantiles")
            if not len(x):
                continue
            label, (low, lower, middle, upper, high) = f"{side}, held out", found.T
            if len(x) > 1:
                chart.band(x, low, high, label, color, 0.13)
                chart.band(x, lower, upper, label, color, 0.22)
            columns = {"low": low, "high": high}
            tooltips = [
                (f"{side}, step", "@x{0,0}"),
                ("median", "@y{0.000}"),
                ("5 to 95 %", "@low{0.00} to @high{0.00}"),
            ]
            chart.line(x, middle, label, color, width=2)
            chart.dots(x, middle, label, color, tooltips=tooltips, columns=columns)
            rows = [[f"{step:,.0f}", *map(shown, values)] for step, values in zip(x, found)]
            chart.tables.append(Table((f"step, {side}", "5 %", "25 %", "median", "75 %", "95 %"), rows))

    def _limits(self, chart: Chart) -> None:
        """The limits of the alarm, drawn where the scores come near them, and told where they do not."""
        limits = {number(run.settings.get("score_limit")) for run in self.runs}
        limit = min((value for value in limits if value > 0), default=math.nan)
        sizes = [
            np.nanmax(np.abs(run.column(f"{side}_mean")), initial=0)
            for run in self.runs
            for side in ("chosen", "rejected")
        ]
        for held in self._held():
            for name in ("chosen", "rejected"):
                sizes.append(np.abs(held.quantiles(f"{name}_quantiles")[1]).max(initial=0))
        if not math.isfinite(limit):
            return
        if limit > NEAR * max(sizes):
            chart.caption += f" The alarm's limit, ±{limit:g} (--score_limit), is beyond the picture."
            return
        for sign in (1, -1):  # both, also where scores come near one of them alone
            chart.rule(sign * limit, f"the alarm's limit, ±{limit:g}", colors.WARNING)

    def _table_of_evaluations(self, names: Sequence[str]) -> Table:
        rows, known = [], [name for name in names if any(len(held.read(name)[0]) for held in self._held())]
        for held in self._held():
            for place in evenly(len(held.lines), 100 if self.is_one else MOST_ROWS // 4):
                line = held.lines[place]
                first = f"{line['step']:,}" if self.is_one and not held.label else f"{held.label}, {line['step']:,}"
                rows.append([first, *(shown(number(line.get(name))) for name in known)])
        return Table(("evaluation, step", *(name.replace("_", " ") for name in known)), rows)


def _usual(values: np.ndarray) -> np.ndarray:
    """The values without the few that would press all others flat: those far beyond 98 % of them."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, (0.01, 0.99))
    return finite[(finite <= high + 2 * (high - low)) | (finite <= high + abs(high))]
