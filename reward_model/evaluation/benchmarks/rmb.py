# SPDX-License-Identifier: Apache-2.0
"""RMB: pairs, and a best answer against several others, for helpfulness and harmlessness in 49 scenarios.

Zhou et al. 2024, arXiv 2410.09893. A tie counts as wrong.
"""

from __future__ import annotations

import numpy as np

from reward_model.data.chats import is_chat
from reward_model.data.comparisons import BadRow
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, Scores, ask, by_subset, share, text_of

PAIRS = {"pair_uid", "conversation_input", "chosen", "reject", "category_path"}
LISTS = {"bon_uid", "conversation_input", "bon_best", "loser_list", "category_path"}
SETS = {"Pairwise_set": "pairwise", "BoN_set": "best of N"}
GOALS = {"Helpfulness": "helpfulness", "Harmlessness": "harmlessness"}
PARTS = tuple(f"{kind}, {goal}" for kind in SETS.values() for goal in GOALS.values())


def fits(columns: set[str], first: dict, file: str) -> bool:
    return columns >= PAIRS or columns >= LISTS


def questions(row: dict, file: str) -> list[Question]:
    """The better answer, then the others."""
    turns = row.get("conversation_input") or []
    if not is_chat(turns):
        raise BadRow("conversation_input is no list of messages")
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    is_pair = "bon_best" not in row
    others = [row.get("reject")] if is_pair else row.get("loser_list")
    if not isinstance(others, list) or not others:
        raise BadRow("loser_list is no list of answers")
    answers = [_answer(value) for value in (row.get("chosen" if is_pair else "bon_best"), *others)]
    id = row.get("pair_uid" if is_pair else "bon_uid", "")
    return [ask(prompt, answers, [0] + [1] * len(others), text_of(row, "category_path"), id)]


def _answer(value) -> str:
    if not isinstance(value, dict):
        raise BadRow("an answer is no object with llm_name and answer")
    return text_of(value, "answer")


def part_of(category: str) -> str:
    """The set and the goal of a category path.

    >>> part_of("BoN_set/Helpfulness/Chat/Discussion")
    'best of N, helpfulness'
    """
    kind, goal = (category.split("/") + ["", ""])[:2]
    return f"{SETS.get(kind, kind)}, {GOALS.get(goal, goal)}"


def metrics(asked: list[Question], scores: Scores) -> dict[str, float]:
    """Accuracy of each set and goal, of each scenario, and the mean of the four sets.

    A question is right if its best answer scores above all others. RMB's own code (``eval/scripts/my_run_rm.py``) does
    pairs only; best of N is as the paper defines it, and as RM-R1's ``run_rm_bestofn.py``, made of RMB's code, does.
    The mean of the four (``overall``, only where all four are there) is RM-R1's too (``process_final_result.py``).
    """
    right = [int(all(values[0] > value for value in values[1:])) for values in scores]
    parts = by_subset([_named(question, part_of(question.subset)) for question in asked], right)
    found = {part: share(parts[part]) for part in sorted(parts, key=_place)}
    if set(PARTS) <= set(found):
        found = {"overall": float(np.mean([found[part] for part in PARTS]))} | found
    scenarios = by_subset(asked, right)
    return found | {name: share(scenarios[name]) for name in sorted(scenarios)}


def _place(part: str) -> tuple[int, str]:
    return (PARTS.index(part) if part in PARTS else len(PARTS)), part


def _named(question: Question, subset: str) -> Question:
    return Question(question.row, question.answers, subset)


RMB = Benchmark(
    "RMB",
    "github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark at 2be3180",
    fits,
    questions,
    metrics,
    ("overall", *PARTS),
)
