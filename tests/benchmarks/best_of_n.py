# SPDX-License-Identifier: Apache-2.0
"""Best of N by a reward model, with and without a penalty for doubt, as another model or people judge what is chosen.

python tests/benchmarks/best_of_n.py --model FOLDER --data FOLDER --output FOLDER [--strange 0.3]

The three reward models are those of novelty.py, which are trained if --output does not have them: each on four topics
of UKPConvArg1. Its questions are the debates of the two topics that it has not seen. What is chosen is judged twice:

- made answers, by another model, which was trained on the pairs of these debates alone. An answer is one to eight
  sentences drawn from the arguments of its debate, each of them, with the chance of --strange, in their place from
  another topic's or from licenses and docstrings. Of 512 answers to each question the best of N is an expectation over
  all choices of N of them, in units of the judge's standard deviation over this debate's own arguments.
- people's own arguments, by the share of comparisons that people let them win, from -1 to 1.

Chosen is by r; by r - λ·novelty, novelty the quantile that `reward-model novelty fit` would give; by r - λ·z, z the
energy behind it in standard deviations of held-out training texts; by r - β·u, u the standard deviation of the heads. r
is in units of its standard deviation over the texts that the model was trained on, and so is u.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from statistics import mean

import torch
from novelty import HELD_OUT, draw_of, far_texts, left_out, prepare, read, topic_of, train, train_proxy

NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PEOPLES = (1, 2, 4, 8, 16)
JUDGE_STEPS = 120
WEIGHTS = (0.5, 1, 2, 4)


def sentences(texts: list[str]) -> list[str]:
    return [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text.strip()) if len(part) > 15]


def made_answers(own: list[str], strange: list[str], share: float, count: int, seed: int) -> list[str]:
    """So many different answers of one to eight sentences, each of them strange with a chance of ``share``."""
    drawn = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [drawn.choice(strange if drawn.random() < share else own) for _ in range(drawn.randint(1, 8))]
        found[" ".join(parts)] = None
    return list(found)


def best_of(n: int, chosen_by: torch.Tensor, gold: torch.Tensor) -> float:
    """The expected gold of the best of n of M answers, drawn without replacement; ties are broken by their order.

    The i-th from below is the best of n with the chance C(i - 1, n - 1) / C(M, n).
    """
    ordered = gold[chosen_by.argsort(stable=True)].double()
    places = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    size = torch.tensor(float(len(ordered)), dtype=torch.float64)

    def log_choose(of: torch.Tensor, k: int) -> torch.Tensor:
        return torch.lgamma(of + 1) - torch.lgamma(torch.tensor(k + 1.0).double()) - torch.lgamma(of - k + 1)

    chances = torch.where(places >= n, (log_choose(places - 1, n - 1) - log_choose(size, n)).exp(), 0.0)
    return float((torch.nan_to_num(chances) * ordered).sum())


class Proxy:
    """The reward model of a seed, and everything that doubts it."""

    def __init__(self, rows: list[dict], folder: Path, seed: int):
        from reward_model.inference import load
        from reward_model.models.scorer import head_layer
        from reward_model.novelty.fitted import METHODS, Novelty, fingerprint

        self.reward = load(folder / "model", novelty=False)
        self.heads = head_layer(self.reward.scorer).weight.detach()
        without = left_out(list(dict.fromkeys(topic_of(row["prompt"]) for row in rows)), seed)
        texts = list(dict.fromkeys((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
        own = [text for text in texts if topic_of(text[0]) not in without]
        known = self.states([text for text in own if draw_of(seed, *text) >= HELD_OUT])
        held = self.states([text for text in own if draw_of(seed, *text) < HELD_OUT])
        self.fitted = {}
        for name, method in METHODS.items():
            density = method.fit(known, seed, self.heads)
            energies = density.energy(held)
            quantiles = Novelty.of(density, held, 0.95, fingerprint(self.reward.scorer), {})
            self.fitted[name] = (quantiles, energies.mean(), energies.std())
        self.std = (known @ self.heads.T).mean(1).std()

    def states(self, texts: list[tuple[str, str]]) -> torch.Tensor:
        rows = self.reward.rows([prompt for prompt, _ in texts], [[text] for _, text in texts], max_seq_len=512)
        return self.reward.states_of_rows(rows)

    def choices(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """How to choose → by what."""
        scores = states @ self.heads.T / self.std
        r, u = scores.mean(1), scores.std(1, correction=0)
        found = {"r": r}
        for method in ("mahalanobis", "relative_mahalanobis", "exemplar", "rnd"):
            novelty, center, width = self.fitted[method]
            energies = (novelty.density.energy(states) - center) / width
            for weight in WEIGHTS:
                found[f"r − {weight:g}·novelty, {method}"] = r - weight * novelty(states)
            for weight in (0.1, 0.25, 0.5):
                found[f"r − {weight:g}·z, {method}"] = r - weight * energies
        for weight in (1, 4, 16):
            found[f"r − {weight:g}·u"] = r - weight * u
        return found


def questions(rows: list[dict], folder: Path, seed: int) -> dict[str, list[str]]:
    """Debates that the reward model of a seed has not seen → their arguments."""
    without = left_out(list(dict.fromkeys(topic_of(row["prompt"]) for row in rows)), seed)
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if topic_of(row["prompt"]) in without:
            found.setdefault(row["prompt"], {}).update({row["chosen"]: None, row["rejected"]: None})
    return {prompt: list(texts) for prompt, texts in found.items()}


def peoples_scores(data: Path) -> dict[tuple[str, str], float]:
    """Prompt and argument → share of its comparisons that it won less the share that it lost."""
    rows = read(data, ("train_ranked", "eval_ranked"))
    return {(row["prompt"], text): score for row in rows for text, score in zip(row["responses"], row["scores"])}


def measured(rows: list[dict], people: dict, folder: Path, seed: int, options: argparse.Namespace) -> dict:
    """Kind of answers → how to choose → the gold of the best of each N, mean over the debates of a seed."""
    from reward_model.inference import load

    proxy = Proxy(rows, folder, seed)
    judge = load(folder / "judge")
    asked = questions(rows, folder, seed)
    elsewhere = [row[side] for row in rows if topic_of(row["prompt"]) not in {topic_of(p) for p in asked}
                 for side in ("chosen", "rejected")]  # fmt: skip
    strange = sentences(list(dict.fromkeys(elsewhere))) + sentences(far_texts(200))
    made: dict[str, list[list[float]]] = {}
    peoples: dict[str, list[list[float]]] = {}
    for number, (prompt, own) in enumerate(asked.items()):
        answers = made_answers(sentences(own), strange, options.strange, options.answers, 100 * seed + number)
        golds = judge.score([prompt] * (len(own) + len(answers)), [*own, *answers])
        of_own, gold = torch.tensor(golds[: len(own)]), torch.tensor(golds[len(own) :])
        gold = (gold - of_own.mean()) / of_own.std()
        by = proxy.choices(proxy.states([(prompt, text) for text in answers])) | {"the judge": gold}
        for name, values in by.items():
            made.setdefault(name, []).append([best_of(n, values, gold) for n in NS])
        known = [text for text in own if (prompt, text) in people]
        gold = torch.tensor([people[prompt, text] for text in known])
        by = proxy.choices(proxy.states([(prompt, text) for text in known])) | {"the judge": gold}
        for name, values in by.items():
            peoples.setdefault(name, []).append([best_of(n, values, gold) for n in PEOPLES])

    def over_debates(found: dict[str, list[list[float]]]) -> dict[str, list[float]]:
        return {name: [mean(values) for values in zip(*curves)] for name, curves in found.items()}

    return {"made": over_debates(made), "people": over_debates(peoples)}


def beside_r(of_seeds: list[dict], kind: str, name: str) -> list[list[float]]:
    """By how much more the best of each N is worth than by r alone, of each model."""
    return [[one - r for one, r in zip(each[kind][name], each[kind]["r"])] for each in of_seeds]


def show(of_seeds: list[dict], kind: str, ns: tuple[int, ...]) -> str:
    """A table in Markdown: mean of the models at each N, and what is gained over r at the last, least and most."""
    lines = [f"| chosen by | {' | '.join(f'N = {n}' for n in ns)} | beside r |", f"|{'---|' * (len(ns) + 2)}"]
    for name in of_seeds[0][kind]:
        cells = [f"{mean(values):.2f}" for values in zip(*(each[kind][name] for each in of_seeds))]
        last = [gained[-1] for gained in beside_r(of_seeds, kind, name)]
        cells.append("" if name == "r" else f"{mean(last):+.2f} [{min(last):+.2f} to {max(last):+.2f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(of_seeds: list[dict], shown: list[str], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    panels = (
        ("made", NS, "made answers: what the judge says of the best of N"),
        ("made", NS, "the same, less that by r alone; bands are the models"),
        ("people", PEOPLES, "people's arguments: what people say of the best of N"),
    )
    for place, (axis, (kind, ns, title)) in enumerate(zip(axes, panels)):
        for i, name in enumerate(shown):
            if name == "the judge" and place == 1:
                continue
            curves = beside_r(of_seeds, kind, name) if place == 1 else [each[kind][name] for each in of_seeds]
            label = "a choice without error" if name == "the judge" else name
            color, line = ("grey", ":") if name == "the judge" else (f"C{i}", "-")
            means = [mean(values) for values in zip(*curves)]
            axis.plot(ns, means, marker="o", linestyle=line, color=color, markersize=3, label=label)
            if place == 1:
                low, high = [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)]
                axis.fill_between(ns, low, high, alpha=0.12, linewidth=0, color=color)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ns, ns)
        axis.set_xlabel("N")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pretrained encoder of sentences")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="that of novelty.py, or another folder")
    parser.add_argument("--seeds", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--strange", type=float, default=0.3, metavar="SHARE", help="of sentences from elsewhere")
    parser.add_argument("--answers", type=int, default=512, metavar="M", help="to each question")
    options = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(options, name, getattr(options, name).resolve())
    rows, people = read(options.data), peoples_scores(options.data)
    of_seeds = []
    name = f"best_of_n_{options.strange:g}"
    for seed in options.seeds:
        folder = options.output / f"seed_{seed}"
        prepare(rows, folder, seed)
        train_proxy(options.model, folder, seed)
        data = (folder / "eval.jsonl", folder / "train.jsonl")  # the proxy's, the other way round
        train(options.model, folder / "judge", seed + 100, *data, JUDGE_STEPS, [])
        of_seeds.append(measured(rows, people, folder, seed, options))
        (options.output / f"{name}.json").write_text(json.dumps(of_seeds) + "\n", encoding="utf-8")
    for kind, ns in (("made", NS), ("people", PEOPLES)):
        print(f"{kind}\n\n{show(of_seeds, kind, ns)}\n")
    shown = ["r", "r − 1·novelty, mahalanobis", "r − 4·novelty, mahalanobis", "r − 0.1·z, mahalanobis", "r − 16·u"]
    draw(of_seeds, [*shown, "the judge"], options.output / f"{name}.png")


if __name__ == "__main__":
    main()
