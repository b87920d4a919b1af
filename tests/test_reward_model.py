# SPDX-License-Identifier: Apache-2.0
"""The drop-in reward model against a slow reference, hand-derived numbers and tiny Transformers models."""

import ast
import inspect
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from reference import (
    PAD,
    TOKENIZER,
    VOCABULARY,
    TinyBackbone,
    random_pairs,
    slow_end_scores,
    slow_forward,
)
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reward_model import reward_model as dropin
from reward_model.reward_model import (
    BARRIER_KNEE,
    SCORE_PENALTIES,
    RewardModel,
    log_barrier,
    pairwise_loss,
    score_penalty,
    span_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("ragged", "full", "identical", "noise")
LEVELS = {
    "token": {"loss_level": "token"},
    "token_no_pads": {"loss_level": "token", "exclude_pads": True},
    "sequence": {"loss_level": "sequence"},
    "sequence_no_pads": {"loss_level": "sequence", "exclude_pads": True},
}
GAPS = (-1e4, -1e3, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e3, 1e4)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def tiny_model(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return RewardModel(TinyBackbone(dtype), TOKENIZER, **options)


def token_scores(model, input_ids, **kwargs):
    return (model.rwtransformer(input_ids, **kwargs)[0] * model.v_head.weight[0]).sum(-1)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_as_slow(model, input_ids, options, margin=None):
    fast = model(input_ids, margin=margin)
    options = options if margin is None else {**options, "margin": margin}
    loss, chosen, rejected = slow_forward(token_scores(model, input_ids), input_ids, **options)
    expected = {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}
    torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(fast["loss"], model), gradients(loss, model), rtol=1e-9, atol=1e-11)


def assert_finite_step(model, input_ids):
    result = model(input_ids)
    assert all(value.isfinite().all() for value in result.values())
    assert all(gradient.isfinite().all() for gradient in gradients(result["loss"], model))
    return result


# --- the whole forward against the slow reference ---


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("leading_pads", [0, 1])
@pytest.mark.parametrize("level", LEVELS)
def test_forward_equals_slow_reference(level, leading_pads, times):
    generator = torch.Generator().manual_seed(leading_pads)
    shapes = [(1, 2), (1, 7), (2, 5), (3, 12), (5, 3)]
    margins, smoothings, penalties = ("none", "number", "per pair"), (0.0, 0.2), (None, *SCORE_PENALTIES)
    options = itertools.product(range(times), margins, smoothings, penalties, KINDS)
    for seed, (_, margin_kind, smoothing, penalty, kind) in enumerate(options):
        pairs, length = shapes[seed % len(shapes)]
        new = {**LEVELS[level], "label_smoothing": smoothing, "score_penalty": penalty, "score_penalty_weight": 0.3}
        new["margin"] = 0.7 if margin_kind == "number" else 0.0
        model = tiny_model(seed, num_padding_at_beginning=leading_pads, **new)
        with torch.no_grad():
            model.v_head.weight.mul_(20)  # some scores reach beyond the barrier's knee
        margin = None
        if margin_kind == "per pair":
            margin = 3 * torch.rand(pairs, generator=generator, dtype=torch.float64)
        input_ids = random_pairs(generator, pairs, length, leading_pads, kind)
        assert_as_slow(model, input_ids, {"leading_pads": leading_pads, **new}, margin)


def test_reference_reaches_beyond_the_barrier_knee():
    sizes = []
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        model = tiny_model(seed)
        model.v_head.weight.data.mul_(20)
        sizes.append(model(random_pairs(generator, 5, 3))["chosen_mean_scores"].abs().max().item())
    assert min(sizes) < BARRIER_KNEE < max(sizes)


def test_per_pair_margin_replaces_the_number():
    input_ids = random_pairs(torch.Generator().manual_seed(1), 3, 8)
    with_number = tiny_model(margin=5.0)(input_ids, margin=torch.zeros(3))
    torch.testing.assert_close(with_number, tiny_model()(input_ids))


def test_integer_margins_are_taken():
    input_ids = random_pairs(torch.Generator().manual_seed(1), 3, 8)
    as_integers = tiny_model()(input_ids, margin=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(as_integers, tiny_model()(input_ids, margin=torch.tensor([1.0, 2.0, 3.0])))


def test_a_weight_without_a_penalty_changes_nothing():
    input_ids = random_pairs(torch.Generator().manual_seed(2), 3, 8)
    assert tiny_model(score_penalty_weight=0.1)(input_ids)["loss"] == tiny_model()(input_ids)["loss"]


def test_one_number_as_the_batchs_margin():
    input_ids = random_pairs(torch.Generator().manual_seed(2), 3, 8)
    expected = tiny_model()(input_ids, margin=torch.full((3, 1), 0.5))["loss"]
    assert tiny_model()(input_ids, margin=0.5)["loss"] == expected


# --- finite where upstream asserts or gives NaN ---


FIRST_TOKEN_DIFFERS = [[5, 6, 7, PAD], [6, 6, 8, 9]]
DIFFERS_AFTER_BOTH_ENDS = [[5, 6, PAD, 7], [5, 6, PAD, 8]]
ONE_EXTENDS_THE_OTHER = [[5, 6, 7, PAD], [5, 6, PAD, PAD]]
OPT_LEADING_PAD = [[PAD, 5, 6, 7], [PAD, 5, 8, PAD]]
ALL_PADS = [[PAD] * 4, [PAD] * 4]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("leading_pads", [0, 1])
@pytest.mark.parametrize(
    "rows",
    [FIRST_TOKEN_DIFFERS, DIFFERS_AFTER_BOTH_ENDS, ONE_EXTENDS_THE_OTHER, OPT_LEADING_PAD, ALL_PADS],
    ids=["first_token_differs", "differs_after_both_ends", "one_extends_the_other", "opt_leading_pad", "all_pads"],
)
def test_forward_is_finite_and_as_reference_on_odd_pairs(rows, leading_pads, level):
    model = tiny_model(num_padding_at_beginning=leading_pads, **LEVELS[level])
    assert_finite_step(model, torch.tensor(rows))
    assert_as_slow(model, torch.tensor(rows), {"leading_pads": leading_pads, **LEVELS[level]})


def test_pair_without_a_trained_token_falls_back_to_its_end_scores():
    result = tiny_model(exclude_pads=True)(torch.tensor(ONE_EXTENDS_THE_OTHER))
    gap = result["chosen_mean_scores"] - result["rejected_mean_scores"]
    assert gap.abs().item() > 1e-3
    torch.testing.assert_close(result["loss"], -torch.log(torch.sigmoid(gap)).mean())


def test_excluded_pads_get_no_gradient():
    rows = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 9, 7, PAD, PAD]])
    for exclude_pads, trained in [(True, [2, 3]), (False, [2, 3, 4, 5])]:
        model = tiny_model(exclude_pads=exclude_pads)
        kept = []
        model.v_head.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        loss = model(rows)["loss"]
        (gradient,) = torch.autograd.grad(loss, kept)
        assert gradient.squeeze(-1).ne(0).nonzero().tolist() == [[row, token] for row in (0, 1) for token in trained]


# --- stable at any gap and in any dtype ---


def at_least_float32(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def gap_scores(dtype):
    chosen = torch.tensor(GAPS, dtype=dtype, requires_grad=True)
    return chosen, torch.zeros_like(chosen, requires_grad=True)


def assert_finite_gradients(loss, *scores):
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), scores):
        assert gradient.isfinite().all()
        assert gradient.ne(0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [None, 3.0])
def test_pairwise_loss_is_finite_at_any_gap(dtype, smoothing, margin):
    chosen, rejected = gap_scores(dtype)
    loss = pairwise_loss(chosen, rejected, margin, smoothing)
    assert loss.dtype == at_least_float32(dtype)
    assert_finite_gradients(loss, chosen, rejected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_loss_is_linear_in_a_lost_gap(dtype):
    chosen, rejected = gap_scores(dtype)
    loss = pairwise_loss(chosen, rejected)
    gradient, opposite = torch.autograd.grad(loss.sum(), (chosen, rejected))
    torch.testing.assert_close(loss[:4].double(), -chosen[:4].double(), rtol=0, atol=1e-8)
    assert loss[-3:].abs().max() < 1e-40
    assert gradient[:3].tolist() == [-1, -1, -1]
    assert opposite[:3].tolist() == [1, 1, 1]
    assert gradient[GAPS.index(0.0)] == -0.5


def with_(margin, label_smoothing=0.0):
    return lambda chosen, rejected: pairwise_loss(chosen, rejected, margin, label_smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_span_loss_is_finite_at_any_gap(dtype):
    chosen, rejected = gap_scores(dtype)
    tokens = len(GAPS)
    loss = span_loss(chosen[None], rejected[None], torch.tensor([0]), torch.tensor([tokens]), with_(1.0, 0.1))
    assert loss.dtype == at_least_float32(dtype)
    assert loss.shape == (1,)
    assert_finite_gradients(loss, chosen, rejected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORE_PENALTIES)
def test_score_penalty_is_finite_at_any_gap(kind, dtype):
    chosen, rejected = gap_scores(dtype)
    chosen = (chosen + 1).detach().requires_grad_()
    penalty = score_penalty(kind, chosen, rejected)
    assert penalty.dtype == at_least_float32(dtype)
    assert penalty.shape == ()
    assert penalty.isfinite()
    (gradient,) = torch.autograd.grad(penalty, chosen)
    assert gradient.isfinite().all()
    assert gradient[0].ne(0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_returns_at_least_float32(dtype, level):
    input_ids = random_pairs(torch.Generator().manual_seed(3), 3, 8)
    result = assert_finite_step(
        tiny_model(dtype=dtype, score_penalty="l2", score_penalty_weight=0.1, **LEVELS[level]), input_ids
    )
    assert {value.dtype for value in result.values()} == {at_least_float32(dtype)}


@pytest.mark.parametrize("level", LEVELS)
def test_half_precision_model_survives_huge_scores(level):
    model = tiny_model(dtype=torch.float16, **LEVELS[level])
    model.v_head.weight.data.mul_(2000)
    input_ids = random_pairs(torch.Generator().manual_seed(4), 8, 8)
    for rows in (input_ids, input_ids.roll(8, 0)):
        result = assert_finite_step(model, rows)
        assert (result["chosen_mean_scores"] - result["rejected_mean_scores"]).abs().max() > 89


def test_scores_keep_what_a_half_precision_head_would_round_away():
    model = tiny_model(dtype=torch.bfloat16)
    model.v_head.weight.data.mul_(20)
    input_ids = random_pairs(torch.Generator().manual_seed(5), 4, 8)
    scores = model.forward_value(input_ids, return_value_only=True)
    hidden = model.rwtransformer(input_ids)[0].double()
    exact = (hidden * model.v_head.weight[0].double()).sum(-1)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("method", ["forward", "forward_value"])
def test_scores_stay_float32_under_autocast(method):
    model = tiny_model(dtype=torch.float32)
    input_ids = random_pairs(torch.Generator().manual_seed(5), 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(input_ids) if method == "forward" else model.forward_value(input_ids, prompt_length=2)
    assert {value.dtype for value in result.values()} == {torch.float32}


# --- numbers derived by hand, on three elements ---


@pytest.mark.parametrize("margin, expected", [(None, 0.5019243955612183), (3.0, 2.645728349685669)])
def test_worked_example(margin, expected):
    loss = pairwise_loss(torch.tensor(0.17402283847332), torch.tensor(-0.2538455128669739), margin)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_by_hand():
    gap = double(0, math.log(3), -math.log(3))  # σ: 1/2, 3/4, 1/4
    expected = double(
        math.log(2),
        -0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4),
        -0.8 * math.log(1 / 4) - 0.2 * math.log(3 / 4),
    )
    torch.testing.assert_close(pairwise_loss(gap + 2, double(2, 2, 2), label_smoothing=0.2), expected)
    torch.testing.assert_close(pairwise_loss(gap + 2, double(2, 2, 2), label_smoothing=double(0.2, 0.2, 0.2)), expected)


def test_margin_by_hand():
    chosen, rejected, margin = double(1, 2, 3), double(1, 1, 1), double(0, 1, 2 + math.log(3))
    expected = double(math.log(2), math.log(2), math.log(4))  # σ(−log 3) = 1/4
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margin), expected)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("center", (1 + 0 + 16) / 3),
        ("l2", (1 + 4 + 9 + 0 + 4 + 1) / 6),
        ("zero_sum", (5 / 6) ** 2),
        ("log_barrier", -math.log((4 * 6) * (3 * 7) * (2 * 8) * (5 * 5) * (3 * 7) * (4 * 6)) / 6),
    ],
)
def test_score_penalty_by_hand(kind, expected):
    assert score_penalty(kind, double(1, 2, 3), double(0, -2, 1)).item() == pytest.approx(expected)


def test_span_loss_by_hand():
    lead = math.log(3)
    chosen = double(9, 0, lead, 9).expand(3, 4)
    start, end = torch.tensor([1, 2, 3]), torch.tensor([3, 3, 3])
    expected = double((math.log(2) + math.log(4 / 3)) / 2, math.log(4 / 3), 0)
    torch.testing.assert_close(span_loss(chosen, torch.zeros_like(chosen), start, end), expected)


def test_span_loss_takes_a_margin_per_pair():
    chosen, rejected = double(1, 1, 1).expand(2, 3), double(0, 0, 0).expand(2, 3)
    start, end = torch.tensor([0, 1]), torch.tensor([3, 2])
    loss = span_loss(chosen, rejected, start, end, with_(double(1, 1 + math.log(3))[:, None]))
    torch.testing.assert_close(loss, double(math.log(2), math.log(4)))


# --- derivatives ---


def random_scores(*shape, scale=2.0):
    torch.manual_seed(0)
    return [(scale * torch.randn(shape, dtype=torch.float64)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck_pairwise_loss(smoothing):
    margin = double(0.5, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r, m: pairwise_loss(c, r, m, smoothing), (*random_scores(3), margin))


def test_gradcheck_span_loss():
    start, end = torch.tensor([0, 2, 4]), torch.tensor([5, 4, 4])
    assert torch.autograd.gradcheck(lambda c, r: span_loss(c, r, start, end, with_(0.5, 0.1)), random_scores(3, 5))


@pytest.mark.parametrize("kind", SCORE_PENALTIES)
def test_weighted_pairs_are_repeated_pairs(kind):
    """Weights 1/4 and 3/4: as if the second pair were there three times."""
    chosen, rejected = random_scores(2, scale=3.0)
    often = [0, 1, 1, 1]
    weighted = score_penalty(kind, chosen, rejected, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(weighted, score_penalty(kind, chosen[often], rejected[often]))


@pytest.mark.parametrize("kind", SCORE_PENALTIES)
def test_gradcheck_score_penalty(kind):
    assert torch.autograd.gradcheck(lambda c, r: score_penalty(kind, c, r), random_scores(3, scale=6.0))


def barrier_gradient(scores):
    scores = scores.requires_grad_()
    return torch.autograd.grad(log_barrier(scores).sum(), scores)[0]


def test_log_barrier_is_its_formula_inside():
    scores = torch.linspace(-4.95, 4.95, 101, dtype=torch.float64)
    torch.testing.assert_close(log_barrier(scores), -torch.log(5 - scores) - torch.log(5 + scores))
    assert log_barrier(double(0)).item() == pytest.approx(-math.log(25))


@pytest.mark.parametrize("sign", [-1, 1])
def test_log_barrier_is_once_differentiable_at_the_knee(sign):
    around = sign * double(4.95 - 1e-9, 4.95, 4.95 + 1e-9)
    slope = sign * 2 * 4.95 / (25 - 4.95**2)
    torch.testing.assert_close(log_barrier(around), -torch.log(25 - double(4.95, 4.95, 4.95) ** 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(barrier_gradient(around), slope * double(1, 1, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_log_barrier_is_linear_outside_and_pulls_back(sign):
    outside = sign * double(5, 15, 25, 1e4)
    slope = 2 * 4.95 / (25 - 4.95**2)
    values = log_barrier(outside)
    torch.testing.assert_close(values[1:3] - values[:2], 10 * slope * double(1, 1))
    gradient = barrier_gradient(outside)
    torch.testing.assert_close(gradient, sign * slope * torch.ones_like(gradient))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_outside_the_span_reaches_neither_loss_nor_gradient(smoothing):
    start, end = torch.tensor([1, 0, 2]), torch.tensor([3, 4, 2])
    inside = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    clean = random_scores(3, 4)
    poisoned = [scores.detach().where(inside, math.nan).requires_grad_() for scores in clean]
    losses = [span_loss(*scores, start, end, with_(0.5, smoothing)) for scores in (clean, poisoned)]
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][2] == 0
    expected, found = (torch.autograd.grad(loss.sum(), scores) for loss, scores in zip(losses, (clean, poisoned)))
    torch.testing.assert_close(found, expected)
    assert all(gradient[~inside].eq(0).all() for gradient in found)


# --- no synchronization, no loop over the batch ---


def every_option():
    for level, penalty in itertools.product(LEVELS, (None, *SCORE_PENALTIES)):
        new = {**LEVELS[level], "score_penalty": penalty, "score_penalty_weight": 0.1, "label_smoothing": 0.1}
        yield tiny_model(dtype=torch.float32, num_padding_at_beginning=1, margin=0.5, **new)


def test_forward_and_backward_run_on_tensors_without_data():
    for model in every_option():
        with FakeTensorMode(allow_non_fake_inputs=True):
            input_ids = torch.randint(VOCABULARY, (8, 6))
            gradients(model(input_ids)["loss"], model)
            gradients(model(input_ids, margin=torch.rand(4))["loss"], model)
            gradients(model.forward_value(input_ids, prompt_length=2)["chosen_end_scores"].sum(), model)


def test_tensors_without_data_refuse_to_synchronize():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.randint(VOCABULARY, (8, 6)).sum().item()


class OperatorLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
        self.boolean_indices = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names.append(name)
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            self.boolean_indices += any(index is not None and index.dtype == torch.bool for index in indices)
        return func(*args, **(kwargs or {}))


def train(model, input_ids):
    gradients(model(input_ids)["loss"], model)


def value(model, input_ids):
    model.forward_value(input_ids, prompt_length=2)


def operators(run, *args):
    with OperatorLog() as log:
        run(*args)
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "item"} & set(log.names)
    assert log.boolean_indices == 0
    return log.names


def test_number_of_operators_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    small, large = (random_pairs(generator, pairs, 9, 1) for pairs in (2, 32))
    for model in every_option():
        assert operators(train, model, small) == operators(train, model, large)
        assert operators(value, model, small) == operators(value, model, large)


def test_operator_log_sees_a_synchronization_and_a_boolean_index():
    flags = torch.tensor([True, False])
    with OperatorLog() as log:
        flags.any().item()
        torch.ones(2)[flags]
    assert "_local_scalar_dense" in log.names
    assert log.boolean_indices == 1


# --- forward_value ---


def answers(generator, rows, length, prompt_length, kind):
    ids = torch.randint(PAD + 1, VOCABULARY, (rows, length), generator=generator)
    for row in range(rows):
        if kind in ("left", "both"):
            ids[row, : int(torch.randint(prompt_length, (1,), generator=generator))] = PAD
        if kind in ("right", "both"):
            ids[row, int(torch.randint(prompt_length, length + 1, (1,), generator=generator)) :] = PAD
    return ids


@pytest.mark.parametrize("kind", ["left", "right", "both", "none"])
def test_forward_value_equals_slow_reference(kind):
    generator = torch.Generator().manual_seed(0)
    for seed, (rows, length) in enumerate(itertools.product((1, 4), range(2, 12))):
        for prompt_length in range(1, length):
            model = tiny_model(seed, num_padding_at_beginning=seed % 2)
            input_ids = answers(generator, rows, length, prompt_length, kind)
            result = model.forward_value(input_ids, prompt_length=prompt_length)
            assert result.keys() == {"values", "chosen_end_scores"}
            values = token_scores(model, input_ids)
            torch.testing.assert_close(result["values"], values)
            expected = slow_end_scores(values, input_ids, prompt_length)
            torch.testing.assert_close(result["chosen_end_scores"], expected)


def test_forward_value_of_an_empty_answer_reads_the_prompts_last_token():
    model = tiny_model()
    input_ids = torch.tensor([[PAD, 5, 6], [4, 5, 6]])
    result = model.forward_value(input_ids, prompt_length=3)
    torch.testing.assert_close(result["chosen_end_scores"], token_scores(model, input_ids)[:, -1])


def test_return_value_only_gives_the_values():
    model = tiny_model()
    input_ids = random_pairs(torch.Generator().manual_seed(0), 2, 6)
    values = model.forward_value(input_ids, return_value_only=True)
    torch.testing.assert_close(values, token_scores(model, input_ids))


def test_forward_value_takes_the_mask_second():
    backbone = Recorder()
    mask = torch.ones(4, 6)
    RewardModel(backbone, TOKENIZER).forward_value(torch.full((4, 6), 5), mask, return_value_only=True)
    assert backbone.seen["attention_mask"] is mask


@pytest.mark.parametrize("prompt_length", [0, -1])
def test_forward_value_refuses_no_prompt(prompt_length):
    with pytest.raises(ValueError, match="prompt_length"):
        tiny_model().forward_value(torch.full((2, 4), 5), prompt_length=prompt_length)


# --- what the backbone is given ---


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="gpt2", hidden_size=9)
        self.embedding = nn.Embedding(VOCABULARY, 9)
        self.seen = None
        self.checkpointing = None

    def keep(self, input_ids, **seen):
        self.seen = seen
        return (self.embedding(input_ids),)

    def forward(self, input_ids, attention_mask=None, head_mask=None, past_key_values=None, use_cache=True):
        return self.keep(
            input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    def gradient_checkpointing_enable(self, **kwargs):
        self.checkpointing = kwargs

    def gradient_checkpointing_disable(self):
        self.checkpointing = None


class MaskOnly(Recorder):
    def forward(self, input_ids, attention_mask=None):
        return self.keep(input_ids, attention_mask=attention_mask)


class TakesMoreThanItNames(Recorder):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return self.keep(input_ids, **kwargs)


class Wrapper(Recorder):
    def forward(self, *args, **kwargs):
        return self.keep(*args, **kwargs)


def call(model, method, **kwargs):
    input_ids = torch.full((4, 6), 5)
    if method == "forward":
        return model(input_ids, **kwargs)
    return model.forward_value(input_ids, prompt_length=2, **kwargs)


BOTH_METHODS = pytest.mark.parametrize("method", ["forward", "forward_value"])


@BOTH_METHODS
@pytest.mark.parametrize("use_cache", [False, True])
def test_keywords_that_hold_something_reach_the_backbone(method, use_cache):
    backbone = Recorder()
    given = {"attention_mask": torch.ones(4, 6), "head_mask": torch.ones(1, 2), "past_key_values": ()}
    call(RewardModel(backbone, TOKENIZER), method, use_cache=use_cache, **given)
    assert backbone.seen.pop("use_cache") is use_cache
    assert backbone.seen.keys() == given.keys()
    assert all(backbone.seen[name] is given[name] for name in given)


@BOTH_METHODS
def test_backbone_that_takes_no_cache_is_not_told_of_one(method):
    backbone = MaskOnly()
    mask = torch.ones(4, 6)
    call(RewardModel(backbone, TOKENIZER), method, attention_mask=mask, use_cache=False)
    assert backbone.seen == {"attention_mask": mask}


@BOTH_METHODS
@pytest.mark.parametrize("name", ["head_mask", "position_ids", "inputs_embeds", "past_key_values"])
def test_keyword_the_backbone_does_not_take_raises(name, method):
    with pytest.raises(TypeError, match=f"MaskOnly takes no {name}"):
        call(RewardModel(MaskOnly(), TOKENIZER), method, **{name: torch.ones(1)})


@BOTH_METHODS
def test_keyword_that_would_vanish_in_kwargs_raises(method):
    with pytest.raises(TypeError, match="TakesMoreThanItNames takes no head_mask"):
        call(RewardModel(TakesMoreThanItNames(), TOKENIZER), method, head_mask=torch.ones(1))


@BOTH_METHODS
def test_wrapper_that_names_nothing_is_given_what_holds_something(method):
    backbone = Wrapper()
    positions = torch.arange(6).expand(4, 6)
    call(RewardModel(backbone, TOKENIZER), method, position_ids=positions)
    assert backbone.seen == {"position_ids": positions, "use_cache": False}


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {**SIZES, "intermediate_size": 16}),
    "gpt2": (transformers.GPT2Config, {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "n_layer": 1}),
    "opt": (transformers.OPTConfig, {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 8}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, "intermediate_size": 16}),
    "bloom": (transformers.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 16, "n_head": 2, "n_layer": 1}),
    "qwen2": (transformers.Qwen2Config, {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1}),
    "bert": (transformers.BertConfig, {**SIZES, "intermediate_size": 16}),
}
SPECIAL_TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def real_model(family, dtype=torch.float32, **options):
    config_class, sizes = FAMILIES[family]
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(config_class(**sizes, **SPECIAL_TOKENS)).to(dtype).eval()
    return RewardModel(base, TOKENIZER, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_backbone_equals_slow_reference(family):
    model = real_model(family)
    seen = {}
    model.rwtransformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    input_ids = random_pairs(torch.Generator().manual_seed(0), 3, 8)
    mask = input_ids != PAD
    result = model(input_ids, attention_mask=mask)
    assert seen.keys() == {"attention_mask", "use_cache"}
    assert seen["attention_mask"] is mask
    assert seen["use_cache"] is False
    loss, chosen, rejected = slow_forward(token_scores(model, input_ids, attention_mask=mask), input_ids)
    expected = {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    result["loss"].backward()
    assert model.v_head.weight.grad.isfinite().all()
    assert model.v_head.weight.grad.ne(0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_real_backbone_forward_value(family):
    model = real_model(family)
    input_ids = answers(torch.Generator().manual_seed(0), 4, 8, 3, "right")
    mask = input_ids != PAD
    result = model.forward_value(input_ids, mask, prompt_length=3)
    values = token_scores(model, input_ids, attention_mask=mask)
    torch.testing.assert_close(result["values"], values, rtol=1e-5, atol=1e-6)
    expected = slow_end_scores(values, input_ids, 3)
    torch.testing.assert_close(result["chosen_end_scores"], expected, rtol=1e-5, atol=1e-6)


# --- attributes, head, state dict ---


@pytest.mark.parametrize("family", FAMILIES)
def test_head_width_and_config(family):
    model = real_model(family)
    width = 8 if family == "opt" else 16
    assert model.config is model.rwtransformer.config
    assert model.v_head.in_features == width
    if family == "opt":
        assert not hasattr(model.config, "n_embd")
    else:
        assert model.config.n_embd == width


def test_head_width_of_a_composite_config():
    backbone = TinyBackbone()
    backbone.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=9), hidden_size=77)
    assert RewardModel(backbone, TOKENIZER).v_head.in_features == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_keys(family):
    model = real_model(family)
    expected = {"v_head.weight"} | {f"rwtransformer.{key}" for key in model.rwtransformer.state_dict()}
    assert model.state_dict().keys() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_is_a_bias_free_linear_in_the_base_models_dtype(dtype):
    model = tiny_model(dtype=dtype)
    assert isinstance(model.v_head, nn.Linear)
    assert model.v_head.bias is None
    assert model.v_head.weight.shape == (1, 9)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_half_precision_backbone_scores_in_float32(dtype):
    model = real_model("llama", dtype)
    input_ids = random_pairs(torch.Generator().manual_seed(0), 3, 8)
    result = assert_finite_step(model, input_ids)
    assert model.v_head.weight.dtype == dtype
    assert {value.dtype for value in result.values()} == {torch.float32}


def test_attributes_its_callers_read():
    backbone = TinyBackbone()
    model = RewardModel(backbone, TOKENIZER, 1, True)
    assert model.rwtransformer is backbone
    assert model.config is backbone.config
    assert model.PAD_ID == PAD
    assert model.num_padding_at_beginning == 1
    assert model.compute_fp32_loss is True


def test_gradient_checkpointing_reaches_the_backbone():
    backbone = Recorder()
    model = RewardModel(backbone, TOKENIZER)
    model.gradient_checkpointing_enable()
    assert backbone.checkpointing == {}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert backbone.checkpointing == {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model.gradient_checkpointing_disable()
    assert backbone.checkpointing is None


def test_gradient_checkpointing_of_a_real_backbone():
    model = real_model("opt")
    model.gradient_checkpointing_enable()
    assert model.rwtransformer.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.rwtransformer.is_gradient_checkpointing


# --- refusals ---


@pytest.mark.parametrize(
    "option, message",
    [
        ({"loss_level": "word"}, "loss_level 'word'"),
        ({"score_penalty": "l1"}, "score_penalty 'l1'"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"label_smoothing": 0.6}, "label_smoothing 0.6"),
        ({"label_smoothing": math.nan}, "label_smoothing nan"),
        ({"margin": math.inf}, "margin inf"),
        ({"margin": math.nan}, "margin nan"),
        ({"score_penalty": "l2", "score_penalty_weight": math.inf}, "score_penalty_weight inf"),
        ({"score_penalty_weight": math.nan}, "score_penalty_weight nan"),
        ({"score_penalty": "l2", "score_penalty_weight": -1.0}, "score_penalty_weight -1.0"),
        ({"score_penalty": "l2"}, "score_penalty_weight 0.0"),
    ],
)
def test_constructor_refuses(option, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**option)


def test_constructor_refuses_a_config_without_a_width():
    backbone = TinyBackbone()
    backbone.config = SimpleNamespace(model_type="llama")
    with pytest.raises(ValueError, match="hidden_size"):
        RewardModel(backbone, TOKENIZER)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_constructor_takes_the_bounds_of_smoothing(smoothing):
    assert tiny_model(label_smoothing=smoothing).label_smoothing == smoothing


@pytest.mark.parametrize("shape", [(3, 4), (8,), (2, 2, 4)])
def test_forward_refuses_anything_but_an_even_number_of_rows(shape):
    with pytest.raises(ValueError, match=r"input_ids \("):
        tiny_model()(torch.full(shape, 5))


def test_unknown_penalty_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"'l1'.*center.*log_barrier"):
        score_penalty("l1", torch.zeros(2), torch.zeros(2))


def test_new_options_are_keyword_only():
    parameters = inspect.signature(RewardModel).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["base_model", "tokenizer", "num_padding_at_beginning", "compute_fp32_loss"]


def test_file_imports_torch_and_the_standard_library_only():
    modules = set()
    for node in ast.walk(ast.parse(Path(dropin.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules.add(node.module.split(".")[0])
    assert "torch" in modules
    assert modules - {"torch"} <= sys.stdlib_module_names
