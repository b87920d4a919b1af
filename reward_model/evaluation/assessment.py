# SPDX-License-Identifier: Apache-2.0
"""Everything that is said of a model on a data set, as one object of JSON: ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward_model.data.comparisons import Comparison
from reward_model.evaluation.baselines import baselines, longer_wins
from reward_model.evaluation.bounds import bounds
from reward_model.evaluation.calibration import calibration, tempered
from reward_model.evaluation.intervals import auroc, share
from reward_model.evaluation.judged import Judged
from reward_model.evaluation.list_metrics import list_metrics, specificity
from reward_model.evaluation.metrics import QUANTILES, correlation, point_metrics

FORMAT = 1
FILE = "evaluation.json"
BINS_SHOWN = 40  # of a histogram
POINTS_SHOWN = 2_000  # of score against length
MISTAKES = 40
CHARACTERS = 2_000  # of a text that is shown
MOST_SUBSETS = 200
MARGIN_BINS = 5


def assess(judged: Judged, texts: Sequence[list[int]] | None = None, seed: int = 0, stored: float = 1.0) -> dict:
    """What is found of one model on one data set; keys that the data have nothing for are left out.

    Args:
        texts: token ids of each response, for the bag of words; None: without it.
        seed: of what is drawn: resamples, folds, halves and the points of a picture.
        stored: the temperature that the model was saved with.

    Returns:
        ``rows``, ``answers``, ``pairs``, ``prompts``; ``accuracy`` with its interval and its ties, ``loss``; ``scores``
        of chosen, rejected and all; ``histogram`` and ``gaps``; ``calibration``; ``length``; ``by_subset``,
        ``by_margin``; ``lists``, ``points``, ``specificity``; ``bounds``, of several heads;
        ``novelty``; ``baselines``; ``scatter``.
    """
    found: dict[str, Any] = {
        "format": FORMAT,
        "rows": len(judged.prompts),
        "answers": len(judged.scores),
        "pairs": len(judged),
        "prompts": len(np.unique(judged.prompts)),
    }
    sides = {"chosen": judged.scores[judged.better], "rejected": judged.scores[judged.worse]} if len(judged) else {}
    found["scores"] = {name: _spread(values) for name, values in (sides | {"all": judged.scores}).items()}
    found["histogram"] = _histograms(sides or {"all": judged.scores})
    if len(judged):
        found |= _of_pairs(judged, texts, seed, stored)
    parts = {"lists": list_metrics(judged, seed), "points": _of_points(judged), "specificity": specificity(judged)}
    parts["bounds"] = bounds(judged)
    parts["novelty"] = _novelty(judged)
    found |= {name: part for name, part in parts.items() if part}
    found["length"] = found.get("length", {}) | {"correlation": correlation(judged.scores, judged.lengths)}
    found["scatter"] = _scatter(judged, seed)
    return found


def _of_pairs(judged: Judged, texts: Sequence[list[int]] | None, seed: int, stored: float) -> dict[str, Any]:
    gaps, prompts, right = judged.gaps, judged.pair_prompts, judged.right
    longer = longer_wins(judged)
    shorter = share(right[longer == 0], prompts[longer == 0], seed)
    found: dict[str, Any] = {
        "undecided": len(judged.prompts) - len(np.unique(judged.pair_rows)),
        "accuracy": share(right, prompts, seed).to_json() | {"ties": int(np.sum(gaps == 0))},
        "loss": float(np.logaddexp(0.0, -gaps).mean()),
        "gap": {"mean": float(gaps.mean()), "std": float(gaps.std())},
        "gaps": _histogram(gaps, "counts"),
        "calibration": _calibration(gaps, prompts, seed, stored),
        "length": {"longer_wins": float(longer.mean())},
        "baselines": [{"name": name} | of.to_json() for name, of in baselines(judged, texts, seed).items()],
    }
    if shorter.pairs:
        found["length"]["shorter_is_better"] = shorter.to_json()
    if subsets := _by_subset(judged, seed):
        found["by_subset"] = subsets
    if margins := _by_margin(judged):
        found["by_margin"] = margins
    return found


def _calibration(gaps: np.ndarray, prompts: np.ndarray, seed: int, stored: float) -> dict[str, Any]:
    """Of σ(Δ); of σ(Δ / T) with a T that was fitted on other prompts; and of the T that the model has."""
    fitted = tempered(gaps, prompts, seed)
    found: dict[str, Any] = {"raw": calibration(gaps).to_json(), "reported_on": len(gaps)}
    if fitted:
        found |= {
            "temperature": fitted.temperature,
            "temperature_low": fitted.interval and fitted.interval[0],
            "temperature_high": fitted.interval and fitted.interval[1],
            "fitted_on": len(gaps),
            "folds": 2,
            "tempered": fitted.tempered.to_json(),
        }
    if stored != 1.0:
        found |= {"stored_temperature": stored, "stored": calibration(gaps / stored).to_json()}
    return found


def _of_points(judged: Judged) -> dict[str, float | int]:
    """Scores beside the targets of responses that have one."""
    known = np.isfinite(judged.targets)
    if known.sum() < 2 or not np.ptp(judged.targets[known]):
        return {}
    nothing = np.full(int(known.sum()), np.nan)
    found = point_metrics(judged.scores[known], judged.targets[known], nothing, nothing)
    return {"answers": int(known.sum()), "pearson": found["pearson"], "spearman": found["spearman"]}


def _novelty(judged: Judged) -> dict[str, Any]:
    """Of answers, and how well that of a pair, its higher one, tells wrong pairs from right ones; {}: not fitted.

    Returns:
        ``mean``; ``threshold``, from which on an answer is novel; ``novel``, the share of such; ``wrong_auroc``, with
        its interval.
    """
    found = judged.beside.get("novelty")
    if found is None or not len(found):
        return {}
    said: dict[str, Any] = {"mean": float(found.mean()), "threshold": judged.novel_from}
    said["novel"] = float((found >= judged.novel_from).mean())
    of_pairs, wrong = np.maximum(found[judged.better], found[judged.worse]), judged.right < 0.5
    if wrong.any() and not wrong.all():
        said["wrong_auroc"] = auroc(of_pairs, wrong, judged.pair_prompts).to_json()
    return said


def _spread(scores: np.ndarray) -> dict[str, Any]:
    if not len(scores):
        return {"count": 0}
    return {
        "count": len(scores),
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "quantiles": np.quantile(scores, QUANTILES).tolist(),
    }


def _histogram(values: np.ndarray, name: str) -> dict[str, list]:
    counts, edges = np.histogram(values, BINS_SHOWN)
    return {"edges": edges.tolist(), name: counts.tolist()}


def _histograms(sides: dict[str, np.ndarray]) -> dict[str, list]:
    """Of several groups, in the same bins."""
    edges = np.histogram_bin_edges(np.concatenate(list(sides.values())), BINS_SHOWN)
    return {"edges": edges.tolist()} | {name: np.histogram(values, edges)[0].tolist() for name, values in sides.items()}


def _by_subset(judged: Judged, seed: int) -> list[dict]:
    """Of each subset that rows name, most pairs first; the rows without one as ''."""
    names = judged.subsets[judged.pair_rows]
    if not np.any(names != ""):
        return []
    kinds, counts = np.unique(names, return_counts=True)
    shown = kinds[np.argsort(-counts, kind="stable")][:MOST_SUBSETS]
    parts = ((str(kind), names == kind) for kind in shown)
    return [
        {"subset": kind} | share(judged.right[mine], judged.pair_prompts[mine], seed).to_json() for kind, mine in parts
    ]


def _by_margin(judged: Judged) -> list[dict]:
    """Accuracy of the pairs in each fifth of the margins that the data give; of each value where there are few."""
    known = np.isfinite(judged.margins)
    if not known.any() or not np.ptp(judged.margins[known]):
        return []
    margins, right = judged.margins[known], judged.right[known]
    values = np.unique(margins)
    if len(values) <= MARGIN_BINS:
        edges = np.append(values, np.inf)
    else:
        edges = np.unique(np.quantile(margins, np.linspace(0, 1, MARGIN_BINS + 1)))
        edges[-1] = np.inf
    places = np.searchsorted(edges, margins, side="right") - 1
    found = []
    for place in np.unique(places):
        mine = places == place
        low, high = float(margins[mine].min()), float(margins[mine].max())
        found.append({"low": low, "high": high, "pairs": int(mine.sum()), "value": float(right[mine].mean())})
    return found


def _scatter(judged: Judged, seed: int) -> dict[str, list]:
    """Length and score of some responses, and which side of a pair they are."""
    sides = np.full(len(judged.scores), "neither", dtype="<U8")
    sides[judged.worse] = "rejected"
    sides[judged.better] = "chosen"
    drawn = np.sort(np.random.default_rng(seed).permutation(len(judged.scores))[:POINTS_SHOWN])
    return {
        "length": judged.lengths[drawn].tolist(),
        "score": judged.scores[drawn].tolist(),
        "side": sides[drawn].tolist(),
    }


# --- texts ---


def mistakes(judged: Judged, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The pairs that a model has wrong with the largest gaps, with their texts."""
    order = np.argsort(judged.gaps, kind="stable")[:MISTAKES]
    return [described_pair(judged, tokenizer, int(i)) for i in order if judged.gaps[i] < 0]


def disagreements(one: Judged, other: Judged, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The pairs that two models order differently, first those on which they are furthest apart, in their spreads."""
    gaps = [each.gaps / (each.scores.std() or 1.0) for each in (one, other)]
    apart = np.flatnonzero(np.sign(gaps[0]) != np.sign(gaps[1]))
    order = apart[np.argsort(-np.abs(gaps[0] - gaps[1])[apart], kind="stable")][:MISTAKES]
    return [
        described_pair(one, tokenizer, int(i)) | {"gap": float(one.gaps[i]), "other_gap": float(other.gaps[i])}
        for i in order
    ]


def described_pair(judged: Judged, tokenizer: PreTrainedTokenizerBase, pair: int) -> dict:
    """A pair in words: its texts, as the tokenizer reads its ids back, its scores, and where the row is."""
    row = int(judged.pair_rows[pair])
    first = int(np.searchsorted(judged.rows, row))
    comparison, better, worse = judged.data[row], judged.better[pair], judged.worse[pair]
    prompt, chosen, rejected = _texts(comparison, int(better - first), int(worse - first), tokenizer)
    return {
        "prompt": prompt if len(prompt) <= CHARACTERS else f"… {prompt[-CHARACTERS:]}",
        "chosen": _cut(chosen),
        "rejected": _cut(rejected),
        "chosen_score": float(judged.scores[better]),
        "rejected_score": float(judged.scores[worse]),
        "file": judged.origins.names[int(judged.origins.sources[row])],
        "row": int(judged.origins.numbers[row]),
    }


def _texts(row: Comparison, better: int, worse: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What was asked, and the two responses, which may go on alike after it."""
    ids = [row.prompt[: row.asked], *(row.prompt[row.asked :] + row.responses[i] for i in (better, worse))]
    prompt, one, other = (str(tokenizer.decode(each, skip_special_tokens=True)) for each in ids)
    return prompt, one, other


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"


class Responses(Sequence[list[int]]):
    """Token ids of each response of all rows, after what was asked, (n,); read from the data when asked for."""

    def __init__(self, judged: Judged):
        self.judged = judged
        self.row, self.ids = -1, [[0]]

    def __len__(self) -> int:
        return len(self.judged.scores)

    def __getitem__(self, response: int) -> list[int]:  # type: ignore[override]  # no slices
        row = int(self.judged.rows[response])
        if row != self.row:
            found = self.judged.data[row]
            self.row, self.ids = row, [found.prompt[found.asked :] + ids for ids in found.responses]
        return self.ids[response - int(np.searchsorted(self.judged.rows, row))]
