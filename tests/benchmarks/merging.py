# SPDX-License-Identifier: Apache-2.0
"""Accuracy against time, with a prompt's pairs where the order puts them and with all of them brought together.

python tests/benchmarks/merging.py --model FOLDER --data FOLDER --output FOLDER
python tests/benchmarks/merging.py … --seeds 1 2 3 --flags "--learning_rate 3e-5 --num_train_epochs 2"

Trains the same model on the same pairs with ``--merge batch``, ``--merge prompt``, and the latter with a prompt for the
batch element, through training_scripts/main.py. FOLDER then holds merging.json, merging.png, and a folder per run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

MAIN = Path(__file__).resolve().parent.parent.parent / "training_scripts" / "main.py"
PAIRS = 16  # a step
ARMS = {
    "batch": ["--merge", "batch"],
    "prompt": ["--merge", "prompt"],
    # one row of up to 16 answers is one element, with all of its judged pairs
    "prompt, element prompt": ["--merge", "prompt", "--batch_element", "prompt", "--per_device_train_batch_size", "1"],
}


def run(options: argparse.Namespace, arm: str, seed: int) -> dict:
    """One training run: evaluations as [seconds of training until then, accuracy, standard deviation of scores]."""
    folder = options.output / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
    flags = ["--model_name_or_path", options.model, "--data_path", options.data, "--output_dir", folder]
    flags += ["--per_device_train_batch_size", PAIRS, "--per_device_eval_batch_size", 4 * PAIRS, "--seed", seed]
    words = [sys.executable, MAIN.name, *flags, *shlex.split(options.flags), *ARMS[arm]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, words)), cwd=MAIN.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm}, seed {seed}: {done.stderr[-3000:]}")
    seconds, evaluations, tokens, steps = 0.0, [], 0, 0
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if record["split"] == "train":
            seconds += record["pairs"] / record["pairs_per_second"]
            tokens, steps = tokens + record["tokens"], steps + 1
        else:
            evaluations.append([seconds, record["accuracy"], record["score_std"], record["longer_wins_accuracy"]])
    print(f"{arm}, seed {seed}: {steps} steps, {tokens} tokens, {seconds:.0f} s, accuracy {evaluations[-1][1]:.4f}")
    return {"arm": arm, "seed": seed, "steps": steps, "tokens": tokens, "evaluations": evaluations}


def show(runs: list[dict]) -> None:
    """A line per arm: means over the seeds at the end of training."""
    print(f"{'':24} {'steps':>6} {'tokens':>10} {'seconds':>8}  accuracy [min–max]       std of scores")
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        last = [r["evaluations"][-1] for r in mine]
        accuracies = [accuracy for _, accuracy, *_ in last]
        print(
            f"{arm:24} {mine[0]['steps']:6} {mean(r['tokens'] for r in mine):10,.0f} {mean(e[0] for e in last):8.0f}  "
            f"{mean(accuracies):.3f} [{min(accuracies):.3f}–{max(accuracies):.3f}]    {mean(e[2] for e in last):.2f}"
        )


def draw(runs: list[dict], picture: Path) -> None:
    """Held-out accuracy over seconds of training, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, arm in enumerate(ARMS):
        for r in (r for r in runs if r["arm"] == arm):
            first = r["seed"] == runs[0]["seed"]
            seconds, accuracies = zip(*(e[:2] for e in r["evaluations"][1:]))  # the first is before training
            label = f"--merge {arm}" if first else None
            axis.plot(seconds, accuracies, "o-", color=f"C{i}", markersize=3, alpha=0.7, label=label)
    baseline = runs[0]["evaluations"][0][3]
    axis.axhline(baseline, color="grey", linestyle=":", linewidth=1, label=f"longer answer wins: {baseline:.3f}")
    axis.set(xlabel="seconds of training", ylabel="held-out accuracy", xscale="log")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train and eval files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--flags", default="", help="more flags of main.py")
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    runs = [run(options, arm, seed) for seed in options.seeds for arm in ARMS]
    (options.output / "merging.json").write_text(json.dumps(runs, indent=1) + "\n")
    show(runs)
    draw(runs, options.output / "merging.png")


if __name__ == "__main__":
    main()
