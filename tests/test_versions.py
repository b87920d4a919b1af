# SPDX-License-Identifier: Apache-2.0
"""Slow: the lowest and the newest of what pyproject.toml allows, each in an environment of its own.

Each environment takes 5 to 6 GB from the registry. ``VERSIONS=folder`` keeps them there and takes them up again.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import runs
import tiny
import torch
import transformers
from runs import PAIRS, TOP, Metrics
from transformers import AutoConfig, AutoModel, AutoTokenizer

from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.models.scorer import head_layer

NAMES = ("torch", "deepspeed", "transformers", "datasets", "peft", "numpy")
ENVIRONMENTS = {  # name → Python, how uv chooses, what else it is told
    "lowest": ("3.10", "lowest-direct", []),
    "pinned": ("3.11", "highest", ["-c", str(TOP / "constraints.txt"), "torch==2.13.0"]),
    "transformers-4": ("3.12", "highest", ["transformers<5"]),
    "newest": ("3.13", "highest", []),
}
SCORE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from reward_model.inference import load
folder, rows = sys.argv[1], [json.loads(line) for line in Path(sys.argv[2]).open()]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
texts = [row["prompt"] + row["chosen"] + tokenizer.eos_token for row in rows]
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten()
own = torch.tensor(load(folder).score([row["prompt"] for row in rows], [row["chosen"] for row in rows]))
print(json.dumps([scores.float().mean().item(), (scores - own).abs().max().item()]))
"""

PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
batch = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**batch).logits.flatten()
print(json.dumps([batch["input_ids"].tolist(), scores.tolist()]))
"""
# one of each way in which Transformers 4 is told of rotary embeddings
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "llama": {"rope_theta": 5e5, "original_max_position_embeddings": 16, **LLAMA_3},
    "qwen2": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "gpt_neox": {"rope_theta": 333.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    "modernbert": {
        "full_attention": {"rope_theta": 777.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 333.0, "rope_type": "default"},
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="no uv on PATH"),
]


def interpreter(version):
    """A Python of this version, on PATH or pyenv's."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    for candidate in (shutil.which(f"python{version}"), *sorted(kept)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return pytest.skip(f"no Python {version} on this machine")


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def python(request, tmp_path_factory):
    version, resolution, others = ENVIRONMENTS[request.param]
    base = interpreter(version)
    kept = os.environ.get("VERSIONS")
    folder = Path(kept, request.param) if kept else tmp_path_factory.mktemp(request.param) / "environment"
    made = folder / "bin" / "python"
    if not made.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", base, str(folder)], check=True)
        install = ["uv", "pip", "install", "--quiet", "--python", str(made), "--resolution", resolution]
        subprocess.run([*install, "-r", str(TOP / "pyproject.toml"), *others], check=True)
    code = "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], "
    print(subprocess.check_output([made, "-c", code + ", ".join(f"'{n}', v('{n}')" for n in NAMES) + ")"], text=True))
    yield made
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(python, tmp_path_factory):
    """Train in the environment with flags; its metrics, the demonstration's data, and the output folder."""
    home = tmp_path_factory.mktemp("home")
    values = {
        "HOME": str(home),
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "PYTHONPATH": str(TOP),
        "HF_HUB_OFFLINE": "1",
    }

    def call(*words):
        done = subprocess.run([python, *map(str, words)], cwd=runs.SCRIPTS, env=values, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    call("-m", "reward_model.data.demo", home / "demo")
    rows = home / "demo" / "data" / "train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:PAIRS]))

    def train(name, *flags, processes=1):
        output = home / name
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", processes, "--master_port", runs.free_port()]
        fixed = ["--max_seq_len", 256, "--learning_rate", 1e-3, "--per_device_train_batch_size", 16 // processes]
        paths = ["--model_name_or_path", home / "demo" / "model", "--data_path", home / "demo" / "data"]
        done = call(*launcher, "main.py", *paths, "--output_dir", output, *fixed, *flags)
        return Metrics(output / "metrics.jsonl", done), output

    train.score = lambda output: json.loads(
        call("-c", SCORE, output, home / "demo" / "data" / "eval.jsonl").stdout.splitlines()[-1]
    )
    return train


@pytest.fixture(scope="module")
def plain(run):
    return run("plain", "--zero_stage", 0)


def assert_saved_as_evaluated(run, metrics, output, tolerance=1e-4):
    mean, apart = run.score(output)
    assert mean == pytest.approx(metrics.final["chosen_mean"], abs=tolerance)
    assert apart < tolerance


def test_a_run_learns_and_what_it_saves_scores_alike(run, plain):
    metrics, output = plain
    assert metrics.evaluations[0]["loss"] == pytest.approx(0.67, abs=0.02)
    assert metrics.final["accuracy"] > 0.85
    assert_saved_as_evaluated(run, metrics, output)


def test_zero_3_trains_the_same_model(run, plain):
    metrics, output = run("zero3", "--zero_stage", 3)
    for ours, theirs in zip(metrics.evaluations, plain[0].evaluations, strict=True):
        assert ours["chosen_mean"] == pytest.approx(theirs["chosen_mean"], abs=2e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert metrics.evaluations[0]["chosen_mean"] == pytest.approx(plain[0].evaluations[0]["chosen_mean"], abs=1e-5)
    assert_saved_as_evaluated(run, metrics, output)


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_on_two_processes(run, plain, stage):
    metrics, output = run(f"lora{stage}", "--lora_dim", 8, "--zero_stage", stage, processes=2)
    assert metrics.evaluations[0]["loss"] == pytest.approx(plain[0].evaluations[0]["loss"], abs=1e-5)
    assert metrics.final["loss"] < metrics.evaluations[0]["loss"] - 0.05
    assert_saved_as_evaluated(run, metrics, output)


def test_half_precision(run, plain):
    metrics, output = run("bf16", "--dtype", "bf16", "--zero_stage", 2, "--offload", "--gradient_checkpointing")
    assert metrics.final["accuracy"] == pytest.approx(plain[0].final["accuracy"], abs=0.05)
    assert_saved_as_evaluated(run, metrics, output, tolerance=0.05)


@pytest.mark.skipif(transformers.__version__ < "5", reason="saves with Transformers 5")
@pytest.mark.parametrize("python", ["lowest", "transformers-4"], indirect=True)
@pytest.mark.parametrize("family", ROPES)
def test_transformers_4_scores_what_transformers_5_saves(python, family, tmp_path):
    tokenizer = tiny.chatml(tmp_path / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {name: size for name, size in models.GROUPED.items() if family in ("llama", "qwen2") or "key" not in name}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes, **ids, rope_parameters=ROPES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=0)
    with torch.no_grad():
        head_layer(scorer).weight.add_(0.3 * torch.randn_like(head_layer(scorer).weight))
    saving.save(scorer, AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "out")
    texts = json.dumps(["the cat sat on the mat, and the other cat", "x", "<|im_start|>user\nthe cat<|im_end|>"])
    values = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    scored = [
        json.loads(subprocess.check_output([each, "-c", PLAIN, tmp_path / "out", texts], env=values, text=True))
        for each in (sys.executable, python)
    ]
    assert scored[0][0] == scored[1][0]
    assert scored[0][1] == pytest.approx(scored[1][1], abs=1e-5)
    assert max(scored[0][1]) - min(scored[0][1]) > 0.05
