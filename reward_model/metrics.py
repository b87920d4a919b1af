# SPDX-License-Identifier: Apache-2.0
"""What is reported of the scores of a set of pairs."""

from __future__ import annotations

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def accuracy(winner: np.ndarray, loser: np.ndarray) -> float:
    """Share of pairs (p,) in which the winner's number is the larger one; a tie counts one half."""
    return float(np.mean((winner > loser) + 0.5 * (winner == loser)))


def pair_metrics(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
) -> dict[str, float | int | list[float]]:
    """Accuracy, score statistics and the length baseline of p pairs.

    Args:
        chosen, rejected: end scores (p,).
        chosen_lengths, rejected_lengths: tokens of the answers (p,).

    Returns:
        ``loss``, the plain logistic one; ``accuracy``; ``longer_wins_accuracy``, what preferring the longer answer
        would get; mean and (population) standard deviation of chosen, rejected and all scores; the mean gap;
        ``QUANTILES`` of chosen and rejected scores.
    """
    chosen, rejected = chosen.astype(np.float64), rejected.astype(np.float64)
    scores = np.concatenate([chosen, rejected])
    return {
        "pairs": len(chosen),
        "loss": float(np.mean(np.logaddexp(0.0, rejected - chosen))),
        "accuracy": accuracy(chosen, rejected),
        "longer_wins_accuracy": accuracy(chosen_lengths, rejected_lengths),
        "gap_mean": float(np.mean(chosen - rejected)),
        "chosen_mean": float(chosen.mean()),
        "chosen_std": float(chosen.std()),
        "rejected_mean": float(rejected.mean()),
        "rejected_std": float(rejected.std()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "chosen_quantiles": np.quantile(chosen, QUANTILES).tolist(),
        "rejected_quantiles": np.quantile(rejected, QUANTILES).tolist(),
    }
