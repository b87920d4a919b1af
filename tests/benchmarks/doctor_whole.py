# SPDX-License-Identifier: Apache-2.0
"""As doctor.py, with whole models, all of whose weights are trained, and by the commands that users have.

python tests/benchmarks/doctor_whole.py --model FOLDER --data FOLDER --output FOLDER [--noise "random 0.2" …]

Of UKPConvArg1's training pairs some labels are flipped, as in doctor.py. `reward-model ensemble --folds 5` trains five
models on the noisy pairs, each without the prompts that it judges, which writes a strength beside each pair;
`reward-model doctor` makes the cleaned sets of it, and one model is trained on each. A training has 60 steps of 16
pairs. What is not known to a user is the share of wrong labels, and here it is: so many pairs are removed or flipped.
Runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from doctor import ARMS, SIDES, below_zero, draw, found_of, read, table, wrong_labels

TREATMENTS = {
    "nothing": ("noisy", [], []),
    "clean set": ("clean", [], []),
    "remove": ("remove", ["--remove", "{share}"], []),
    "flip": ("flip", ["--flip", "{share}"], []),
    "soften": ("soften", ["--soften"], ["--label_smoothing", "column"]),
    "margin": ("margin", ["--margin"], ["--margin", "column"]),
}
TRAINING = shlex.split(
    "--pooling mean --pair_encoding false --merge prompt --per_device_train_batch_size 16 --tokens_per_batch 0 "
    "--learning_rate 1e-4 --head_learning_rate 1e-3 --max_steps 60 --dtype fp32"
)


def reward_model(command: str, *words) -> None:
    """One of the commands, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    all_words = [sys.executable, "-m", "reward_model", command, *map(str, words)]
    done = subprocess.run(all_words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(all_words)}: {done.stderr[-3000:]}")


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def held_out_accuracy(options: argparse.Namespace, folder: Path, data: Path, seed: int, flags: list[str]) -> float:
    """Of a model that is trained on a file, in ``folder``."""
    if not (folder / "report.html").is_file():
        words = ["--model_name_or_path", options.model, *TRAINING, "--data_path", data, "--seed", seed, *flags]
        words += ["--eval_data_path", options.output / "eval.jsonl", "--eval_interval", 0]
        reward_model("train", *words, "--output_dir", folder, "--per_device_eval_batch_size", 512)
    assessment = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["assessments"][0]
    return assessment["accuracy"]["value"]


def own_gaps(folder: Path, rows: list[dict]) -> np.ndarray:
    """What a model makes of the pairs that it was trained on, (p,)."""
    from reward_model.inference import load

    reward = load(folder)
    texts = list(dict.fromkeys((row["prompt"], row[side]) for row in rows for side in SIDES))
    scores = dict(zip(texts, reward.score([prompt for prompt, _ in texts], [text for _, text in texts])))
    return np.array([scores[r["prompt"], r["chosen"]] - scores[r["prompt"], r["rejected"]] for r in rows])


def measure(options: argparse.Namespace, kind: str, share: float, seed: int) -> tuple[dict, dict]:
    """How well wrong labels are found, and the held-out accuracy after each treatment."""
    folder = options.output / f"{kind.replace(' ', '_')}_{share:g}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    clean = [{name: row[name] for name in ("prompt", *SIDES)} for row in read(options.data / "train_pairs.jsonl.gz")]
    wrong = wrong_labels(kind, share, np.array([[len(row[side]) for side in SIDES] for row in clean]), seed)
    noisy = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if w else r for r, w in zip(clean, wrong)]
    write(folder / "noisy.jsonl", noisy)
    write(options.output / "clean.jsonl", clean)
    judged = folder / "judged.jsonl"
    if not judged.is_file():
        words = ["--folds", 5, "--data", folder / "noisy.jsonl", "--output", judged, "--seed", seed, "--resume"]
        reward_model("ensemble", *words, "--", "--model_name_or_path", options.model, *TRAINING, "--eval_iters", 1)
    accuracy = {}
    for arm in ARMS:
        name, cleaning, training = TREATMENTS[arm]
        path = options.output / "clean.jsonl" if arm == "clean set" else folder / f"{name}.jsonl"
        if cleaning and not path.is_file():
            words = [word.format(share=share) for word in cleaning]
            reward_model("doctor", judged, *words, "--output", path)
        place = options.output / f"clean_{seed}" if arm == "clean set" else folder / name
        accuracy[arm] = held_out_accuracy(options, place, path, seed, training)
    strength = np.array([json.loads(line)["strength_mean"] for line in judged.read_text().splitlines()])
    suspicions = {"strength": -strength, "one model's loss": -own_gaps(folder / "noisy", noisy)}
    found = {name: found_of(values, wrong) for name, values in suspicions.items()}
    found["below zero"] = below_zero(strength, wrong)
    found["chance"] = found_of(np.random.default_rng(3000 + seed).random(len(wrong)), wrong)
    print(kind, share, f"seed {seed}", json.dumps({"found": found, "accuracy": accuracy}), flush=True)
    return found, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--noise", nargs="+", default=["random 0.2", "shorter wins 0.2"], metavar='"KIND SHARE"')
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    options.output.mkdir(parents=True, exist_ok=True)
    held_out = read(options.data / "eval_pairs.jsonl.gz")
    write(options.output / "eval.jsonl", [{name: row[name] for name in ("prompt", *SIDES)} for row in held_out])
    records = []
    for noise in options.noise:
        kind, _, share = noise.rpartition(" ")
        found, accuracy = zip(*(measure(options, kind, float(share), seed) for seed in options.seeds))
        records.append({"kind": kind, "share": float(share), "found": found, "accuracy": accuracy})
        (options.output / "doctor.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        draw(records, options.output / "doctor_whole.png", "Whole models")
    print(table(records))


if __name__ == "__main__":
    main()
