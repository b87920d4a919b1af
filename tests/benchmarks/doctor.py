# SPDX-License-Identifier: Apache-2.0
"""Is strength any good? Labels that are known to be wrong: how many are found, and what cleaning is worth.

python tests/benchmarks/doctor.py --model FOLDER --data FOLDER --output FOLDER

--model is an encoder, --data holds train_pairs and eval_pairs, .jsonl.gz (UKPConvArg1). ON FROZEN STATES: each text is
embedded once (mean pooling), and all that is trained are linear Bradley–Terry heads on these states. Whole models
trained on all their weights may behave otherwise.

Training labels are flipped at random (5, 10, 20, 30 %), or where the shorter answer won (10, 20 % of all pairs, drawn
among those). The strength of a pair is the mean over 20 heads, of which none saw it: 5 folds × 4 bootstraps. The
training set has 10 prompts, each a debate's side, so folds by prompt would leave out a whole topic and say more about
topics than about labels. Folds are by unordered pairs of texts, so that no repetition or contradiction of a pair is on
the other side; the two texts of a pair are in other pairs of the training folds. Bootstraps draw pairs.

The weight decay of the heads is the one that orders left-out folds best, where 10 % of the labels are wrong: for the
strengths folds by pairs, for the heads that are compared on the held-out debates folds by prompt.

Compared with: the loss of a single head trained on all pairs, the wrong ones among them; and chance. The ensemble's
strength in one standard deviation (mean over standard deviation) is a third score.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

FOLDS, BOOTSTRAPS = 5, 4
DECAYS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the sum of the losses
NOISE = [("random", share) for share in (0.05, 0.1, 0.2, 0.3)] + [("shorter wins", share) for share in (0.1, 0.2)]
ARMS = ("nothing", "remove", "flip", "soften", "margin", "clean set")
SCORES = ("strength", "strength / std", "one model's loss")
SIDES = ("chosen", "rejected")


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@torch.no_grad()
def embed(folder: str, texts: list[str]) -> np.ndarray:
    """Mean of the last states of each text, of length 1, (t, h)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        found.append(model(**ids).last_hidden_state[0].mean(0))
    states = torch.stack(found).numpy().astype(np.float64)
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def fit(x: np.ndarray, weight: np.ndarray, target: np.ndarray, margin: np.ndarray, decay: float) -> np.ndarray:
    """A linear Bradley–Terry head w (h,): the least of Σ weight · loss(w·x − margin) + decay/2 · ‖w‖² (L-BFGS).

    x: differences of states, better − worse, (p, h). target: probability that better is better, 1 where nothing else
    is known; the loss is −target·log σ(Δ) − (1 − target)·log σ(−Δ) (Secrets of RLHF II, eq. 5; margins, eq. 6).
    """

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        gap = x @ w - margin
        value = weight @ (np.logaddexp(0, -gap) * target + np.logaddexp(0, gap) * (1 - target))
        slope = weight * (expit(gap) - target)
        return value + decay / 2 * (w @ w), x.T @ slope + decay * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def plain(x: np.ndarray, decay: float, weight: np.ndarray | None = None) -> np.ndarray:
    count = len(x)
    return fit(x, np.ones(count) if weight is None else weight, np.ones(count), np.zeros(count), decay)


def strengths(x: np.ndarray, folds: np.ndarray, seed: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of Δ over heads that have not seen the pair, (p,) each."""
    generator = np.random.default_rng(seed)
    found = np.zeros((BOOTSTRAPS, len(x)))
    for fold in range(FOLDS):
        inside, out = np.flatnonzero(folds != fold), folds == fold
        for place in range(BOOTSTRAPS):
            weight = np.bincount(generator.integers(0, len(inside), len(inside)), minlength=len(inside))
            found[place, out] = x[out] @ plain(x[inside], decay, weight.astype(np.float64))
    return found.mean(0), found.std(0)


def wrong_labels(kind: str, share: float, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Which pairs are flipped, (p,). lengths: characters of the better and of the worse answer, (p, 2)."""
    generator = np.random.default_rng(1000 + seed)
    # so that the shorter wins: those whose longer answer won
    candidates = np.arange(len(lengths)) if kind == "random" else np.flatnonzero(lengths[:, 0] > lengths[:, 1])
    wrong = np.zeros(len(lengths), bool)
    wrong[generator.permutation(candidates)[: round(share * len(lengths))]] = True
    return wrong


def auroc(suspicion: np.ndarray, wrong: np.ndarray) -> float:
    """The share of pairs of a wrong and a right label of which the wrong one is more suspicious (Mann–Whitney)."""
    ranks, count = rankdata(suspicion), int(wrong.sum())
    return float((ranks[wrong].sum() - count * (count + 1) / 2) / (count * (len(wrong) - count)))


def found_of(suspicion: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """AUROC; precision among the most suspicious, as many as are wrong, where it equals recall; and below zero."""
    count = int(wrong.sum())
    top = np.argsort(-suspicion, kind="stable")[:count]
    return {"auroc": auroc(suspicion, wrong), "precision": float(wrong[top].mean())}


def below_zero(mean: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Of pairs whose strength is below 0: precision, and recall."""
    told = mean < 0
    return {"precision": float(wrong[told].mean()), "recall": float(told[wrong].mean()), "share": float(told.mean())}


def train_arm(name: str, x: np.ndarray, clean: np.ndarray, mean: np.ndarray, share: float, decay: float) -> np.ndarray:
    """A head trained after one treatment; remove and flip take as many pairs, the weakest, as are wrong.

    To flip and soften is to soften: a pair swapped, with one minus its probability, has the loss that it had.
    """
    count = len(x)
    ones, zeros = np.ones(count), np.zeros(count)
    weakest = np.argsort(mean, kind="stable")[: round(share * count)]
    sign = np.ones(count)
    sign[weakest] = -1
    treatments: dict[str, Callable[[], np.ndarray]] = {
        "nothing": lambda: plain(x, decay),
        "clean set": lambda: plain(clean, decay),
        "remove": lambda: plain(np.delete(x, weakest, 0), decay),
        "flip": lambda: plain(x * sign[:, None], decay),
        "soften": lambda: fit(x, ones, expit(mean), zeros, decay),
        "margin": lambda: fit(x, ones, ones, mean, decay),
    }
    return treatments[name]()


def choose_decay(x: np.ndarray, folds: np.ndarray) -> float:
    """Of a few, that whose heads order the left-out folds best, wrong labels and all: nobody knows which they are."""
    right = {}
    for decay in DECAYS:
        told = np.zeros(len(x))
        for fold in range(FOLDS):
            told[folds == fold] = x[folds == fold] @ plain(x[folds != fold], decay)
        right[decay] = float((told > 0).mean())
    return max(right, key=lambda decay: right[decay])


def folds_of(pairs: list[tuple[int, int]], seed: int) -> np.ndarray:
    """A fold for each unordered pair of texts, (p,)."""
    keys = {key: place for place, key in enumerate(dict.fromkeys(tuple(sorted(pair)) for pair in pairs))}
    drawn = np.random.default_rng(2000 + seed).permutation(len(keys)) % FOLDS
    return np.array([drawn[keys[tuple(sorted(pair))]] for pair in pairs])


def measure(
    train: np.ndarray,
    held: np.ndarray,
    lengths: np.ndarray,
    pairs: list,
    prompts: np.ndarray,
    seeds: list[int],
    decays: list[float],
) -> list[dict]:
    """A record for each kind and share of noise, with lists over seeds."""
    noisy = train * np.where(wrong_labels("random", 0.1, lengths, seeds[0]), -1, 1)[:, None]
    decay = decays[0] if decays else choose_decay(noisy, folds_of(pairs, seeds[0]))
    # two prompts a fold: what is held out is of other debates
    of_arms = decays[1] if decays else choose_decay(noisy, prompts % FOLDS)
    print(f"weight decay: {decay} for strengths, {of_arms} for the heads that are compared", flush=True)
    records = []
    for kind, share in NOISE:
        record: dict = {"kind": kind, "share": share, "decay": [decay, of_arms], "found": [], "accuracy": []}
        for seed in seeds:
            wrong = wrong_labels(kind, share, lengths, seed)
            x = train * np.where(wrong, -1, 1)[:, None]
            mean, std = strengths(x, folds_of(pairs, seed), seed, decay)
            loss = np.logaddexp(0, -(x @ plain(x, decay)))
            chance = np.random.default_rng(seed).random(len(x))
            scores = {"strength": -mean, "strength / std": -mean / std, "one model's loss": loss, "chance": chance}
            found = {name: found_of(score, wrong) for name, score in scores.items()}
            record["found"].append(found | {"below zero": below_zero(mean, wrong)})
            heads = {name: train_arm(name, x, train, mean, share, of_arms) for name in ARMS}
            record["accuracy"].append({name: float((held @ head > 0).mean()) for name, head in heads.items()})
        records.append(record)
        print(kind, share, {name: round(_mean(record["accuracy"], name), 3) for name in ARMS}, flush=True)
    return records


def _mean(rows: list[dict], *path: str) -> float:
    return float(np.mean([_at(row, path) for row in rows]))


def _at(row: dict, path: tuple[str, ...]):
    for key in path:
        row = row[key]
    return row


def _spread(rows: list[dict], *path: str) -> str:
    values = [_at(row, path) for row in rows]
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def table(records: list[dict]) -> str:
    """Both questions in one table: finding, then held-out accuracy."""
    scores = [name for name in SCORES if name in records[0]["found"][0]]
    head = ["wrong labels", *(f"AUROC, {name}" for name in scores), "precision = recall, strength", "the same, loss"]
    head += ["chance", "strength < 0: precision", "recall", *(f"accuracy, {arm}" for arm in ARMS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in records:
        found, accuracy = record["found"], record["accuracy"]
        cells = [f"{record['kind']}, {record['share']:.0%}"]
        cells += [f"{_mean(found, name, 'auroc'):.3f}" for name in scores]
        cells += [f"{_mean(found, name, 'precision'):.3f}" for name in ("strength", "one model's loss", "chance")]
        cells += [f"{_mean(found, 'below zero', name):.3f}" for name in ("precision", "recall")]
        cells += [_spread(accuracy, arm) for arm in ARMS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(records: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    at = np.arange(len(records))
    for name, mark in zip((*SCORES, "chance"), "o^sx"):
        if name in records[0]["found"][0]:
            axes[0].plot(at, [_mean(r["found"], name, "auroc") for r in records], mark, label=name)
    axes[0].set(ylabel="AUROC of finding wrong labels", ylim=(0.4, 1.0))
    for place, arm in enumerate(ARMS):
        means = [_mean(r["accuracy"], arm) for r in records]
        ends = [np.std([row[arm] for row in r["accuracy"]], ddof=len(r["accuracy"]) > 1) for r in records]
        axes[1].errorbar(at + (place - 3) * 0.09, means, ends, fmt="o", markersize=4, label=arm)
    axes[1].set(ylabel="held-out accuracy")
    for ax in axes:
        ax.set_xticks(at, [f"{r['kind']}\n{r['share']:.0%}" for r in records], fontsize=8)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
        ax.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{title}; mean and standard deviation of the seeds", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--decay", type=float, nargs=2, default=[], help="weight decays of both kinds, not chosen")
    options = parser.parse_args()
    start = time.monotonic()
    sets = [read(Path(options.data) / f"{name}_pairs.jsonl.gz") for name in ("train", "eval")]
    texts = list(dict.fromkeys(f"{row['prompt']} {row[side]}" for rows in sets for row in rows for side in SIDES))
    number = {text: place for place, text in enumerate(texts)}
    states = embed(options.model, texts)
    print(f"{len(texts)} texts embedded after {time.monotonic() - start:.0f} s", flush=True)
    pairs = [[tuple(number[f"{row['prompt']} {row[side]}"] for side in SIDES) for row in rows] for rows in sets]
    train, held = (np.stack([states[one] - states[other] for one, other in of]) for of in pairs)
    lengths = np.array([[len(row[side]) for side in SIDES] for row in sets[0]])
    prompts = np.unique([row["prompt"] for row in sets[0]], return_inverse=True)[1]
    records = measure(train, held, lengths, pairs[0], prompts, options.seeds, options.decay)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "doctor.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (folder / "doctor.md").write_text(table(records) + "\n", encoding="utf-8")
    draw(records, folder / "doctor.png", "Linear heads on frozen states")
    print(table(records))
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
