# SPDX-License-Identifier: Apache-2.0
"""Patched trees of upstream's commits, and runs of their steps in processes of their own."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from reward_model.common.compile_lock import in_use

PATCHES = runs.TOP / "patches"
CHAT = "applications/DeepSpeed-Chat"
PINS = {"package": "45b4b7156c8794a3452a5a7d03dbd8d797068569", "legacy": "ab4e2e54620d0e80ead128b30dd39d9d55751eab"}
RANGES = {"package": ("e86d0c6d", PINS["package"]), "legacy": ("76c16f1c", "0079e59d")}  # first and last commit
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "dog",
    "near",
    "its",
    "tree",
    "house",
    "why",
    "is",
    "that",
)


def git(*words):
    """git in the checkout that DEEPSPEED_EXAMPLES names; its output as bytes."""
    checkout = os.environ.get("DEEPSPEED_EXAMPLES")
    if not checkout:
        pytest.skip("DEEPSPEED_EXAMPLES is unset: name the folder of a DeepSpeedExamples checkout")
    result = subprocess.run(["git", "-C", checkout, *words], capture_output=True)
    if result.returncode:
        pytest.skip(f"git {words[0]} {words[-1]} in {checkout}: {result.stderr.decode().strip()}")
    return result.stdout


def export(commit, folder):
    """The Python files of a commit, as an unpacked archive has them."""
    for line in git("ls-tree", "-r", commit, CHAT + "/").decode().splitlines():
        mode, _, rest = line.split(" ", 2)
        blob, path = rest.split("\t")
        if path.endswith(".py"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(git("cat-file", "blob", blob))
            (folder / path).chmod(int(mode[-3:], 8))
    return folder


def apply(command, folder):
    return subprocess.run([PATCHES / "apply.sh", command, folder], capture_output=True, text=True)


def git_apply(folder, patch):
    """One patch alone, in a folder that is no repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    subprocess.run(["git", "apply", patch], cwd=folder, env=environment, check=True)


def contents(folder):
    """Every file but those that Python leaves behind."""
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return {f.relative_to(folder): (f.read_bytes(), f.stat().st_mode) for f in files}


def write_data(folder, rows=240, held_out=60, seed=0):
    """Pairs in which the word good wins over bad: as saved by ``datasets`` and, under hub/, as files."""
    from datasets import Dataset, DatasetDict

    rng = random.Random(seed)

    def answer(word):
        return " " + " ".join([word] * rng.randint(1, 4) + rng.choices(WORDS, k=rng.randint(1, 6)))

    def row():
        prompt = "Human: " + " ".join(rng.choices(WORDS, k=rng.randint(3, 8))) + " Assistant:"
        return {"prompt": prompt, "chosen": answer("good"), "rejected": answer("bad"), "margin": rng.choice([0.5, 2.0])}

    splits = {"train": [row() for _ in range(rows)], "test": [row() for _ in range(held_out)]}
    DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()}).save_to_disk(
        folder / "Dahoas" / "rm-static"
    )
    hub = folder / "hub" / "Dahoas" / "rm-static"
    hub.mkdir(parents=True)
    for name, split in splits.items():
        (hub / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in split))


class Tree:
    """A patched tree, the data beside it, and its steps."""

    def __init__(self, folder, layout, data):
        self.folder, self.layout, self.data = folder, layout, data
        self.chat = folder / CHAT
        self.package = self.chat if layout == "package" else self.chat / "training"
        self.cache = folder / "cache"

    def run(self, script, *flags, launcher="deepspeed", processes=1, timeout=300, **environment):
        """Run a script of training/; its output, and its exit status."""
        values = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")}
        values |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.package)} | environment
        values["HF_DATASETS_CACHE"] = str(self.folder / "datasets")
        words = runs.command(launcher, processes)[:-1] + [self.chat / "training" / script, *flags]
        for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
            if not in_use(str(lock)):  # left by a run that was killed: upstream waits for it for ever
                lock.unlink(missing_ok=True)
        return subprocess.run(
            [str(word) for word in words], cwd=self.data / "hub", env=values, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def step2(self, model, output, *flags, succeed=True, **launching):
        """Step 2 with small numbers. A later flag wins over an earlier one."""
        path = self.data / "Dahoas" / "rm-static" if self.layout == "package" else "Dahoas/rm-static"
        fixed = {
            "data_path": path, "data_split": "2,4,4", "data_output_path": self.cache, "model_name_or_path": model,
            "max_seq_len": 64, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3, "dtype": "bf16", "zero_stage": 1, "output_dir": output,
        }  # fmt: skip
        words = [word for name, value in fixed.items() for word in (f"--{name}", value)]
        result = self.run("step2_reward_model_finetuning/main.py", *words, "--deepspeed", *flags, **launching)
        if succeed:
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return Step2(result)

    def python(self, code, *arguments):
        """What a piece of code prints that imports the tree's own modules."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.package)}
        words = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


class Step2:
    """What step 2 printed."""

    def __init__(self, result):
        self.result = result
        self.output = result.stdout + result.stderr
        lines = re.findall(r"^chosen_last_scores.*", result.stdout, re.MULTILINE)
        self.evaluations = [[float(x) for x in re.findall(r": ([-\d.e]+|nan)", line)] for line in lines]
        self.losses = [float(x) for x in re.findall(r"with loss ([-\d.e]+|inf|nan)", result.stdout)]


def output_of(folder):
    return Path(folder) / "pytorch_model.bin"
