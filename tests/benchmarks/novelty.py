# SPDX-License-Identifier: Apache-2.0
"""Does novelty tell texts of other kinds, wrong pairs, and answers that exploit a reward model? Methods side by side.

python tests/benchmarks/novelty.py --model FOLDER --data FOLDER --output FOLDER

--model is a pretrained encoder of sentences; --data holds train_pairs and eval_pairs, .jsonl.gz, of UKPConvArg1
(prompt, chosen, rejected, margin). There are six topics, with two debates each. Three reward models are trained (60
steps of 16 pairs): each on four topics, without the other two, and on pairs of four fifths of the texts of these.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

MAIN = Path(__file__).resolve().parent.parent.parent / "training_scripts" / "main.py"
STEPS, PAIRS = 60, 16
HELD_OUT = 0.2  # of the texts of a topic that is trained on


def read(data: Path) -> list[dict]:
    """Every pair, of both files."""
    rows = []
    for name in ("train_pairs", "eval_pairs"):
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


def topic_of(prompt: str) -> str:
    """Two debates argue for one side each of a topic."""
    return prompt.partition("Argue for:")[0].strip()


def draw_of(seed: int, prompt: str, text: str) -> float:
    """A number of [0, 1) that each text has by itself."""
    digest = hashlib.blake2b(f"{seed}\n{prompt}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def left_out(topics: list[str], seed: int) -> list[str]:
    """The two topics that the reward model of a seed, 1 to 3, has not seen."""
    return topics[2 * (seed - 1) : 2 * seed]


def prepare(rows: list[dict], folder: Path, seed: int) -> None:
    """The training and the evaluation pairs of a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = list(dict.fromkeys(topic_of(row["prompt"]) for row in rows))
    without = left_out(topics, seed)
    parts: dict[str, list[dict]] = {"train": [], "eval": []}
    for row in rows:
        pair = {name: row[name] for name in ("prompt", "chosen", "rejected", "margin")}
        if topic_of(row["prompt"]) in without:
            parts["eval"].append(pair)
        elif all(draw_of(seed, row["prompt"], row[side]) >= HELD_OUT for side in ("chosen", "rejected")):
            parts["train"].append(pair)
    for name, pairs in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def train(model: Path, folder: Path, seed: int) -> None:
    """The reward model of a seed, if it is not there."""
    if (folder / "model" / "config.json").is_file():
        return
    words = [sys.executable, MAIN.name, "--model_name_or_path", model, "--pooling", "mean", "--merge", "prompt"]
    words += ["--data_path", folder / "train.jsonl", "--eval_data_path", folder / "eval.jsonl"]
    words += ["--per_device_train_batch_size", PAIRS, "--max_steps", STEPS, "--per_device_eval_batch_size", 512]
    words += ["--learning_rate", 1e-4, "--head_learning_rate", 1e-3, "--seed", seed, "--dtype", "fp32"]
    words += ["--eval_iters", 1, "--output_dir", folder / "model"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=MAIN.parent, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"seed {seed}: {done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pretrained encoder of sentences")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    rows = read(options.data)
    for seed in options.seeds:
        prepare(rows, options.output / f"seed_{seed}", seed)
        train(options.model, options.output / f"seed_{seed}", seed)


if __name__ == "__main__":
    main()
