# SPDX-License-Identifier: Apache-2.0
"""PPE: human preferences, and 32 answers to questions whose right answers are known, in five domains.

Frick et al. 2024, arXiv 2410.14872. The columns are those of the data sets' cards (lmarena-ai/PPE-*). The metrics
follow the paper. Its own code (github.com/lmarena/PPE) could not be had: these numbers were compared with slow
references of ours and not with that code, which may treat ties otherwise, and samples the curves that are exact here.
Numbers about the models that answered (separability, agreement of rankings) are not computed.
"""

from __future__ import annotations

import math

import numpy as np

from reward_model.data.comparisons import BadRow
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, Scores, ask, text_of

HUMAN = {"question_id", "model_a", "model_b", "winner", "prompt", "response_1", "response_2"}
BEST_OF_K = {"question_id", "model_name", "prompt", "scores", "sampled_conflict_pairs", "response_1", "response_2"}
DOMAINS = {  # by a column that only its files have
    "mmlu_pro": "options",
    "math": "sanitized_solution",
    "gpqa": "Subdomain",
    "ifeval": "instruction_id_list",
    "mbpp_plus": "test_list",
}
KINDS = {  # of human preferences; a column that is true
    "hard_prompt": "hard prompts",
    "easy_prompt": "easy prompts",
    "if_prompt": "instructions",
    "is_code": "code",
    "math_prompt": "math",
}
LANGUAGES = ("English", "other languages")
WINNERS = {"model_a": (0, 1), "model_b": (1, 0)}  # → ranks of the two answers; everything else is a tie


def fits(columns: set[str], first: dict, file: str) -> bool:
    return columns >= HUMAN or columns >= BEST_OF_K


def questions(row: dict, file: str) -> list[Question]:
    """One question; none of human preferences where people saw a tie, as no order can be right there."""
    return _of_answers(row) if "sampled_conflict_pairs" in row else _of_people(row)


def _of_people(row: dict) -> list[Question]:
    ranks = WINNERS.get(text_of(row, "winner"))
    if ranks is None:
        return []
    answers = text_of(row, "response_1"), text_of(row, "response_2")
    kinds = [name for column, name in KINDS.items() if row.get(column) is True]
    kinds.append(LANGUAGES[row.get("language") != "English"])
    asked = text_of(row, "prompt"), answers, ranks, "human", row.get("question_id", "")
    return [ask(*asked, kinds=kinds, winner=row["winner"])]


def _of_answers(row: dict) -> list[Question]:
    given = row.get("scores")
    if not isinstance(given, list) or not given:
        raise BadRow("scores is no list")
    right = [bool(score) for score in given]
    answers = [text_of(row, f"response_{i}") for i in range(1, len(right) + 1)]
    pairs = [(int(i), int(j)) for i, j in row.get("sampled_conflict_pairs") or []]
    if any(not 0 <= place < len(right) for pair in pairs for place in pair):
        raise BadRow("sampled_conflict_pairs has a place that no answer has")
    if any(right[i] == right[j] for i, j in pairs):
        raise BadRow("sampled_conflict_pairs has a pair of which both are right or both are wrong")
    domain = next((name for name, column in DOMAINS.items() if column in row), "other")
    pairs = [(i, j) if right[i] else (j, i) for i, j in pairs]
    ranks = [int(not is_right) for is_right in right]
    asked = text_of(row, "prompt"), answers, ranks, domain, row.get("question_id", "")
    return [ask(*asked, pairs=pairs, right=right)]


def best_of_k(scores: list[float], right: list[bool]) -> np.ndarray:
    """Probability (n,) that the highest score of k answers, drawn without replacement, k from 1 to n, is a right one's.

    Exact, not sampled: Σ over distinct scores s of P(s is the highest) · share of right answers among those with s,
    where P = [C(answers ≤ s, k) − C(answers < s, k)] / C(n, k). Among equal scores each is as likely to be taken.

    >>> best_of_k([2.0, 1.0, 1.0], [False, True, False]).round(4).tolist()
    [0.3333, 0.1667, 0.0]
    """
    n = len(scores)
    total = [math.comb(n, k) for k in range(1, n + 1)]
    found = np.zeros(n)
    below = 0
    for value in sorted(set(scores)):
        here = [is_right for score, is_right in zip(scores, right) if score == value]
        ways = [math.comb(below + len(here), k) - math.comb(below, k) for k in range(1, n + 1)]
        found += np.array([a / b for a, b in zip(ways, total)]) * (sum(here) / len(here))
        below += len(here)
    return found


def auc(scores: list[float], right: list[bool]) -> float | None:
    """Share of (right, wrong) answers in the right order, a tie one half: the area under the ROC curve of a question.

    None where all are right or all wrong.
    """
    good = np.array([score for score, is_right in zip(scores, right) if is_right])
    bad = np.array([score for score, is_right in zip(scores, right) if not is_right])
    if not len(good) or not len(bad):
        return None
    gaps = np.subtract.outer(good, bad)
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))


def metrics(asked: list[Question], scores: Scores) -> dict[str, float]:
    """Human preference: accuracy, of all and by kind. Of each domain, and as ``correctness`` their mean:

    - accuracy: share of ``sampled_conflict_pairs`` whose right answer has the higher score,
    - max: the highest point of the best-of-K curve, the mean over questions of :func:`best_of_k`,
    - end: its last point, the best of all K answers,
    - loss: the mean over k of the squared difference between what the score picks and the best that could be picked,
      which for right (1) and wrong (0) is P(a right one was drawn) − P(a right one was picked),
    - AUC: the mean of :func:`auc` over questions that have a right and a wrong answer.

    A tie counts as wrong in accuracy; in the others as their definitions say.
    """
    human: list[tuple[list[str], bool]] = []
    domains: dict[str, list[tuple[Question, list[float]]]] = {}
    for question, values in zip(asked, scores, strict=True):
        if question.subset == "human":
            winner, loser = values if question.facts["winner"] == "model_a" else values[::-1]
            human.append((question.facts["kinds"], winner > loser))
        else:
            domains.setdefault(question.subset, []).append((question, list(values)))
    found = {}
    if human:
        found["human preference"] = _mean([right for _, right in human])
        for kind in (*KINDS.values(), *LANGUAGES):
            if of_kind := [right for kinds, right in human if kind in kinds]:
                found[f"human preference, {kind}"] = _mean(of_kind)
    ordered = [name for name in (*DOMAINS, "other") if name in domains]
    numbers = {name: _correctness(domains[name]) for name in ordered}
    for measure in ("accuracy", "max", "end", "loss", "AUC"):
        if of_domains := [values[measure] for values in numbers.values() if measure in values]:
            found[f"correctness, {measure}"] = _mean(of_domains)
    return found | {f"{name}, {key}": value for name, values in numbers.items() for key, value in values.items()}


def _correctness(rows: list[tuple[Question, list[float]]]) -> dict[str, float]:
    pairs = [scores[good] > scores[bad] for question, scores in rows for good, bad in question.facts["pairs"]]
    answers = min(len(scores) for _, scores in rows)  # 32 everywhere; the curve ends where the shortest ends
    picked = np.mean([best_of_k(scores, question.facts["right"])[:answers] for question, scores in rows], axis=0)
    could = np.mean([_drawn(question.facts["right"])[:answers] for question, _ in rows], axis=0)
    found = {"accuracy": _mean(pairs)} if pairs else {}
    found |= {"max": float(picked.max()), "end": float(picked[-1]), "loss": _mean(could - picked)}
    areas = [area for question, scores in rows if (area := auc(scores, question.facts["right"])) is not None]
    return found | ({"AUC": _mean(areas)} if areas else {})


def _drawn(right: list[bool]) -> np.ndarray:
    """Probability (n,) that one of k answers drawn without replacement is right, k from 1 to n."""
    return best_of_k([float(is_right) for is_right in right], right)


def _mean(values) -> float:
    return float(np.mean(values))


PPE = Benchmark(
    "PPE",
    "lmarena-ai/PPE-Human-Preference-V1 and lmarena-ai/PPE-*-Best-of-K; code, not compared: github.com/lmarena/PPE",
    fits,
    questions,
    metrics,
    ("human preference", *(f"correctness, {measure}" for measure in ("accuracy", "max", "end", "loss", "AUC"))),
)
