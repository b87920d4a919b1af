# SPDX-License-Identifier: Apache-2.0
"""FlexAttention, by which GPUs share prompts, trains on a CPU what separate rows train there: gradients, whole runs.

With PyTorch's reference for the operator: helpers/flex_on_cpu.py. Its kernels are tried in test_triton.py.
"""

import flex_on_cpu
import models
import pytest
import runs
import torch
from torch.nn.attention.flex_attention import create_block_mask

from reward_model.batching.collate import collate
from reward_model.data.comparisons import Comparison
from reward_model.models import attention
from reward_model.models.attention import ON_CUDA, SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.reward_model import pairwise_loss

FLEX = ON_CUDA[0]
FAMILIES = [family for family in [*models.DECODERS, *models.NO_CLASS] if family != "bloom"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, one_thread):
    flex_on_cpu.allow(monkeypatch.setattr)
    torch._dynamo.reset()
    yield
    attention._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Writes a tiny model of a family, once."""
    folders = {}

    def write(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            models.write(family, folders[family])
        return str(folders[family])

    return write


def comparisons():
    """A pair, a prompt without a token, a list of four, and responses of one token, in a row of several blocks."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(10, models.VOCABULARY, (length,), generator=generator).tolist()

    return [
        Comparison(ids(30), [ids(31), ids(17)], [0], [1], [0.0], prompt_hash=1),
        Comparison([], [ids(5), ids(40)], [1], [0], [0.0], prompt_hash=2),
        Comparison(ids(21), [ids(8), ids(1), ids(12), ids(2)], [0, 3, 1], [1, 2, 2], [0.0] * 3, prompt_hash=3),
        Comparison(ids(1), [ids(1), ids(1)], [0], [1], [0.0], prompt_hash=4),
    ]


def gradients(scorer, backend):
    """Scores, loss, and gradients by name."""
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), pad=0)
    own = scorer.backbone.config._attn_implementation
    forward.use(backend)
    batch = collate(comparisons(), forward.layout)
    scorer.zero_grad()
    scores = forward(batch, batch.tokens.ends)
    pairs = batch.pairs
    loss = (pairwise_loss(scores[pairs.better], scores[pairs.worse]) * pairs.weights).sum()
    loss.backward()
    scorer.backbone.set_attn_implementation(own)
    return scores.detach(), loss.detach(), {n: p.grad.clone() for n, p in scorer.named_parameters() if p.requires_grad}


def assert_same(scorer):
    """By separate rows and by FlexAttention; each gradient relative to the largest of its tensor."""
    scores, loss, separate = gradients(scorer, SEPARATE)
    assert scores.std() > 1e-3  # equal ones would prove nothing
    flex_scores, flex_loss, flex = gradients(scorer, FLEX)
    torch.testing.assert_close(flex_scores, scores, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(flex_loss, loss, rtol=2e-5, atol=2e-5)
    assert flex.keys() == separate.keys()
    largest = max(float(gradient.abs().max()) for gradient in separate.values())
    for name, gradient in separate.items():
        assert float((gradient - flex[name]).abs().max()) <= 2e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family, folder_of):
    assert_same(load_for_training(folder_of(family), torch.float32, seed=0, dropout=0.0).train())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_recomputation(reentrant, folder_of):
    scorer = load_for_training(folder_of("llama"), torch.float32, seed=0, dropout=0.0).train()
    scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    scorer.backbone.enable_input_require_grads()
    assert_same(scorer)


def test_gradients_with_lora(folder_of):
    scorer = add_lora(load_for_training(folder_of("qwen3"), torch.float32, seed=0, dropout=0.0), 4, 8, None).train()
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero as PEFT makes it: nothing would reach lora_A
    assert_same(scorer)


def test_a_wrong_mask_is_noticed(folder_of, monkeypatch):
    right = attention.attention_mask

    def causal(batch, backend, dtype):
        if backend is not FLEX:
            return right(batch, backend, dtype)
        size = batch.tokens.input_ids.shape[1]
        mask = create_block_mask(lambda row, head, query, key: query >= key, 1, None, size, size, device="cpu")
        mask.ndim = 4
        return mask

    monkeypatch.setattr(attention, "attention_mask", causal)
    with pytest.raises(AssertionError):
        assert_same(load_for_training(folder_of("llama"), torch.float32, seed=0, dropout=0.0).train())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--zero_stage 1",
        pytest.param("--zero_stage 3 --merge prompt --gradient_checkpointing --loss focal", marks=pytest.mark.slow),
    ],
)
def test_a_run_has_the_losses_of_slices(flags, demo, tmp_path, monkeypatch):
    """The whole of main.py, and what it says of its attention; the check at its start passes FlexAttention."""
    flags = [*flags.split(), "--max_train_samples", "96"]
    slices = runs.train(demo, tmp_path / "slices", *flags)
    flex = runs.train(demo, tmp_path / "flex", *flags, launcher="flex")
    assert "prompts are shared: slices attention" in slices.output
    assert "prompts are shared: flex attention" in flex.output
    assert len(flex.losses) > 3
    assert flex.losses == pytest.approx(slices.losses, abs=1e-5)
    assert flex.final["loss"] == pytest.approx(slices.final["loss"], abs=1e-5)


def test_it_is_compiled_for_one_length_and_then_for_all(folder_of):
    scorer = load_for_training(folder_of("llama"), torch.float32, seed=0, dropout=0.0).train()
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), pad=0)
    forward.use(FLEX)
    torch._dynamo.utils.counters.clear()
    for length in (9, 140, 300, 420, 600):
        batch = collate([Comparison([11] * length, [[12, 13], [14]], [0], [1], [0.0])], forward.layout)
        forward(batch, batch.tokens.ends).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
