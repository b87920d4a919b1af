# SPDX-License-Identifier: Apache-2.0
"""Responses that share a prompt get the scores, losses and gradients that they have in rows of their own."""

import dataclasses
from types import SimpleNamespace

import models
import pytest
import torch

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.data.comparisons import Comparison
from reward_model.models import attention
from reward_model.models import attention_choice as choice
from reward_model.models.attention import DENSE, ON_CPU, ON_CUDA, SEPARATE
from reward_model.models.attention_choice import Texts, disagreement
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.reward_model import pairwise_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SLICES, _, PACKED = ON_CPU
FLEX, VARLEN, _ = ON_CUDA
SHARES = [family for family in [*models.DECODERS, *models.NO_CLASS] if family != "bloom"]


@pytest.fixture(scope="module")
def scorer_of(tmp_path_factory):
    """Loads a tiny model of a family, afresh each time."""

    def load(family, dtype=torch.float32):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            models.write(family, folders[family])
        scorer = load_for_training(str(folders[family]), dtype, seed=0, dropout=0.0)
        scorer.own_attention = scorer.backbone.config._attn_implementation
        return scorer

    folders = {}
    return load


def comparisons():
    """Three prompts: one without a token, a list of four, and responses of one token."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(10, models.VOCABULARY, (length,), generator=generator).tolist()

    return [
        Comparison(ids(11), [ids(7), ids(4)], [0], [1], [0.0], prompt_hash=1),
        Comparison([], [ids(5), ids(9)], [1], [0], [0.0], prompt_hash=2),
        Comparison(ids(6), [ids(3), ids(1), ids(8), ids(2)], [0, 3, 1], [1, 2, 2], [0.0] * 3, prompt_hash=3),
        Comparison(ids(1), [ids(1), ids(1)], [0], [1], [0.0], prompt_hash=4),
    ]


def run(scorer, way, dtype=torch.float32, states=False, rows=None):
    """End scores of all responses, and the batch that they came from."""
    scorer.backbone.set_attn_implementation(way.attention or scorer.own_attention)
    batch = collate(rows or comparisons(), Layout(way.layout, pad=0, block=way.block))
    tokens = batch.tokens
    positions = None if way is SEPARATE else tokens.position_ids
    mask = attention.attention_mask(batch, way, dtype)
    return scorer(tokens.input_ids, mask, tokens.ends, positions, states=states), batch


def gradients(scorer, way, dtype=torch.float32):
    """Loss and gradients by name, in float32."""
    scorer.zero_grad()
    scores, batch = run(scorer, way, dtype)
    pairs = batch.pairs
    loss = (pairwise_loss(scores[pairs.better], scores[pairs.worse]) * pairs.weights).sum()
    loss.backward()
    found = {name: p.grad.float().clone() for name, p in scorer.named_parameters() if p.grad is not None}
    return scores.detach(), loss.detach(), found


def assert_same(one, other, tolerance):
    """Scores and loss, and each gradient relative to the largest of its tensor."""
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)
    assert one[2].keys() == other[2].keys()
    largest = max(float(g.abs().max()) for g in one[2].values())
    for name, gradient in one[2].items():
        assert float((gradient - other[2][name]).abs().max()) <= tolerance * largest, name


CASES = [(family, way) for family in SHARES for way in ON_CPU]
NAMES = [f"{family}-{way.name}" for family, way in CASES]


@pytest.mark.parametrize(("family", "way"), CASES, ids=NAMES)
def test_scores_loss_and_gradients(family, way, scorer_of):
    scorer = scorer_of(family).train()
    separate = gradients(scorer, SEPARATE)
    assert separate[0].std() > 1e-3  # the scores differ: equal ones would prove nothing
    assert_same(separate, gradients(scorer, way), 2e-5)


@pytest.mark.parametrize("way", [SLICES, DENSE], ids=lambda way: way.name)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(way, reentrant, scorer_of):
    scorer = scorer_of("llama").train()
    separate = gradients(scorer, SEPARATE)
    scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    scorer.backbone.enable_input_require_grads()
    assert_same(separate, gradients(scorer, way), 2e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen3", "cohere"])
def test_lora(family, scorer_of):
    scorer = add_lora(scorer_of(family), 4, 8, None).train()
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero as PEFT makes it: nothing would reach lora_A
    separate = gradients(scorer, SEPARATE)
    assert any("lora_A" in name and g.abs().max() > 0 for name, g in separate[2].items())
    for way in (SLICES, DENSE):
        assert_same(separate, gradients(scorer, way), 2e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_bfloat16(family, scorer_of):
    """Relative to the float32 model, a shared row is no further off than separate rows are."""
    exact = gradients(scorer_of(family).train(), SEPARATE)[0]
    scorer = scorer_of(family, torch.bfloat16).train()
    own = (gradients(scorer, SEPARATE, torch.bfloat16)[0] - exact).norm()
    assert own > 0
    for way in (SLICES, DENSE):
        assert (gradients(scorer, way, torch.bfloat16)[0] - exact).norm() <= 2 * own


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox", "gemma2", "cohere"])
def test_flex_attention_gives_the_same_states(family, scorer_of):
    """Uncompiled, without gradients: FlexAttention has no backward pass on a CPU. tests/gpu trains with it."""
    scorer = scorer_of(family).eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        separate, flex = (run(scorer, way, states=True)[0] for way in (SEPARATE, FLEX))
    torch.testing.assert_close(flex, separate, rtol=1e-4, atol=1e-4)


def test_attention_dropout_is_applied(scorer_of):
    scorer = scorer_of("gpt2").train()
    for block in scorer.backbone.h:
        block.attn.attn_dropout.p = 0.5
    first, second = run(scorer, SLICES)[0], run(scorer, SLICES)[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(run(scorer.eval(), SLICES)[0], run(scorer, SEPARATE)[0], rtol=1e-4, atol=1e-4)


def test_the_dense_mask_by_hand():
    rows = [Comparison([1], [[2, 3], [4]], [0], [1], [0.0]), Comparison([5], [[6], [7]], [0], [1], [0.0])]
    mask = attention.attention_mask(collate(rows, Layout("shared", pad=0)), DENSE, torch.bfloat16)
    assert mask.shape == (2, 1, 4, 4)
    assert mask.dtype == torch.bfloat16
    # prompt, two of the first response, one of the second; the pad of the shorter row sees itself
    assert (mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert (mask[1, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert set(mask.flatten().tolist()) == {0.0, float("-inf")}


IDS = torch.randint(10, models.VOCABULARY, (60,), generator=torch.Generator().manual_seed(5)).tolist()
TEXTS = Texts(IDS, 0)


def checked(scorer, way, change=lambda tokens: tokens):
    """:func:`disagreement` of a way whose tokens were tampered with."""

    def hidden(batch, chosen, training):
        scorer.backbone.set_attn_implementation(chosen.attention or scorer.own_attention)
        batch = dataclasses.replace(batch, tokens=batch.tokens if chosen is SEPARATE else change(batch.tokens))
        tokens, mask = batch.tokens, attention.attention_mask(batch, chosen, torch.float32)
        positions = None if chosen is SEPARATE else tokens.position_ids
        return scorer(tokens.input_ids, mask, tokens.ends, positions, states=True)

    with torch.no_grad():
        return disagreement(SimpleNamespace(states=hidden), way, TEXTS)


@pytest.mark.parametrize(("family", "way"), CASES, ids=NAMES)
def test_the_check_passes_what_is_right(family, way, scorer_of):
    difference, leak = checked(scorer_of(family).eval(), way)
    assert difference < 1e-5
    assert leak == 0.0


def merged_responses(tokens):
    """A response sees those before it."""
    has_prompt = tokens.prompt_end > tokens.prompt_begin
    return dataclasses.replace(tokens, begin=torch.where(has_prompt, tokens.prompt_begin, tokens.begin))


def merged_rows(tokens):
    """A comparison sees those before it."""
    return dataclasses.replace(tokens, prompt_begin=torch.zeros_like(tokens.prompt_begin))


def restarted_positions(tokens):
    prompt = int(tokens.sizes[1])
    return dataclasses.replace(tokens, position_ids=(tokens.position_ids - prompt).clamp(min=0))


def running_positions(tokens):
    return dataclasses.replace(tokens, position_ids=torch.arange(tokens.input_ids.shape[1])[None])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_check_finds_a_leak_between_responses(family, scorer_of):
    difference, leak = checked(scorer_of(family).eval(), DENSE, merged_responses)
    assert leak > 100 * choice.LEAK
    assert difference > choice.TOLERANCES[torch.float32]


@pytest.mark.parametrize("change", [restarted_positions, running_positions])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_check_finds_wrong_positions(family, change, scorer_of):
    difference, _ = checked(scorer_of(family).eval(), DENSE, change)
    assert difference > 10 * choice.TOLERANCES[torch.float32]


def test_the_check_finds_a_leak_between_comparisons(scorer_of):
    packed = dataclasses.replace(DENSE, layout="packed")
    assert checked(scorer_of("llama").eval(), packed)[0] < 1e-5
    assert checked(scorer_of("llama").eval(), packed, merged_rows)[1] > 100 * choice.LEAK


def test_bloom_refuses(scorer_of):
    for way in ON_CPU:
        with pytest.raises(Exception):  # noqa: B017  (whatever it raises, the trainer falls back)
            checked(scorer_of("bloom").eval(), way)


class Stub:
    """States (n, 2) that a way gets wrong as told: by a factor, by what another response holds, or by raising."""

    def __init__(self, **faults):
        self.faults = faults

    def states(self, batch, way, training):
        fault = self.faults.get(way.name)
        if isinstance(fault, Exception) and training:
            raise fault
        states = torch.ones(len(batch.tokens.ends), 2)
        if fault == "leak":
            return states + 2e-6 * batch.tokens.input_ids[0, 9]  # the first response's first token
        return states * (fault if isinstance(fault, float) else 1.0)

    def gradient(self, batch, way):
        if self.faults.get(way.name) == "no room":
            raise RuntimeError("out of resource: shared memory, Required: 147456\nmore")
        return torch.ones(3, 2) * (1.5 if self.faults.get(way.name) == "gradient" else 1.0)


@pytest.mark.parametrize(
    ("faults", "chosen", "said"),
    [
        ({}, "slices", "prompts are shared: slices attention"),
        (
            {"slices": 1.1},
            "dense",
            "prompts are shared: dense attention (not slices: differs by 0.1 from separate rows)",
        ),
        (
            {"slices": "no room"},
            "dense",
            "prompts are shared: dense attention (not slices: out of resource: shared memory, Required: 147456)",
        ),
        ({"slices": "gradient"}, "dense", "not slices: gradients differ by 0.5 from those of separate rows"),
        (
            {"slices": float("nan"), "dense": "leak"},
            "separate",
            "slices: differs by nan from separate rows; not dense: an",
        ),
        ({"slices": ValueError("no\ndropout"), "dense": 0.5}, "separate", "slices: no; not dense: differs by 0.5"),
    ],
)
def test_choose(faults, chosen, said, monkeypatch):
    monkeypatch.setattr(choice, "first_text", lambda text: text)  # of one rank
    made = choice.choose(ON_CPU[:2], Stub(**faults), torch.float32, TEXTS)
    assert made.backend.name == chosen
    assert said in str(made)


def test_one_rank_that_refuses_decides_for_all(monkeypatch):
    monkeypatch.setattr(choice, "first_text", lambda text: "out of memory")
    assert choice.choose(ON_CPU, Stub(), torch.float32, TEXTS).backend is SEPARATE


@pytest.mark.parametrize(("family", "way"), CASES, ids=NAMES)
def test_gradients_of_the_check_are_those_of_separate_rows(family, way, scorer_of):
    scorer = scorer_of(family)
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), 0)
    with torch.no_grad():
        apart = choice.gradient_disagreement(forward, way, TEXTS)
        assert 0 <= apart < 1e-4
    assert all(parameter.grad is None for parameter in scorer.parameters())


def test_gradients_of_a_wrong_mask_differ(scorer_of, monkeypatch):
    scorer = scorer_of("llama")
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), 0)
    right = attention.attention_mask

    def leaky(batch, backend, dtype):
        changed = dataclasses.replace(batch, tokens=merged_responses(batch.tokens))
        return right(batch if backend is SEPARATE else changed, backend, dtype)

    monkeypatch.setattr(attention, "attention_mask", leaky)
    assert choice.gradient_disagreement(forward, DENSE, TEXTS) > 0.01


def config(**values):
    made = SimpleNamespace(**values)
    made.get_text_config = lambda: made
    return made


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, float("inf")),
        ({"sliding_window": None}, float("inf")),
        ({"sliding_window": 64}, 64),  # Mistral: no layer_types, every layer slides
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, float("inf")),  # Qwen2: set, but not used
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),  # Gemma 2
        ({"attention_chunk_size": 32, "layer_types": ["chunked_attention"]}, 32),  # Llama 4
    ],
)
def test_window(values, limit):
    assert attention.window(config(**values)) == limit
