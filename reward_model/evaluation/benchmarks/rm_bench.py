# SPDX-License-Identifier: Apache-2.0
"""RM-Bench: three right and three wrong answers in three styles, each right one against each wrong one.

Liu et al. 2024, arXiv 2410.16184. A tie counts as wrong.
"""

from __future__ import annotations

import re
from pathlib import PurePath

import numpy as np

from reward_model.data.comparisons import BadRow
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, Scores, ask, text_of, texts_of

STYLES = ("concise", "detailed", "markdown")  # the order of ``chosen`` and of ``rejected``
DOMAINS = ("chat", "math", "code", "safety")  # in the order in which scripts/utils.py averages
DOMAIN_FILE = re.compile(rf"({'|'.join(DOMAINS)})(-\w+)?_filtered\b")  # chat_filtered.json, safety-refuse_filtered.json
LEVELS = ("hard", "normal", "easy")


def fits(columns: set[str], first: dict, file: str) -> bool:
    if not {"id", "prompt", "chosen", "rejected"} <= columns or "num_correct" in columns:
        return False
    sides = first.get("chosen"), first.get("rejected")
    are_texts = (isinstance(side, list) and all(isinstance(text, str) for text in side) for side in sides)
    return all(are_texts) and [len(side) for side in sides if side] == [len(STYLES)] * 2


def questions(row: dict, file: str) -> list[Question]:
    """The six answers of a row, the right ones first. Files of one domain have it in their name."""
    right, wrong = texts_of(row, "chosen", len(STYLES)), texts_of(row, "rejected", len(STYLES))
    if (len(right), len(wrong)) != (len(STYLES), len(STYLES)):
        raise BadRow(f"there are {len(right)} and {len(wrong)} answers, not three and three")
    named = DOMAIN_FILE.match(PurePath(file).name)
    domain = row.get("domain") or (named[1] if named else "")
    known = next((name for name in DOMAINS if domain.startswith(name)), domain)
    return [ask(text_of(row, "prompt"), right + wrong, [0] * 3 + [1] * 3, known, row.get("id", ""))]


def matrix_of(scores: Scores) -> np.ndarray:
    """Share of questions (3, 3) in which the right answer of style i scores above the wrong one of style j."""
    wins = np.zeros((len(STYLES), len(STYLES)))
    for values in scores:
        wins += np.greater.outer(np.asarray(values[:3]), np.asarray(values[3:]))
    return wins / len(scores)


def levels_of(matrix: np.ndarray) -> dict[str, float]:
    """Hard: the right answer has the plainer style, above the diagonal. Normal: the same. Easy: the richer one."""
    return {
        "hard": float(np.sum(np.triu(matrix, 1)) / 3),
        "normal": float(np.mean(np.diag(matrix))),
        "easy": float(np.sum(np.tril(matrix, -1)) / 3),
    }


def metrics(asked: list[Question], scores: Scores) -> dict[str, float]:
    """The mean over domains and over levels, each domain's levels, and its matrix.

    Domain: the mean of its three levels. ``total``: the mean of domains, and ``hard``, ``normal``, ``easy`` those of
    the domains' levels, each domain with the same weight. Source: ``compute_accuracy`` of ``scripts/utils.py``, which
    needs all four domains where a file names them; here the means are over those that are there.
    """
    of_domain: dict[str, list] = {}
    for question, values in zip(asked, scores, strict=True):
        of_domain.setdefault(question.subset, []).append(values)
    ordered = [name for name in DOMAINS if name in of_domain] + [name for name in of_domain if name not in DOMAINS]
    matrices = {name: matrix_of(of_domain[name]) for name in ordered}
    levels = {name: levels_of(matrix) for name, matrix in matrices.items()}
    domains = {name: float(np.mean(list(of_levels.values()))) for name, of_levels in levels.items()}
    found = {"total": float(np.mean(list(domains.values())))}
    found |= {level: float(np.mean([of_levels[level] for of_levels in levels.values()])) for level in LEVELS}
    found |= {name: value for name, value in domains.items() if name}
    for name, matrix in matrices.items():
        before = f"{name} " if name else ""
        found |= {f"{before}{level}": value for level, value in levels[name].items() if name}
        for i, right in enumerate(STYLES):
            found |= {f"{before}{right} over {wrong}": float(matrix[i, j]) for j, wrong in enumerate(STYLES)}
    return found


RM_BENCH = Benchmark(
    "RM-Bench",
    "THU-KEG/RM-Bench; code: github.com/THU-KEG/RM-Bench at 73c52d7",
    fits,
    questions,
    metrics,
    ("total", *LEVELS, *DOMAINS),
)
