# SPDX-License-Identifier: Apache-2.0
"""Recomputed layers: what they keep, where it waits, and that gradients do not change by it."""

import models
import pytest
import torch
import transformers
from flags import read

from reward_model.common.errors import UserError
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer
from reward_model.training import recompute

ROWS, TOKENS = 2, 12
FAMILIES = ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "gemma2", "bloom", "bert"]


@pytest.fixture
def moved(monkeypatch):
    """The tensors that go to the host."""
    found = []

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert pin_memory
            super().__init__(self.pack, lambda kept: kept.clone())

        def pack(self, tensor):
            found.append(tensor)
            return tensor.clone()

    monkeypatch.setattr(recompute, "save_on_cpu", Watched)
    return found


def scorer_of(family):
    _, config_class, sizes = models.FAMILIES[family]
    config = getattr(transformers, config_class)(**sizes, num_labels=1, pad_token_id=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return Scorer(model.train(), "classifier" if family in models.ENCODERS else "last")


def gradients(scorer):
    ids = torch.arange(10, 10 + ROWS * TOKENS).view(ROWS, TOKENS)
    torch.manual_seed(1)  # dropout
    scores = scorer(ids, torch.ones_like(ids), torch.tensor([7, 2 * TOKENS - 1]))
    (scores * torch.tensor([1.0, -2.0])).sum().backward()
    found = {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()
    return found


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layers_input_goes_to_the_host_and_gradients_stay(family, reentrant, lora, moved):
    scorer = scorer_of(family)
    recompute.recompute_layers(scorer, reentrant, bool(lora), offload=False)
    if lora:
        add_lora(scorer, lora, lora, None)
        scorer.train()
    expected = gradients(scorer)
    assert not moved
    recompute.keep_inputs_on_host(scorer)
    found = gradients(scorer)
    width, layers = scorer.config.hidden_size, scorer.config.num_hidden_layers
    states = [tensor for tensor in moved if tensor.shape == (ROWS, TOKENS, width)]
    assert len(states) == layers
    assert sum(tensor.numel() for tensor in moved) <= 1.1 * layers * ROWS * TOKENS * width  # nothing else of size
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_torchs_own_hooks_leave_gradients_as_they_are():
    scorer = scorer_of("llama")
    recompute.recompute_layers(scorer, False, False, offload=False)
    expected = gradients(scorer)
    recompute.keep_inputs_on_host(scorer)
    found = gradients(scorer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_gpu_nothing_moves(moved, caplog):
    scorer = scorer_of("llama")
    recompute.recompute_layers(scorer, False, False, offload=True)
    gradients(scorer)
    assert not moved
    assert "--offload_activations changes nothing here" in caplog.text


def test_on_a_gpu_inputs_move(moved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scorer = scorer_of("llama")
    recompute.recompute_layers(scorer, False, False, offload=True)
    monkeypatch.undo()
    assert all("_on_host" in layer._gradient_checkpointing_func.__qualname__ for layer in scorer.backbone.layers)


def test_what_cannot_be_done_is_a_line():
    scorer = scorer_of("llama")
    with pytest.raises(UserError, match=r"^--offload_activations: Llama.* of its own; leave the flag out$"):
        recompute.keep_inputs_on_host(scorer)  # nothing is recomputed
    scorer.unwrapped.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"^--gradient_checkpointing: Llama"):
        recompute.recompute_layers(scorer, False, False, offload=False)
    with pytest.raises(UserError, match=r"^--offload_activations needs --gradient_checkpointing"):
        read(["--model_name_or_path", "m", "--offload_activations"])
