# SPDX-License-Identifier: Apache-2.0
"""One picture of a run: loss, accuracy, and where the scores went."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CHOSEN, REJECTED, NEUTRAL = "#2a6f97", "#c1553b", "#555555"


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The records of a ``metrics.jsonl``: training steps, evaluations."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r for r in records if r["split"] == "train"], [r for r in records if r["split"] == "eval"]


def draw(metrics: Path, picture: Path, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Write a PNG of a run.

    Args:
        metrics: the run's ``metrics.jsonl``.
        picture: file to write.
        chosen, rejected: scores of the last evaluation (p,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train, evaluations = read_metrics(metrics)
    figure, ((loss, accuracy), (scores, histogram)) = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    steps = [r["step"] for r in train]
    eval_steps = [r["step"] for r in evaluations]

    _curve(loss, steps, [r["loss"] for r in train], "training")
    loss.plot(eval_steps, [r["loss"] for r in evaluations], "o-", color=CHOSEN, label="held out")
    loss.axhline(np.log(2), color=NEUTRAL, linestyle=":", linewidth=1, label="log 2 (no preference)")
    loss.set(title="Loss", xlabel="step", ylim=(0, None))
    loss.legend(frameon=False)

    _curve(accuracy, steps, [r["accuracy"] for r in train], "training")
    accuracy.plot(eval_steps, [r["accuracy"] for r in evaluations], "o-", color=CHOSEN, label="held out")
    baseline = evaluations[-1]["longer_wins_accuracy"]
    accuracy.axhline(baseline, color=NEUTRAL, linestyle=":", linewidth=1, label=f"longer answer wins: {baseline:.3f}")
    accuracy.set(title="Pairs in the right order", xlabel="step", ylim=(0, 1.02))
    accuracy.legend(frameon=False, loc="lower right")

    for name, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        low, lower, middle, upper, high = np.array([r[f"{name}_quantiles"] for r in evaluations]).T
        scores.plot(steps, _running_mean([r[f"{name}_mean"] for r in train]), color=color, alpha=0.6, linewidth=1)
        scores.fill_between(eval_steps, low, high, color=color, alpha=0.15, linewidth=0)
        scores.fill_between(eval_steps, lower, upper, color=color, alpha=0.3, linewidth=0)
        scores.plot(eval_steps, middle, "o", color=color, label=f"{name}, held out")
    scores.set(title="Scores: training mean; held-out median, 50 % and 90 %", xlabel="step", ylabel="score")
    scores.legend(frameon=False, loc="upper left")

    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=40)
    histogram.hist(chosen, edges, color=CHOSEN, alpha=0.6, label="chosen")
    histogram.hist(rejected, edges, color=REJECTED, alpha=0.6, label="rejected")
    histogram.set(title="Held-out scores at the end", xlabel="score", ylabel="answers")
    histogram.legend(frameon=False)

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _curve(axis, steps: list[int], values: list[float], label: str) -> None:
    """Every step faintly, and the running mean."""
    axis.plot(steps, values, color=NEUTRAL, alpha=0.25, linewidth=1)
    axis.plot(steps, _running_mean(values), color=NEUTRAL, label=label)


def _running_mean(values: list[float]) -> list[float]:
    """Over the last twentieth of the run."""
    window = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]
