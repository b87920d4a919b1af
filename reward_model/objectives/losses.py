# SPDX-License-Identifier: Apache-2.0
"""Objectives on scores: of pairs, of ranked lists, of single answers; and a penalty on what follows length.

They add to the drop-in's ``pairwise_loss`` and ``score_penalty``. All are computed in float32 at least and are finite
for scores to ±1e4 in any dtype. No loss reduces over the batch: one place does (``objective.py``).

Notation: p pairs (or any shape of them), b lists, k answers of the longest list, n answers; Δ = chosen − rejected, r a
score, σ the logistic function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from reward_model.config.objectives import PRIOR_SMALLEST
from reward_model.reward_model import at_least_float32, pairwise_loss

NARROWEST = 1e-3  # between two thresholds; closer ones would leave the grade between them without a gradient
SPREAD_FLOOR = 1e-4  # standard deviation of scores below which their correlation is not told: a tenth of a new head's

# ------------------------------------------------------------------------------------------------------------- pairs


def scaled_loss(chosen: torch.Tensor, rejected: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """−m·log σ(Δ): a pair weighs by how much better its chosen answer is (HelpSteer2-Preference, arXiv 2410.01257).

    Args:
        chosen, rejected: scores (p).
        scale: m ≥ 0, a number or (p); there 1, 2 or 3. 1: plain logistic.

    Returns:
        (p), float32 at least.
    """
    return scale * pairwise_loss(chosen, rejected)


def hinge_loss(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 1.0) -> torch.Tensor:
    """max(0, m − Δ): nothing is asked of a pair whose gap has reached m. Its gradient is 0 at Δ = m too.

    Args:
        chosen, rejected: scores (p).
        margin: m, a number or (p).

    Returns:
        (p), float32 at least.
    """
    return F.relu(margin - (at_least_float32(chosen) - at_least_float32(rejected)))


def focal_loss(chosen: torch.Tensor, rejected: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """−(1 − 2·max(0, σ(Δ) − ½))^γ · log σ(Δ): a pair in the right order counts for less (InternLM2, arXiv 2403.17297).

    Args:
        chosen, rejected: scores (p).
        gamma: γ ≥ 0; 0: plain logistic.

    Returns:
        (p), float32 at least. At Δ = 0, where the weight has a corner, the gradient is the plain loss's.
    """
    gap = at_least_float32(chosen) - at_least_float32(rejected)
    # the bracket is 2σ(−max(0, Δ)); its logarithm neither underflows nor has an infinite slope
    log_weight = gamma * (math.log(2) + F.logsigmoid(-F.relu(gap)))
    return -log_weight.exp() * F.logsigmoid(gap)


def direct_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """−log σ(Δ) − log σ(r_chosen) − log σ(−r_rejected): also which side of 0 a score lies on (Eurus, arXiv 2404.02078).

    Args:
        chosen, rejected: scores (p).

    Returns:
        (p), float32 at least.
    """
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    return pairwise_loss(chosen, rejected) - F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def strength_smoothing(strength: torch.Tensor) -> torch.Tensor:
    """α of the smoothed pairwise loss, from what an ensemble of models makes of a pair: 1 − σ(μ) where μ < 0, else 0.

    Secrets of RLHF II (arXiv 2401.06080, section 2.5) applies "label smoothing to data with the preference strength
    less than 0", and names no α. This one gives such a pair the label that the ensemble itself gives it, σ(μ) by the
    paper's equation 1, so that α is ½ for a pair that is ambiguous and nears 1, the swapped label, for one that all
    models hold to be wrong. A pair with μ ≥ 0 keeps its hard label.

    Beside ``--margin strength`` (equation 6: −log σ(Δ − μ), of all pairs, in the paper's "Soft Label + Margin") the
    loss of a pair with μ < 0 is least at Δ = 2μ, as both move it; that of others has no minimum.

    Args:
        strength: μ, mean difference of the models' scores, any shape.

    Returns:
        The same shape, in [0, 1), float32 at least; NaN where the strength is.
    """
    mean = at_least_float32(strength)
    return torch.where(mean >= 0, torch.zeros_like(mean), torch.sigmoid(-mean))


def prior_constrained_loss(chosen: torch.Tensor, rejected: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """−log σ(Δ) − log σ(δ* − Δ): the gap has a bound, and is best at half of it (PCRM, arXiv 2404.00978).

    Args:
        chosen, rejected: scores (p).
        bound: δ* of :func:`prior_bound` (p); no gradient goes there. As it grows: plain logistic.

    Returns:
        (p), float32 at least.
    """
    gap = at_least_float32(chosen) - at_least_float32(rejected)
    return -F.logsigmoid(gap) - F.logsigmoid(bound.detach() - gap)


def prior_bound(similarity: torch.Tensor, slope: float = 20.0, shift: float = -15.0) -> torch.Tensor:
    """δ* = β1/(s + 0.001) + β3: answers that are alike may differ little in score (PCRM, arXiv 2404.00978).

    Args:
        similarity: s in [0, 1] (p), of :func:`length_similarity` or :func:`angular_similarity`.
        slope, shift: β1, β3. The paper's: 20, −15; for TL;DR 10, −5 with lengths and 30, −25 with embeddings.

    Returns:
        (p), float32 at least, without a gradient; just below 5 at s = 1 for each of those settings.
    """
    return slope / (at_least_float32(similarity.detach()) + PRIOR_SMALLEST) + shift


def length_similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The shorter length divided by the longer. Tokens (p), 1 at least → (p) in (0, 1], float32."""
    return torch.minimum(one, other).float() / torch.maximum(one, other).float()


def angular_similarity(cosine: torch.Tensor) -> torch.Tensor:
    """(π − arccos c)/π with the cosine c clamped to [0, 1]. (p) → (p) in [½, 1], float32 at least, no gradient."""
    return (math.pi - torch.arccos(at_least_float32(cosine.detach()).clamp(0, 1))) / math.pi


# ------------------------------------------------------------------------------------------------------------- lists
# A list's ranks (b, k) are whole numbers, 0 the best, equal where tied, −1 where the list has no such answer.


def rank_list_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Mean of −log σ(r_i − r_j) over all ordered pairs of a list, at most k(k−1)/2.

    InstructGPT (arXiv 2203.02155, eq. 1), where a list is one element of the batch: as pairs of a shuffled set each
    answer would take k − 1 updates.

    Args:
        scores: (b, k). What stands where a list has no answer gets no gradient, even if it is NaN.
        ranks: (b, k). Tied answers say nothing about each other.

    Returns:
        (b,), float32 at least; 0 where no answer is before another. k = 2: plain logistic.
    """
    scores, present = _present(scores, ranks)
    ordered = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]  # i before j
    losses = pairwise_loss(scores[:, :, None], scores[:, None, :]).where(ordered, 0.0)
    return losses.sum((1, 2)) / ordered.sum((1, 2)).clamp(min=1)


def plackett_luce_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """−log of the probability of an order in which the best is drawn first, then the best of the rest, and so on.

    −Σ_i [r_i − log Σ_{j not before i} exp r_j] (Plackett 1975; Luce 1959).

    Args:
        scores: (b, k). What stands where a list has no answer gets no gradient, even if it is NaN.
        ranks: (b, k), without ties: with them this would be Breslow's approximation.

    Returns:
        (b,), float32 at least. k = 2: plain logistic. Equal scores cost log k!.
    """
    scores, present = _present(scores, ranks)
    before = ranks[:, :, None] > ranks[:, None, :]  # j, as seen from i; what is absent is before all that is not
    rest = scores[:, None, :].masked_fill(before, -math.inf).logsumexp(2)
    return (rest - scores).where(present, 0.0).sum(1)


def best_of_k_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of softmax(r_1 … r_k) with the best answer (Ziegler et al. 2019, arXiv 1909.08593, eq. 1).

    Args:
        scores: (b, k). What stands where a list has no answer gets no gradient, even if it is NaN.
        ranks: (b, k) with one 0; the order of the others does not matter.

    Returns:
        (b,), float32 at least. k = 2: plain logistic.
    """
    scores, present = _present(scores, ranks)
    best = scores.where(ranks == 0, 0.0).sum(1)
    return scores.masked_fill(~present, -math.inf).logsumexp(1) - best


def _present(scores: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with 0 where a list has no answer, and where it has one."""
    present = ranks >= 0
    return at_least_float32(scores).where(present, 0.0), present


# ------------------------------------------------------------------------------------------------------ single answers


def squared_error(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(r − t)² of each answer (HelpSteer, ArmoRM). Scores and targets (n,) → (n,), float32 at least."""
    return (at_least_float32(scores) - target).square()


def absolute_error(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|r − t| of each answer, with gradient 0 at r = t. Scores and targets (n,) → (n,), float32 at least."""
    return (at_least_float32(scores) - target).abs()


def huber_loss(scores: torch.Tensor, target: torch.Tensor, delta: float = 1.0) -> torch.Tensor:
    """½(r − t)² where |r − t| ≤ δ, else δ(|r − t| − ½δ) (Huber 1964).

    Args:
        scores, target: (n,).
        delta: δ > 0. As it grows: half the squared error.

    Returns:
        (n,), float32 at least. Once differentiable everywhere.
    """
    scores = at_least_float32(scores)
    return F.huber_loss(scores, target.to(scores.dtype), reduction="none", delta=delta)


def binary_loss(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """−y·log σ(r) − (1 − y)·log σ(−r): binary cross-entropy of a good answer's probability.

    Args:
        scores: (n,).
        label: y (n,), 0 or 1 or the probability of 1.

    Returns:
        (n,), float32 at least.
    """
    scores = at_least_float32(scores)
    return F.binary_cross_entropy_with_logits(scores, label.to(scores.dtype), reduction="none")


def ordinal_loss(scores: torch.Tensor, grade: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """−log P(grade), P(grade > c) = σ(r − θ_c): the proportional-odds model of grades (McCullagh 1980).

    Args:
        scores: (n,).
        grade: (n,) whole numbers from 0 to C − 1.
        thresholds: θ (C − 1,), ascending.

    Returns:
        (n,), float32 at least. C = 2 and θ = 0: :func:`binary_loss`.

    With a < b, σ(−a) − σ(−b) = σ(−a)·σ(b)·(1 − e^(a−b)), none of which cancels digits: so far as a score may go, its
    loss is a number.
    """
    scores, thresholds = at_least_float32(scores), at_least_float32(thresholds)
    scores = scores.to(torch.promote_types(scores.dtype, thresholds.dtype))
    grade = grade.long()
    last = len(thresholds)
    above = (thresholds[(grade - 1).clamp(min=0)] - scores).where(grade > 0, -math.inf)
    below = (thresholds[grade.clamp(max=last - 1)] - scores).where(grade < last, math.inf)
    widths = -torch.log(-torch.expm1(-thresholds.diff()))  # (C − 2,), of the grades that have two thresholds
    widths = F.pad(widths, (1, 1))
    return -F.logsigmoid(-above) - F.logsigmoid(below) + widths[grade]


def likeliest_grade(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The grade that :func:`ordinal_loss` costs least. Scores (n,), thresholds (C − 1,) → (n,) from 0 to C − 1."""
    grades = torch.arange(len(thresholds) + 1, device=scores.device)
    return ordinal_loss(scores[:, None], grades[None], thresholds).argmin(1)


class Thresholds(nn.Module):
    """Learned thresholds of :func:`ordinal_loss`, in ascending order whatever an optimizer does to them.

    Args:
        values: to begin with, (C − 1,) real numbers, ascending; less than 0.002 apart, they are spread to that.
    """

    def __init__(self, values: torch.Tensor, dtype: torch.dtype | None = None):
        super().__init__()
        dtype = dtype or values.dtype
        self.first = nn.Parameter(values[:1].to(dtype, copy=True))
        # softplus⁻¹(x) = x + log(1 − e^−x)
        steps = (values.diff() - NARROWEST).clamp(min=NARROWEST)
        self.steps = nn.Parameter((steps + torch.log(-torch.expm1(-steps))).to(dtype)) if len(steps) else None

    def forward(self) -> torch.Tensor:
        """(C − 1,), float32 at least."""
        first = at_least_float32(self.first)
        if self.steps is None:
            return first + 0.0
        steps = (F.softplus(at_least_float32(self.steps)) + NARROWEST).cumsum(0)
        return torch.cat([first, first + steps])


def frequency_thresholds(counts: torch.Tensor) -> torch.Tensor:
    """The thresholds that suit scores of 0: θ_c = −logit P(grade > c). Grades' counts (C,) → (C − 1,), ascending."""
    counts = counts.double() + 0.5  # a grade that never occurs still has a width
    above = 1 - counts.cumsum(0)[:-1] / counts.sum()
    return -torch.logit(above).float()


# -------------------------------------------------------------------------------------------------------------- length


def length_penalty(scores: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The squared correlation of score and length over a batch, after ODIN (arXiv 2402.07319), which takes its size.

    The square has no corner at 0, and no scale: if a smaller spread of the scores made it less, all scores would shrink
    (measured: with a floor of 0.1 under the spread, weight 1 held a standard deviation of 0.011). Only where the spread
    is below 1e-4, and the gradient would pass any bound, is it taken for that.

    Args:
        scores: (n,).
        lengths: of the answers, in any unit (n,).
        weights: of the answers (n,), which sum to 1.

    Returns:
        A 0-d tensor in [0, 1], float32 at least; 0 (to rounding) where all lengths or all scores are equal. It sees the
        batch it is given: the micro-batch of one rank.
    """
    scores = at_least_float32(scores)
    lengths = lengths.to(scores.dtype)
    r = scores - (weights * scores).sum()
    length = lengths - (weights * lengths).sum()
    spread = (weights * length.square()).sum()
    covariance = (weights * r * length).sum()
    explained = covariance.square() / spread.where(spread > 0, 1.0)
    return explained / (weights * r.square()).sum().clamp(min=SPREAD_FLOOR**2)


LIST_FUNCTIONS = {"rank_list": rank_list_loss, "plackett_luce": plackett_luce_loss, "best_of_k": best_of_k_loss}
