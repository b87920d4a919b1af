# SPDX-License-Identifier: Apache-2.0
"""How strongly an ensemble of reward models prefers the chosen answer of a pair: the columns that say it.

Of a pair, d_m = r_m(chosen) − r_m(rejected) is what model m makes of it, and over M models (Secrets of RLHF II,
arXiv 2401.06080, equation 4)

    mean = Σ d_m / M,    std = √(Σ (d_m − mean)² / M),    agree = share of models with d_m > 0, a tie counts half.

Where a model has several heads (``--heads``), each of them is a vote: :func:`strengths_of_differences`.
A mean below 0 says that the models, asked together, prefer the answer that the data call rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MEAN, STD, AGREE, MODELS = "strength_mean", "strength_std", "strength_agree", "strength_models"
COLUMNS = (MEAN, STD, AGREE, MODELS)  # that `reward-model ensemble` writes; the last: how many models there were
# of fnlp/hh-rlhf-strength-cleaned, which the paper's authors published
THEIRS = ("mean preference difference", "std preference difference", "chosen score list", "rejected score list")


class Strength(NamedTuple):
    """Of one pair, in units of the models' scores.

    mean: of the differences between chosen and rejected over the models, finite. std: their standard deviation, that of
    a population; agree: share of the models that prefer chosen, 0 to 1. Both are NaN where the row does not say them.
    """

    mean: float
    std: float = math.nan
    agree: float = math.nan

    def flipped(self) -> Strength:
        """Of the same pair with chosen and rejected swapped."""
        return Strength(-self.mean, self.std, 1 - self.agree)


def strength_of_differences(differences: Sequence[float]) -> Strength:
    """What several models make of a pair. A single model has standard deviation 0.

    Args:
        differences: r(chosen) − r(rejected) of each model, (m,), at least one.

    >>> strength_of_differences([1.0, 3.0, 0.0, -4.0])
    Strength(mean=0.0, std=2.5495097567963922, agree=0.625)
    """
    found = np.asarray(differences, np.float64)
    return Strength(float(found.mean()), float(found.std()), float(((found > 0) + 0.5 * (found == 0)).mean()))


def strengths_of_differences(
    differences: np.ndarray, heads: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same of many pairs, where a model may have judged some of them alone, and may have several heads.

    Each of the K_m heads of model m is a vote d_mk, and all models weigh the same: with w = 1 / (M·K_m) a vote,
    mean = Σ w d, std = √(Σ w (d − mean)²), agree = Σ w [d > 0], a tie counting one half. One model with K heads gives
    mean and std over the heads; models with one head each give :func:`strength_of_differences`.

    Args:
        differences: of every head, those of a model one after the other, (v, n); all of a model's are NaN where it has
            not judged a pair.
        heads: of each model, (m,), v in all; None: one each.

    Returns:
        mean, std and agree, (n,) each, NaN where no model has judged; and how many models have, (n,).

    >>> mean, std, agree, models = strengths_of_differences(np.array([[3.0], [1.0], [-4.0]]), [2, 1])
    >>> float(mean[0]), float(agree[0]), int(models[0])
    (-1.0, 0.5, 2)
    """
    of_models = np.ones(len(differences), int) if heads is None else np.asarray(heads)
    firsts = np.cumsum(of_models) - of_models
    known = np.isfinite(differences)
    found = np.where(known, differences, 0.0)
    counts = known[firsts].sum(0)

    def mean_of(values: np.ndarray) -> np.ndarray:
        """(v, n) → (n,): the mean over the models of each one's mean over its heads."""
        return (np.add.reduceat(np.where(known, values, 0.0), firsts, 0) / of_models[:, None]).sum(0) / counts

    with np.errstate(invalid="ignore"):  # 0 / 0 where no model has judged
        mean = mean_of(found)
        std = np.sqrt(mean_of((found - mean) ** 2))
        agree = mean_of(found > 0) + 0.5 * mean_of(found == 0)
    return mean, std, agree, counts


def strength_of(row: dict[str, Any]) -> Strength | None:
    """The strength that a row of a data set says it has; None: it says none, or one whose mean is no finite number.

    Reads the columns ``strength_mean``, ``strength_std``, ``strength_agree``, and, where the first is not there, those
    of fnlp/hh-rlhf-strength-cleaned: the mean and standard deviation ready, and each model's scores, from which the
    share that agrees follows, and mean and standard deviation where they are missing.

    >>> strength_of({"strength_mean": -1.5, "strength_agree": 0.25})
    Strength(mean=-1.5, std=nan, agree=0.25)
    >>> strength_of({"chosen": "yes", "rejected": "no"}) is None
    True
    """
    if row.get(MEAN) is not None and row[MEAN] != "":
        mean, std, agree = (number_in(row, name) for name in (MEAN, STD, AGREE))
    else:
        mean, std = (number_in(row, name) for name in THEIRS[:2])
        scored = _strength_of_scores(*(row.get(name) for name in THEIRS[2:]))
        agree = scored.agree if scored else math.nan
        if scored and math.isnan(mean):
            mean, std = scored.mean, scored.std
    if not math.isfinite(mean):
        return None
    return Strength(mean, std if std >= 0 else math.nan, agree if 0 <= agree <= 1 else math.nan)


def number_in(row: dict[str, Any], name: str) -> float:
    """The finite number of a column, also as text, as in CSV files; NaN for anything else."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def _strength_of_scores(chosen: Any, rejected: Any) -> Strength | None:
    """From the scores that each model gave, in the same order; None: they are not there, or do not belong together."""
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not 0 < len(chosen) == len(rejected):
        return None
    pairs = [(number_in({"": one}, ""), number_in({"": other}, "")) for one, other in zip(chosen, rejected)]
    differences = [one - other for one, other in pairs]
    return strength_of_differences(differences) if all(map(math.isfinite, differences)) else None
