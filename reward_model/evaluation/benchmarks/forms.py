# SPDX-License-Identifier: Apache-2.0
"""What every benchmark of reward models has: questions with their answers, and numbers made of the answers' scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_model.data.comparisons import BadRow


@dataclass(frozen=True)
class Question:
    """One prompt with all the answers that a benchmark has scored.

    row: in the form of :mod:`reward_model.data.rows`: ``prompt`` as chat messages, ``responses``, each a list with one
        message of the assistant, and ``ranks``, 0 for what the benchmark holds right and 1 for the rest.
    answers: the place in ``row["responses"]`` of each of the benchmark's answers, in the benchmark's order. Published
        files repeat answers within a question; ``responses`` has each text once, as rows with two equal answers are
        refused, and a model gives equal texts equal scores.
    subset: the benchmark's own name of the part that it belongs to, '' where it has none.
    id: the benchmark's own.
    facts: what the metrics read beside the scores.
    """

    row: dict
    answers: tuple[int, ...]
    subset: str = ""
    id: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def one_by_one(self) -> list[dict]:
        """Its responses as rows of one response each.

        For a question that is refused as a whole because the chat template makes two of its answers equal.
        """
        parts = zip(self.row["responses"], self.row["ranks"])
        return [{"prompt": self.row["prompt"], "responses": [answer], "ranks": [rank]} for answer, rank in parts]


Scores = Sequence[Sequence[float]]  # one list for each question, one number for each of the benchmark's answers


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    name: as its authors write it.
    source: where its data and its code are; the commit is the one that the metrics were compared with.
    fits: (columns, first row, file name) → whether a file is one of its files.
    questions: (row, file name) → the row's questions. Raises BadRow where a column does not hold what it has there.
    metrics: (questions, scores) → the numbers, in the order in which people read them.
    headline: names of the numbers that are quoted, where they are there.
    unit: ``share``: the numbers are shares of 1; ``percent``: of 100. As the benchmark's own code has them.
    subsets: how many the published score is the mean of; 0: it has another form.
    """

    name: str
    source: str
    fits: Callable[[set[str], dict, str], bool]
    questions: Callable[[dict, str], list[Question]]
    metrics: Callable[[list[Question], Scores], dict[str, float]]
    headline: tuple[str, ...]
    unit: str = "share"
    subsets: int = 0


def ask(
    prompt: str | list[dict],
    answers: Iterable[str],
    ranks: Iterable[int],
    subset: str = "",
    id: object = "",
    **facts: Any,
) -> Question:
    """A question of a prompt, which is a user's turn or messages, and texts.

    Args:
        ranks: one for each answer. Of equal answers the better rank counts.

    Raises:
        BadRow: an answer is not text.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    places: dict[str, int] = {}
    kept: list[int] = []
    order: list[int] = []
    for number, (text, rank) in enumerate(zip(answers, ranks, strict=True), 1):
        if not isinstance(text, str):
            raise BadRow(f"answer {number} is {type(text).__name__}, not text")
        if text not in places:
            places[text] = len(kept)
            kept.append(rank)
        order.append(places[text])
        kept[places[text]] = min(kept[places[text]], rank)
    responses = [[{"role": "assistant", "content": text}] for text in places]
    row = {"prompt": messages, "responses": responses, "ranks": kept}
    return Question(row, tuple(order), subset, str(id), facts)


def text_of(row: dict, name: str) -> str:
    """Raises BadRow: the column does not hold text."""
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}, not text")
    return value


def texts_of(row: dict, name: str, least: int = 1) -> list[str]:
    """Raises BadRow: the column does not hold at least so many texts."""
    value = row.get(name)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(text, str) for text in value):
        raise BadRow(f"{name} is not a list of {least} texts or more")
    return value


def share(right: Sequence[float]) -> float:
    """The mean, summed from the first to the last: how rewardbench and RMB sum, to the last digit."""
    return float(sum(right) / len(right))


def by_subset(questions: Iterable[Question], values: Iterable[float]) -> dict[str, list[float]]:
    """The values of each subset, subsets in the order of their first question."""
    found: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question.subset, []).append(value)
    return found


def expanded(questions: Sequence[Question], scores: Sequence[Sequence[float] | None]) -> list[list[float] | None]:
    """Scores of each question's ``responses`` → scores of the benchmark's answers, in its order."""
    found: list[list[float] | None] = []
    for question, values in zip(questions, scores, strict=True):
        assert values is None or len(values) == len(question.row["responses"]), f"question {question.id}"
        found.append(None if values is None else [float(values[place]) for place in question.answers])
    return found
