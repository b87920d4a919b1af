# SPDX-License-Identifier: Apache-2.0
"""Whether σ(Δ) is the probability that the chosen answer wins, and the temperature that makes it one.

A library for this, netcal, brings a dozen packages for what is a histogram and one number; SciPy finds the number.

Notation: p pairs with gaps Δ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from reward_model.common.words import counted
from reward_model.evaluation.intervals import CONFIDENCE, LEAST_PROMPTS, by_prompt

BINS = 10  # of the predicted probability
BOUNDS = (1e-3, 1e3)  # of a temperature; one at a bound was not found
LEAST_PAIRS = 20  # a temperature of fewer says nothing
MOST_CHANGE = 0.05  # of a probability, if T is at an end of its interval: one bin of ten over [½, 1]
STEEPEST = 0.2239  # the most that σ(x / T) changes by, for a change of log T by 1: max of x·σ(x)·σ(−x), at x = 1.543
MOST_OFF = 2.0  # a factor; a probability may then be off by 0.2239 · log 2 = 0.155
NO_TEMPERATURE = "each half of the prompts has to have 20 pairs, some of them wrong and most of them right"


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence σ(|Δ|) lies from low to high: how many, their mean confidence, the share that is right."""

    low: float
    high: float
    pairs: int
    confidence: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """How well σ(Δ) tells the share of pairs in the right order.

    ece: mean over the pairs of |right − confidence| of their bin; mce: the largest of these (Guo et al. 2017, arXiv
    1706.04599, eqs. 3 and 5). brier: mean of (1 − σ(Δ))². log_loss: mean of −log σ(Δ).
    """

    bins: list[Bin]
    ece: float
    mce: float
    brier: float
    log_loss: float

    def to_json(self) -> dict:
        return asdict(self)


def calibration(gaps: np.ndarray) -> Calibration:
    """The reliability of p ≥ 1 gaps.

    The model's choice is the answer with the higher score, its confidence σ(|Δ|), in ten bins of equal width over
    [½, 1]. A tie is half right.
    """
    gaps = gaps.astype(np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    right = np.where(gaps == 0, 0.5, gaps > 0)
    places = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    counts, sums, hits = (np.bincount(places, values, BINS) for values in (np.ones_like(gaps), confidence, right))
    edges = np.linspace(0.5, 1.0, BINS + 1)
    bins = [
        Bin(float(edges[i]), float(edges[i + 1]), int(n), float(sums[i] / n), float(hits[i] / n))
        for i, n in enumerate(counts)
        if n
    ]
    losses = np.logaddexp(0.0, -gaps)
    return Calibration(
        bins=bins,
        ece=sum(b.pairs * abs(b.right - b.confidence) for b in bins) / len(gaps),
        mce=max(abs(b.right - b.confidence) for b in bins),
        brier=float(np.mean(np.exp(-np.logaddexp(0.0, gaps)) ** 2)),
        log_loss=float(losses.mean()),
    )


def temperature_of(gaps: np.ndarray) -> float | None:
    """The T > 0 of least mean −log σ(Δ / T) over p pairs (Guo et al. 2017, section 4.2); None: there is none.

    The loss is convex in 1/T. It has no least value where every pair is in the right order (T → 0) or where wrong pairs
    outweigh right ones (T → ∞).
    """
    from scipy.optimize import minimize_scalar

    if len(gaps) < LEAST_PAIRS or not np.any(gaps):
        return None
    gaps = gaps.astype(np.float64)
    size = float(np.abs(gaps).mean())  # searched in units of the gaps
    found = minimize_scalar(
        lambda log: float(np.logaddexp(0.0, -gaps / (size * np.exp(log))).mean()),
        bounds=(float(np.log(BOUNDS[0])), float(np.log(BOUNDS[1]))),
        method="bounded",
        options={"xatol": 1e-8},
    )
    temperature = float(np.exp(found.x))
    is_inside = BOUNDS[0] * 1.01 < temperature < BOUNDS[1] / 1.01
    return size * temperature if is_inside else None


@dataclass(frozen=True)
class Tempered:
    """What a temperature does to the calibration of pairs that it was not fitted on.

    temperature: of all pairs. interval: of it; None where there are too few prompts. raw, tempered: of every pair,
    each by the temperature of the other half of the prompts.
    """

    temperature: float
    interval: tuple[float, float] | None
    raw: Calibration
    tempered: Calibration


def tempered(gaps: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Tempered | None:
    """Fit a temperature on each half of the prompts, and look at it on the other half; None: a half has none.

    Args:
        prompts: the prompt of each pair, (p,).
    """
    names, numbers = np.unique(prompts, return_inverse=True)
    half = np.random.default_rng(seed).permutation(len(names)) % 2 == 0
    is_first = half[numbers]
    temperature = temperature_of(gaps)
    found = [temperature_of(gaps[part]) for part in (is_first, ~is_first)]
    if temperature is None or found[0] is None or found[1] is None:
        return None
    others = np.where(is_first, found[1], found[0])
    interval = interval_of(temperature, gaps, prompts)
    return Tempered(temperature, interval, calibration(gaps), calibration(gaps / others))


def interval_of(temperature: float, gaps: np.ndarray, prompts: np.ndarray) -> tuple[float, float] | None:
    """Between which temperatures the best one of all such pairs lies, at ``CONFIDENCE``; None: too few prompts.

    log T is where the mean of x·σ(−x), x = Δ/T, is 0, so that its variance is that of these sums over the prompts,
    which are the independent draws, over the square of the slope Σ x²·σ(x)·σ(−x) (the sandwich, White 1982, theorem
    3.2, with clusters). It is as good as its normal form: for few prompts the bootstrap's is wider still.

    Args:
        gaps: (p,), to which the temperature was fitted. prompts: the prompt of each, (p,).
    """
    from scipy.stats import norm

    x = gaps.astype(np.float64) / temperature
    wrong, right = (np.exp(-np.logaddexp(0.0, each)) for each in (x, -x))  # σ(−x), σ(x)
    sums, _ = by_prompt(x * wrong, prompts)
    slope, k = float(np.sum(x**2 * right * wrong)), len(sums)
    if k < LEAST_PROMPTS or not slope:
        return None
    reach = norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(np.sum(sums**2) * k / (k - 1)) / slope
    return float(temperature * np.exp(-reach)), float(temperature * np.exp(reach))


def is_known(temperature: float, interval: tuple[float, float] | None) -> bool:
    """Whether a temperature is known to a factor of ``MOST_OFF``, beyond which none is saved with a model."""
    return interval is not None and interval[1] / temperature <= MOST_OFF


def doubt_temperature(temperature: float, interval: tuple[float, float] | None, pairs: int) -> str:
    """In a line that the pairs are too few for a temperature; empty: they are enough.

    They are if, with T at either end of its interval, no probability σ(gap / T) differs by more than a bin of the
    calibration error, 0.05: log T may be wrong by 0.05 / 0.2239, which is T by a quarter. As drawn by
    σ(gap / T), it takes 600 pairs whose gaps have standard deviation T, and 300 with 2T.
    """
    if interval is None:
        return (
            f"the temperature is of {counted(pairs, 'pair')} with fewer than {LEAST_PROMPTS} prompts: do not rely on it"
        )
    low, high = interval
    if STEEPEST * np.log(high / temperature) <= MOST_CHANGE:
        return ""
    return (
        f"the temperature is rough, {low:.3g} to {high:.3g} (95 %, {counted(pairs, 'pair')}): more held-out pairs pin "
        "it down"
    )
