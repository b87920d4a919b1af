# SPDX-License-Identifier: Apache-2.0
"""Whether something that is not worth, as length, place or style, tells which answer wins.

Notation: p pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reward_model.doctor.findings import Finding, Level, interval, leaves, level_of, part, percent
from reward_model.doctor.judgements import examples
from reward_model.doctor.ledger import UNKNOWN, Ledger
from reward_model.doctor.reading import TRAINING
from reward_model.doctor.style import STYLES
from reward_model.evaluation.intervals import Share, share

EQUAL_LENGTH = np.log(1.2)  # answers of which the longer has at most a fifth more characters
LEAST_PAIRS = 50  # of a bias that is told
REACH = 0.1  # from ½, of length and place; what is more is doubtful
STYLE_REACH = 0.15
HURTS = 0.3


@dataclass(frozen=True)
class Bias:
    """How often the side wins that has more of something. at_equal_length: the same of pairs of about equal length."""

    name: str
    share: Share
    at_equal_length: Share

    def to_json(self) -> dict:
        equal = self.at_equal_length.to_json() if self.at_equal_length.pairs else None
        return {"name": self.name, "share": self.share.to_json(), "at_equal_length": equal}


@dataclass(frozen=True)
class Biases:
    """Of the training pairs. rows: of length, place and styles, those of which there is anything to tell.

    length_correlation: of being better (1) or worse (−1) with the log of the ratio of lengths, over both orders of each
    pair: with x = log(length of better / length of worse) it is mean(x) / √mean(x²), 0 where length says nothing.
    strength_correlation: Spearman's, of x with the strength; NaN without strengths.
    """

    rows: list[Bias]
    length_correlation: float
    strength_correlation: float
    lengths: dict[str, list[float]]

    def to_json(self) -> dict:
        numbers = (self.length_correlation, self.strength_correlation)
        first, second = (None if np.isnan(number) else float(number) for number in numbers)
        return {
            "rows": [each.to_json() for each in self.rows],
            "length_correlation": first,
            "strength_correlation": second,
            "lengths": self.lengths,
        }


def biases_of(ledger: Ledger, seed: int) -> Biases:
    """How often the longer answer wins, the one that was shown first, and the one that has more of each style."""
    mask = ledger.pair_sets() == TRAINING
    prompts = ledger.pair_prompts()[mask]
    better, worse = (ledger.pair_array(f"{side}_length")[mask].astype(np.float64) for side in ("better", "worse"))
    ratio = np.log((better + 1) / (worse + 1))  # one more: an answer may have no characters but white space
    is_equal = np.abs(ratio) <= EQUAL_LENGTH
    first = ledger.pair_array("position")[mask]
    signs = {"characters": np.sign(ratio)} | {"place, shown first": np.where(first == UNKNOWN, 0, 2 * first - 1)}
    styles = ledger.style_signs()[mask]
    signs |= {name: styles[:, place] for place, name in enumerate(STYLES)}
    rows = []
    for name, sign in signs.items():
        differ = sign != 0
        if not differ.any():
            continue
        alone, wins = np.zeros(0, bool), sign > 0
        if name != "characters":
            alone = differ & is_equal
        whole = share(wins[differ].astype(np.float64), prompts[differ], seed)
        equal = (
            Share(float(wins[alone].mean()), None, None, int(alone.sum()))
            if alone.any()
            else Share(np.nan, None, None, 0)
        )
        rows.append(Bias(name, whole, equal))
    square = float(np.mean(ratio**2)) if len(ratio) else 0.0
    correlation = float(np.mean(ratio)) / np.sqrt(square) if square else 0.0
    return Biases(rows, correlation, _with_strength(ledger.pair_array("mean")[mask], ratio), _lengths(better, worse))


def _with_strength(strength: np.ndarray, ratio: np.ndarray) -> float:
    from scipy.stats import spearmanr

    known = np.isfinite(strength)
    if known.sum() < 3 or not np.ptp(strength[known]) or not np.ptp(ratio[known]):
        return float("nan")
    return float(spearmanr(strength[known], ratio[known]).statistic)


def _lengths(better: np.ndarray, worse: np.ndarray) -> dict[str, list[float]]:
    """Deciles of the characters of better and worse answers."""
    if not len(better):
        return {}
    places = np.linspace(0, 1, 11)
    return {name: np.quantile(of, places).tolist() for name, of in (("better", better), ("worse", worse))}


def bias_findings(biases: Biases) -> Iterator[Finding]:
    """What of it is too much."""
    for each in biases.rows:
        found = each.share
        if each.name == "characters":
            line = (
                f"the longer answer wins {interval(found)} of {found.pairs:,} pairs, in characters; correlation of "
                f"length and winning {biases.length_correlation:+.2f}"
            )
            advice = (
                "a model may learn length and nothing else: set its accuracy beside this share, compare pairs of "
                "equal length, or train with --length_penalty or --loss prior_length"
            )
            yield _of_bias("length", found, line, advice, REACH)
        elif each.name.startswith("place"):
            line = f"the answer that was shown first wins {interval(found)} of {found.pairs:,} pairs of known order"
            advice = "the judges prefer a place: show each pair in both orders, and keep what both say"
            yield _of_bias("position", found, line, advice, REACH)
        else:
            equal = each.at_equal_length
            aside = f"; {equal.value:.3f} of {equal.pairs:,} of equal length" if equal.pairs >= LEAST_PAIRS else ""
            line = f"the answer with more {each.name} wins {interval(found)} of {found.pairs:,} pairs{aside}"
            learned = "" if found.value > 0.5 else "to avoid "
            advice = (
                f"a model may learn {learned}{each.name} in place of what is said: look whether it is what you want"
            )
            yield _of_bias(f"style_{each.name.replace(' ', '_')}", found, line, advice, STYLE_REACH)


def _of_bias(name: str, found: Share, line: str, advice: str, reach: float) -> Finding:
    level: Level = "fine"
    is_known = found.low is not None  # few prompts have no interval, and are no proof of what hurts
    is_one_of_few = name in ("length", "position")  # of many styles one leaves its interval by chance
    if leaves(found, reach) and (found.pairs >= LEAST_PAIRS or (is_known and is_one_of_few)):
        level = "hurts" if is_known and is_one_of_few and leaves(found, HURTS) else "doubtful"
    elif abs(found.value - 0.5) > reach:
        line += ": too few pairs to tell"
    count = round(found.value * found.pairs)
    return Finding(name, level, line, advice if level != "fine" else "", count, found.pairs, found)


def script_findings(ledger: Ledger) -> Iterator[Finding]:
    """Scripts of the answers, answers of other scripts than their prompt or each other, and refusals."""
    counts = {ledger.scripts[place] or "no letters": count for place, count in ledger.script_counts.most_common()}
    total = sum(counts.values())
    if total:
        said = ", ".join(f"{name.lower()} {percent(count / total)}" for name, count in list(counts.items())[:6])
        others = f", and {len(counts) - 6} more" if len(counts) > 6 else ""
        yield Finding(
            "scripts",
            "fine",
            f"scripts of the training answers, of which languages are not told: {said}{others}",
            of=total,
        )
    mask = ledger.pair_sets() == TRAINING
    better, worse = (ledger.pair_array(f"{side}_script")[mask] for side in ("better", "worse"))
    if not len(better):
        return
    rows = ledger.pair_array("row")[mask]
    differ = np.flatnonzero((better != worse) & (better > 0) & (worse > 0))
    yield Finding(
        "scripts_differ",
        level_of(len(differ) / len(better), 0.01, 0.5),
        f"{part(len(differ), len(better), 'pair')} have answers in two scripts",
        "the script may decide in place of what is said: look at some" if len(differ) else "",
        len(differ),
        len(better),
        rows=examples(ledger, rows[differ]),
    )
    prompt = ledger.row_array("script")[rows]
    other = np.flatnonzero((better != prompt) & (better > 0) & (prompt > 0))
    yield Finding(
        "script_of_prompt",
        level_of(len(other) / len(better), 0.05, 0.9),
        f"{part(len(other), len(better), 'pair')} have a chosen answer in another script than the prompt's",
        "right in translations, wrong elsewhere: look at some" if len(other) else "",
        len(other),
        len(better),
        rows=examples(ledger, rows[other]),
    )


def refusal_findings(ledger: Ledger) -> Iterator[Finding]:
    """How many answers decline, and on which side."""
    mask = ledger.pair_sets() == TRAINING
    better, worse = (ledger.pair_array(f"{side}_refuses")[mask].astype(bool) for side in ("better", "worse"))
    if not len(better):
        return
    rows = ledger.pair_array("row")[mask]
    total = len(better)
    yield Finding(
        "refusals",
        level_of(float(better.mean()), 0.1, 0.5),
        f"{part(int(better.sum()), total, 'pair')} have a chosen answer that declines, in English phrases; "
        f"{part(int(worse.sum()), total, 'pair')} a rejected one; {int((better & worse).sum()):,} both",
        "right in data about safety; elsewhere a model learns that declining is good" if better.any() else "",
        int(better.sum()),
        total,
        rows=examples(ledger, rows[better]),
    )
