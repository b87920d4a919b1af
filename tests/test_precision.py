# SPDX-License-Identifier: Apache-2.0
"""TF32: which modules see it, and when it would change nothing."""

import models
import pytest
import torch
import transformers

from reward_model.config.options import parse
from reward_model.models.scorer import Scorer, head_layer
from reward_model.training import precision


@pytest.fixture(autouse=True)
def torch_as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")


def scorer_of(family):
    _, config_class, sizes = models.FAMILIES[family]
    config = getattr(transformers, config_class)(**sizes, num_labels=1, pad_token_id=1)
    return Scorer(transformers.AutoModelForSequenceClassification.from_config(config), "last")


def seen(scorer):
    """Class of a module → torch's setting while it computes, for those that multiply."""
    found = {}

    def look(module, *_):
        found.setdefault(type(module).__name__, set()).add(torch.get_float32_matmul_precision())

    hooks = [module.register_forward_pre_hook(look) for module in scorer.modules()]
    ids = torch.arange(10, 18).view(1, 8)
    scores = scorer(ids, torch.ones_like(ids), torch.tensor([7]))
    found["backward"] = {torch.get_float32_matmul_precision()}
    scores.sum().backward()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_layers_multiply_in_tf32_and_head_and_positions_do_not(family):
    scorer = scorer_of(family).train()
    precision.use_tf32(scorer)
    found = seen(scorer)
    rotary = [name for name in found if name.endswith("RotaryEmbedding")]
    layers = [name for name in found if name.endswith(("Attention", "MLP"))]
    assert rotary
    assert layers
    assert all(found[name] == {"highest"} for name in (*rotary, type(head_layer(scorer)).__name__) if name != "Linear")
    assert all(found[name] == {"high"} for name in (*layers, "backward"))


def test_the_head_is_exact():
    scorer = scorer_of("llama").train()
    precision.use_tf32(scorer)
    at_head = []
    head_layer(scorer).register_forward_pre_hook(lambda *_: at_head.append(torch.get_float32_matmul_precision()))
    seen(scorer)
    assert at_head == ["highest"]


def test_an_evaluation_is_exact():
    scorer = scorer_of("llama").train()
    precision.use_tf32(scorer)
    seen(scorer)
    assert set().union(*seen(scorer.eval()).values()) == {"highest"}


def test_without_the_flag_torch_is_left_alone():
    assert not parse(["--model_name_or_path", "m"]).engine.tf32
    assert set().union(*seen(scorer_of("llama").train()).values()) == {"highest"}


@pytest.mark.parametrize(
    ("dtype", "is_there", "capability", "words"),
    [
        ("bf16", True, (9, 0), "multiply in bf16"),
        ("fp32", False, None, "no CUDA GPU"),
        ("fp32", True, (7, 5), "older than compute capability 8.0"),
        ("fp32", True, (8, 0), ""),
        ("fp32", True, (12, 0), ""),
    ],
)
def test_it_says_where_it_changes_nothing(monkeypatch, caplog, dtype, is_there, capability, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    scorer = scorer_of("llama").train()
    precision.set_tf32(scorer, dtype)
    assert words in caplog.text
    assert len(caplog.records) == bool(words)
    assert seen(scorer)["LlamaMLP"] == {"highest" if words else "high"}
