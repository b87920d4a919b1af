# SPDX-License-Identifier: Apache-2.0
"""Records and assessments as a run leaves them, made up."""

import json
import math

import numpy as np

TEXT = "What is the best way to paint a fence?"


def train_record(step, **values):
    left = math.exp(-step / 30)
    return {
        "split": "train",
        "step": step,
        "epoch": step / 100,
        "loss": 0.2 + 0.49 * left,
        "learning_rate": 1e-3 * left,
        "rows": 32,
        "pairs": 32,
        "tokens": 2_500,
        "padding": 0.05,
        "micro_batches": 1,
        "rows_per_second": 64.0,
        "pairs_per_second": 64.0,
        "tokens_per_second": 5_000.0,
        "accuracy": 0.9 - 0.4 * left,
        "gap": 2 - 2 * left,
        "chosen_mean": 1 - left,
        "rejected_mean": left - 1,
        "grad_norm": 1.5,
    } | values


def eval_record(step, **values):
    left = math.exp(-step / 30)
    return {
        "split": "eval",
        "step": step,
        "epoch": step / 100,
        "pairs": 300,
        "loss": 0.3 + 0.39 * left,
        "accuracy": 0.85 - 0.35 * left,
        "longer_wins_accuracy": 0.47,
        "chosen_mean": 1 - left,
        "rejected_mean": left - 1,
        "score_abs_mean": 1.0,
        "calibration_error": 0.06,
        "chosen_quantiles": [-1.0, 0.0, 1.0, 2.0, 3.0],
        "rejected_quantiles": [-3.0, -2.0, -1.0, 0.0, 1.0],
    } | values


def point_record(step):
    numbers = {"rated": 40, "pearson": 0.5, "spearman": 0.4, "rated_mean": 0.1, "rated_std": 1.0, "point_loss": 0.7}
    return {"split": "eval", "step": step, "epoch": 0.0} | numbers


def records(steps=30, every=10):
    """A small run, whole."""
    lines = [eval_record(0)]
    for step in range(1, steps + 1):
        lines.append(train_record(step))
        if step % every == 0:
            lines.append(eval_record(step))
    return lines


def write_run(folder, lines=None, settings=None, assessment=None, is_finished=True, tail=""):
    """A run's folder; ``tail`` is what a crash left of the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = records() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    values = {
        "model_name_or_path": "some/model",
        "data_path": ["some/data"],
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "score_limit": 32.0,
        "seed": 1,
        "given": ["learning_rate", "data_path"],
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
    }
    (folder / "run.json").write_text(json.dumps(values | (settings or {})))
    if assessment is not None:
        parts = assessment if isinstance(assessment, list) else [assessment]
        (folder / "evaluation.json").write_text(json.dumps({"assessments": parts}))
    if is_finished:
        (folder / "finished.json").write_text('{"step": 30}')
    return folder


def comparison(**values):
    """Of two models, with all that ``reward-model evaluate`` says of them."""
    texts = {"prompt": f"{TEXT} 7", "chosen": "With a brush.", "rejected": "Not at all."}
    scores = {"chosen_score": 0.5, "rejected_score": -0.75, "gap": 1.25, "other_gap": -0.5}
    found = {"value": -0.02, "low": -0.041, "high": 0.003, "only_one": 7, "only_other": 13, "p_value": 0.2632}
    models = {"set": "", "one": "some/model", "other": "other/model-2"}
    return models | found | {"pairs": 300, "disagreements": [texts | scores | {"file": "e.jsonl", "row": 3}]} | values


def assessment(**values):
    """All that ``evaluation.json`` may hold."""
    generator = np.random.default_rng(0)
    scores = generator.normal(0, 2, 600)
    bins = [
        {"low": 0.5 + i / 20, "high": 0.55 + i / 20, "pairs": 30, "confidence": 0.52 + i / 20, "right": 0.5 + i / 20}
        for i in range(10)
    ]
    of_all = {"ece": 0.06, "mce": 0.2, "brier": 0.1, "log_loss": 0.3}
    spread = {"count": 300, "mean": 0.5, "std": 1.0, "quantiles": [-1.0, 0.0, 0.5, 1.0, 2.0]}
    return {
        "format": 1,
        "model": "some/model",
        "data": ["some/data"],
        "set": "",
        "rows": 300,
        "answers": 600,
        "pairs": 300,
        "prompts": 100,
        "accuracy": {"value": 0.8533, "low": 0.81, "high": 0.89, "ties": 1},
        "loss": 0.3,
        "normalized": {"mean": 0.0, "std": 1.0},
        "scores": {"chosen": spread, "rejected": spread, "all": spread},
        "histogram": {
            "edges": np.linspace(-5, 5, 21).tolist(),
            "chosen": list(range(20)),
            "rejected": list(range(20, 0, -1)),
        },
        "gaps": {"edges": np.linspace(-4, 8, 25).tolist(), "counts": list(range(24))},
        "calibration": {
            "temperature": 1.37,
            "fitted_on": 150,
            "reported_on": 150,
            "raw": {"bins": bins} | of_all,
            "tempered": {"bins": bins} | of_all | {"ece": 0.02},
        },
        "length": {
            "correlation": -0.12,
            "longer_wins": 0.44,
            "shorter_is_better": {"value": 0.8, "low": 0.7, "high": 0.9, "pairs": 100},
        },
        "by_subset": [{"subset": f"subset {i}", "pairs": 50, "value": 0.8, "low": 0.7, "high": 0.9} for i in range(6)],
        "by_margin": [{"low": float(i), "high": i + 1.0, "pairs": 50, "value": 0.7 + i / 20} for i in range(4)],
        "lists": {"lists": 100, "best_of": 0.9, "regret": 0.1, "kendall": 0.6, "spearman": 0.7, "ndcg": 0.95},
        "points": {"answers": 600, "pearson": 0.5, "spearman": 0.55},
        "specificity": {"groups": 30, "spread": 0.3, "share": 0.1},
        "baselines": [{"name": "the longer answer", "value": 0.47, "low": 0.42, "high": 0.52}],
        "scatter": {
            "length": generator.integers(5, 200, 600).tolist(),
            "score": scores.tolist(),
            "side": ["chosen", "rejected"] * 300,
        },
        "mistakes": [
            {
                "prompt": f"{TEXT} {i}",
                "chosen": f"With a brush. {i}",
                "rejected": f"Not at all. {i}",
                "chosen_score": -1.0,
                "rejected_score": 3.0 - i / 20,
                "file": "eval.jsonl",
                "row": i,
            }
            for i in range(40)
        ],
    } | values
