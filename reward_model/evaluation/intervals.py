# SPDX-License-Identifier: Apache-2.0
"""How sure an accuracy is, when pairs share prompts, and whether one model is better than another.

Notation: p pairs, k prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000
FEW_PROMPTS = 20_000  # resampled one by one; beyond, the normal interval is the same to three digits
LEAST_PROMPTS = 10  # fewer draws with replacement are hardly different ones, and their interval is too narrow


@dataclass(frozen=True)
class Share:
    """A share of pairs, and its interval of ``CONFIDENCE``; none where there are too few prompts."""

    value: float
    low: float | None
    high: float | None
    pairs: int

    def to_json(self) -> dict:
        return {"value": self.value, "low": self.low, "high": self.high, "pairs": self.pairs}


def share(right: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Share:
    """The mean of numbers of pairs, with an interval that knows that pairs of one prompt are no independent draws.

    Prompts are drawn with replacement, each with all of its pairs (the cluster bootstrap, Field and Welsh 2007); the
    interval is from the 2.5th to the 97.5th percentile. Where all pairs are right, or all wrong, resampling says
    nothing, and the interval is Clopper and Pearson's on as many draws as there are prompts.

    Args:
        right: 1 where a pair is right, ½ at a tie, else 0, (p,).
        prompts: the prompt of each pair, any integers, (p,).
    """
    if not len(right):
        return Share(float("nan"), None, None, 0)
    hits, sizes = by_prompt(right, prompts)
    value = float(right.mean())
    if len(sizes) < LEAST_PROMPTS:
        return Share(value, None, None, len(right))
    if value in (0.0, 1.0):
        from scipy.stats import binomtest

        exact = binomtest(round(value * len(sizes)), len(sizes)).proportion_ci(CONFIDENCE)
        return Share(value, float(exact.low), float(exact.high), len(right))
    low, high = _interval(hits, sizes, seed)
    return Share(value, low, high, len(right))


def by_prompt(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values of each prompt's pairs, and their number, (k,) each."""
    _, numbers = np.unique(prompts, return_inverse=True)
    return np.bincount(numbers, values), np.bincount(numbers).astype(np.float64)


def _interval(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, float]:
    """Of Σ sums / Σ sizes over k prompts."""
    if len(sizes) > FEW_PROMPTS:  # the ratio estimator's variance, Cochran 1977, eq. 6.10, without the finite part
        from scipy.stats import norm

        ratio, k = sums.sum() / sizes.sum(), len(sizes)
        error = np.sqrt(np.sum((sums - ratio * sizes) ** 2) * k / (k - 1)) / sizes.sum()
        reach = norm.ppf((1 + CONFIDENCE) / 2) * error
        return float(ratio - reach), float(ratio + reach)
    from scipy.stats import bootstrap

    found = bootstrap(
        (sums, sizes),
        lambda some, of, axis: some.sum(axis=axis) / of.sum(axis=axis),
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(sizes)),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def auroc(values: np.ndarray, wanted: np.ndarray, prompts: np.ndarray) -> Share:
    """How often a pair that is wanted has the higher value than one that is not, ties as half, with its interval.

    The area under the ROC curve, and the normal interval of the variance of DeLong 1988 in its form for draws by
    cluster (Obuchowski 1997): each pair weighs by how far its own share is from the area, and pairs of one prompt
    together. None where there are too few prompts, or the pairs do not differ.

    Args:
        values: (p,). wanted: bool, (p,), some of them and not all. prompts: the prompt of each pair, (p,).
    """
    from scipy.stats import norm, rankdata

    ranks, influence = rankdata(values), np.zeros(len(values))
    for mine in (wanted, ~wanted):  # the share of the others below each, counted among its own and among all
        influence[mine] = (ranks[mine] - rankdata(values[mine])) / (~mine).sum()
    area = float(influence[wanted].mean())
    for mine, mean in ((wanted, area), (~wanted, 1 - area)):
        influence[mine] = (influence[mine] - mean) / mine.sum()
    influence[~wanted] *= -1
    sums, _ = by_prompt(influence, prompts)
    if len(sums) < LEAST_PROMPTS or not sums.any():
        return Share(area, None, None, len(values))
    reach = norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(np.sum(sums**2) * len(sums) / (len(sums) - 1))
    return Share(area, float(max(0.0, area - reach)), float(min(1.0, area + reach)), len(values))


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus that of another on the same pairs.

    only_one, only_other: pairs that one of them alone has right. p_value: of McNemar's exact test on these, two-sided,
    which takes pairs for independent; the interval does not.
    """

    value: float
    low: float | None
    high: float | None
    only_one: int
    only_other: int
    p_value: float

    def to_json(self) -> dict:
        return dict(vars(self))


def difference(one: np.ndarray, other: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Difference:
    """Compare what two models have right of the same p pairs: the paired bootstrap by prompt, and McNemar's test.

    McNemar 1947: of the pairs on which exactly one model is right, each is as likely to be the one as the other, so
    that their number is binomial with ½. A tie counts as wrong there.
    """
    from scipy.stats import binomtest

    first, second = one == 1, other == 1
    only_one, only_other = int(np.sum(first & ~second)), int(np.sum(~first & second))
    apart = only_one + only_other
    p_value = float(binomtest(only_one, apart).pvalue) if apart else 1.0
    gaps = one - other
    sums, sizes = by_prompt(gaps, prompts)
    low = high = None
    if len(sizes) >= LEAST_PROMPTS and np.ptp(gaps):
        low, high = _interval(sums, sizes, seed)
    return Difference(float(gaps.mean()), low, high, only_one, only_other, p_value)
