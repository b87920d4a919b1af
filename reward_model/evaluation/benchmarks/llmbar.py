# SPDX-License-Identifier: Apache-2.0
"""LLMBar: pairs of which one output follows the instruction, natural ones and four adversarial kinds.

Zeng et al. 2023, arXiv 2310.07641. Its code asks each judge twice, with the outputs exchanged. Scores of single outputs
are its evaluators ``Rating``: a tie is output 2 the first time and output 1 the second, so that it is half right.
"""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from reward_model.data.comparisons import BadRow
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, Scores, ask, text_of

COLUMNS = {"input", "output_1", "output_2", "label"}
NATURAL, ADVERSARIAL = "Natural", "Adversarial"
KINDS = tuple(f"{ADVERSARIAL}/{kind}" for kind in ("Neighbor", "GPTInst", "GPTOut", "Manual"))
FOLDERS = (ADVERSARIAL, "Processed", "CaseStudy")  # each holds folders of sets


def fits(columns: set[str], first: dict, file: str) -> bool:
    return columns == COLUMNS and str(first.get("label")) in ("1", "2")


def subset_of(file: str) -> str:
    """The subset that a file is, which is named by its folder alone, as every file is ``dataset.json``.

    >>> subset_of("LLMBar/Adversarial/GPTOut/dataset.json"), subset_of("Natural/dataset.json"), subset_of("my.json")
    ('Adversarial/GPTOut', 'Natural', '')
    """
    folders = PurePath(file).parts[:-1]
    if folders and folders[-1] == NATURAL:
        return NATURAL
    return "/".join(folders[-2:]) if len(folders) > 1 and folders[-2] in FOLDERS else ""


def questions(row: dict, file: str) -> list[Question]:
    label = str(row.get("label"))
    if label not in ("1", "2"):
        raise BadRow(f"label is {row.get('label')!r}, not 1 or 2")
    answers = text_of(row, "output_1"), text_of(row, "output_2")
    return [ask(text_of(row, "input"), answers, (0, 1) if label == "1" else (1, 0), subset_of(file), label=label)]


def metrics(asked: list[Question], scores: Scores) -> dict[str, float]:
    """Percent: accuracy of all, of each subset, of the adversarial ones, and of pairs on which both orders agree.

    Accuracy: (right in the first order + right in the second) / 2 / pairs, ``correct_average`` in its
    ``statistics.json``; agreement: ``equal`` there, the share of pairs without a tie.
    ``Adversarial``: the mean of the four kinds, each with the same weight, as the paper's tables have it; only where
    all four are there.
    """
    twice = []  # how often a pair is right, of two
    for question, (one, two) in zip(asked, scores, strict=True):
        label = question.facts["label"]
        twice.append(int(("1" if one > two else "2") == label) + int(("2" if two > one else "1") == label))
    subsets: dict[str, list[int]] = {}
    for question, right in zip(asked, twice):
        subsets.setdefault(question.subset, []).append(right)
    found = {name: _percent(subsets[name]) for name in sorted(subsets, key=_place) if name}
    if set(KINDS) <= set(found):
        found[ADVERSARIAL] = float(np.mean([found[name] for name in KINDS]))
    agreed = sum(one != two for one, two in scores) / len(twice) * 100
    return {"accuracy": _percent(twice), "agreement": agreed} | found


def _percent(twice: list[int]) -> float:
    return sum(twice) / 2 / len(twice) * 100


def _place(name: str) -> tuple[int, str]:
    order = (NATURAL, *KINDS)
    return (order.index(name) if name in order else len(order)), name


LLMBAR = Benchmark(
    "LLMBar",
    "github.com/princeton-nlp/LLMBar at 900616b",
    fits,
    questions,
    metrics,
    ("accuracy", NATURAL, ADVERSARIAL),
    "percent",
)
