# SPDX-License-Identifier: Apache-2.0
"""Responses that share a prompt get the scores, losses and gradients that they have in rows of their own."""

import dataclasses
from types import SimpleNamespace

import models
import pytest
import torch

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.errors import UserError
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
VARLEN = ON_CUDA[1]
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
        return disagreement(SimpleNamespace(states_of=hidden), way, TEXTS)


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

    def states_of(self, batch, way, training):
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


def forward_of(scorer, dtype=torch.float32):
    return ForwardPass(scorer, scorer, dtype, torch.device("cpu"), 0)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(choice, "first_text", lambda text: text)
    monkeypatch.setattr(choice, "largest", lambda value: value)


OTHERS = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 16, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 16, "head_dim": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": 16, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {"local_attention": 16}),
    "electra": ("ElectraModel", "ElectraConfig", {"embedding_size": 32}),
}
WINDOWS = ["mistral", "gemma3", "gpt_oss"]
ENCODERS = ["bert", "roberta", "ernie", "electra", "modernbert"]


@pytest.fixture(scope="module", autouse=True)
def other_families():
    with pytest.MonkeyPatch.context() as patch:
        for name, (model, config_class, sizes) in OTHERS.items():
            patch.setitem(models.FAMILIES, name, (model, config_class, models.GROUPED | sizes))
        yield


@pytest.mark.parametrize("family", WINDOWS)
def test_texts_longer_than_a_sliding_window(family, scorer_of, one_rank):
    """gpt_oss has sinks, too."""
    forward = forward_of(scorer_of(family))
    assert attention.window(forward.scorer.config) == 16
    assert forward.choose_attention(longest=50) == "prompts are shared: slices attention"
    long = Texts(IDS, 0, window=16, longest=50)
    with torch.no_grad():
        for way in (SLICES, PACKED):
            assert choice.window_disagreement(forward, way, long) < 1e-5
    assert forward.attention.slides


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_gradients_beyond_a_window(family, scorer_of):
    scorer = scorer_of(family).train()
    rows = [Comparison([*IDS[:30]], [IDS[30:40], IDS[40:43]], [0], [1], [0.0])]
    found = []
    for way in (SEPARATE, SLICES, PACKED):
        scorer.zero_grad()
        run(scorer, way, rows=rows)[0].sum().backward()
        found.append({name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        for other in found[1:]:
            assert float((gradient - other[name]).abs().max()) <= 2e-5 * float(gradient.abs().max()) + 1e-6, name


def test_a_window_that_an_attention_function_is_not_told_of_pads(scorer_of, one_rank):
    """Llama 4 attends within chunks, of which its mask alone knows."""
    said = forward_of(scorer_of("llama4")).choose_attention(longest=50)
    assert said.startswith("prompts are not shared, each answer has a padded row of its own (not slices: differs by")
    assert "not dense: the longest text, 50 tokens, is beyond the attention's window" in said


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_need_no_pads(family, scorer_of, one_rank):
    scorer = scorer_of(family)
    forward = forward_of(scorer)
    assert forward.choose_attention(longest=40) == (
        "prompts are not shared, answers are in one row without pads: varlen attention"
    )
    found = []
    for way in (SEPARATE, PACKED):
        forward.use(way)
        scorer.zero_grad()
        batch = collate(comparisons(), forward.layout)
        scores = forward(batch, batch.tokens.ends)
        scores.square().sum().backward()
        found.append((scores.detach(), {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}))
    assert found[0][0].std() > 1e-4
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert float((gradient - found[1][1][name]).abs().max()) <= 1e-4 * float(gradient.abs().max()) + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_mean_pooling_needs_no_pads(family, scorer_of, one_rank, tmp_path):
    models.write(family, tmp_path)
    forward = forward_of(load_for_training(str(tmp_path), torch.float32, seed=0, pooling="mean", dropout=0.0))
    assert "without pads: varlen" in forward.choose_attention(longest=40)
    scores = []
    for way in (SEPARATE, PACKED):
        forward.use(way)
        batch = collate(comparisons(), forward.layout)
        scores.append(forward(batch, batch.tokens.ends))
    assert scores[0].std() > 1e-4
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_deberta_pads_and_says_why(scorer_of, one_rank):
    said = forward_of(scorer_of("deberta")).choose_attention(longest=40)
    assert said.startswith("prompts are not shared, each answer has a padded row of its own (not varlen: ")


def kernel(query, key, value, begins, begins_of_keys, longest, longest_key, *, scale, window_size, enable_gqa):
    """FlashAttention's function with its arguments and its meaning of windows, text by text."""
    assert begins.dtype == torch.int32
    assert begins is begins_of_keys
    lengths = begins.diff().tolist()
    assert begins[0] == 0
    assert (sum(lengths), max(lengths)) == (len(query), longest)
    assert longest == longest_key
    outputs = []
    for q, k, v in zip(*(states.split(lengths) for states in (query, key, value))):
        i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
        behind, ahead = (len(q) if size < 0 else size for size in window_size)
        sees = (j >= i - behind) & (j <= i + ahead)
        parts = (states.transpose(0, 1) for states in (q, k, v))
        options = {"attn_mask": sees, "scale": scale, "enable_gqa": enable_gqa}
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*parts, **options).transpose(0, 1))
    return torch.cat(outputs)


def first_kernel(query, key, value, begins, begins_of_keys, longest, longest_key, is_causal=False):
    """As torch 2.10 has it."""
    options = {"scale": None, "window_size": (-1, 0 if is_causal else -1), "enable_gqa": False}
    return kernel(query, key, value, begins, begins_of_keys, longest, longest_key, **options)


@pytest.fixture
def kernel_for_varlen(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    return lambda other: monkeypatch.setattr(varlen, "varlen_attn", other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bert", "modernbert"])
def test_varlen_calls_the_kernel_rightly(family, scorer_of, kernel_for_varlen, one_rank):
    forward = forward_of(scorer_of(family))
    fault = choice._fault(VARLEN, forward, torch.float32, Texts(IDS, 0, attention.window(forward.scorer.config), 50))
    assert fault == ""


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_varlen_calls_the_kernel_of_an_older_torch_rightly(family, scorer_of, kernel_for_varlen):
    kernel_for_varlen(first_kernel)
    forward = forward_of(scorer_of(family))
    assert choice._fault(VARLEN, forward, torch.float32, TEXTS) == ("" if family != "gemma3" else WITHOUT_WINDOW)


WITHOUT_WINDOW = f"torch {torch.__version__}'s varlen_attn has no sliding window"


def test_a_scale_and_grouped_heads_for_an_older_torch(kernel_for_varlen):
    query, key = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    begins = torch.tensor([0, 3, 7], dtype=torch.int32).expand(1, 1, 4, -1)
    found = []
    for function in (kernel, first_kernel):
        kernel_for_varlen(function)
        found.append(attention.varlen_attention(torch.nn.Module(), query, key, key, begins, scaling=0.3)[0])
    torch.testing.assert_close(*found)
    assert found[0].shape == (1, 7, 4, 8)


def test_varlen_refuses_what_the_kernel_does_not_know(scorer_of, kernel_for_varlen):
    with torch.no_grad():
        assert "softcap" in choice._fault(VARLEN, forward_of(scorer_of("gemma2")), torch.float32, TEXTS)
        assert "s_aux" in choice._fault(VARLEN, forward_of(scorer_of("gpt_oss")), torch.float32, TEXTS)


@pytest.mark.parametrize("way", ON_CPU, ids=lambda way: way.name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_half_precision_is_judged_by_float32(family, way, scorer_of):
    forward = forward_of(scorer_of(family, torch.bfloat16), torch.bfloat16)
    with torch.no_grad():
        errors = forward.rounding(TEXTS.small(way), way)
        assert len(errors) == 2
        assert all(1e-5 < error < 0.05 for error in errors)
        assert choice.rounding_ratio(forward, way, TEXTS) <= choice.FURTHER


def test_an_attention_that_rounds_more_than_separate_rows_is_refused(scorer_of, monkeypatch):
    """An error of 2 %, too small for the tolerance of states that pass through many layers."""
    right = attention.sliced_attention

    def coarse(*args, **options):
        output, _ = right(*args, **options)
        return output * 1.02, None

    forward = forward_of(scorer_of("llama", torch.bfloat16), torch.bfloat16)
    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, attention.SLICES, coarse)
    with torch.no_grad():
        assert choice.disagreement(forward, SLICES, TEXTS)[0] < choice.TOLERANCES[torch.bfloat16]
        assert "times as far from float32 as separate rows are" in choice._fault(SLICES, forward, torch.bfloat16, TEXTS)


class Timed(Stub):
    """A pass takes so many seconds, after a first one."""

    def __init__(self, seconds, **faults):
        super().__init__(**faults)
        self.takes, self.calls = seconds, []

    def seconds(self, batches, backend):
        self.calls.append(backend.name)
        taken = self.takes[backend.name]
        if isinstance(taken, Exception):
            raise taken
        return taken * len(batches)


def test_the_fastest_of_those_that_are_right_is_taken(one_rank):
    probe = Timed({"slices": 0.5, "varlen": 0.25, "separate": 1.0}, dense=1.1)
    made = choice.choose(ON_CPU, probe, torch.float32, TEXTS, lambda backend: [TEXTS.small(backend)] * 2)
    assert made.backend is PACKED
    assert probe.calls == ["slices", "varlen", "separate"] * (1 + choice.ROUNDS)  # in turn, and once before it counts
    assert str(made) == (
        "prompts are not shared, answers are in one row without pads: varlen attention (a row of the data takes slices "
        "250 ms, varlen 125 ms, separate 500 ms; not dense: differs by 0.1 from separate rows)"
    )


def test_one_that_has_no_room_for_the_run_s_own_batches_is_not_taken(one_rank):
    probe = Timed({"slices": torch.OutOfMemoryError("CUDA out of memory."), "dense": 0.3, "varlen": 0.4, "separate": 1})
    made = choice.choose(ON_CPU, probe, torch.float32, TEXTS, lambda backend: [TEXTS.small(backend)])
    assert made.backend is DENSE
    assert "not slices: CUDA out of memory." in str(made)


def test_the_first_that_is_right_is_taken_if_none_can_be_timed(one_rank):
    none = torch.OutOfMemoryError("CUDA out of memory.")
    probe = Timed(dict.fromkeys(("slices", "dense", "varlen", "separate"), none))
    made = choice.choose(ON_CPU, probe, torch.float32, TEXTS, lambda backend: [TEXTS.small(backend)])
    assert made.backend is SLICES
    assert "not separate: CUDA out of memory." in str(made)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_seconds_leave_no_gradients(reentrant, scorer_of):
    scorer = scorer_of("llama")
    forward = forward_of(scorer)
    if reentrant is not None:
        scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert forward.recomputes_reentrantly == (reentrant is True)
    for way in (SLICES, SEPARATE):
        assert forward.seconds([TEXTS.small(way)], way) > 0
    assert all(parameter.grad is None for parameter in scorer.parameters())


def test_a_wanted_attention_is_taken_or_refused(scorer_of, one_rank):
    forward = forward_of(scorer_of("gpt2"))
    assert "varlen attention" in forward.choose_attention(20, "varlen")
    assert forward.attention is PACKED
    assert "padded row of its own" in forward.choose_attention(20, "separate")
    with pytest.raises(UserError, match=r"--attention slices: .*leave the flag out"):
        forward_of(scorer_of("bloom")).choose_attention(20, "slices")
    with pytest.raises(UserError, match="--attention slices: this model is scored at more than the last token"):
        forward_of(scorer_of("bert")).choose_attention(20, "slices")


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
