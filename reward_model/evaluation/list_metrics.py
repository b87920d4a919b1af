# SPDX-License-Identifier: Apache-2.0
"""How the scores of a row's responses go with the order, or the targets, that the row gives them.

Notation: l lists, k responses of a list.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reward_model.evaluation.judged import Judged

LEAST = 3  # responses of a list; two are a pair
MOST_LISTS = 20_000  # whose correlations are computed, drawn at random


def lists_of(judged: Judged) -> Iterator[np.ndarray]:
    """The responses of each row that ranks three or more of them, which are not all tied."""
    if not len(judged.rows) or np.bincount(judged.rows).max() < LEAST:
        return
    borders = np.flatnonzero(np.diff(judged.rows)) + 1
    for members in np.split(np.arange(len(judged.rows)), borders):
        ranks = judged.ranks[members]
        if len(members) >= LEAST and ranks.min() >= 0 and np.ptp(ranks):
            yield members


def list_metrics(judged: Judged, seed: int = 0) -> dict[str, float | int]:
    """What becomes of the lists, as means over them; empty: there are none.

    Returns:
        ``lists``; ``best_of``, how often the response with the highest score is one of the best (a tie of the highest
        counts as its share); ``regret``, where targets are given, the best target minus that of the response with the
        highest score; ``kendall``, τ-b, and ``spearman``, ρ, of scores and order; ``ndcg``, Σ gain / log2(1 + place)
        over its largest value, with the gain k − 1 − rank (Järvelin and Kekäläinen 2002, with ranks as grades).
    """
    members = list(lists_of(judged))
    if not members:
        return {}
    count = len(members)
    if count > MOST_LISTS:
        drawn = np.random.default_rng(seed).permutation(count)[:MOST_LISTS]
        members = [members[i] for i in sorted(drawn)]
    of_each = [_of_list(judged.scores[m], judged.ranks[m], judged.targets[m]) for m in members]
    found: dict[str, float | int] = {"lists": count}
    for name in of_each[0]:
        values = np.array([each[name] for each in of_each])
        if not np.isnan(values).all():
            found[name] = float(np.nanmean(values))
    return found


def _of_list(scores: np.ndarray, ranks: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from scipy.stats import kendalltau, spearmanr

    first = scores == scores.max()
    found = {"best_of": float(np.mean(ranks[first] == ranks.min())), "regret": float("nan")}
    if np.isfinite(targets).all():
        found["regret"] = float(targets.max() - targets[first].mean())
    is_constant = not np.ptp(scores)
    found["kendall"] = 0.0 if is_constant else float(kendalltau(scores, -ranks).statistic)
    found["spearman"] = 0.0 if is_constant else float(spearmanr(scores, -ranks).statistic)
    found["ndcg"] = ndcg(scores, (len(ranks) - 1 - ranks).astype(np.float64))
    return found


def ndcg(scores: np.ndarray, gains: np.ndarray) -> float:
    """Of one list, (k,) each; responses of equal scores share their places, as scikit-learn has it.

    >>> ndcg(np.array([3.0, 2.0, 1.0]), np.array([2.0, 1.0, 0.0]))
    1.0
    """
    discounts = 1 / np.log2(2 + np.arange(len(gains)))
    _, groups = np.unique(-scores, return_inverse=True)
    sizes = np.bincount(groups)
    ends = np.cumsum(sizes)
    shares = np.add.reduceat(discounts, ends - sizes)  # of the places that each group takes
    means = np.bincount(groups, gains) / sizes
    best = float(np.sort(gains)[::-1] @ discounts)
    return float(means @ shares) / best if best else 1.0


def specificity(judged: Judged) -> dict[str, float | int]:
    """How far apart the scores of responses are that people hold equal; empty: the data have none.

    Groups are the responses of a row with the same rank. ``spread``: the root of the mean variance within a group (with
    k − 1); ``share``: of it in the standard deviation of all scores (arXiv 2606.21795 asks for equal scores there).
    """
    known = judged.ranks >= 0
    keys = np.stack([judged.rows[known], judged.ranks[known]])
    if not keys.size:
        return {}
    _, groups, sizes = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    scores = judged.scores[known]
    groups = groups.ravel()
    means = np.bincount(groups, scores) / sizes
    squares = np.bincount(groups, (scores - means[groups]) ** 2)
    several = sizes > 1
    if not several.any():
        return {}
    spread = float(np.sqrt(squares[several].sum() / (sizes[several] - 1).sum()))
    whole = float(judged.scores.std())
    return {"groups": int(several.sum()), "spread": spread, "share": spread / whole if whole else 0.0}
