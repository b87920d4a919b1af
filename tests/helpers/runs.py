# SPDX-License-Identifier: Apache-2.0
"""Real runs of main.py: in processes of their own, or forked from one that has done its imports."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOP = Path(__file__).resolve().parents[2]
SCRIPTS = TOP / "training_scripts"
PAIRS, HELD_OUT = 320, 50
READ_BY_LAUNCHERS = re.compile(
    r"MODEL|DATA|OUTPUT|SCRIPTS|LAUNCH\w*|(GLOBAL|MICRO)_BATCH|NUM_GPUS|CUDA_VISIBLE_DEVICES|MASTER_\w+|HOSTFILE|DRY_RUN|"
    r"SSH_OPTIONS|PREFLIGHT_ALLOW|(SLURM|SBATCH|SRUN)_\w+|RANK|WORLD_SIZE|LOCAL_(RANK|WORLD_SIZE)"
)


def environment(**changes):
    """That of these tests, without what a launcher reads or sets (a test before may have set some), and changes.

    A variable that is None is unset.
    """
    kept = {name: value for name, value in os.environ.items() if not READ_BY_LAUNCHERS.fullmatch(name)}
    return {name: value for name, value in (kept | {"PYTHON": sys.executable} | changes).items() if value is not None}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher, processes):
    """The words that start main.py."""
    if launcher in ("python", "warm"):
        return [sys.executable, "main.py"]
    if launcher == "flex":
        return [sys.executable, str(TOP / "tests" / "helpers" / "flex_on_cpu.py")]
    port = str(free_port())
    if launcher == "deepspeed":
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port]
        return [*runner, "--num_gpus", str(processes), "main.py"]
    runner = [sys.executable, "-m", "torch.distributed.run", "--master_port", port]
    return [*runner, "--nproc_per_node", str(processes), "main.py"]


@functools.cache
def warm_parent():
    """A process of this test run that forks runs of main.py; it ends with its standard input."""
    values = environment(HF_HUB_OFFLINE="1", RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)
    words = [sys.executable, str(TOP / "tests" / "helpers" / "warm.py")]
    return subprocess.Popen(words, env=values, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def launch(*flags, launcher="warm", processes=1, timeout=300, environment=None, signals=(), script=None, page=False):
    """Run main.py where a user would; what it printed, and its exit status.

    launcher: ``python``, ``deepspeed`` or ``torchrun`` start it as a user does; ``flex`` with a GPU's attention on a
    CPU; ``warm`` forks it from a process that has done its imports, which is for tests of what comes after them. With
    variables of its own it starts afresh.
    signals: what ``warm`` sends to a rank at a step, ``{"rank": 0, "step": 3, "signal": "SIGTERM"}``.
    script: what ``warm`` runs in place of main.py.
    page: ``warm`` writes ``report.html``, too, which takes as long as a short training.
    """
    values = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    values |= {"HF_HUB_OFFLINE": "1"} | (environment or {})
    flags = [str(flag) for flag in flags]
    if launcher == "warm" and (environment or "--debug" in flags):
        launcher = "python" if processes == 1 else "torchrun"
    words = [*command(launcher, processes), *flags]
    if launcher != "warm":
        return subprocess.run(words, cwd=SCRIPTS, env=values, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        request = {"flags": flags, "environment": values, "processes": processes, "port": free_port()}
        request["signals"] = list(signals)
        request["script"], request["page"] = script and str(script), page
        parent = warm_parent()
        parent.stdin.write(json.dumps(request | {"timeout": timeout, "output": folder}) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        said = (
            "".join(Path(folder, f"{name}{rank}").read_text() for rank in range(processes)) for name in ("out", "err")
        )
        result = subprocess.CompletedProcess(words, status, *said)
    if status == -signal.SIGKILL and not signals:  # else it is what was sent
        raise subprocess.TimeoutExpired(words, timeout, result.stdout, result.stderr)
    return result


def train(demo, output, *flags, **launching):
    """A run that has to succeed; its metrics."""
    fixed = ["--max_seq_len", 256, "--learning_rate", 1e-3, "--data_output_path", demo / "cache"]
    result = launch(
        "--model_name_or_path", demo / "model", "--data_path", demo / "data", "--output_dir", output, *fixed, *flags,
        **launching,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "\nverified: loaded afresh" in result.stdout, result.stdout[-3000:]
    return Metrics(output / "metrics.jsonl", result)


class Metrics:
    """The records of a run, and what it printed."""

    def __init__(self, path, result):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        self.train = [r for r in records if r["split"] == "train"]
        self.evaluations = [r for r in records if r["split"] == "eval"]
        self.scales = [r for r in records if r["split"] == "normalize"]
        self.output = result.stdout + result.stderr

    @property
    def final(self):
        return self.evaluations[-1]

    @property
    def losses(self):
        return [r["loss"] for r in self.train]


def reload_scores(folder, rows):
    """Scores of (prompt, response) rows by Transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    texts = [prompt + response + tokenizer.eos_token for prompt, response in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)


def held_out(demo):
    rows = [json.loads(line) for line in (demo / "data" / "eval.jsonl").read_text().splitlines()]
    return [(r["prompt"], r["chosen"]) for r in rows], [(r["prompt"], r["rejected"]) for r in rows]
