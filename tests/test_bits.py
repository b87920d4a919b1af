# SPDX-License-Identifier: Apache-2.0
"""A base in 4 or 8 bits, and an optimizer in 8 bits: what is trained, merged, saved and planned."""

import json
from importlib import metadata

import architectures
import models
import pytest
import runs
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from reward_model.common.errors import UserError
from reward_model.config.groups import ModelConfig
from reward_model.config.options import RunConfig, require_bitsandbytes
from reward_model.config.settings import resolve
from reward_model.inference import load
from reward_model.models import saving as checkpoint
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.quantization import dequantized, is_quantized
from reward_model.models.scorer import count, embedding_rows, head_layer, resize_embedding
from reward_model.planning.activations import build_on_meta, count_parameters
from reward_model.training.engine import _optimizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[bits]'")
pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "n_embd": 64, "ffn_dim": 96}  # a block of 4 bits has 64 weights
FAMILIES = ["llama", "gpt2", "opt", "gemma2", "deberta", "cohere"]


def quantized(family, folder, bits, dtype=torch.float32, **options):
    tokenizer = models.write(family, folder, **WIDE)
    scorer = load_for_training(str(folder), dtype, seed=3, bits=bits, **options)
    for config in (scorer.config, scorer.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    return scorer, tokenizer


def moved(scorer, module_name=None):
    """With adapters, which have been trained."""
    add_lora(scorer, dim=4, alpha=8, module_name=module_name)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return scorer.eval()


def score(scorer, batch):
    at = torch.arange(len(batch.ends)) * batch.input_ids.shape[1] + batch.ends
    return scorer(batch.input_ids, batch.attention_mask, at)


def layers(scorer):
    return {name: module for name, module in scorer.named_modules() if is_quantized(module)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_saved_scores_as_what_was_trained(family, bits, tmp_path, capsys):
    scorer, tokenizer = quantized(family, tmp_path / "base", bits)
    assert f"% of the weights, in {bits} bits; the others in float32" in capsys.readouterr().out
    assert type(head_layer(scorer).weight) is nn.Parameter
    batch = models.batch(tokenizer)
    plain = load_for_training(str(tmp_path / "base"), torch.float32, seed=3).eval()
    assert (score(scorer.eval(), batch) - score(plain, batch)).abs().max() > 1e-4  # it is quantized
    expected = score(moved(scorer), batch)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    loaded = load(tmp_path / "out").scorer
    assert not layers(loaded)
    torch.testing.assert_close(score(loaded, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("gpt2", 4), ("llama", 8)])
def test_the_card_loads_the_adapter_beside_the_same_base(family, bits, tmp_path, monkeypatch):
    scorer, tokenizer = quantized(family, tmp_path / "base", bits)
    batch = models.batch(tokenizer)
    with torch.no_grad():
        expected = score(moved(scorer), batch)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"a base in {bits} bits" in card
    code = card.split("```python\n")[1].split("```")[0]
    values = {}
    exec(code, values)
    for module in values["model"].modules():
        if bits == 4 and is_quantized(module):
            module.support_avx512bf16_for_cpu = False
    values["model"].config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        found = values["model"].eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    # Transformers' LLM.int8 rounds what comes in, too
    tolerance = 1e-5 if bits == 4 else 0.15 * float(expected.std())
    assert (found - expected).abs().max() <= tolerance


def test_the_merged_weight_is_the_rounded_one_and_the_update(tmp_path):
    scorer, tokenizer = quantized("llama", tmp_path / "base", 8)
    moved(scorer, module_name="mlp")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    original = load_file(tmp_path / "base" / "model.safetensors")
    for name, has_adapter in (("model.layers.1.mlp.up_proj", True), ("model.layers.1.self_attn.q_proj", False)):
        weight, update = original[f"{name}.weight"], 0.0
        if has_adapter:
            a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            update = 2 * b @ a
        largest = weight.half().float().abs().amax(1, keepdim=True)  # bitsandbytes rounds to float16 first
        rounded = (weight.half().float() * 127 / largest).round() * largest / 127
        assert (rounded - weight).abs().max() > 1e-3
        off = (merged[f"{name}.weight"] - rounded - update).abs()
        assert (off > 1e-5).float().mean() < 0.001  # what lies half way
        assert (off <= 1.01 * largest / 127).all()


@torch.no_grad()
def test_an_embedding_grows_beside_a_quantized_base(tmp_path):
    scorer, tokenizer = quantized("llama", tmp_path / "base", 4)
    resize_embedding(scorer, models.VOCABULARY + 1)
    batch = models.batch(tokenizer)
    expected = score(moved(scorer), batch)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    loaded = load(tmp_path / "out").scorer
    assert embedding_rows(loaded) == models.VOCABULARY + 8
    torch.testing.assert_close(score(loaded, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_is_what_a_layer_multiplies_with(bits, tmp_path):
    scorer, _ = quantized("gpt2", tmp_path, bits)  # whose weights are stored as (in, out)
    original = dict(load_for_training(str(tmp_path), torch.float32, seed=3).named_parameters())
    for name, layer in layers(scorer).items():
        x = torch.randn(3, layer.in_features, requires_grad=True)
        weight = dequantized(layer)
        assert weight.shape == original[f"{name}.weight"].shape == (layer.in_features, layer.out_features)
        off = (weight - original[f"{name}.weight"]).norm() / weight.norm()
        assert 0.001 < off < {4: 0.12, 8: 0.02}[bits]
        out = layer(x)
        torch.testing.assert_close(out, x @ weight + layer.bias, atol=1e-4, rtol=1e-4)
        (found,) = torch.autograd.grad(out.square().sum(), x)
        torch.testing.assert_close(found, 2 * out @ weight.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_changes_no_weight_and_training_goes_on_after_it(bits, dtype, tmp_path):
    scorer, tokenizer = quantized("llama", tmp_path, bits, dtype)
    moved(scorer)
    assert {p.dtype for p in scorer.parameters() if p.requires_grad} == {dtype}
    batch = models.batch(tokenizer)
    before = {name: dequantized(layer) for name, layer in layers(scorer).items()}
    with torch.no_grad():
        first = score(scorer.eval(), batch)
    for name, layer in layers(scorer).items():
        assert torch.equal(dequantized(layer), before[name])
    torch.testing.assert_close(score(scorer.train(), batch).detach(), first, atol=1e-5, rtol=0)
    score(scorer, batch).sum().backward()
    grown = [p.grad for name, p in scorer.named_parameters() if "lora_A" in name]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in grown)


def test_experts_stay_as_they_are_and_their_share_is_said(tmp_path, capsys):
    if "mixtral" not in architectures.text_types():
        pytest.skip("this Transformers has no mixtral")
    architectures.make("mixtral", tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, seed=3, bits=4)
    add_lora(scorer, dim=4, alpha=4, module_name=None)
    said = capsys.readouterr().out
    stacked = [p for name, p in scorer.named_parameters() if "expert" in name and p.dim() == 3]
    if not stacked:
        pytest.skip("the experts of this Transformers are linear layers")
    share = sum(map(count, stacked)) / sum(map(count, scorer.parameters()))
    assert f"the experts' weights, {share:.0%} of the model, are frozen, are not quantized and get no adapter" in said
    assert all(p.dtype == torch.float32 for p in stacked)


def test_our_own_form_is_refused(tmp_path):
    tokenizer = models.write("llama", tmp_path / "base", **WIDE)
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=3, pooling="mean")
    checkpoint.save(scorer, tokenizer, tmp_path / "own")
    with pytest.raises(UserError, match=r"--lora_bits 4: .* is in a form that is not quantized"):
        load_for_training(str(tmp_path / "own"), torch.float32, seed=3, bits=4)


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path):
    models.write("llama", tmp_path, **WIDE)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized"):
        load_for_training(str(tmp_path), torch.float32, seed=3, bits=8)


def settings(tmp_path, on_gpu=False, **values):
    config = RunConfig.of(model_name_or_path="m", dtype="fp32", **values)
    return resolve(config, "fp32", 1, hidden_size=64, vocab_size=320, on_gpu=on_gpu)


def test_what_does_not_go_together_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "three.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    with pytest.raises(UserError, match="--lora_bits 4 and ZeRO stage 3"):
        settings(tmp_path, lora_dim=4, lora_bits=4, deepspeed_config=str(file))
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False}))
    with pytest.raises(UserError, match="zero_allow_untested_optimizer true"):
        settings(tmp_path, optim="adamw_8bit", deepspeed_config=str(file))
    with pytest.raises(UserError, match="--optim paged_adamw_8bit: only a GPU"):
        settings(tmp_path, optim="paged_adamw_8bit")
    assert settings(tmp_path, optim="paged_adamw_8bit", on_gpu=True).training.optim == "paged_adamw_8bit"
    config = settings(tmp_path, optim="adamw_8bit").deepspeed.config
    assert config["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in settings(tmp_path).deepspeed.config


def test_without_bitsandbytes_or_with_an_old_one(monkeypatch):
    config = RunConfig.of(model_name_or_path="m", lora_dim=4, lora_bits=4)
    require_bitsandbytes(config.model, config.training)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"--lora_bits 4 needs bitsandbytes: pip install 'bitsandbytes>=0.50'"):
        require_bitsandbytes(config.model, config.training)
    monkeypatch.setattr(metadata, "version", lambda name: "0.46.1")
    other = RunConfig.of(model_name_or_path="m", optim="adamw_8bit")
    with pytest.raises(UserError, match=r"--optim adamw_8bit: bitsandbytes 0\.46\.1 is too old"):
        require_bitsandbytes(other.model, other.training)
    plain = RunConfig.of(model_name_or_path="m")
    require_bitsandbytes(plain.model, plain.training)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_load_takes_the_bytes_that_the_plan_says(family, bits, tmp_path):
    scorer, _ = quantized(family, tmp_path, bits, torch.bfloat16)
    add_lora(scorer, dim=4, alpha=4, module_name=None)
    held = 0
    for parameter in scorer.parameters():
        held += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + state.state2.absmax.nbytes
        if getattr(parameter, "SCB", None) is not None:
            held += parameter.SCB.nbytes
    planned = build_on_meta(AutoConfig.from_pretrained(tmp_path), ModelConfig("m", lora_dim=4, lora_bits=bits), "bf16")
    counts = count_parameters(planned, bits)
    assert counts.weights(width=2) == held
    assert counts.quantized == sum(count(layer.weight) for layer in layers(scorer).values())
    assert counts.packed < 0.7 * counts.quantized * bits / 8 * 2
    assert counts.total == sum(map(count, scorer.parameters()))
    largest = max(count(layer.weight) for layer in layers(scorer).values())
    assert counts.unpacked == {4: 2, 8: 6}[bits] * largest


def test_moments_are_in_8_bits_and_the_steps_are_adamws(tmp_path):
    torch.manual_seed(0)
    models.write("llama", tmp_path, **WIDE)
    found = {}
    for optim in ("adamw_torch_fused", "adamw_8bit"):
        scorer = load_for_training(str(tmp_path), torch.float32, seed=3)
        before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
        optimizer = _optimizer(settings(tmp_path, optim=optim, weight_decay=0.1), scorer)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in scorer.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        found[optim] = {name: p.detach() - before[name] for name, p in scorer.named_parameters()}
    name = "model.model.layers.0.mlp.up_proj.weight"
    state = optimizer.state[dict(scorer.named_parameters())[name]]
    held = sum(value.nbytes for key, value in state.items() if key in ("state1", "state2", "absmax1", "absmax2"))
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert held / (64 * 96) == pytest.approx(2 + 8 / 256)
    for name, exact in found["adamw_torch_fused"].items():
        assert exact.norm() > 0
        assert (found["adamw_8bit"][name] - exact).norm() <= 0.05 * exact.norm(), name


FEW = ["--max_train_samples", 96, "--lora_dim", 8, "--lora_learning_rate", 5e-3]


@pytest.mark.slow
def test_a_run_in_4_bits_on_two_processes_follows_one_process(demo, tmp_path):
    one = runs.train(demo, tmp_path / "one", *FEW, "--lora_bits", 4)
    assert one.losses[-1] < one.losses[0] - 0.1
    flags = ["--lora_bits", 4, "--zero_stage", 2, "--per_device_train_batch_size", 8]
    two = runs.train(demo, tmp_path / "two", *FEW, *flags, processes=2)
    assert two.losses == pytest.approx(one.losses, abs=5e-5)
    for folder, metrics in ((tmp_path / "one", one), (tmp_path / "two", two)):
        chosen = runs.reload_scores(folder, runs.held_out(demo)[0])
        assert chosen.mean().item() == pytest.approx(metrics.final["chosen_mean"], abs=1e-4)
    assert json.loads((tmp_path / "one" / "run.json").read_text())["versions"]["bitsandbytes"]


@pytest.mark.slow
def test_8_bits_in_bfloat16_with_an_8_bit_optimizer(demo, tmp_path):
    flags = ["--lora_bits", 8, "--dtype", "bf16", "--optim", "adamw_8bit", "--zero_stage", 1]
    metrics = runs.train(demo, tmp_path / "out", *FEW, *flags, "--lora_dropout", 0.05)
    assert "prompts are shared: slices attention" in metrics.output
    assert metrics.losses[-1] < metrics.losses[0] - 0.1


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_an_8_bit_optimizer_at_every_stage(stage, plain_run, demo, tmp_path):
    flags = ["--max_train_samples", 96, "--optim", "adamw_8bit", "--zero_stage", stage]
    metrics = runs.train(demo, tmp_path / "out", *flags)
    assert metrics.losses == pytest.approx(plain_run.losses, abs=0.01)
    assert metrics.losses != plain_run.losses


@pytest.fixture(scope="module")
def plain_run(demo, tmp_path_factory):
    return runs.train(demo, tmp_path_factory.mktemp("plain") / "out", "--max_train_samples", 96)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_the_checkpoint_lacks_is_not_quantized(bits, tmp_path):
    """The pooler of a BERT that was saved without one, as masked language models are."""
    import transformers

    models.write("bert", tmp_path / "bert", **WIDE)
    config = AutoConfig.from_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    scorer = load_for_training(str(tmp_path / "bert"), torch.float32, seed=3, bits=bits)
    pooler = scorer.backbone.pooler.dense
    assert type(pooler) is nn.Linear
    assert any(is_quantized(module) for module in scorer.modules())
    add_lora(scorer, 4, 8, None)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(scorer(ids, torch.ones_like(ids), torch.tensor([2]))).all()
