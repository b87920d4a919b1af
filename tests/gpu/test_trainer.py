# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a GPU: dtypes, ZeRO stages, offload and LoRA train the model that a CPU trains."""

import re

import pytest
import runs
import torch

from reward_model.inference import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def plain(demo, tmp_path_factory):
    """float32, ZeRO 0, one GPU."""
    return runs.train(demo, tmp_path_factory.mktemp("plain") / "out", "--dtype", "fp32", launcher="deepspeed")


def test_bfloat16_is_the_default(demo, tmp_path):
    metrics = runs.train(demo, tmp_path / "out", launcher="deepspeed")
    assert "cuda, bf16, ZeRO 1" in metrics.output
    assert next(load(tmp_path / "out").scorer.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("setting", ["0", "1", "2", "3", "2 --offload", "3 --offload"])
def test_every_setting_trains_the_same_model(setting, dtype, plain, demo, tmp_path):
    flags = ["--zero_stage", *setting.split(), "--dtype", dtype, "--gradient_checkpointing"]
    metrics = runs.train(demo, tmp_path / "out", *flags, launcher="deepspeed", timeout=600)
    assert metrics.losses[:4] == pytest.approx(plain.losses[:4], abs=1e-3 if dtype == "fp32" else 0.02)
    assert metrics.final["loss"] == pytest.approx(plain.final["loss"], abs=0.05)
    chosen = load(tmp_path / "out", device="cuda").score(*zip(*runs.held_out(demo)[0]))
    assert sum(chosen) / len(chosen) == pytest.approx(metrics.final["chosen_mean"], abs=0.02)


def test_the_fastest_attention_is_taken(plain):
    """The first run has timed those that are right: its line gives the milliseconds of each."""
    assert re.search(r"a row of the data takes .*flex [\d.]+ ms", plain.output)


@pytest.mark.parametrize("name", ["flex", "varlen", "dense", "separate"])
def test_each_attention_gives_the_same_losses(name, plain, demo, tmp_path):
    dtype = "bf16" if name == "varlen" else "fp32"  # FlashAttention's kernels are in half precision
    other = runs.train(demo, tmp_path / "out", "--dtype", dtype, "--attention", name, launcher="python")
    assert other.losses == pytest.approx(plain.losses, abs=2e-2 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_lora(stage, demo, tmp_path):
    flags = ["--lora_dim", 8, "--lora_learning_rate", 5e-3, "--zero_stage", stage, "--dtype", "bf16"]
    metrics = runs.train(demo, tmp_path / "out", *flags, launcher="deepspeed")
    assert metrics.final["loss"] < 0.5
