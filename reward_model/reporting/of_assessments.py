# SPDX-License-Identifier: Apache-2.0
"""The charts and tables of assessments: how one model's answers, or those of several, stand to each other.

An assessment is what ``evaluation.json`` holds. Every key of it may be absent; what it leaves out is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from reward_model.reporting import colors
from reward_model.reporting.charts import Chart, Table
from reward_model.reporting.runs import number, numbers
from reward_model.reporting.thinning import evenly
from reward_model.reporting.words import edge, share, shown

MOST_DOTS = 4_000  # of a scatter, over all assessments together
MOST_MISTAKES = 40
MOST_SUBSETS = 200


@dataclass(frozen=True)
class Assessment:
    """One of those on a page. label: to show. values: as in ``evaluation.json``."""

    label: str
    color: str
    values: dict[str, Any]

    def at(self, *path: str) -> Any:
        """What lies at a path of keys; None: nothing."""
        found: Any = self.values
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *path: str) -> float:
        return number(self.at(*path))

    def rows(self, *path: str) -> list[dict[str, Any]]:
        """A list of objects; empty: there is none."""
        found = self.at(*path)
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    def interval(self, *path: str) -> tuple[float, float, float]:
        """A value and the ends of its interval, NaN where it has none."""
        return self.number(*path, "value"), self.number(*path, "low"), self.number(*path, "high")

    def histogram(self, edges: tuple[str, ...], counts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """Edges (k + 1,) and counts (k,); None: none that fit together."""
        x, y = numbers(self.at(*edges)), numbers(self.at(*counts))
        is_whole = len(x) == len(y) + 1 and len(y) and np.isfinite(x).all() and np.isfinite(y).all()
        return (x, y) if is_whole else None


class Assessed:
    """The charts and tables of some assessments."""

    def __init__(self, assessments: Sequence[Assessment]):
        self.all = assessments
        self.is_one = len(assessments) == 1

    def charts(self) -> Iterator[Chart]:
        """Those that have anything to show."""
        found = [self.gaps(), self.scores(), self.calibration(), self.lengths()]
        yield from (chart for chart in found if not chart.is_empty)

    def gaps(self) -> Chart:
        chart = Chart(
            "Gaps", "score of the better answer − score of the worse", "pairs", "Left of 0 the order is wrong."
        )
        for each in self.all:
            found = each.histogram(("gaps", "edges"), ("gaps", "counts"))
            if found:
                edges, counts = found
                color = colors.GREEN if self.is_one else each.color
                chart.bars(edges, counts, "pairs" if self.is_one else each.label, color, filled=self.is_one)
                chart.tables.append(_table_of_bins(edges, {"pairs" if self.is_one else each.label: counts}))
        if not chart.is_empty:
            chart.rule(0, "equal scores", vertical=True)
        return chart

    def scores(self) -> Chart:
        chart = Chart("Scores", "score", "answers")
        for each in self.all:
            table: dict[str, np.ndarray] = {}
            for side, color in (("chosen", colors.CHOSEN), ("rejected", colors.REJECTED)):
                found = each.histogram(("histogram", "edges"), ("histogram", side))
                if found is None:
                    continue
                label = side if self.is_one else f"{each.label}, {side}"
                edges, table[label] = found
                if self.is_one:
                    chart.bars(edges, table[label], label, color)
                else:
                    x, y = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(table[label], 2), [0.0]])
                    dash = "solid" if side == "chosen" else "dashed"
                    chart.line(x, y, label, each.color, dash=dash, width=1.4)
            if table:
                chart.tables.append(_table_of_bins(edges, table))
        return chart

    def calibration(self) -> Chart:
        chart = Chart("Calibration", "σ(|gap|): how sure the model is", "share that it gets right")
        said = []
        for each in self.all:
            temperature = each.number("calibration", "temperature")
            for kind in ("raw", "tempered"):
                bins = each.rows("calibration", kind, "bins")
                x, y = (np.array([number(b.get(name)) for b in bins]) for name in ("confidence", "right"))
                pairs = np.array([number(b.get("pairs")) for b in bins])
                known = np.isfinite(x) & np.isfinite(y)
                if not known.any():
                    continue
                label, color, is_raw = kind, colors.SLATE if kind == "raw" else colors.BLUE, kind == "raw"
                if not self.is_one:
                    label, color = f"{each.label}, {kind}", each.color
                elif not is_raw and math.isfinite(temperature):
                    label = f"temperature {temperature:.3g}"
                chart.line(x[known], y[known], label, color, dash="dashed" if is_raw else "solid")
                tooltips = [(label, "@y{0.000}"), ("as sure as", "@x{0.000}"), ("pairs", "@pairs{0,0}")]
                share = np.sqrt(np.clip(np.nan_to_num(pairs[known]) / max(1.0, np.nansum(pairs)), 0, 1))
                columns = {"pairs": pairs[known], "size": 4 + 14 * share}  # areas as the numbers of pairs
                chart.dots(
                    x[known], y[known], label, color, size="size", hollow=is_raw, tooltips=tooltips, columns=columns
                )
                chart.tables.append(_table_of_calibration(label, bins))
            before, after = (each.number("calibration", kind, "ece") for kind in ("raw", "tempered"))
            if math.isfinite(before) and math.isfinite(after):
                of_it = "" if self.is_one else f"{each.label}: "
                low, high = (each.number("calibration", f"temperature_{end}") for end in ("low", "high"))
                between = f" [{low:.3g}, {high:.3g}]" if math.isfinite(low + high) else ""
                said.append(f"{of_it}{before:.3f} → {after:.3f} at temperature {temperature:.3g}{between}")
        if chart.is_empty:
            return chart
        ends = np.array([0.5, 1.0])
        chart.line(ends, ends, "perfect", colors.TEXT, width=1, dash="dotted")
        if said:
            chart.caption = f"Expected calibration error {'; '.join(said[:3])}. The larger a dot, the more pairs."
        chart.ticks("0.[00]", "0.[00]")
        return chart

    def lengths(self) -> Chart:
        chart = Chart("Score against length", "tokens of the answer", "score")
        said = []
        for each in self.all:
            length, score = numbers(each.at("scatter", "length")), numbers(each.at("scatter", "score"))
            side = each.at("scatter", "side")
            if not (len(length) == len(score) and len(score) and isinstance(side, list) and len(side) == len(score)):
                continue
            places = evenly(len(score), MOST_DOTS // len(self.all))
            places = places[np.isfinite(length[places]) & np.isfinite(score[places])]
            of_side = np.array([str(value) for value in side])[places]
            for name, color in (("chosen", colors.CHOSEN), ("rejected", colors.REJECTED)):
                kept = places[of_side == name]
                if len(kept):
                    label = name if self.is_one else f"{each.label}, {name}"
                    own = color if self.is_one else each.color
                    is_hollow = not self.is_one and name == "rejected"
                    tooltips = [(label, "@y{0.000}"), ("tokens", "@x{0,0}")]
                    chart.dots(
                        length[kept], score[kept], label, own, size=5, alpha=0.4, hollow=is_hollow, tooltips=tooltips
                    )
            if math.isfinite(each.number("length", "correlation")):
                of_it = "" if self.is_one else f" ({each.label})"
                said.append(f"{shown(each.number('length', 'correlation'), 3)}{of_it}")
            chart.tables.append(
                _table_of_lengths("" if self.is_one else each.label, length[places], score[places], of_side)
            )
        if said:
            chart.caption = f"Correlation {', '.join(said[:4])}."
        return chart

    def numbers(self) -> Iterator[tuple[str, Table]]:
        """What is said in one number, with an interval where it has one: titles and tables."""
        for title, lines in NUMBERS.items():
            rows = [[name, *(_cell(each, path, kind) for each in self.all)] for name, path, kind in lines]
            rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
            if title == "Accuracy":
                rows += self._baselines()
            if rows:
                yield title, Table(("", *(each.label for each in self.all)), rows)
        rows = []
        for each in self.all:
            for name, key in (
                ("expected error", "ece"),
                ("maximal error", "mce"),
                ("Brier", "brier"),
                ("log loss", "log_loss"),
            ):
                before, after = (each.number("calibration", kind, key) for kind in ("raw", "tempered"))
                if math.isfinite(before) or math.isfinite(after):
                    rows.append([name if self.is_one else f"{each.label}: {name}", shown(before), shown(after)])
        if rows:
            temperature = self.all[0].number("calibration", "temperature") if self.is_one else math.nan
            last = f"at temperature {temperature:.3g}" if math.isfinite(temperature) else "with the temperature"
            yield "Calibration", Table(("", "as it is", last), rows)

    def _baselines(self) -> list[list[str]]:
        names = dict.fromkeys(str(row.get("name")) for each in self.all for row in each.rows("baselines"))
        rows = []
        for name in names:
            cells = []
            for each in self.all:
                found = [row for row in each.rows("baselines") if str(row.get("name")) == name]
                cells.append(_cell(Assessment("", "", {"": found[0]}), ("",), "interval") if found else "–")
            rows.append([f"baseline: {name}", *cells])
        return rows


NUMBERS: dict[str, tuple[tuple[str, tuple[str, ...], str], ...]] = {
    "Accuracy": (
        ("accuracy", ("accuracy",), "interval"),
        ("… where the shorter answer is better", ("length", "shorter_is_better"), "interval"),
        ("pairs with equal scores", ("accuracy", "ties"), "number"),
    ),
    "Scores": (
        ("logistic loss", ("loss",), "number"),
        ("mean of chosen", ("scores", "chosen", "mean"), "number"),
        ("mean of rejected", ("scores", "rejected", "mean"), "number"),
        ("standard deviation of all", ("scores", "all", "std"), "number"),
        ("correlation with length", ("length", "correlation"), "number"),
        ("temperature", ("calibration", "temperature"), "number"),
        ("correlation with targets (Pearson)", ("points", "pearson"), "number"),
        ("correlation with targets (Spearman)", ("points", "spearman"), "number"),
        ("spread among answers held equal", ("specificity", "spread"), "number"),
        ("… as a share of all spread", ("specificity", "share"), "number"),
    ),
    "Several heads": (
        ("heads", ("bounds", "heads"), "number"),
        ("mean standard deviation of a score", ("bounds", "score_std"), "number"),
        ("… of a gap", ("bounds", "gap_std"), "number"),
        ("β of the bounds, gap ± β·std", ("bounds", "beta"), "number"),
        ("lower bound too high by, on average", ("bounds", "lower_bound_error"), "number"),
        ("… at most", ("bounds", "largest"), "number"),
        ("share of pairs with both bounds on one side of 0", ("bounds", "sure"), "number"),
        ("accuracy of these", ("bounds", "accuracy_sure"), "number"),
        ("… of the others", ("bounds", "accuracy_unsure"), "number"),
    ),
    "Lists": (
        ("best of the list found", ("lists", "best_of"), "number"),
        ("regret", ("lists", "regret"), "number"),
        ("Kendall's τ", ("lists", "kendall"), "number"),
        ("Spearman's ρ", ("lists", "spearman"), "number"),
        ("NDCG", ("lists", "ndcg"), "number"),
    ),
    "Data": (
        ("pairs", ("pairs",), "number"),
        ("prompts", ("prompts",), "number"),
        ("answers", ("answers",), "number"),
        ("lists", ("lists", "lists"), "number"),
        ("share of pairs whose longer answer is better", ("length", "longer_wins"), "number"),
        ("groups of answers held equal", ("specificity", "groups"), "number"),
    ),
}


def _cell(each: Assessment, path: tuple[str, ...], kind: str) -> str:
    if kind == "number":
        return shown(each.number(*path))
    value, low, high = each.interval(*path)
    return f"{share(value)} ({low:.3f} to {high:.3f})" if math.isfinite(low + high) else share(value)


def _table_of_bins(edges: np.ndarray, counts: dict[str, np.ndarray]) -> Table:
    rows = [
        [f"{edge(low)} to {edge(high)}", *(shown(each[place]) for each in counts.values())]
        for place, (low, high) in enumerate(pairwise(edges))
        if any(each[place] for each in counts.values())
    ]
    return Table(("from, to", *counts), rows, "Empty ones are left out.")


def _table_of_calibration(label: str, bins: list[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{edge(number(each.get('low')))} to {edge(number(each.get('high')))}",
            shown(number(each.get("pairs"))),
            shown(number(each.get("confidence"))),
            shown(number(each.get("right"))),
        ]
        for each in bins
        if number(each.get("pairs")) > 0
    ]
    return Table((f"{label}: as sure as", "pairs", "mean of that", "right"), rows)


def _table_of_lengths(label: str, lengths: np.ndarray, scores: np.ndarray, sides: np.ndarray) -> Table:
    """Mean score by length, in ten stretches of equal numbers of answers: a table of each dot would help nobody."""
    order = np.argsort(lengths, kind="stable")
    rows = []
    for part in np.array_split(order, min(10, len(order))):
        means = [scores[part][sides[part] == side] for side in ("chosen", "rejected")]
        first, last = lengths[part[0]], lengths[part[-1]]
        rows.append(
            [f"{shown(first)} to {shown(last)}", str(len(part)), *(shown(m.mean()) if len(m) else "–" for m in means)]
        )
    return Table((f"{label + ': ' if label else ''}tokens", "answers", "mean chosen", "mean rejected"), rows)
