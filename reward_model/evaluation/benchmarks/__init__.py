# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of reward models: known by the columns of their published files, scored as their own code scores.

    benchmark = recognize(columns, first_row, file)         # None: no benchmark's file
    questions = benchmark.questions(row, file)              # for every row of it
    result = measure(benchmark, questions, scores)          # a list of scores for each question
    print("\\n".join(described(result)))

Files of one benchmark belong together: RewardBench's prior sets, RM-Bench's domains, RMB's scenarios, LLMBar's folders
and PPE's domains are files of their own, and their averages are over all that were given.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from reward_model.evaluation.benchmarks.forms import Benchmark, Question, expanded
from reward_model.evaluation.benchmarks.judgebench import JUDGEBENCH
from reward_model.evaluation.benchmarks.llmbar import LLMBAR
from reward_model.evaluation.benchmarks.ppe import PPE
from reward_model.evaluation.benchmarks.result_files import write_pairs, write_results
from reward_model.evaluation.benchmarks.rewardbench import REWARDBENCH
from reward_model.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2
from reward_model.evaluation.benchmarks.rm_bench import RM_BENCH
from reward_model.evaluation.benchmarks.rmb import RMB

BENCHMARKS = (REWARDBENCH, REWARDBENCH_2, RM_BENCH, JUDGEBENCH, PPE, RMB, LLMBAR)
WIDTH = 110

__all__ = ["BENCHMARKS", "Benchmark", "Question", "described", "measure", "recognize", "write_pairs", "write_results"]


def recognize(columns: Iterable[str], first: dict, file: str = "") -> Benchmark | None:
    """The benchmark whose published files have these columns, or None.

    Args:
        first: the first row, which tells lists from texts.
        file: its name with its folders. Three benchmarks say a subset there and nowhere else: RewardBench's prior sets
            (``anthropic_hhh-00000-of-00001.parquet``), RM-Bench's domains (``chat_filtered.json``) and LLMBar
            (``Natural/dataset.json``).
    """
    names = set(columns)
    return next((benchmark for benchmark in BENCHMARKS if benchmark.fits(names, first, file)), None)


def measure(benchmark: Benchmark, questions: Sequence[Question], scores: Sequence[Sequence[float] | None]) -> dict:
    """A benchmark's numbers.

    Args:
        scores: one list for each question, one number for each of its ``row["responses"]``; None for a question that
            could not be scored, which is left out. Published files have some: RMB has two empty answers.

    Returns:
        ``benchmark`` and ``unit``; ``questions``, how many were counted; ``left_out``; ``values``, name → number.
    """
    counted = [(question, values) for question, values in zip(questions, expanded(questions, scores)) if values]
    asked, given = [question for question, _ in counted], [values for _, values in counted]
    return {
        "benchmark": benchmark.name,
        "unit": benchmark.unit,
        "questions": len(asked),
        "left_out": len(questions) - len(asked),
        "values": benchmark.metrics(asked, given) if asked else {},
    }


def described(result: dict) -> list[str]:
    """What :func:`measure` returned, for people: the numbers that are quoted in a line, then all others, in percent."""
    benchmark = next(one for one in BENCHMARKS if one.name == result["benchmark"])
    values = {name: value * (100 if result["unit"] == "share" else 1) for name, value in result["values"].items()}
    quoted = [name for name in benchmark.headline if name in values]
    left = f", and {result['left_out']} left out: these are not its numbers" if result["left_out"] else ""
    if (found := len(set(values) - {"score"})) < benchmark.subsets:
        left += f", and {found} of its {benchmark.subsets} subsets: the score is not the published one"
    lines = [f"{benchmark.name}, in percent, {result['questions']} questions{left}"]
    for names in (quoted, [name for name in values if name not in quoted]):
        said = "; ".join(f"{name} {values[name]:.1f}" for name in names)
        lines += textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return lines
