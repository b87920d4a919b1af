# SPDX-License-Identifier: Apache-2.0
"""The objectives on scores against slow loops, hand-derived numbers, finite differences, TRL and OpenRLHF."""

import importlib.util
import itertools
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from reward_model.objectives.losses import (
    SPREAD_FLOOR,
    Thresholds,
    absolute_error,
    angular_similarity,
    best_of_k_loss,
    binary_loss,
    direct_loss,
    focal_loss,
    frequency_thresholds,
    hinge_loss,
    huber_loss,
    length_penalty,
    length_similarity,
    ordinal_loss,
    plackett_luce_loss,
    prior_bound,
    prior_constrained_loss,
    rank_list_loss,
    scaled_loss,
    squared_error,
)
from reward_model.reward_model import pairwise_loss, score_penalty

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXTREMES = (-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4)
LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_numbers(seed, *shape, scale=2.0):
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_pair(seed, *shape):
    return [random_numbers(2 * seed + i, *shape).requires_grad_() for i in range(2)]


def gradient(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


def assert_finite(loss, dtype, *inputs):
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite().all()
    for slope in gradient(loss, *inputs):
        assert slope.isfinite().all()
        assert slope.ne(0).any()


# --- slow references: one element at a time, math.log and math.exp ---


def slow_logistic(gap):
    return math.log1p(math.exp(-gap))


def slow_focal(gap, gamma):
    probability = 1 / (1 + math.exp(-gap))
    return -((1 - 2 * max(0, probability - 0.5)) ** gamma) * math.log(probability)


def slow_direct(chosen, rejected):
    return slow_logistic(chosen - rejected) + slow_logistic(chosen) + slow_logistic(-rejected)


def slow_rank_list(scores, ranks):
    costs = []
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if ranks[i] < ranks[j]:
            costs.append(slow_logistic(scores[i] - scores[j]))
    return sum(costs) / len(costs) if costs else 0.0


def slow_plackett_luce(scores, ranks):
    left = [score for _, score in sorted(zip(ranks, scores))]
    probability = 1.0
    while left:
        probability *= math.exp(left[0]) / sum(math.exp(score) for score in left)
        left.pop(0)
    return -math.log(probability)


def slow_best_of_k(scores, ranks):
    return -math.log(math.exp(scores[ranks.index(0)]) / sum(math.exp(score) for score in scores))


def slow_huber(score, target, delta):
    error = abs(score - target)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


def slow_binary(score, label):
    probability = 1 / (1 + math.exp(-score))
    return -label * math.log(probability) - (1 - label) * math.log(1 - probability)


def slow_ordinal(score, grade, thresholds):
    above = [1.0] + [1 / (1 + math.exp(threshold - score)) for threshold in thresholds] + [0.0]
    return -math.log(above[grade] - above[grade + 1])


def slow_length_penalty(scores, lengths, weights):
    def mean(values):
        return sum(weight * value for weight, value in zip(weights, values))

    r, length = ([value - mean(values) for value in values] for values in (scores, lengths))
    covariance = mean([a * b for a, b in zip(r, length)])
    variances = mean([a * a for a in r]), mean([b * b for b in length])
    return covariance**2 / (max(variances[0], 1e-8) * variances[1])


# name: (fast, slow) of chosen, rejected and a third number, which is the scale, the margin or the bound
PAIRS = {
    "scaled": (scaled_loss, lambda c, r, m: m * slow_logistic(c - r)),
    "scaled_2": (lambda c, r, _: scaled_loss(c, r, 2), lambda c, r, _: 2 * slow_logistic(c - r)),
    "hinge": (hinge_loss, lambda c, r, m: max(0, m - (c - r))),
    "hinge_1": (lambda c, r, _: hinge_loss(c, r), lambda c, r, _: max(0, 1 - (c - r))),
    "focal": (lambda c, r, _: focal_loss(c, r), lambda c, r, _: slow_focal(c - r, 2)),
    "focal_0.5": (lambda c, r, _: focal_loss(c, r, 0.5), lambda c, r, _: slow_focal(c - r, 0.5)),
    "direct": (lambda c, r, _: direct_loss(c, r), lambda c, r, _: slow_direct(c, r)),
    "prior_constrained": (prior_constrained_loss, lambda c, r, b: slow_logistic(c - r) + slow_logistic(b - (c - r))),
}
LISTS = {
    "rank_list": (rank_list_loss, slow_rank_list),
    "plackett_luce": (plackett_luce_loss, slow_plackett_luce),
    "best_of_k": (best_of_k_loss, slow_best_of_k),
}
SINGLE = {
    "squared": (squared_error, lambda r, t: (r - t) ** 2),
    "absolute": (absolute_error, lambda r, t: abs(r - t)),
    "huber": (huber_loss, lambda r, t: slow_huber(r, t, 1)),
    "huber_0.3": (lambda r, t: huber_loss(r, t, 0.3), lambda r, t: slow_huber(r, t, 0.3)),
    "binary": (binary_loss, slow_binary),
}
EVERY_PAIR = pytest.mark.parametrize("fast, slow", PAIRS.values(), ids=PAIRS)
EVERY_LIST = pytest.mark.parametrize("fast, slow", LISTS.values(), ids=LISTS)
EVERY_SINGLE = pytest.mark.parametrize("fast, slow", SINGLE.values(), ids=SINGLE)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- pairs ---


@EVERY_PAIR
def test_pairs_equal_slow_reference(fast, slow):
    chosen, rejected, third = random_numbers(0, 40), random_numbers(1, 40), 0.1 + 4 * random_numbers(2, 40).sigmoid()
    expected = double(*map(slow, chosen.tolist(), rejected.tolist(), third.tolist()))
    torch.testing.assert_close(fast(chosen, rejected, third), expected)
    square = [x.reshape(5, 8) for x in (chosen, rejected, third)]  # as span_loss calls it
    torch.testing.assert_close(fast(*square), expected.reshape(5, 8))


@EVERY_PAIR
def test_gradcheck_pairs(fast, slow):
    assert gradcheck(lambda c, r: fast(c, r, double(0.5, 1, 2, 3, 4)), random_pair(3, 5))


@EVERY_DTYPE
@EVERY_PAIR
def test_pairs_are_finite_at_any_scores(fast, slow, dtype):
    chosen, rejected = torch.cartesian_prod(torch.tensor(EXTREMES, dtype=dtype), torch.tensor(EXTREMES, dtype=dtype)).T
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    assert_finite(fast(chosen, rejected, torch.full_like(chosen, 3)), dtype, chosen, rejected)


@pytest.mark.parametrize(
    "loss, expected",
    [
        (lambda c, r: scaled_loss(c, r, double(1, 2, 3)), (LOG2, 2 * math.log(4 / 3), 3 * LOG4)),
        (hinge_loss, (1, 0, 1 + LOG3)),
        (lambda c, r: hinge_loss(c, r, double(0, 2, 0.5)), (0, 2 - LOG3, 0.5 + LOG3)),
        (focal_loss, (LOG2, math.log(4 / 3) / 4, LOG4)),  # (1 − 2·(3/4 − 1/2))² = 1/4
        (lambda c, r: focal_loss(c, r, 1.0), (LOG2, math.log(4 / 3) / 2, LOG4)),
        (
            lambda c, r: prior_constrained_loss(c, r, double(0, 2 * LOG3, 0)),
            (2 * LOG2, 2 * math.log(4 / 3), LOG4 + math.log(4 / 3)),
        ),
    ],
    ids=["scaled", "hinge", "hinge_margins", "focal", "focal_1", "prior_constrained"],
)
def test_pairs_by_hand(loss, expected):
    gap = double(0, LOG3, -LOG3)  # σ: 1/2, 3/4, 1/4
    torch.testing.assert_close(loss(gap + 2, double(2, 2, 2)), double(*expected))


def test_direct_by_hand():
    expected = double(LOG2 + LOG2 + LOG2, LOG2 + math.log(4 / 3) + LOG4, 2 * math.log(4 / 3) + math.log(10 / 9))
    torch.testing.assert_close(direct_loss(double(0, LOG3, LOG3), double(0, LOG3, -LOG3)), expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: scaled_loss(c, r, 1),
        lambda c, r: focal_loss(c, r, 0.0),
        lambda c, r: prior_constrained_loss(c, r, torch.tensor(1e6)),
        lambda c, r: torch.log(1 + torch.exp(r - c)),  # the log-exp loss is another name for it
    ],
    ids=["scale_1", "gamma_0", "bound_large", "log_exp"],
)
def test_limits_are_the_logistic_loss(loss):
    pair = random_pair(4, 20)
    torch.testing.assert_close(loss(*pair), pairwise_loss(*pair))
    torch.testing.assert_close(gradient(loss(*pair), *pair), gradient(pairwise_loss(*pair), *pair))


def test_hinge_asks_nothing_at_its_margin():
    chosen, rejected = double(1.5, 1, 3).requires_grad_(), double(1, 0, 0).requires_grad_()  # short of, at, beyond 1
    slopes = gradient(hinge_loss(chosen, rejected), chosen, rejected)
    assert [slope.tolist() for slope in slopes] == [[-1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_at_equal_scores_has_the_plain_gradient(gamma):
    chosen, rejected = double(0, 3).requires_grad_(), double(0, 3).requires_grad_()
    slopes = gradient(focal_loss(chosen, rejected, gamma), chosen, rejected)
    torch.testing.assert_close(slopes, (double(-0.5, -0.5), double(0.5, 0.5)))


def test_prior_constrained_is_best_at_half_its_bound():
    bound = double(0.5, 4.98, 100)
    gap = (bound / 2).requires_grad_()
    zero = torch.zeros_like(gap)
    assert gradient(prior_constrained_loss(gap, zero, bound), gap)[0].tolist() == [0, 0, 0]
    beside = (bound / 2 + 0.1, bound / 2 - 0.1)
    slopes = [gradient(prior_constrained_loss(x.requires_grad_(), zero, bound), x)[0] for x in beside]
    assert (slopes[0] > 0).all()
    assert (slopes[1] < 0).all()


# --- the prior's bound and similarities ---


@pytest.mark.parametrize("slope, shift", [(20.0, -15.0), (10.0, -5.0), (30.0, -25.0)])
def test_prior_bound_is_just_below_5_for_equal_answers(slope, shift):
    similarity = double(0, 0.25, 0.999, 1)
    expected = [slope / (s + 0.001) + shift for s in similarity.tolist()]
    bound = prior_bound(similarity, slope, shift)
    torch.testing.assert_close(bound, double(*expected))
    assert 4.96 < bound[-1] < 5
    assert bound[-2] == pytest.approx(5)


def test_prior_bound_has_the_papers_defaults():
    torch.testing.assert_close(prior_bound(double(0.5, 0.999)), double(20 / 0.501 - 15, 5))


def test_length_similarity():
    one, other = torch.tensor([10, 20, 7, 1]), torch.tensor([40, 10, 7, 8192])
    expected = torch.tensor([min(a, b) / max(a, b) for a, b in zip(one.tolist(), other.tolist())])
    torch.testing.assert_close(length_similarity(one, other), expected)
    assert length_similarity(one, other)[:3].tolist() == [0.25, 0.5, 1]


def test_angular_similarity():
    cosine = double(1, 0.5, 0, -0.5, 1 + 1e-9)  # rounding takes a cosine beyond 1, where arccos is NaN
    torch.testing.assert_close(angular_similarity(cosine), double(1, 2 / 3, 0.5, 0.5, 1))
    inside = random_numbers(0, 20).sigmoid()
    slow = double(*((math.pi - math.acos(c)) / math.pi for c in inside.tolist()))
    torch.testing.assert_close(angular_similarity(inside), slow)


@EVERY_DTYPE
def test_priors_are_finite_in_any_dtype(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    nothing_to_all = torch.tensor([0, 0.5, 1], dtype=dtype)
    bound, angular = prior_bound(nothing_to_all), angular_similarity(nothing_to_all)
    assert bound.dtype == angular.dtype == wide
    torch.testing.assert_close(bound, torch.tensor([19985, 24.920159680638722, 4.980019980019978], dtype=wide))
    torch.testing.assert_close(angular, torch.tensor([1 / 2, 2 / 3, 1], dtype=wide))


def test_no_gradient_reaches_what_the_prior_is_made_of():
    similarity, bound = double(0.25, 0.5, 1).requires_grad_(), double(3, 4, 5).requires_grad_()
    assert not prior_bound(similarity).requires_grad
    assert not angular_similarity(similarity).requires_grad
    chosen, rejected = random_pair(5, 3)
    loss = prior_constrained_loss(chosen, rejected, bound)
    assert torch.autograd.grad(loss.sum(), bound, allow_unused=True) == (None,)


# --- lists ---


def random_list(seed, ties):
    """Up to 6 answers with ranks; ties are among those that are not the best, so that every loss may have them."""
    generator = torch.Generator().manual_seed(seed)
    k = 1 + seed % 6
    ranks = torch.randperm(k, generator=generator)
    if ties:
        ranks = (ranks + 1) // 2
    return random_numbers(seed, k), ranks


def as_batch(lists, absent=math.nan):
    """Lists of unequal length as one, the gaps anywhere."""
    k = max(len(ranks) for _, ranks in lists) + 1
    scores = torch.full((len(lists), k), absent, dtype=torch.float64)
    ranks = torch.full((len(lists), k), -1)
    for row, (own_scores, own_ranks) in enumerate(lists):
        places = torch.randperm(k, generator=torch.Generator().manual_seed(row))[: len(own_ranks)]
        scores[row, places], ranks[row, places] = own_scores, own_ranks
    return scores, ranks


@pytest.mark.parametrize("ties", [False, True])
@EVERY_LIST
def test_lists_equal_slow_reference(fast, slow, ties):
    if ties and fast is plackett_luce_loss:
        ties = False  # it takes none
    lists = [random_list(seed, ties) for seed in range(30)]
    expected = double(*(slow(scores.tolist(), ranks.tolist()) for scores, ranks in lists))
    torch.testing.assert_close(fast(*as_batch(lists)), expected)


def test_rank_list_takes_ties_for_the_best():
    lists = [(random_numbers(seed, 5), torch.tensor([0, 2, 0, 1, 1])) for seed in range(5)]
    expected = double(*(slow_rank_list(scores.tolist(), ranks.tolist()) for scores, ranks in lists))
    torch.testing.assert_close(rank_list_loss(*as_batch(lists)), expected)


@EVERY_LIST
def test_gradcheck_lists(fast, slow):
    scores, ranks = as_batch([random_list(seed, ties=False) for seed in range(5)], absent=0.5)
    assert gradcheck(lambda s: fast(s, ranks), scores.requires_grad_())


@EVERY_DTYPE
@EVERY_LIST
def test_lists_are_finite_at_any_scores(fast, slow, dtype):
    scores = torch.cartesian_prod(*3 * [torch.tensor(EXTREMES, dtype=dtype)])
    for ranks in ([0, 1, 2], [2, 0, 1], [1, -1, 0]):
        assert_finite(fast(scores.requires_grad_(), torch.tensor(ranks).expand(len(scores), 3)), dtype, scores)


@pytest.mark.parametrize(
    "loss, ranks, expected",
    [
        # exp r is 3, 2, 1; the pairs' probabilities are 3/5, 3/4, 2/3 or their complements
        (rank_list_loss, [0, 1, 2], math.log(10 / 3) / 3),
        (rank_list_loss, [2, 1, 0], math.log(30) / 3),
        (rank_list_loss, [0, 0, 1], math.log(4 / 3 * 3 / 2) / 2),
        (rank_list_loss, [0, -1, 1], math.log(4 / 3)),
        (plackett_luce_loss, [0, 1, 2], math.log(6 / 3 * 3 / 2)),
        (plackett_luce_loss, [2, 1, 0], math.log(6 / 1 * 5 / 2)),
        (plackett_luce_loss, [1, -1, 0], math.log(4 / 1)),
        (best_of_k_loss, [0, 1, 2], math.log(6 / 3)),
        (best_of_k_loss, [1, 1, 0], math.log(6 / 1)),
        (best_of_k_loss, [-1, 0, 1], math.log(3 / 2)),
    ],
)
def test_lists_by_hand(loss, ranks, expected):
    scores = double(3, 2, 1).log()[None]
    torch.testing.assert_close(loss(scores, torch.tensor([ranks])), double(expected))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_equal_scores(k):
    scores, ranks = torch.full((1, k), 7.0, dtype=torch.float64), torch.arange(k)[None]
    assert rank_list_loss(scores, ranks).item() == pytest.approx(LOG2 if k > 1 else 0)
    assert plackett_luce_loss(scores, ranks).item() == pytest.approx(math.log(math.factorial(k)))
    assert best_of_k_loss(scores, ranks).item() == pytest.approx(math.log(k))


@EVERY_LIST
def test_a_list_of_two_is_a_pair(fast, slow):
    chosen, rejected = random_pair(6, 20)
    expected = pairwise_loss(chosen, rejected)
    for scores, ranks in (([chosen, rejected], [0, 1]), ([rejected, chosen], [1, 0])):
        loss = fast(torch.stack(scores, 1), torch.tensor(ranks).expand(20, 2))
        torch.testing.assert_close(loss, expected)
        slopes = gradient(loss, chosen, rejected), gradient(pairwise_loss(chosen, rejected), chosen, rejected)
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("absent", [math.nan, math.inf, -1e4, 1e4])
@EVERY_LIST
def test_an_absent_answer_changes_nothing(fast, slow, absent):
    lists = [random_list(seed, ties=False) for seed in range(12)]
    scores, ranks = as_batch(lists, absent)
    losses = fast(scores.requires_grad_(), ranks)
    (slopes,) = gradient(losses, scores)
    assert slopes[ranks < 0].eq(0).all()
    for row, (own_scores, own_ranks) in enumerate(lists):
        alone = fast(own_scores.requires_grad_()[None], own_ranks[None])
        torch.testing.assert_close(losses[row : row + 1], alone)
        (own_slopes,) = gradient(alone, own_scores)
        best_first = slopes[row][ranks[row].argsort()][-len(own_ranks) :]  # the absent, −1, come before them
        torch.testing.assert_close(best_first, own_slopes[own_ranks.argsort()])


@EVERY_LIST
def test_the_order_in_which_answers_stand_does_not_matter(fast, slow):
    scores, ranks = random_numbers(7, 3, 4), torch.tensor([[0, 1, 2, 3], [3, 2, -1, 0], [1, 0, -1, -1]])
    expected = fast(scores, ranks)
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(fast(scores[:, order], ranks[:, order]), expected)


@pytest.mark.parametrize("ranks", [[0, 0, 0], [2, 2, -1], [0, -1, -1], [-1, -1, -1]])
def test_rank_list_without_an_order_is_0(ranks):
    scores = random_numbers(8, 1, 3).requires_grad_()
    loss = rank_list_loss(scores, torch.tensor([ranks]))
    assert loss.tolist() == [0]
    assert gradient(loss, scores)[0].tolist() == [[0, 0, 0]]


# --- single answers ---


@EVERY_SINGLE
def test_single_answers_equal_slow_reference(fast, slow):
    scores, target = random_numbers(9, 40), random_numbers(10, 40).sigmoid()
    torch.testing.assert_close(fast(scores, target), double(*map(slow, scores.tolist(), target.tolist())))


@EVERY_SINGLE
def test_gradcheck_single_answers(fast, slow):
    assert gradcheck(lambda s: fast(s, double(0, 0.2, 0.5, 0.9, 1)), random_numbers(11, 5).requires_grad_())


@EVERY_DTYPE
@EVERY_SINGLE
def test_single_answers_are_finite_at_any_scores(fast, slow, dtype):
    targets = [0.0, 0.5, 1.0] if fast is binary_loss else EXTREMES
    scores, target = torch.cartesian_prod(torch.tensor(EXTREMES, dtype=dtype), torch.tensor(targets, dtype=dtype)).T
    scores = scores.clone().requires_grad_()
    assert_finite(fast(scores, target), dtype, scores)


@pytest.mark.parametrize(
    "loss, expected",
    [
        (squared_error, (0.25, 1, 9)),
        (absolute_error, (0.5, 1, 3)),
        (huber_loss, (1 / 8, 1 / 2, 3 - 1 / 2)),
        (lambda r, t: huber_loss(r, t, 2.0), (1 / 8, 1 / 2, 2 * (3 - 1))),
    ],
    ids=["squared", "absolute", "huber", "huber_2"],
)
def test_errors_by_hand(loss, expected):
    torch.testing.assert_close(loss(double(2.5, 1, -1), torch.tensor([2, 2, 2])), double(*expected))


def test_binary_by_hand():
    scores = double(0, LOG3, LOG3)  # σ: 1/2, 3/4, 3/4
    torch.testing.assert_close(binary_loss(scores, torch.tensor([1, 1, 0])), double(LOG2, math.log(4 / 3), LOG4))
    halves = double(LOG2, *2 * [(math.log(4 / 3) + LOG4) / 2])
    torch.testing.assert_close(binary_loss(scores, double(0.5, 0.5, 0.5)), halves)


def test_huber_of_a_huge_delta_is_half_the_squared_error():
    scores, target = random_numbers(12, 10, scale=100.0), random_numbers(13, 10)
    torch.testing.assert_close(huber_loss(scores, target, 1e6), squared_error(scores, target) / 2)


@pytest.mark.parametrize("sign", [-1, 1])
def test_huber_is_once_differentiable_where_its_pieces_meet(sign):
    scores = (sign * double(2 - 1e-9, 2, 2 + 1e-9)).requires_grad_()
    loss = huber_loss(scores, torch.zeros(3), delta=2.0)
    torch.testing.assert_close(loss, double(2, 2, 2))
    torch.testing.assert_close(gradient(loss, scores)[0], sign * double(2, 2, 2))


def test_absolute_error_is_flat_at_its_target():
    scores = double(1, 2, 3).requires_grad_()
    assert gradient(absolute_error(scores, double(2, 2, 2)), scores)[0].tolist() == [-1, 0, 1]


# --- grades ---


@pytest.mark.parametrize("thresholds", [(0.3,), (-1.0, 0.5), (-2.0, -1.9, 0.0, 1.0)])
def test_ordinal_equals_slow_reference(thresholds):
    scores = random_numbers(14, 40)
    for grade in range(len(thresholds) + 1):
        expected = double(*(slow_ordinal(score, grade, thresholds) for score in scores.tolist()))
        torch.testing.assert_close(ordinal_loss(scores, torch.full((40,), grade), double(*thresholds)), expected)


def test_ordinal_by_hand():
    grade = torch.tensor([0, 1, 2])
    for score, probabilities in ((0, (1 / 4, 1 / 2, 1 / 4)), (LOG3, (1 / 10, 4 / 10, 5 / 10))):
        loss = ordinal_loss(double(score, score, score), grade, double(-LOG3, LOG3))
        torch.testing.assert_close(loss, -double(*probabilities).log())


def test_two_grades_are_a_binary_label():
    scores, grade = random_numbers(15, 20).requires_grad_(), torch.arange(20) % 2
    losses = ordinal_loss(scores, grade, double(0)), binary_loss(scores, grade)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradient(loss, scores)[0] for loss in losses))


def test_ordinal_keeps_the_digits_of_a_difference():
    """σ(50) − σ(49) is 0 in float32; it is e^−49 − e^−50."""
    loss = ordinal_loss(torch.tensor([50.0, -50.0]), torch.tensor([1, 1]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor([49.0, 50.0]) - math.log(1 - math.exp(-1)))
    close = torch.tensor([0.0, 2**-14])  # σ(0) − σ(−d) = tanh(d/2)/2
    loss = ordinal_loss(torch.zeros(1), torch.tensor([1]), close)
    torch.testing.assert_close(loss, torch.tensor([-math.log(math.tanh(2**-15) / 2)]))


@pytest.mark.parametrize("thresholds", [(0.3,), (-1.0, 0.5), (-2.0, -1.5, 0.0, 1.0)])
def test_gradcheck_ordinal(thresholds):
    grade = torch.arange(6) % (len(thresholds) + 1)
    inputs = random_numbers(16, 6).requires_grad_(), double(*thresholds).requires_grad_()
    assert gradcheck(lambda s, t: ordinal_loss(s, grade, t), inputs)


@pytest.mark.parametrize("values", [(0.3,), (-1.0, 0.5, 0.7)])
def test_gradcheck_ordinal_through_thresholds(values):
    module, grade = Thresholds(double(*values)), torch.arange(6) % (len(values) + 1)
    names = [name for name, _ in module.named_parameters()]

    def loss(scores, *parameters):
        return ordinal_loss(scores, grade, torch.func.functional_call(module, dict(zip(names, parameters)), ()))

    assert gradcheck(loss, (random_numbers(17, 6).requires_grad_(), *module.parameters()))


@EVERY_DTYPE
@pytest.mark.parametrize(
    "values", [(0.5,), (1e4,), (-1.0, 0.0, 2.0), (-1e4, 0.0, 1e4), (-10048.0, -9984.0), (9984.0, 10048.0)]
)
def test_ordinal_is_finite_at_any_scores_and_thresholds(values, dtype):
    thresholds = torch.tensor(values, dtype=dtype).requires_grad_()
    extremes, grades = torch.tensor(EXTREMES, dtype=dtype), range(len(values) + 1)
    scores = extremes.repeat(len(grades)).requires_grad_()
    grade = torch.arange(len(grades)).repeat_interleave(len(extremes))
    assert_finite(ordinal_loss(scores, grade, thresholds), dtype, scores, thresholds)


START = (-30.0, -1.0, -0.998, 2.0, 2.5, 60.0)


def test_thresholds_begin_where_they_were_told_to():
    for values in (START, START[:2], START[:1]):
        torch.testing.assert_close(Thresholds(torch.tensor(values))(), torch.tensor(values), rtol=0, atol=1e-5)
        torch.testing.assert_close(Thresholds(double(*values))(), double(*values), rtol=0, atol=1e-12)


def test_thresholds_never_meet():
    """Where they do, the grade between them has no gradient, and no other grade a finite one."""
    module = Thresholds(torch.tensor([-1.0, 0.0, 1.0]))
    module.steps.data[0] = -100.0
    assert module().diff()[0].item() == pytest.approx(1e-3, rel=1e-3)
    ordinal_loss(torch.zeros(3), torch.tensor([0, 1, 2]), module()).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("values", [(0.5,), (-1.0, 0.0, 0.5, 2.0)])
def test_thresholds_stay_ascending(values, dtype):
    module = Thresholds(torch.tensor(values), dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
        assert module().dtype == torch.float32
        assert module().shape == (len(values),)
        assert (module().diff() > 0).all()


def test_bfloat16_thresholds_begin_close_to_where_they_were_told_to():
    values = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    # 8 bits: each of three steps of at most 1.5 is off by less than 1.5/256
    torch.testing.assert_close(Thresholds(values, torch.bfloat16)(), values, rtol=0, atol=0.02)


def test_one_threshold_learns():
    module = Thresholds(torch.tensor([0.5]))
    assert [name for name, _ in module.named_parameters()] == ["first"]
    ordinal_loss(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1, 1, 0]), module()).mean().backward()
    torch.testing.assert_close(module.first.grad, torch.tensor([1 / 6]))  # (1/2 + 1/2 − 1/2)/3: more are above


@pytest.mark.parametrize(
    "counts, expected",
    [
        # half an answer more of each grade: (1/4, 3/4), thirds, (3/5, 1/5, 1/5)
        ([0, 1], [-LOG3]),
        ([0, 0, 0], [-LOG2, LOG2]),
        ([1, 0, 0], [math.log(3 / 2), LOG4]),
    ],
)
def test_frequency_thresholds_by_hand(counts, expected):
    torch.testing.assert_close(frequency_thresholds(torch.tensor(counts)), torch.tensor(expected))


@pytest.mark.parametrize("counts", [[3, 0], [5, 0, 100, 7, 1], [0, 0, 40_000, 0]])
def test_scores_of_0_begin_at_the_grades_frequencies(counts):
    thresholds = Thresholds(frequency_thresholds(torch.tensor(counts)))()
    loss = ordinal_loss(torch.zeros(len(counts)), torch.arange(len(counts)), thresholds)
    smoothed = torch.tensor(counts) + 0.5
    torch.testing.assert_close(torch.exp(-loss), smoothed / smoothed.sum(), rtol=1e-4, atol=0)


# --- length ---


def random_answers(seed, n=12, scale=2.0):
    scores = random_numbers(seed, n, scale=scale)
    lengths = (100 + 20 * random_numbers(seed + 1, n) + 10 * scores / scale).round()
    return scores, lengths, random_numbers(seed + 2, n).softmax(0)


def test_length_penalty_equals_slow_reference():
    for seed in range(10):
        for scale in (1e-5, 1e-4, 0.01, 2.0):
            answers = random_answers(seed, scale=scale)
            slow = slow_length_penalty(*(values.tolist() for values in answers))
            assert length_penalty(*answers).item() == pytest.approx(slow)


def test_length_penalty_is_numpys_squared_correlation_at_any_scale():
    for seed in range(10):
        for scale in (0.001, 1.0, 1000.0):
            scores, lengths, weights = random_answers(seed, scale=scale)
            covariance = np.cov(scores, lengths, aweights=weights)
            squared = covariance[0, 1] ** 2 / (covariance[0, 0] * covariance[1, 1])
            assert length_penalty(scores, lengths, weights).item() == pytest.approx(squared, rel=1e-6)


def test_length_penalty_by_hand():
    """Two answers correlate fully; with a tenth of the least spread, a hundredth of the square is left."""
    half = double(0.5, 0.5)
    for lengths in ((1, 2), (2, 1), (100, 900)):
        for gap, expected in ((0.2, 1.0), (2 * SPREAD_FLOOR, 1.0), (0.2 * SPREAD_FLOOR, 0.01)):
            penalty = length_penalty(double(0.4, 0.4 + gap), torch.tensor(lengths), half)
            assert penalty.shape == ()
            assert penalty.item() == pytest.approx(expected, rel=1e-6)
    # deviations (−1, 0, 1) and (−1/4, 3/4, −1/4): covariance 0
    zero = length_penalty(double(1, 2, 3), torch.tensor([5, 6, 5]), double(0.375, 0.25, 0.375))
    assert zero.item() == pytest.approx(0, abs=1e-12)


def test_smaller_scores_do_not_pay_less():
    """Along the scale of the scores there is no slope: a penalty with one made them all shrink."""
    scores, lengths, weights = random_answers(3, scale=0.005)  # as a new head's
    (slope,) = gradient(length_penalty(scores.requires_grad_(), lengths, weights), scores)
    centered = scores - (weights * scores).sum()
    assert (slope * centered).sum().item() == pytest.approx(0, abs=1e-10)
    assert slope.abs().max() > 1


def test_gradcheck_length_penalty():
    for scale in (0.05, 2.0):
        scores, lengths, weights = random_answers(0, 5, scale)
        assert gradcheck(lambda s, other=(lengths, weights): length_penalty(s, *other), scores.requires_grad_())


@EVERY_DTYPE
def test_length_penalty_is_finite_at_any_scores(dtype):
    lengths = torch.tensor([1, 10, 8192, 8192, 3, 500, 4000])
    for values in (EXTREMES, EXTREMES[::-1], 6 * (-1e4,) + (1e4,), 6 * (1e-4,) + (0,)):
        scores = torch.tensor(values, dtype=dtype).requires_grad_()
        assert_finite(length_penalty(scores, lengths, torch.full((7,), 1 / 7, dtype=dtype)), dtype, scores)


@EVERY_DTYPE
@pytest.mark.parametrize("n", [1, 3, 7])
def test_length_penalty_is_0_without_a_spread(n, dtype):
    weights = torch.full((n,), 1 / n)
    varied = torch.arange(n)
    for scores, lengths in ((varied - 1.5, torch.full((n,), 700)), (torch.full((n,), 1.5), varied + 1)):
        scores = scores.to(dtype).requires_grad_()
        penalty = length_penalty(scores, lengths, weights)
        torch.testing.assert_close(penalty.double(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient(penalty, scores)[0], torch.zeros_like(scores), rtol=0, atol=1e-5)


def test_length_penalty_lies_in_0_to_1():
    scores = torch.linspace(-9, 9, 7, dtype=torch.float64)
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    for lengths in (scores + 10, 10 - scores):
        assert length_penalty(scores, lengths, weights).item() == pytest.approx(1)
    assert all(0 < length_penalty(*random_answers(seed)) < 1 for seed in range(20))


def test_a_step_down_lowers_the_length_penalty():
    for seed in range(10):
        scores, lengths, weights = random_answers(seed, scale=0.3)
        before = length_penalty(scores.requires_grad_(), lengths, weights)
        (slope,) = gradient(before, scores)
        assert slope.ne(0).all()
        assert length_penalty(scores - 0.01 * slope, lengths, weights) < before


def test_gradient_of_the_length_penalty_is_bounded():
    """With s the spread, √Σ g²/w ≤ 1/s; below the least spread f, 2s/f²."""
    for spread in 10 ** torch.linspace(-8, 2, 41, dtype=torch.float64):
        for seed in range(5):
            scores, lengths, weights = random_answers(seed, scale=spread.item())
            (slope,) = gradient(length_penalty(scores.requires_grad_(), lengths, weights), scores)
            size = (slope.square() / weights).sum().sqrt().item()
            own = (weights * (scores - (weights * scores).sum()).square()).sum().sqrt().item()
            assert size <= 1.001 * (1 / own if own > SPREAD_FLOOR else 2 * own / SPREAD_FLOOR**2)


# --- the same numbers as TRL and OpenRLHF, where they are ---


def assert_same(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, *inputs), gradient(theirs, *inputs))


@pytest.fixture(scope="module")
def trl_loss():
    """RewardTrainer.compute_loss of scores as they come out of a model."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")

    def loss(chosen, rejected, centring=None, **inputs):
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=centring),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        return trl.RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)

    return loss


def test_as_trl(trl_loss):
    pair, margin = random_pair(18, 8), random_numbers(19, 8).abs()
    assert_same(pairwise_loss(*pair).mean(), trl_loss(*pair), *pair)
    assert_same(pairwise_loss(*pair, margin).mean(), trl_loss(*pair, margin=margin), *pair)
    assert (trl_loss(*pair) - trl_loss(*pair, margin=margin)).abs() > 0.1


@pytest.mark.parametrize("weight", [0.01, 0.5])
def test_as_trl_with_centered_rewards(trl_loss, weight):
    pair, margin = random_pair(20, 8), random_numbers(21, 8).abs()
    for inputs in ({}, {"margin": margin}):
        ours = pairwise_loss(*pair, **inputs).mean() + weight * score_penalty("center", *pair)
        assert_same(ours, trl_loss(*pair, weight, **inputs), *pair)


@pytest.fixture(scope="module")
def openrlhf():
    """Its losses by their file: the package around them imports much that they do not need."""
    if "OPENRLHF" not in os.environ:
        pytest.skip("OPENRLHF names no checkout")
    file = Path(os.environ["OPENRLHF"], "openrlhf", "models", "loss.py")
    package, utils = ModuleType("openrlhf_models"), ModuleType("openrlhf_models.utils")
    package.__path__ = []
    utils.masked_mean = None  # of its policy losses
    spec = importlib.util.spec_from_file_location("openrlhf_models.loss", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for part in (package, utils, module):
            patch.setitem(sys.modules, part.__name__, part)
        spec.loader.exec_module(module)
    return module


def test_as_openrlhf(openrlhf):
    pair, margin = random_pair(22, 8), random_numbers(23, 8).abs()
    assert_same(pairwise_loss(*pair).mean(), openrlhf.PairWiseLoss()(*pair), *pair)
    assert_same(pairwise_loss(*pair, margin).mean(), openrlhf.PairWiseLoss()(*pair, margin), *pair)
    assert_same(pairwise_loss(*pair).mean(), openrlhf.LogExpLoss()(*pair), *pair)


def test_openrlhfs_log_exp_overflows_and_takes_no_margin(openrlhf):
    chosen, rejected = torch.tensor([-100.0], requires_grad=True), torch.tensor([0.0])
    theirs, ours = openrlhf.LogExpLoss()(chosen, rejected), pairwise_loss(chosen, rejected)
    assert theirs.isinf()
    assert gradient(theirs, chosen)[0].isnan().all()
    assert ours.tolist() == [100]
    assert gradient(ours, chosen)[0].tolist() == [-1]

    one, zero, margin = double(1), double(0), double(2)
    assert openrlhf.LogExpLoss()(one, zero, margin) == openrlhf.LogExpLoss()(one, zero)
    assert pairwise_loss(one, zero, margin) > pairwise_loss(one, zero) + 0.5
