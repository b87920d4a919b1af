# SPDX-License-Identifier: Apache-2.0
"""What is reported of the scores of a set of pairs."""

from __future__ import annotations

import numpy as np

from reward_model.evaluation.calibration import calibration

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
        ``QUANTILES`` of chosen and rejected scores; mean size of a score; the expected calibration error; the
        correlation of score and length.
    """
    chosen, rejected = chosen.astype(np.float64), rejected.astype(np.float64)
    scores = np.concatenate([chosen, rejected])
    lengths = np.concatenate([chosen_lengths, rejected_lengths])
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
        "score_abs_mean": float(np.abs(scores).mean()),
        "calibration_error": calibration(chosen - rejected).ece,
        "length_correlation": correlation(scores, lengths),
        "chosen_quantiles": np.quantile(chosen, QUANTILES).tolist(),
        "rejected_quantiles": np.quantile(rejected, QUANTILES).tolist(),
    }


def point_metrics(
    scores: np.ndarray, targets: np.ndarray, losses: np.ndarray, right: np.ndarray
) -> dict[str, float | int]:
    """How the scores of n answers go with their targets.

    Args:
        scores, targets: (n,).
        losses: of the objective (n,), NaN where it has none of answers. right: 1 where an answer has its label, 0 where
            not (n,); NaN where there are no labels. Their means are ``point_loss`` and ``label_accuracy``.
    """
    found = {
        "rated": len(scores),
        "pearson": correlation(scores, targets),
        "spearman": correlation(_ranks(scores), _ranks(targets)),
        "rated_mean": float(scores.mean(dtype=np.float64)),
        "rated_std": float(scores.std(dtype=np.float64)),
    }
    means = {"point_loss": losses.mean(dtype=np.float64), "label_accuracy": right.mean(dtype=np.float64)}
    return found | {name: float(value) for name, value in means.items() if not np.isnan(value)}


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, of two (n,); 0 where one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of each value among all, ties alike."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
