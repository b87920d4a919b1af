# SPDX-License-Identifier: Apache-2.0
"""Whether the spread of several heads says how sure a score is: calibration of the bounds Δ ± β·u of a pair's gap.

u is the standard deviation (the population's) of the gaps that the K heads give. RewardUQ (arXiv 2602.24040, read in
the code of package ``rewarduq``, ``metrics.py``) takes the bounds of each score instead, so that its lower bound of a
gap is (r_c − β·u_c) − (r_r + β·u_r): wider, since what all heads add to both answers counts as doubt there.

Notation: p pairs with gaps Δ and their spreads u, K heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reward_model.evaluation.judged import Judged

BINS = 20  # of a probability from 0 to 1, as RewardUQ has them
PARTS = 5  # of the pairs, by the spread of their gaps


def spread_metrics(judged: Judged) -> dict[str, float]:
    """For a line of a training's metrics: mean standard deviation over the heads, of scores and of gaps."""
    if judged.heads is None:
        return {}
    found = {"score_heads_std": float(judged.heads.std(axis=1).mean())}
    if judged.gap_spread is not None and len(judged):
        found["gap_heads_std"] = float(judged.gap_spread.mean())
    return found


def bounds(judged: Judged) -> dict[str, Any]:
    """What the heads' spread is worth; {}: the model has one head.

    Returns:
        ``heads``, ``beta``, ``score_std`` and of pairs ``gap_std``, means; ``lower_bound_error`` and its ``largest``
        (:func:`lower_bound_error`); ``sure``, the share of pairs whose bounds are both above 0 or both below, and
        ``accuracy_sure`` and ``accuracy_unsure`` of these and of the others, None of none; ``by_spread``, the accuracy
        of each fifth of the pairs, those that the heads agree on most first.
    """
    if judged.heads is None:
        return {}
    found: dict[str, Any] = {"heads": judged.heads.shape[1], "beta": judged.beta} | {
        name.replace("_heads", ""): value for name, value in spread_metrics(judged).items()
    }
    spread = judged.gap_spread
    if spread is None or not len(judged):
        return found
    error, largest = lower_bound_error(judged.gaps, judged.beta * spread)
    is_sure = np.abs(judged.gaps) > judged.beta * spread
    return found | {
        "lower_bound_error": error,
        "largest": largest,
        "sure": float(is_sure.mean()),
        "accuracy_sure": _mean(judged.right[is_sure]),
        "accuracy_unsure": _mean(judged.right[~is_sure]),
        "by_spread": _by_spread(spread, judged.right),
    }


def lower_bound_error(gaps: np.ndarray, widths: np.ndarray) -> tuple[float, float]:
    """By how much σ(Δ − width) lies above the share of pairs that are right: mean over the pairs, and the largest.

    RewardUQ's expected and maximum lower bound calibration error: pairs are put into 20 bins by their lower bound, and
    a bin's error is max(0, mean lower bound − share that is right); a bound may be too low, not too high. Each pair
    counts in both orders, so that the error of upper bounds is the same number. Widths 0: how far confidence in the
    preferred answer and in the other lies above what is right.

    Args:
        gaps: (p,). widths: β·u of each, 0 or more (p,).

    >>> lower_bound_error(np.array([2.0, 2.0, -2.0, 2.0]), np.zeros(4))[0] < 0.14  # σ(2) = 0.88, and ¾ are right
    True
    """
    both = np.concatenate([gaps, -gaps])
    low = 1 / (1 + np.exp(-(both - np.tile(widths, 2))))
    right = np.repeat([1.0, 0.0], len(gaps))
    places = np.minimum((low * BINS).astype(int), BINS - 1)
    counts, lows, rights = (np.bincount(places, values, BINS) for values in (np.ones_like(low), low, right))
    errors = np.maximum(0.0, lows - rights) / np.maximum(counts, 1)
    return float((errors * counts).sum() / len(low)), float(errors.max())


def _by_spread(spread: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    parts = np.array_split(np.argsort(spread, kind="stable"), PARTS)
    return [
        {
            "low": float(spread[mine].min()),
            "high": float(spread[mine].max()),
            "pairs": len(mine),
            "value": float(right[mine].mean()),
        }
        for mine in parts
        if len(mine)
    ]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
