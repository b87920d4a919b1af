# SPDX-License-Identifier: Apache-2.0
"""The same model trained with each objective and each penalty, on human judgments of arguments (UKPConvArg1).

python tests/benchmarks/objectives.py --model FOLDER --data FOLDER --output FOLDER
python tests/benchmarks/objectives.py … --seeds 1 2 3 --arms logistic center --processes 2 --flags "--max_grad_norm 0"

--data holds train_pairs, eval_pairs and train_ranked, all .jsonl.gz: prompt, chosen, rejected, margin, votes_chosen,
votes; prompt, responses, scores. Lists and scores are of the pairs' own texts. All are held against the same pairs.
FOLDER then holds objectives.json, objectives.png, and a folder per run; runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

MAIN = Path(__file__).resolve().parent.parent.parent / "training_scripts" / "main.py"
PAIRS = 16  # a step: of one debate as far as they go, so that they have few texts, each of them encoded once
PAIR_STEP = ["--per_device_train_batch_size", PAIRS]  # 231 steps an epoch
LIST_STEP = ["--per_device_train_batch_size", 8, "--max_responses", 48, "--num_train_epochs", 2]  # 74 in two
POINT_STEP = ["--per_device_train_batch_size", 8, "--num_train_epochs", 3]  # 120 in three

# name: (file to train on, group of the table, flags)
ARMS = {
    "logistic": ("pairs", "pairs", []),
    "margin": ("pairs", "pairs", ["--margin", "column"]),
    "margin 1": ("pairs", "pairs", ["--margin", 1]),
    "scaled": ("pairs", "pairs", ["--loss", "scaled", "--margin", "column"]),
    "hinge": ("pairs", "pairs", ["--loss", "hinge"]),
    "focal": ("pairs", "pairs", ["--loss", "focal"]),
    "label smoothing 0.1": ("pairs", "pairs", ["--label_smoothing", 0.1]),
    "soft labels": ("pairs", "pairs", ["--label_smoothing", "column"]),
    "direct": ("pairs", "pairs", ["--loss", "direct"]),
    "prior, length": ("pairs", "pairs", ["--loss", "prior_length"]),
    "prior, cosine": ("pairs", "pairs", ["--loss", "prior_cosine", "--prior_model", "{model}"]),
    "margin, similarity": ("pairs", "pairs", ["--margin", "similarity"]),
    "norm_bt": ("pairs", "pairs", ["--pair_weight", "norm"]),
    "contrastive": ("pairs", "pairs", ["--contrastive_weight", 1]),
    "contrastive, difference": ("pairs", "pairs", ["--contrastive_weight", 1, "--contrastive", "difference"]),
    "MetaRM": ("pairs", "pairs", ["--meta_data", "{data}/shifted.jsonl"]),  # the held-out topics, unjudged
    "center": ("pairs", "penalties on logistic", ["--score_penalty", "center"]),
    "center 0.1": ("pairs", "penalties on logistic", ["--score_penalty", "center", "--score_penalty_weight", 0.1]),
    "l2 0.1": ("pairs", "penalties on logistic", ["--score_penalty", "l2", "--score_penalty_weight", 0.1]),
    "zero_sum": (
        "pairs",
        "penalties on logistic",
        ["--score_penalty", "zero_sum", "--score_penalty_weight", 1e-3 * PAIRS],
    ),
    "log_barrier": ("pairs", "penalties on logistic", ["--score_penalty", "log_barrier"]),
    "length 0.1": ("pairs", "penalties on logistic", ["--length_penalty", 0.1]),
    "length 1": ("pairs", "penalties on logistic", ["--length_penalty", 1]),
    "rank_list": ("lists", "lists of four", ["--loss", "rank_list"]),
    "plackett_luce": ("lists", "lists of four", ["--loss", "plackett_luce"]),
    "best_of_k": ("lists", "lists of four", ["--loss", "best_of_k"]),
    "mse": ("points", "scores", ["--loss", "mse"]),
    "mae": ("points", "scores", ["--loss", "mae"]),
    "huber": ("points", "scores", ["--loss", "huber", "--huber_delta", 0.2]),
    "bce": ("labels", "scores", ["--loss", "bce"]),
    "ordinal": ("grades", "scores", ["--loss", "ordinal"]),
    "logistic + mse": ("scored_pairs", "both", ["--loss", "logistic", "mse", "--on_bad_row", "skip"]),
}
STEPS = {"lists": LIST_STEP, "points": POINT_STEP, "labels": POINT_STEP, "grades": POINT_STEP}
COLUMNS = {
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "tempered_error": "with one temperature",
    "temperature": "temperature",
    "score_std": "std of scores",
    "length_correlation": "corr. with length",
}


LEAST_SHOWN = 0.77  # accuracy in the picture; a triangle stands for what is below


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(folder: Path, name: str, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare(data: Path, folder: Path) -> None:
    """The same judgments in the form that each kind of objective reads."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, lists = read(data / "train_pairs.jsonl.gz"), read(data / "train_ranked.jsonl.gz")
    scores = {(row["prompt"], text): s for row in lists for text, s in zip(row["responses"], row["scores"])}
    fields = ("prompt", "chosen", "rejected", "margin")
    judged = [{f: p[f] for f in fields} | {"probability": p["votes_chosen"] / p["votes"]} for p in pairs]
    write(folder, "pairs", judged)
    write(folder, "lists", [{f: row[f] for f in ("prompt", "responses", "scores")} for row in lists])
    single = [{"prompt": prompt, "response": text, "score": s} for (prompt, text), s in scores.items()]
    write(folder, "points", single)
    # a share of votes won, and five grades of it
    write(folder, "labels", [row | {"score": (row["score"] + 1) / 2} for row in single])
    write(folder, "grades", [row | {"score": min(int((row["score"] + 1) * 2.5), 4)} for row in single])
    sides = {"chosen_score": "chosen", "rejected_score": "rejected"}
    write(
        folder,
        "scored_pairs",
        [p | {name: scores.get((p["prompt"], p[side])) for name, side in sides.items()} for p in judged],
    )
    held_out = read(data / "eval_pairs.jsonl.gz")
    write(folder, "eval", [{f: p[f] for f in fields} for p in held_out])
    both = [sorted((p["chosen"], p["rejected"])) for p in held_out]
    write(folder, "shifted", [{"prompt": p["prompt"], "responses": texts} for p, texts in zip(held_out, both)])


def run(options: argparse.Namespace, arm: str, seed: int, core: int) -> dict:
    """One training run, on one core: its evaluations."""
    file, _, flags = ARMS[arm]
    folder = options.output / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
    if not (folder / "report.html").is_file():
        data = options.output / "data"
        words = [sys.executable, MAIN.name, "--model_name_or_path", options.model, "--pooling", "mean"]
        words += ["--data_path", data / f"{file}.jsonl", "--eval_data_path", data / "eval.jsonl"]
        words += ["--output_dir", folder, "--seed", seed, "--merge", "prompt", "--per_device_eval_batch_size", 512]
        words += [
            "--dtype",
            options.dtype,
            "--learning_rate",
            1e-4,
            "--head_learning_rate",
            1e-3,
            "--eval_interval",
            options.eval_interval,
        ]
        words += [*STEPS.get(file, PAIR_STEP), *flags, *shlex.split(options.flags)]
        words = [str(word).format(model=options.model, data=data) for word in words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        pin = ["taskset", "-c", str(core)] if options.processes > 1 else []
        done = subprocess.run([*pin, *words], cwd=MAIN.parent, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}, seed {seed}: {done.stderr[-3000:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in records if r["split"] == "eval"]
    training = [r for r in records if r["split"] == "train"]
    evaluations[-1] |= tempered(folder)
    last = {name: round(evaluations[-1][name], 3) for name in COLUMNS}
    seconds = sum(r["rows"] / r["rows_per_second"] for r in training)
    print(f"{arm}, seed {seed}: {len(training)} steps, {seconds:.0f} s, {last}", flush=True)
    return {"arm": arm, "seed": seed, "steps": len(training), "seconds": seconds, "evaluations": evaluations}


def tempered(folder: Path) -> dict[str, float]:
    """Calibration once scores are divided by one temperature, fitted on other debates than it is held against.

    The raw error is of the same bins. NaN: no temperature is best, as where a model is hardly better than chance.
    """
    calibration = json.loads((folder / "evaluation.json").read_text())["assessments"][0]["calibration"]
    return {
        "calibration_error": calibration["raw"]["ece"],
        "tempered_error": calibration.get("tempered", {}).get("ece", math.nan),
        "temperature": calibration.get("temperature", math.nan),
    }


def run_all(options: argparse.Namespace) -> list[dict]:
    """Every seed of every arm, so many processes at a time, each on a core of its own."""
    cores = list(range(options.processes))
    wanted = [(arm, seed) for seed in options.seeds for arm in options.arms]

    def on_a_core(what):
        core = cores.pop()
        try:
            return run(options, *what, core)
        finally:
            cores.append(core)

    with ThreadPoolExecutor(options.processes) as pool:
        return list(pool.map(on_a_core, wanted))


def show(runs: list[dict]) -> None:
    """A line of Markdown per arm: mean over the seeds, and the least and most accuracy."""
    print(f"| | steps | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for arm in dict.fromkeys(r["arm"] for r in runs):
        mine = [r for r in runs if r["arm"] == arm]
        cells = []
        for name in COLUMNS:
            values = [r["evaluations"][-1][name] for r in mine]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            if spread and name == "accuracy":
                spread = f" [{min(values):.3f}–{max(values):.3f}]"
            cells.append(f"{mean(values):.3f}{spread}")
        print(f"| {arm} | {mine[0]['steps']} | {' | '.join(cells)} |")
    first = runs[0]["evaluations"][0]
    print(f"\nalways the longer answer: {first['longer_wins_accuracy']:.3f}")


def draw(runs: list[dict], picture: Path) -> None:
    """Accuracy, calibration and spread of scores at the end, a line per arm and a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in runs))
    groups = list(dict.fromkeys(ARMS[arm][1] for arm in arms))
    shown = ("accuracy", "calibration_error", "tempered_error", "score_std", "length_correlation")
    height = 0.26 * len(arms) + 1.2
    figure, axes = plt.subplots(1, len(shown), figsize=(12, height), sharey=True, layout="constrained")
    for axis, name in zip(axes, shown):
        for i, arm in enumerate(arms):
            color = f"C{groups.index(ARMS[arm][1])}"
            values = [r["evaluations"][-1][name] for r in runs if r["arm"] == arm]
            axis.plot(values, [i] * len(values), "o", color=color, markersize=4, alpha=0.5)
            axis.plot([mean(values)], [i], "|", color=color, markersize=14, markeredgewidth=2)
            if name == "accuracy" and min(values) < LEAST_SHOWN:
                axis.plot([LEAST_SHOWN], [i], "<", color=color, markersize=6, clip_on=False)
        if "logistic" in arms:
            plain = [r["evaluations"][-1][name] for r in runs if r["arm"] == "logistic"]
            axis.axvspan(min(plain), max(plain), color="grey", alpha=0.15, linewidth=0)
        if name == "accuracy":
            axis.set_xlim(left=LEAST_SHOWN)
        axis.set_title({"tempered_error": "with a temperature"}.get(name, COLUMNS[name]), fontsize=10)
        if name in ("calibration_error", "tempered_error"):
            axis.set_xlim(0, 0.35)  # the same for both, so that they can be compared
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    baseline = runs[0]["evaluations"][0]["longer_wins_accuracy"]
    axes[0].axvline(baseline, color="grey", linestyle=":", linewidth=1)
    axes[0].set_yticks(range(len(arms)), arms, fontsize=9)
    axes[0].invert_yaxis()
    for label, arm in zip(axes[0].get_yticklabels(), arms):
        label.set_color(f"C{groups.index(ARMS[arm][1])}")
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pretrained encoder of sentences")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--dtype", default="fp32", help="bf16: half the time on a CPU with AVX512-BF16")
    parser.add_argument("--eval_interval", type=int, default=58, help="0: after each epoch")
    parser.add_argument("--flags", default="", help="more flags of main.py")
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    prepare(options.data, options.output / "data")
    runs = run_all(options)
    (options.output / "objectives.json").write_text(json.dumps(runs) + "\n")
    show(runs)
    draw(runs, options.output / "objectives.png")


if __name__ == "__main__":
    main()
