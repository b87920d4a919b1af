# SPDX-License-Identifier: Apache-2.0
"""Compiled layers: scores and gradients, how often torch compiles, names of weights, and what is refused."""

import models
import pytest
import runs
import torch
import transformers
from torch._dynamo.utils import counters

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.errors import UserError
from reward_model.config.options import RunConfig
from reward_model.config.settings import resolve
from reward_model.data.comparisons import Comparison
from reward_model.models import attention
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, layers_of
from reward_model.training import compiling, engine
from reward_model.training.recompute import recompute_layers

SEPARATE, SLICES, DENSE = attention.SEPARATE, attention.ON_CPU[0], attention.DENSE
LENGTHS = range(12)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """As torch.compile traces it, without the minute that its code generator takes; all is as before afterwards."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    functions = attention.ALL_ATTENTION_FUNCTIONS
    functions.register(attention.SLICES, attention.sliced_attention)


def scorer_of(family, backend, layers=3):
    _, config_class, sizes = models.FAMILIES[family]
    config = getattr(transformers, config_class)(
        **sizes | {"num_hidden_layers": layers}, num_labels=1, pad_token_id=1, attention_dropout=0.0
    )
    torch.manual_seed(0)
    scorer = Scorer(transformers.AutoModelForSequenceClassification.from_config(config).train(), "last")
    scorer.backbone.set_attn_implementation(backend.attention or "sdpa")
    return scorer


def batch(number, backend):
    """Of 1 to 3 pairs, another length for each number."""
    ids = list(range(10, 300))
    answers = [ids[30 : 33 + number], ids[60 : 64 + 2 * number]]
    rows = [Comparison(ids[: 5 + number], answers, better=[0], worse=[1], margin=[0.0])] * (1 + number % 3)
    return collate(rows, Layout(backend.layout, 1, 16, backend.block))


def scores(scorer, given, backend):
    tokens = given.tokens
    mask = attention.attention_mask(given, backend, torch.float32)
    positions = None if backend is SEPARATE else tokens.position_ids
    return scorer(tokens.input_ids, mask, tokens.ends, position_ids=positions)


def passes(scorer, backend):
    """The scores of each length, and the gradients."""
    found = []
    for number in LENGTHS:
        given = scores(scorer, batch(number, backend), backend)
        given.sum().backward()
        found.append((given.detach(), {n: p.grad for n, p in scorer.named_parameters() if p.grad is not None}))
        scorer.zero_grad()
    return found


def assert_alike(first, second):
    for (scores_1, gradients_1), (scores_2, gradients_2) in zip(first, second, strict=True):
        torch.testing.assert_close(scores_1, scores_2, atol=1e-5, rtol=1e-4)
        assert gradients_1.keys() == gradients_2.keys()
        for name, gradient in gradients_1.items():
            torch.testing.assert_close(gradient, gradients_2[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"), [("llama", SEPARATE), ("llama", SLICES), ("llama", DENSE), ("gpt_neox", SLICES)]
)
def test_twelve_lengths_need_few_compilations(family, backend):
    scorer = scorer_of(family, backend)
    expected, names = passes(scorer, backend), list(scorer.state_dict())
    line = compiling.compile_layers(scorer, recomputes=False)
    assert line.startswith("3 layers are compiled")
    assert ("but for the attention" in line) is (backend is SLICES)
    assert_alike(expected, passes(scorer, backend))
    assert list(scorer.state_dict()) == names
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    scorer.eval()
    with torch.no_grad():
        for number in LENGTHS:
            scores(scorer, batch(number, backend), backend)
    assert counters["stats"]["unique_graphs"] <= 8


@pytest.mark.parametrize("backend", [SEPARATE, SLICES], ids=lambda backend: backend.name)
def test_with_lora(backend):
    scorer = scorer_of("llama", backend)
    add_lora(scorer, 4, 4, None)
    expected = passes(scorer.train(), backend)
    compiling.compile_layers(scorer, recomputes=False)
    assert_alike(expected, passes(scorer, backend))
    assert 1 <= counters["stats"]["unique_graphs"] <= 8


@pytest.mark.parametrize("backend", [SEPARATE, DENSE], ids=lambda backend: backend.name)
def test_recomputed_layers_are_compiled_whole(backend):
    scorer = scorer_of("llama", backend)
    expected = passes(scorer, backend)
    recompute_layers(scorer, reentrant=False, has_frozen_base=False, offload=False)
    compiling.compile_layers(scorer, recomputes=True)
    assert_alike(expected, passes(scorer, backend))
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def test_what_cannot_be_compiled_is_a_line(monkeypatch):
    scorer = scorer_of("llama", SLICES)
    with pytest.raises(UserError, match=r"^--compile and --gradient_checkpointing: .*; leave one of the two out$"):
        compiling.compile_layers(scorer, recomputes=True)
    assert all(layer._compiled_call_impl is None for layer in layers_of(scorer))
    del scorer.backbone.layers
    with pytest.raises(UserError, match=r"^--compile: LlamaModel has no list of layers"):
        compiling.compile_layers(scorer, recomputes=False)


def test_zero_3_is_refused_before_a_model_is_loaded():
    config = RunConfig.of(model_name_or_path="nowhere", zero_stage=3, compile=True)
    with pytest.raises(UserError, match=r"^--compile and ZeRO 3: .* take --zero_stage 2"):
        engine.build_scorer(resolve(config, "fp32", 1, 64, 100), 100)


@pytest.mark.parametrize(
    ("version", "is_old"), [("2.4.1+cu121", True), ("2.5.0", True), ("2.6.0", False), ("2.13.0", False)]
)
def test_an_old_torch_is_refused(monkeypatch, version, is_old):
    monkeypatch.setattr(torch, "__version__", version)
    if is_old:
        with pytest.raises(UserError, match=r"^--compile needs torch 2\.6 or later, this is 2\.[45]"):
            compiling.require_whole_layers(2)
    else:
        compiling.require_whole_layers(2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_is_as_one_that_is_not(demo, tmp_path, stage):
    flags = ["--zero_stage", stage, "--max_train_samples", 96, "--max_eval_samples", 24]
    how = {"launcher": "torchrun", "processes": 2, "timeout": 500}
    plain = runs.train(demo, tmp_path / "plain", *flags, **how)
    compiled = runs.train(demo, tmp_path / "compiled", *flags, "--compile", **how)
    assert "layers are compiled, but for the attention" in compiled.output
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5)
    assert compiled.final["gap_mean"] == pytest.approx(plain.final["gap_mean"], abs=1e-4)
