# SPDX-License-Identifier: Apache-2.0
"""JudgeBench: pairs of which one answer is right, by the data set that they came from.

Tan et al. 2024, arXiv 2410.12784. Two equal scores are read as B>A by every reward model in its ``utils/judges.py``, so
that a tie is right where B is.
"""

from __future__ import annotations

from reward_model.data.comparisons import BadRow
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, Scores, ask, text_of

SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")  # how ``source`` begins
LABELS = ("A>B", "B>A")


def fits(columns: set[str], first: dict, file: str) -> bool:
    needed = {"pair_id", "source", "question", "response_A", "response_B", "label"}
    return needed <= columns and first.get("label") in LABELS


def questions(row: dict, file: str) -> list[Question]:
    label = row.get("label")
    if label not in LABELS:
        raise BadRow(f"label is {label!r}, not A>B or B>A")
    answers = text_of(row, "response_A"), text_of(row, "response_B")
    ranks = (0, 1) if label == LABELS[0] else (1, 0)
    return [ask(text_of(row, "question"), answers, ranks, text_of(row, "source"), row.get("pair_id", ""), label=label)]


def metrics(asked: list[Question], scores: Scores) -> dict[str, float]:
    """Percent of right decisions, of all pairs and of those whose source begins so (``run_judge.py``)."""
    decisions = [LABELS[0] if a > b else LABELS[1] for a, b in scores]
    right = [decision == question.facts["label"] for question, decision in zip(asked, decisions, strict=True)]
    found = {"overall": 100 * sum(right) / len(right)}
    for source in SOURCES:
        of_source = [is_right for question, is_right in zip(asked, right) if question.subset.startswith(source)]
        if of_source:
            found[source] = 100 * sum(of_source) / len(of_source)
    return found


JUDGEBENCH = Benchmark(
    "JudgeBench",
    "ScalerLab/JudgeBench; code: github.com/ScalerLab/JudgeBench at e2c52c2",
    fits,
    questions,
    metrics,
    ("overall", *SOURCES),
    "percent",
)
