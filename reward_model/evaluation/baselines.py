# SPDX-License-Identifier: Apache-2.0
"""What needs no reward model: the longer answer, a bag of its tokens, and both. A model has to be better than these.

Notation: p pairs, n responses, v different tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reward_model.evaluation.intervals import Share, share
from reward_model.evaluation.judged import Judged

FOLDS = 5
PENALTY = 1e-2  # times |w|² / 2, on a mean loss: words of a few pairs weigh little
MOST_PAIRS = 20_000  # that the bag of words looks at, drawn by prompt
FEW_PROMPTS = 2 * FOLDS


def longer_wins(judged: Judged) -> np.ndarray:
    """1 where the better answer is the longer one, ½ where both are equally long, (p,)."""
    better, worse = judged.lengths[judged.better], judged.lengths[judged.worse]
    return (better > worse) + 0.5 * (better == worse)


def baselines(judged: Judged, texts: Sequence[list[int]] | None, seed: int = 0) -> dict[str, Share]:
    """Accuracies by name.

    The bag of words is a logistic regression on the difference of log(1 + count) of each token of the two answers; both
    adds the difference of their log lengths. They are trained on four fifths of the prompts of these very pairs and
    looked at on the rest, in turn, so that they know the data a little; a reward model did not see them.

    Args:
        texts: token ids of each response, (n,); None: the longer answer alone.
    """
    found = {"the longer answer": share(longer_wins(judged), judged.pair_prompts, seed)}
    prompts = np.unique(judged.pair_prompts)
    if texts is None or len(prompts) < FEW_PROMPTS:
        return found
    chosen = _drawn(judged, seed)
    folds = (np.random.default_rng(seed).permutation(len(prompts)) % FOLDS)[judged.pair_prompts[chosen]]
    words = _differences(judged, texts, chosen)
    lengths = np.log1p(judged.lengths[judged.better[chosen]]) - np.log1p(judged.lengths[judged.worse[chosen]])
    for name, extra in (("a bag of words", None), ("words and length", lengths)):
        right = _cross_fitted(words, extra, folds)
        found[name] = share(right, judged.pair_prompts[chosen], seed)
    return found


def _drawn(judged: Judged, seed: int) -> np.ndarray:
    """Pairs of as many prompts, drawn at random, as keep within ``MOST_PAIRS``; in their order."""
    if len(judged) <= MOST_PAIRS:
        return np.arange(len(judged))
    counts = np.bincount(judged.pair_prompts)
    order = np.random.default_rng(seed).permutation(len(counts))
    kept = order[np.cumsum(counts[order]) <= MOST_PAIRS]
    return np.flatnonzero(np.isin(judged.pair_prompts, kept))


def _differences(judged: Judged, texts: Sequence[list[int]], chosen: np.ndarray):
    """log(1 + count) of each token in the better answer minus that in the other, a sparse matrix (p, v)."""
    from scipy.sparse import csr_matrix

    numbers: dict[int, int] = {}
    rows, columns, values = [], [], []
    for row, pair in enumerate(chosen):
        for side, sign in ((judged.better[pair], 1.0), (judged.worse[pair], -1.0)):
            ids, counts = np.unique(texts[side], return_counts=True)
            rows += [row] * len(ids)
            columns += [numbers.setdefault(int(i), len(numbers)) for i in ids]
            values.append(sign * np.log1p(counts))
    return csr_matrix((np.concatenate(values), (rows, columns)), shape=(len(chosen), len(numbers)))


def _cross_fitted(words, extra: np.ndarray | None, folds: np.ndarray) -> np.ndarray:
    """1 where a regression that was trained on the other folds has a pair right, ½ where it has no opinion."""
    from scipy.sparse import csr_matrix, hstack

    features = words if extra is None else hstack([words, csr_matrix(extra[:, None])]).tocsr()
    right = np.zeros(len(folds))
    for fold in range(FOLDS):
        mine = folds == fold
        gaps = features[mine] @ _regression(features[~mine])
        right[mine] = (gaps > 0) + 0.5 * (gaps == 0)
    return right


def _regression(features) -> np.ndarray:
    """The weights (v,) of least mean −log σ(x·w) + PENALTY |w|² / 2 over pairs whose better answer comes first."""
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        gaps = features @ weights
        value = np.logaddexp(0.0, -gaps).mean() + PENALTY * weights @ weights / 2
        slope = -np.exp(-np.logaddexp(0.0, gaps)) / len(gaps)
        return float(value), features.T @ slope + PENALTY * weights

    return minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
