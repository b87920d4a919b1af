# SPDX-License-Identifier: Apache-2.0
"""What a loss takes from hidden states: weights and margins of pairs, a contrastive and a language model's term.

A state is what the score head is given of a response. All is computed in float32 at least, and no gradient goes through
a weight or a margin.

Notation: p pairs, n responses, m vectors, h hidden units; h_c, h_r the states of a pair's chosen and rejected response.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from reward_model.batching.batch import Batch, Pairs
from reward_model.objectives.losses import angular_similarity
from reward_model.reward_model import at_least_float32

DECAY = 0.9  # β of the running mean, NormBT's default
SMALLEST = 1e-6  # ε beside a distance
HEAVIEST = 10.0  # weight of a pair; NormBT has no bound, and two equal texts would weigh without one


def distances(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """‖h_c − h_r‖ of each pair. States (p, h) each → (p,), float32 at least, no gradient."""
    return (at_least_float32(chosen.detach()) - at_least_float32(rejected.detach())).norm(dim=-1)


def norm_weights(distance: torch.Tensor, mean: torch.Tensor | float) -> torch.Tensor:
    """min(μ / (‖h_c − h_r‖ + ε), 10): what a pair weighs, so that close pairs are learned from as far ones are.

    NormBT (arXiv 2512.06343): the gradient of −log σ(Δ) by a linear head is (σ(Δ) − 1)(h_c − h_r), so that it grows
    with the distance of the states whatever the error is. Read: the abstract and a summary of the paper's formulas
    (weight, running mean with β = 0.9, ε without its value). Ours: ε = 1e-6, the bound, what μ begins with, and that μ
    is a mean over the whole step of all ranks.

    Args:
        distance: ‖h_c − h_r‖ (p,).
        mean: μ, of :class:`RunningDistance`; a number or 0-d.

    Returns:
        (p,), float32 at least, without a gradient. Where all distances are μ: 1, to ε.
    """
    distance = at_least_float32(distance.detach())
    return (torch.as_tensor(mean).to(distance) / (distance + SMALLEST)).clamp(max=HEAVIEST)


def similarity_margin(chosen: torch.Tensor, rejected: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale · (1 − (2/π)·arccos clamp(cos(h_c, h_r), 0, 1)): the more alike two answers are, the larger the margin.

    After APLOT (arXiv 2510.10963), whose margin grows with the semantic similarity of the answers and with how little
    the predicted rewards differ, by an optimal-transport plan over the batch. Read: its abstract alone; this takes the
    similarity and leaves out the transport and the rewards, and its form is ours: the angle between the states, as the
    prior constraint (PCRM), its opposite, has it between embeddings, made to run from 0 to 1.

    Args:
        chosen, rejected: states (p, h).
        scale: the margin of equal states; that of orthogonal ones, and beyond, is 0.

    Returns:
        (p,), float32 at least, without a gradient.
    """
    cosine = F.cosine_similarity(at_least_float32(chosen.detach()), at_least_float32(rejected.detach()), dim=-1)
    return scale * (2 * angular_similarity(cosine) - 1)


def contrastive_loss(
    one: torch.Tensor, other: torch.Tensor, temperature: float = 0.05, names: torch.Tensor | None = None
) -> torch.Tensor:
    """−log softmax_j(cos(one_i, other_j)/τ) at j = i: each vector is told from all others by another view of it.

    SimCSE (Gao et al. 2021) as Secrets of RLHF II has it (arXiv 2401.06080, eq. 9), where the two views are two passes
    with different dropout. Read: its section 3.1, which says neither τ nor the weight of the term; 0.05 is SimCSE's.

    Args:
        one, other: the vectors in two views (m, h). The gradient goes through both.
        temperature: τ.
        names: whole numbers (m,); vectors of one name are not told from each other. None: all differ.

    Returns:
        (m,), float32 at least; 0 for m = 1, and log m where all vectors are equal.
    """
    one, other = (F.normalize(at_least_float32(each), dim=-1) for each in (one, other))
    cosines = one @ other.T / temperature  # (m, m)
    if names is not None:
        same = names[:, None] == names[None, :]
        same.fill_diagonal_(False)
        cosines = cosines.masked_fill(same, -math.inf)
    return cosines.logsumexp(1) - cosines.diagonal()


def differences(states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """h_c − h_r of all pairs, then h_r − h_c of all (Secrets II, section 3.1.1). (n, h) → (2p, h), float32 at least."""
    found = at_least_float32(states[pairs.better]) - at_least_float32(states[pairs.worse])
    return torch.cat([found, -found])


def names_of_differences(pairs: Pairs, names: torch.Tensor) -> torch.Tensor:
    """A number for each of :func:`differences`, equal for pairs of the same two texts. Names of texts (n,) → (2p,)"""
    better, worse = names[pairs.better], names[pairs.worse]
    return torch.cat([better * 3 + worse, worse * 3 + better])  # odd factors lose nothing as they wrap around


class AnswerTokens(NamedTuple):
    """Tokens whose likelihood counts: indices of those before them, their ids, and what each weighs; (m,) each."""

    before: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def chosen_tokens(batch: Batch) -> AnswerTokens:
    """The tokens of chosen answers: Σ weights · −log p is the mean over pairs of an answer's mean over its tokens.

    GRM (arXiv 2406.10216): (1 − α)·L_reward + α·L_SFT with α = 0.01. Read: the abstract, and a public trainer of that
    name, which takes −log σ(β Σ log p), β = 0.1, or −Σ log p, both of sums over an answer's tokens. Ours is the mean
    over them, so that long answers do not outweigh the pairs: the first, where its logistic function is near 1, pulls
    0.1 · (number of tokens) times as hard at the same α.

    Without any pair it is tokens that weigh nothing, so that every rank computes with the head in each pass.
    """
    tokens, pairs = batch.tokens, batch.pairs
    shares = pairs.weights.new_zeros(len(tokens.ends)).index_add(0, pairs.better, pairs.weights)  # of each response
    chosen = shares.nonzero().squeeze(1)
    if not len(chosen):
        chosen = torch.zeros_like(tokens.ends[:1])
    before, ids, owners = tokens.answer_tokens(chosen)
    if not len(ids):
        before, ids, owners = (torch.zeros_like(tokens.ends[:1]) for _ in range(3))
        shares = torch.zeros_like(shares)
    counts = torch.bincount(owners, minlength=len(chosen))
    return AnswerTokens(before, ids, (shares[chosen] / counts.clamp(min=1))[owners])


def difference_loss(scores: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """J = (2/k²) Σ_{i<j} σ(|r_i − r_j|) of each prompt: how far a model tells its k answers apart.

    MetaRM (arXiv 2405.00438; Secrets of RLHF II, arXiv 2401.06080, eq. 11). At equal scores the gradient is 0.

    Args:
        scores: Of all answers (t,).
        rows: The prompt of each, (t,), from 0 to ``count`` − 1.

    Returns:
        (count,), float32 at least: from (k − 1)/(2k) for equal scores to below (k − 1)/k; 0 for a single answer.
    """
    scores = at_least_float32(scores)
    is_pair = (rows[:, None] == rows[None, :]).triu(1)  # (t, t), i < j
    of_first = torch.sigmoid((scores[:, None] - scores[None, :]).abs()).where(is_pair, 0.0).sum(1)
    sizes = torch.bincount(rows, minlength=count).to(scores.dtype)
    return scores.new_zeros(count).index_add(0, rows, of_first) * 2 / sizes.square()


class RunningDistance:
    """μ, the running mean of the distance between the states of a pair, equal on all ranks.

    μ ← 0.9 μ + 0.1 (mean of a step), after each step; a pair counts as it does in the loss. A step is weighed by the μ
    of those before it, the first one by its own mean, measured before it without dropout. As a sum over micro-batches
    and ranks it does not depend on how a step is divided. A step whose mean is not finite changes nothing.

    mean: μ, 0-d float64 on the device; None: no step with pairs was seen yet.
    """

    def __init__(self) -> None:
        self.mean: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None  # of weighted distances and of weights, (2,) float64

    def add(self, pairs: Pairs, states: torch.Tensor, weight: float) -> None:
        """Count a micro-batch.

        Args:
            states: Of each response, (n, h).
            weight: Of the micro-batch in its step.
        """
        found = distances(states[pairs.better], states[pairs.worse]).double()
        weights = pairs.weights.double() * weight
        part = torch.stack([(found * weights).sum(), weights.sum()])
        self.sums = part if self.sums is None else self.sums + part

    def end_step(self) -> None:
        """Take in what was counted since the last step; every rank calls it."""
        assert self.sums is not None
        sums, self.sums = self.sums, None
        torch.distributed.all_reduce(sums)
        found = sums[0] / sums[1]  # NaN: the step has no pairs
        if self.mean is None:
            self.mean = found if found.isfinite() else None
        else:  # without a look at it, which would wait for the step
            self.mean = torch.where(found.isfinite(), DECAY * self.mean + (1 - DECAY) * found, self.mean)

    def state(self) -> float | None:
        """For a checkpoint, as JSON keeps it to the last bit."""
        return None if self.mean is None else self.mean.item()

    def restore(self, state: float | None, device: torch.device) -> None:
        """Be what :meth:`state` was."""
        self.mean = None if state is None else torch.tensor(state, dtype=torch.float64, device=device)
