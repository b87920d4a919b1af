# SPDX-License-Identifier: Apache-2.0
"""One picture of a run: loss, accuracy (or correlation with the targets), and where the scores went."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np

CHOSEN, REJECTED, NEUTRAL = "#2a6f97", "#c1553b", "#555555"
COLUMNS, MOST_LINES = 165, 6  # of warnings below the picture
COLORS = {"chosen": CHOSEN, "rejected": REJECTED, "scored answers": CHOSEN}


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The records of a ``metrics.jsonl``: training steps, evaluations of the first evaluation set."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluations = [r for r in records if r["split"] == "eval"]
    first = evaluations[0].get("set") if evaluations else None
    return [r for r in records if r["split"] == "train"], [r for r in evaluations if r.get("set") == first]


def read_warnings(path: Path) -> list[str]:
    """What went wrong in a run, by its ``metrics.jsonl``: alarms, and how many steps were skipped."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    bad = [f"{r['step']}" for r in records if r["split"] == "bad_step"]
    skipped = [f"steps skipped for a loss or gradient that was not finite: {', '.join(bad)}"] if bad else []
    return [r["message"] for r in records if r["split"] == "alarm"] + skipped


def draw(metrics: Path, picture: Path, scores: dict[str, np.ndarray]) -> None:
    """Write a PNG of a run.

    Args:
        metrics: the run's ``metrics.jsonl``. Warnings in it are written below the picture.
        picture: file to write.
        scores: of the last evaluation, ``chosen`` and ``rejected`` (p,), or ``scored answers`` (n,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train, evaluations = read_metrics(metrics)
    figure, ((loss, order), (course, histogram)) = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    steps = [r["step"] for r in train]
    has_pairs = "accuracy" in evaluations[-1]

    _curve(loss, steps, [r["loss"] for r in train], "training")
    _held_out(loss, evaluations, "loss" if has_pairs else "point_loss", "held out")
    if has_pairs:
        loss.axhline(np.log(2), color=NEUTRAL, linestyle=":", linewidth=1, label="log 2 (no preference)")
    loss.set(title="Loss (held out: logistic)" if has_pairs else "Loss", xlabel="step", ylim=(0, None))

    if has_pairs:
        _pair_accuracy(order, train, evaluations)
        known = [r for r in evaluations if "pearson" in r]
        if known:
            found = [r["pearson"] for r in known]
            order.plot([r["step"] for r in known], found, "s--", color=REJECTED, label="held out, corr. with targets")
        _pair_scores(course, train, evaluations)
    else:
        _held_out(order, evaluations, "pearson", "held out")
        order.set(title="Correlation of scores with their targets", xlabel="step", ylim=(None, 1.02))
        middle, spread = (np.array([r[name] for r in evaluations]) for name in ("rated_mean", "rated_std"))
        eval_steps = [r["step"] for r in evaluations]
        course.fill_between(eval_steps, middle - spread, middle + spread, color=CHOSEN, alpha=0.3, linewidth=0)
        course.plot(eval_steps, middle, "o-", color=CHOSEN, label="held out")
        course.set(title="Scores: held-out mean ± standard deviation", xlabel="step", ylabel="score")

    bins = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=40)
    for name, values in scores.items():
        histogram.hist(values, bins, color=COLORS[name], alpha=0.6, label=name)
    histogram.set(title="Held-out scores at the end", xlabel="score", ylabel="answers")

    for axis, place in ((loss, "best"), (order, "lower right"), (course, "upper left"), (histogram, "best")):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc=place)
    if warnings := read_warnings(metrics):
        lines = [part for text in warnings for part in textwrap.wrap(text, COLUMNS)]
        figure.supxlabel("\n".join(lines[:MOST_LINES]), x=0.01, ha="left", fontsize=8, color=REJECTED)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _pair_accuracy(axis, train: list[dict], evaluations: list[dict]) -> None:
    known = [r for r in train if "accuracy" in r]
    _curve(axis, [r["step"] for r in known], [r["accuracy"] for r in known], "training")
    _held_out(axis, evaluations, "accuracy", "held out")
    baseline = evaluations[-1]["longer_wins_accuracy"]
    axis.axhline(baseline, color=NEUTRAL, linestyle=":", linewidth=1, label=f"longer answer wins: {baseline:.3f}")
    axis.set(title="Pairs in the right order", xlabel="step", ylim=(0, 1.02))


def _pair_scores(axis, train: list[dict], evaluations: list[dict]) -> None:
    known, eval_steps = [r for r in train if "accuracy" in r], [r["step"] for r in evaluations]
    for name in ("chosen", "rejected"):
        low, lower, middle, upper, high = np.array([r[f"{name}_quantiles"] for r in evaluations]).T
        means = _running_mean([r[f"{name}_mean"] for r in known])
        axis.plot([r["step"] for r in known], means, color=COLORS[name], alpha=0.6, linewidth=1)
        axis.fill_between(eval_steps, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        axis.fill_between(eval_steps, lower, upper, color=COLORS[name], alpha=0.3, linewidth=0)
        axis.plot(eval_steps, middle, "o", color=COLORS[name], label=f"{name}, held out")
    axis.set(title="Scores: training mean; held-out median, 50 % and 90 %", xlabel="step", ylabel="score")


def _held_out(axis, evaluations: list[dict], name: str, label: str) -> None:
    known = [r for r in evaluations if name in r]
    if known:
        axis.plot([r["step"] for r in known], [r[name] for r in known], "o-", color=CHOSEN, label=label)


def _curve(axis, steps: list[int], values: list[float], label: str) -> None:
    """Every step faintly, and the running mean."""
    axis.plot(steps, values, color=NEUTRAL, alpha=0.25, linewidth=1)
    axis.plot(steps, _running_mean(values), color=NEUTRAL, label=label)


def _running_mean(values: list[float]) -> list[float]:
    """Over the last twentieth of the run."""
    window = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]
