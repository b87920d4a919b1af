# SPDX-License-Identifier: Apache-2.0
"""Does novelty tell texts of other kinds, and pairs that a reward model has wrong? Methods side by side.

python tests/benchmarks/novelty.py --model FOLDER --data FOLDER --output FOLDER

--model is a pretrained encoder of sentences; --data holds train_pairs and eval_pairs, .jsonl.gz, of UKPConvArg1
(prompt, chosen, rejected, margin). There are six topics, with two debates each. Three reward models of eight heads are
trained (60 steps of 16 pairs): each on four topics, without the other two, and on pairs of four fifths of the texts of
these. To these texts each method is fitted; in-domain is the other fifth, near are the two topics left out, far is
other text: licenses of this machine and docstrings of Python. It prints a table of AUROCs: of in-domain texts against
near and far ones, and of pairs of near that the model has right against those it has wrong, by the more novel of their
two answers and, to compare with, by the size of the gap, the smallest first, and by that size over the standard
deviation of the heads' gaps. Mean of the models, and least and most.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

MAIN = Path(__file__).resolve().parent.parent.parent / "training_scripts" / "main.py"
STEPS, PAIRS = 60, 16
HEADS = 8
ANCHOR = 0.0013  # 0.5 / 384, RewardUQ's weight for a hidden size of 384
HELD_OUT = 0.2  # of the texts of a topic that is trained on


def read(data: Path, names: tuple[str, ...] = ("train_pairs", "eval_pairs")) -> list[dict]:
    """Every row of some files, by default every pair."""
    rows = []
    for name in names:
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


def train(model: Path, folder: Path, seed: int, data: Path, eval_data: Path, steps: int, flags: list) -> None:
    """A reward model, in ``folder``, if it is not there."""
    if (folder / "config.json").is_file():
        return
    words = [sys.executable, MAIN.name, "--model_name_or_path", model, "--pooling", "mean", "--merge", "prompt"]
    words += ["--data_path", data, "--eval_data_path", eval_data, "--eval_iters", 1, "--output_dir", folder]
    words += ["--per_device_train_batch_size", PAIRS, "--per_device_eval_batch_size", 512]
    words += ["--learning_rate", 1e-4, "--head_learning_rate", 1e-3, "--seed", seed, "--dtype", "fp32"]
    words += ["--max_steps", steps, *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=MAIN.parent, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-3000:]}")


def train_proxy(model: Path, folder: Path, seed: int) -> None:
    """The reward model of a seed, on the topics that are not left out."""
    flags = ["--heads", HEADS, "--head_anchor", ANCHOR]
    train(model, folder / "model", seed, folder / "train.jsonl", folder / "eval.jsonl", STEPS, flags)


def far_texts(count: int) -> list[str]:
    """Paragraphs of licenses and docstrings of Python's library, 80 to 700 characters each."""
    found = []
    for file in sorted(Path("/usr/share/common-licenses").glob("*")):
        found += file.read_text(encoding="utf-8", errors="replace").split("\n\n")
    for module in (argparse, json, subprocess, hashlib, gzip, inspect):
        kinds = [each for each in vars(module).values() if inspect.isclass(each)]
        found += [inspect.getdoc(each) or "" for kind in kinds for each in vars(kind).values() if callable(each)]
    words = dict.fromkeys(" ".join(text.split()) for text in found)
    fitting = [text for text in words if 80 <= len(text) <= 700]
    return sorted(fitting, key=lambda text: draw_of(0, "", text))[:count]


def auroc(inside, outside) -> float:
    """How often one of ``outside`` has more energy than one of ``inside``, ties as half."""
    return ((outside[:, None] > inside).float() + 0.5 * (outside[:, None] == inside).float()).mean().item()


def measured(rows: list[dict], folder: Path, seed: int, far: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Method → AUROC of near, of far and of wrong pairs of near; and how many texts and pairs there were."""
    from reward_model.inference import load
    from reward_model.models.scorer import head_layer
    from reward_model.novelty.fitted import METHODS

    reward = load(folder / "model", novelty=False)
    without = left_out(list(dict.fromkeys(topic_of(row["prompt"]) for row in rows)), seed)
    texts = list(dict.fromkeys((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))
    near = [text for text in texts if topic_of(text[0]) in without]
    own = [text for text in texts if topic_of(text[0]) not in without]
    sets = {
        "fitted": [text for text in own if draw_of(seed, *text) >= HELD_OUT],
        "inside": [text for text in own if draw_of(seed, *text) < HELD_OUT],
        "near": near,
        "far": [(prompts[i % len(prompts)], text) for i, text in enumerate(far_texts(far))],
    }
    states = {}
    for name, pairs in sets.items():
        made = reward.rows([prompt for prompt, _ in pairs], [[text] for _, text in pairs], max_seq_len=512)
        states[name] = reward.states_of_rows(made)
    places = {text: i for i, text in enumerate(near)}
    judged = [row for row in rows if topic_of(row["prompt"]) in without]
    better, worse = ([places[row["prompt"], row[side]] for row in judged] for side in ("chosen", "rejected"))
    heads = head_layer(reward.scorer).weight.detach()
    gaps = states["near"][better] @ heads.T - states["near"][worse] @ heads.T  # (pairs, heads)
    gap, spread = gaps.mean(1), gaps.std(1, correction=0)
    wrong = gap <= 0
    found = {}
    for name, method in METHODS.items():
        fitted = method.fit(states["fitted"], seed, heads)
        energy = {each: fitted.energy(values) for each, values in states.items()}
        of_pairs = torch.maximum(energy["near"][better], energy["near"][worse])
        found[name] = [auroc(energy["inside"], energy[each]) for each in ("near", "far")]
        found[name].append(auroc(of_pairs[~wrong], of_pairs[wrong]))
    nan = float("nan")
    for name, doubt in {"small gap": -gap.abs(), "small gap / spread": -gap.abs() / spread}.items():
        found[name] = [nan, nan, auroc(doubt[~wrong], doubt[wrong])]
    sizes = {name: len(pairs) for name, pairs in sets.items()} | {"pairs": len(judged), "wrong": int(wrong.sum())}
    return found, sizes


def show(of_seeds: list[dict[str, list[float]]]) -> str:
    """A table in Markdown: mean, and least and most of the seeds; empty where there is nothing to tell by."""
    lines = ["| method | near | far | wrong pairs |", "|---|---|---|---|"]
    for name in of_seeds[0]:
        cells = []
        for values in zip(*(each[name] for each in of_seeds)):
            mean = sum(values) / len(values)
            cells.append("" if math.isnan(mean) else f"{mean:.3f} [{min(values):.3f}–{max(values):.3f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pretrained encoder of sentences")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--far", type=int, default=200, metavar="N", help="texts of other kinds")
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    rows = read(options.data)
    of_seeds: list[dict[str, list[float]]] = []
    said: list[str] = []
    for seed in options.seeds:
        prepare(rows, options.output / f"seed_{seed}", seed)
        train_proxy(options.model, options.output / f"seed_{seed}", seed)
        found, sizes = measured(rows, options.output / f"seed_{seed}", seed, options.far)
        of_seeds.append(found)
        said.append(f"seed {seed}: {', '.join(f'{size} {name}' for name, size in sizes.items())}")
        (options.output / "novelty.json").write_text(json.dumps(of_seeds) + "\n", encoding="utf-8")
    table = "\n".join([*said, "", show(of_seeds)])
    (options.output / "novelty.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
