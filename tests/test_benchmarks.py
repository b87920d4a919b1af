# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: worked by hand, and against their own code on generated rows (BENCHMARK_CODE names its folder)."""

import ast
import asyncio
import itertools
import json
import logging
import math
import os
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import own_code
import pytest
import tiny

from reward_model.common.errors import UserError
from reward_model.data.comparisons import BadRow
from reward_model.data.rows import read_row
from reward_model.evaluation.benchmarks import (
    BENCHMARKS,
    described,
    measure,
    recognize,
    write_pairs,
    write_results,
)
from reward_model.evaluation.benchmarks import ppe as ppe_module
from reward_model.evaluation.benchmarks.forms import expanded
from reward_model.evaluation.benchmarks.judgebench import JUDGEBENCH, SOURCES
from reward_model.evaluation.benchmarks.llmbar import LLMBAR
from reward_model.evaluation.benchmarks.ppe import PPE, best_of_k
from reward_model.evaluation.benchmarks.result_files import ScoredPair
from reward_model.evaluation.benchmarks.rewardbench import COUNTS, PRIOR_SETS, REWARDBENCH, SECTIONS
from reward_model.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2
from reward_model.evaluation.benchmarks.rm_bench import RM_BENCH
from reward_model.evaluation.benchmarks.rmb import RMB

SUBSETS_2 = ("Factuality", "Focus", "Math", "Precise IF", "Safety")
RMB_PATHS = [
    f"{kind}/{path}"
    for kind in ("Pairwise_set", "BoN_set")
    for path in ("Helpfulness/Chat/Discussion", "Helpfulness/Code/Documentation", "Harmlessness/S1")
]
KINDS = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")


# rows as they are published


def rewardbench_row(subset, id=0, chosen="yes", rejected="no"):
    models = {"chosen_model": "a", "rejected_model": "b"}
    return {"prompt": "Why?", "chosen": chosen, "rejected": rejected, "subset": subset, "id": id, **models}


def rewardbench_2_row(subset, id, right=1, wrong=3):
    return {
        "id": id,
        "prompt": "Why?",
        "chosen": [f"right {i}" for i in range(right)],
        "rejected": [f"wrong {i}" for i in range(wrong)],
        "num_correct": right,
        "num_incorrect": wrong,
        "total_completions": right + wrong,
        "models": ["a"] * (right + wrong),
        "subset": subset,
        "additional_metadata": {"category": None},
    }


def rm_bench_row(domain=None, id=0):
    answers = {side: [f"{side} {i}" for i in range(3)] for side in ("chosen", "rejected")}
    return {"id": id, "prompt": "Why?", **answers, **({"domain": domain} if domain else {"subset": "alpacaeval"})}


def judgebench_row(source, label, id="0"):
    asked = {"pair_id": id, "original_id": "1", "source": source, "question": "Why?", "response_model": "gpt-4o"}
    return {**asked, "response_A": "a", "response_B": "b", "label": label}


def human_row(winner, language="English", **kinds):
    flags = dict.fromkeys(("is_code", "hard_prompt", "easy_prompt", "if_prompt", "math_prompt"), False) | kinds
    asked = {"question_id": "q", "model_a": "m", "model_b": "n", "winner": winner, "prompt": "Why?"}
    return {**asked, "response_1": "a", "response_2": "b", "language": language, **flags}


def best_of_k_row(right, pairs, column="options"):
    answers = {f"response_{i}": f"answer {i}" for i in range(1, len(right) + 1)}
    judged = {"scores": right, "mean_score": sum(right) / len(right), "conflict_pairs": pairs}
    asked = {"question_id": "q", "model_name": "m", "prompt": "Why?", column: ["x"]}
    return {**asked, **judged, "sampled_conflict_pairs": pairs, **answers}


def rmb_row(path, losers=1, id="0"):
    turns = [{"role": "user", "content": "Why?", "language": "English"}]
    answers = [{"llm_name": "m", "answer": f"answer {i}"} for i in range(1 + losers)]
    if path.startswith("Pairwise"):
        judged = {"pair_uid": id, "chosen": answers[0], "reject": answers[1]}
    else:
        judged = {"bon_uid": id, "bon_best": answers[0], "loser_list": answers[1:]}
    return {"conversation_input": turns, "category_path": path, **judged}


def llmbar_row(label):
    return {"input": "Why?", "output_1": "a", "output_2": "b", "label": label}


ROWS = [  # benchmark, row, file
    (REWARDBENCH, rewardbench_row("hep-go"), "filtered-00000-of-00001.parquet"),
    (REWARDBENCH, {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "a", "rejected": "b"}, "d/shp-0.parquet"),
    (REWARDBENCH, {"prompt": ["Why?"], "chosen": "a", "rejected": "b", "subset": "honest"}, "anthropic_hhh-0.parquet"),
    (REWARDBENCH_2, rewardbench_2_row("Math", "1"), "test.parquet"),
    (RM_BENCH, rm_bench_row("safety-refuse"), "total_dataset.json"),
    (RM_BENCH, rm_bench_row(), "data/chat_filtered.json"),
    (JUDGEBENCH, judgebench_row("mmlu-pro-law", "A>B"), "gpt.jsonl"),
    (PPE, human_row("model_a"), "test.parquet"),
    (PPE, best_of_k_row([True, False], [[0, 1]]), "train.parquet"),
    (RMB, rmb_row(RMB_PATHS[0]), "Discussion.json"),
    (RMB, rmb_row(RMB_PATHS[3], losers=3), "Discussion.json"),
    (LLMBAR, llmbar_row("2"), "LLMBar/Natural/dataset.json"),
    (LLMBAR, llmbar_row(1), "dataset.json"),
]


@pytest.mark.parametrize(("benchmark", "row", "file"), ROWS)
def test_known_by_columns(benchmark, row, file):
    assert recognize(list(row), row, file) is benchmark
    assert [one for one in BENCHMARKS if one.fits(set(row), row, file)] == [benchmark]


@pytest.mark.parametrize(
    ("row", "file"),
    [
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "train.parquet"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "shp_2-0.parquet"),
        ({"prompt": "Why?", "chosen": ["a"], "rejected": ["b"], "id": 1}, "chat_filtered.json"),
        (rewardbench_row("a set of my own"), "filtered.parquet"),
        ({"input": "a", "output_1": "b", "output_2": "c", "label": "3"}, "Natural/dataset.json"),
        ({"input": "a", "output_1": "b", "output_2": "c", "label": "1", "split": "x"}, "Natural/dataset.json"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "winner": "model_a"}, "test.parquet"),
        ({}, ""),
    ],
)
def test_rows_of_no_benchmark(row, file):
    assert recognize(list(row), row, file) is None


@pytest.mark.parametrize(("benchmark", "row", "file"), ROWS)
def test_questions_are_rows_of_ours(benchmark, row, file):
    for question in benchmark.questions(row, file):
        texts = read_row(question.row, tiny.chatml())
        assert len(texts.whole) == len(question.row["responses"]) == len(question.row["ranks"])
        assert texts.prompt.endswith("<|im_start|>assistant\n") and "Why?" in texts.prompt
        assert texts.judged["ranks"] == question.row["ranks"]
        assert sorted(set(question.answers)) == list(range(len(texts.whole)))
        assert [len(read_row(one, tiny.chatml()).whole) for one in question.one_by_one()] == [1] * len(texts.whole)


def test_turns_of_a_prior_set_alternate():
    turns = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}, {"role": "system", "content": "3"}]
    for prompt in (turns, ["1", "2", "3"]):
        row = {"prompt": prompt, "chosen": "a", "rejected": "b", "subset": "of its own"}
        (question,) = REWARDBENCH.questions(row, "shp-00000-of-00001.parquet")
        assert question.subset == "shp"
        assert [message["role"] for message in question.row["prompt"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        (REWARDBENCH, rewardbench_row("hep-go", chosen=None), "chosen is NoneType"),
        (REWARDBENCH, {"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is neither"),
        (REWARDBENCH_2, rewardbench_2_row("Math", "1") | {"num_correct": 5}, "num_correct is 5"),
        (REWARDBENCH_2, rewardbench_2_row("Ties", "7"), "id is '7'"),
        (REWARDBENCH_2, rewardbench_2_row("Ties", "tied:7"), "has 1 right answers"),
        (REWARDBENCH_2, rewardbench_2_row("Ties", "ref:7", 1, 1) | {"num_correct": 2}, "has 2 right answers of 2"),
        (RM_BENCH, rm_bench_row() | {"rejected": ["a", "b"]}, "rejected is not a list of 3"),
        (RM_BENCH, rm_bench_row() | {"rejected": list("abcd")}, "there are 3 and 4 answers"),
        (JUDGEBENCH, judgebench_row("livecodebench", "A=B"), "label is 'A=B'"),
        (PPE, human_row(None), "winner is NoneType"),
        (PPE, best_of_k_row([True, False], [[0, 2]]), "a place that no answer has"),
        (PPE, best_of_k_row([True, True, False], [[0, 1]]), "both are right or both are wrong"),
        (RMB, rmb_row(RMB_PATHS[0]) | {"reject": "text"}, "an answer is no object"),
        (RMB, rmb_row(RMB_PATHS[3]) | {"loser_list": []}, "loser_list is no list"),
        (RMB, rmb_row(RMB_PATHS[0]) | {"conversation_input": "Why?"}, "no list of messages"),
        (LLMBAR, llmbar_row("A"), "label is 'A'"),
    ],
)
def test_rows_that_are_not_as_published(benchmark, row, message):
    with pytest.raises(BadRow, match=message.replace("(", r"\(")):
        benchmark.questions(row, "")


def test_equal_answers_are_scored_once():
    (question,) = RMB.questions(rmb_row(RMB_PATHS[0]) | {"reject": {"llm_name": "n", "answer": "answer 0"}}, "")
    assert len(question.row["responses"]) == 1
    assert question.row["ranks"] == [0]
    assert expanded([question], [[2.5]]) == [[2.5, 2.5]]
    assert measure(RMB, [question], [[2.5]])["values"]["pairwise, helpfulness"] == 0  # a tie is wrong


def test_questions_without_scores_are_left_out_and_said():
    questions = [REWARDBENCH.questions(rewardbench_row("hep-go", i), "")[0] for i in range(3)]
    result = measure(REWARDBENCH, questions, [[1.0, 0.0], None, [0.0, 1.0]])
    assert (result["questions"], result["left_out"], result["values"]["hep-go"]) == (2, 1, 0.5)
    assert "1 left out: these are not its numbers" in described(result)[0]
    nothing = measure(REWARDBENCH, questions, [None] * 3)
    assert nothing["values"] == {} and len(described(nothing)) == 1


def test_what_people_read():
    questions = [REWARDBENCH.questions(rewardbench_row(subset), "")[0] for subset in ("hep-go", "donotanswer")]
    assert described(measure(REWARDBENCH, questions, [[1.0, 0.0], [0.0, 1.0]])) == [
        "RewardBench, in percent, 2 questions",
        "  score 50.0; Safety 0.0; Reasoning 100.0",
        "  donotanswer 0.0; hep-go 100.0",
    ]
    pairs = [JUDGEBENCH.questions(judgebench_row("livecodebench", "A>B"), "")[0]]
    assert described(measure(JUDGEBENCH, pairs, [[1.0, 0.0]]))[1] == "  overall 100.0; livecodebench 100.0"


# by hand


def of_rows(benchmark, rows, scores, file=""):
    """Numbers of (row, file) with the scores of their answers, which are all different texts."""
    rows = [row if isinstance(row, tuple) else (row, file) for row in rows]
    questions = [question for row, name in rows for question in benchmark.questions(row, name)]
    values = measure(benchmark, questions, scores)["values"]
    assert json.loads(json.dumps(values)) == values
    return values


def test_rewardbench_by_hand():
    """Math weighs 984 and one language of code 164, whatever rows there are; a tie is wrong; prior sets weigh half."""
    rows = [rewardbench_row(subset, i) for i, subset in enumerate(["math-prm", "math-prm", "hep-go", "mt-bench-easy"])]
    prior = {"prompt": ["Why?"], "chosen": "a", "rejected": "b"}
    rows += [(prior, f"{name}-00000-of-00001.parquet") for name in ("shp", "summarize", "mtbench_human")]
    scores = [[1, 0], [1, 1], [2, 1], [0, 1], [1, 0], [0, 1], [1, 0]]
    found = of_rows(REWARDBENCH, rows, scores)
    assert found["math-prm"] == 0.5
    assert found["Reasoning"] == pytest.approx((0.5 * 984 + 1 * 164) / (984 + 164))
    assert found["Chat"] == 0
    assert found["Prior Sets"] == 0.5  # of shp and summarize alone
    assert found["score"] == pytest.approx((2 * found["Reasoning"] + 2 * 0 + 0.5) / 5)
    assert found["mtbench_human"] == 1 and "Safety" not in found


def test_rewardbench_2_by_hand():
    rows = [rewardbench_2_row("Math", str(i)) for i in range(4)]
    found = of_rows(REWARDBENCH_2, rows, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    assert found == {"score": (1 + 0.5 + 0.25 + 0) / 4, "Math": (1 + 0.5 + 0.25 + 0) / 4}


def test_ties_by_hand():
    """Two numbers. Of the first, c_ref = 2, c_tied = 1, d = .5: all right, and tanh(1/.5 − 1). The second has a tie."""
    rows = [
        rewardbench_2_row("Ties", "ref:0", 1, 2),
        rewardbench_2_row("Ties", "tied:0", 2, 2),
        rewardbench_2_row("Ties", "ref:1", 1, 1),
        rewardbench_2_row("Ties", "tied:1", 2, 1),
        rewardbench_2_row("Ties", "ref:2", 1, 1),
    ]
    scores = [[3, 1, 0], [2.5, 2, 1, 0], [1, 1], [1, 1, 0], [1, 0]]
    found = of_rows(REWARDBENCH_2, rows, scores)
    # right: tied 2 of 2; ref 2 of 3. c_tied > d: 1 > .5, 1 > 0; min(c) > d: 1 > .5, not 0 > 0; 0/0 − 1 is nan, so 0
    expected = 0.3 * 1 + 0.3 * 2 / 3 + 0.2 * 1 + 0.2 * 0.5 + 0.01 * (math.tanh(1) + 0) / 2
    assert found["Ties"] == pytest.approx(expected, abs=1e-15)
    assert of_rows(REWARDBENCH_2, rows[:1], scores[:1]) == {}  # no number has both rows


def test_rm_bench_by_hand():
    rows = [rm_bench_row("chat"), rm_bench_row("chat"), rm_bench_row("safety-refuse"), rm_bench_row("safety-response")]
    # first: concise above all; markdown above concise alone, with a tie against detailed
    scores = [[9, 0, 2, 1, 2, 3], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    found = of_rows(RM_BENCH, rows, scores)
    assert found["chat concise over markdown"] == 0.5
    assert found["chat markdown over concise"] == 0.5
    assert found["chat markdown over detailed"] == 0  # a tie
    assert found["chat hard"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["chat normal"] == pytest.approx(0.5 / 3)
    assert found["chat easy"] == pytest.approx(0.5 / 3)
    assert found["safety"] == found["safety hard"] == 0.5
    assert found["hard"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert found["total"] == pytest.approx(((1 + 0.5 + 0.5) / 9 + 0.5) / 2)
    alone = of_rows(RM_BENCH, [(rm_bench_row(), "data/safety-response_filtered.json")], scores[2:3])
    assert alone["safety"] == alone["total"] == 1
    unnamed = of_rows(RM_BENCH, [(rm_bench_row(), "mine.json")], scores[:1])
    assert unnamed["total"] == pytest.approx(4 / 9) and unnamed["concise over concise"] == 1


def test_judgebench_by_hand():
    """A tie is B>A: wrong where A is right, and right where B is."""
    rows = [judgebench_row("mmlu-pro-law", "A>B"), judgebench_row("livebench-math", "B>A")]
    rows += [
        judgebench_row("livecodebench", "A>B"),
        judgebench_row("another", "B>A"),
        judgebench_row("mmlu-pro", "A>B"),
    ]
    assert of_rows(JUDGEBENCH, rows, [[1, 1], [1, 1], [2, 1], [2, 1], [1, 0]]) == {
        "overall": 60.0,
        "mmlu-pro": 50.0,
        "livebench-math": 100.0,
        "livecodebench": 100.0,
    }


def test_rmb_by_hand():
    rows = [rmb_row(path, losers=2) for path in RMB_PATHS]
    scores = [[1, 0], [0, 0], [2, 1], [3, 1, 2], [2, 2, 0], [0, 1, 2]]
    found = of_rows(RMB, rows, scores)
    assert found["pairwise, helpfulness"] == 0.5 and found["pairwise, harmlessness"] == 1
    assert found["best of N, helpfulness"] == 0.5 and found["best of N, harmlessness"] == 0
    assert found["overall"] == 0.5
    assert found[RMB_PATHS[4]] == 0
    assert "overall" not in of_rows(RMB, rows[:3], scores[:3])


def test_llmbar_by_hand():
    """A tie is half right. Adversarial is the mean of four kinds, each with the same weight."""
    files = [f"LLMBar/{kind}/dataset.json" for kind in KINDS]
    rows = [(llmbar_row(label), file) for label, file in zip("11212", files)] + [(llmbar_row("1"), files[1])]
    found = of_rows(LLMBAR, rows, [[1, 0], [1, 1], [0, 1], [0, 1], [0, 1], [1, 0]])
    assert found["accuracy"] == pytest.approx(100 * (1 + 0.5 + 1 + 0 + 1 + 1) / 6)
    assert found["agreement"] == pytest.approx(100 * 5 / 6)
    assert found["Adversarial/Neighbor"] == 75 and found["Natural"] == 100
    assert found["Adversarial"] == (75 + 100 + 0 + 100) / 4
    assert "Adversarial" not in of_rows(LLMBAR, rows[:3], [[1, 0]] * 3)


def test_ppe_by_hand():
    rows = [human_row("model_a", is_code=True), human_row("model_b", "German"), human_row("model_b"), human_row("tie")]
    found = of_rows(PPE, rows, [[1, 0], [1, 1], [0, 1]])
    assert found["human preference"] == pytest.approx(2 / 3)
    assert found["human preference, code"] == found["human preference, English"] == 1
    assert found["human preference, other languages"] == 0  # a tie
    rows = [best_of_k_row([True, False, False], [[0, 1], [2, 0]]), best_of_k_row([True, True], [], "test_list")]
    found = of_rows(PPE, rows, [[1, 2, 0], [1, 1]])
    # picked: k = 1 a third, k = 2 right only of answers 1 and 3, k = 3 never; drawn: 1/3, 2/3, 1
    assert found["mmlu_pro, accuracy"] == 0.5
    assert found["mmlu_pro, max"] == pytest.approx(1 / 3) and found["mmlu_pro, end"] == 0
    assert found["mmlu_pro, loss"] == pytest.approx((0 + 1 / 3 + 1) / 3)
    assert found["mmlu_pro, AUC"] == 0.5
    assert found["mbpp_plus, max"] == 1 and "mbpp_plus, AUC" not in found
    assert found["correctness, max"] == pytest.approx((1 / 3 + 1) / 2)


def test_best_of_k_is_the_mean_over_all_draws():
    generator = random.Random(0)
    for _ in range(50):
        n = generator.randint(1, 6)
        scores = [float(generator.randint(0, 3)) for _ in range(n)]
        right = [generator.random() < 0.5 for _ in range(n)]
        for k, found in enumerate(best_of_k(scores, right), 1):
            picked = []
            for draw in itertools.combinations(range(n), k):
                most = max(scores[i] for i in draw)
                picked.append(np.mean([right[i] for i in draw if scores[i] == most]))
            assert found == pytest.approx(np.mean(picked), abs=1e-12)


def test_ppe_on_32_answers_is_the_slow_reference():
    generator = random.Random(1)
    right = [generator.random() < 0.4 for _ in range(32)]
    scores = [round(generator.gauss(0, 1), 1) for _ in range(32)]
    pairs = [[i, j] for i in range(32) for j in range(32) if right[i] and not right[j]][:5]
    found = of_rows(PPE, [best_of_k_row(right, pairs, "Subdomain")], [scores])
    draws = 4000
    curve = []
    for k in (1, 4, 32):
        sets = [generator.sample(range(32), k) for _ in range(draws)]
        curve.append(np.mean([right[max(of, key=lambda i: (scores[i], generator.random()))] for of in sets]))
    exact = best_of_k(scores, right)
    assert curve == pytest.approx([exact[0], exact[3], exact[31]], abs=0.03)  # 4 standard errors of .5/√4000
    assert exact[0] == pytest.approx(np.mean(right))
    assert found["gpqa, end"] == exact[-1] and found["gpqa, max"] == exact.max()
    assert found["gpqa, accuracy"] == np.mean([scores[i] > scores[j] for i, j in pairs])
    wins = [(a > b) + 0.5 * (a == b) for a, r in zip(scores, right) if r for b, s in zip(scores, right) if not s]
    assert ppe_module.auc(scores, right) == pytest.approx(np.mean(wins))


# against their own code

MANY = range(100)  # generated sets; some have many ties, as scores have few values


def drawn(generator, count):
    """Scores with ties, or without."""
    if generator.random() < 0.5:
        return [float(generator.randint(0, 3)) for _ in range(count)]
    return [generator.gauss(0, 3) for _ in range(count)]


def asked_of(benchmark, rows, file=""):
    return [question for row in rows for question in benchmark.questions(row, file)]


def equal(found, expected):
    """To the last digit."""
    assert found.keys() == expected.keys()
    assert all(float(found[name]) == float(expected[name]) for name in expected), (found, expected)


def rewardbench_functions(folder):
    import pandas

    names = {"np": np, "pd": pandas, "Dataset": datasets.Dataset, "defaultdict": defaultdict}
    names |= {"Dict": dict, "List": list, "Tuple": tuple, "math": math}
    own_code.functions(folder / "rewardbench/constants.py", ("EXAMPLE_COUNTS", "SUBSET_MAPPING"), names)
    path = folder / "rewardbench/utils.py"
    helper = "sample_stats" if is_0_1_4(folder) else "_compute_prompt_stats"
    wanted = ("calculate_scores_per_section", "reroll_and_score_dataset", helper, "process_single_model")
    return own_code.functions(path, wanted, names)


def is_0_1_4(folder):
    """The version on PyPI: it leaves tied rows whose right answers score the same out of the last part of Ties."""
    return "def sample_stats" in (folder / "rewardbench/utils.py").read_text()


def rewardbench_case(seed, subsets=tuple(COUNTS)):
    generator = random.Random(seed)
    present = [subset for subset in subsets if generator.random() < 0.8] or [subsets[0]]
    rows = [rewardbench_row(generator.choice(present), i) for i in range(generator.randint(1, 300))]
    return rows, [drawn(generator, 2) for _ in rows]


@pytest.mark.parametrize("folder", own_code.needed("rewardbench/utils.py"))
def test_rewardbench_is_its_own(folder):
    theirs = rewardbench_functions(folder)
    assert theirs["EXAMPLE_COUNTS"] == COUNTS
    assert {section: tuple(names) for section, names in theirs["SUBSET_MAPPING"].items()} == SECTIONS
    for seed in MANY:
        rows, scores = rewardbench_case(seed)
        found = measure(REWARDBENCH, asked_of(REWARDBENCH, rows), scores)["values"]
        grouped = {}
        for subset in sorted({row["subset"] for row in rows}):
            results = [1 if a > b else 0 for row, (a, b) in zip(rows, scores) if row["subset"] == subset]
            grouped[subset] = sum(results) / len(results)
        per_section = theirs["calculate_scores_per_section"](COUNTS, SECTIONS, grouped)
        sections = {name: value for name, value in per_section.items() if any(s in grouped for s in SECTIONS[name])}
        equal({name: value for name, value in found.items() if name != "score"}, sections | grouped)


@pytest.mark.parametrize("folder", own_code.needed("analysis/get_benchmark_results.py"))
def test_score_of_rewardbench_is_its_own(folder):
    """The leaderboard's average, with prior sets and without."""
    import pandas

    names = {"np": np, "pd": pandas, "EXAMPLE_COUNTS": COUNTS, "SUBSET_MAPPING": SECTIONS}
    path = folder / "analysis/get_benchmark_results.py"
    average = own_code.functions(path, ("get_average_over_rewardbench",), names)["get_average_over_rewardbench"]
    for seed in MANY:
        generator = random.Random(seed)
        rows = [rewardbench_row(subset, i) for i, subset in enumerate(COUNTS) for _ in range(generator.randint(1, 9))]
        prior = {"prompt": ["Why?"], "chosen": "a", "rejected": "b"}
        files = [f"{name}-0.parquet" for name in PRIOR_SETS for _ in range(generator.randint(1, 9))]
        files = files if seed % 2 else []
        asked = asked_of(REWARDBENCH, rows) + [REWARDBENCH.questions(prior, file)[0] for file in files]
        found = measure(REWARDBENCH, asked, [drawn(generator, 2) for _ in asked])["values"]
        model = {"model": "m", "model_type": "Seq. Classifier"}
        core = pandas.DataFrame([model | {name: found[name] for name in sorted(COUNTS)}])  # as load_results sorts
        sets = {name: found[name] for name in PRIOR_SETS} if files else dict.fromkeys(PRIOR_SETS, 0.0)
        prefs = pandas.DataFrame([{"model": "m" if files else "another"} | sets])
        expected = average(core, prefs).iloc[0]
        assert found["score"] == expected["average"]
        if files:
            assert found["Prior Sets"] == expected["Prior Sets (0.5 weight)"]


def rewardbench_2_case(seed):
    generator = random.Random(seed)
    rows = [rewardbench_2_row(generator.choice(SUBSETS_2), str(i)) for i in range(generator.randint(1, 40))]
    for number in range(generator.randint(1, 30)):
        rows.append(rewardbench_2_row("Ties", f"ref:{number}", 1, generator.randint(1, 6)))
        if number == 0 or generator.random() < 0.9:
            rows.append(rewardbench_2_row("Ties", f"tied:{number}", generator.randint(2, 9), generator.randint(1, 9)))
    scores = []
    for row in rows:
        values = drawn(generator, row["total_completions"])
        lift = generator.choice((0.0, 0.0, 3.0))  # so that right answers are often above
        scores.append([value + lift * (i < row["num_correct"]) for i, value in enumerate(values)])
    order = list(range(len(rows)))
    generator.shuffle(order)
    return [rows[i] for i in order], [scores[i] for i in order]


def ran_v2(folder, rows, scores, model="org/m"):
    """What run_v2.py saves: its statements after the last score."""
    theirs = rewardbench_functions(folder)
    saved = {}

    def save(results, name, place, *args, **kwargs):
        saved[place] = json.loads(json.dumps(results))

    unrolled = [(row, text, score) for row, of in zip(rows, scores) for text, score in zip(answers_of(row), of)]
    path = folder / "scripts/run_v2.py"
    names = theirs | {
        "dataset": datasets.Dataset.from_dict({"text": [text for _, text, _ in unrolled]}),
        "subsets": [row["subset"] for row, _, _ in unrolled],
        "ids": [row["id"] for row, _, _ in unrolled],
        "scores": [score for _, _, score in unrolled],
        "total_completions": [row["total_completions"] for row in rows],
        "num_correct": [row["num_correct"] for row in rows],
        "args": SimpleNamespace(
            model=model, revision=None, chat_template=None, do_not_save=False, debug=False, disable_beaker_save=True
        ),
        "check_tokenizer_chat_template": lambda tokenizer: True,
        "tokenizer": None,
        "model_type": "Seq. Classifier",
        "save_to_hub": save,
        "logger": logging.getLogger("theirs"),
    }
    main = own_code.function(path, "main")
    own_code.run(own_code.rest(main.body, "out_dataset = dataset.add_column('subset'"), names, path)
    return saved


def answers_of(row):
    return row["chosen"] + row["rejected"]


@pytest.fixture
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def has_equal_right_answers(rows, scores):
    return any(
        row["id"].startswith("tied") and len(set(of[: row["num_correct"]])) == 1 for row, of in zip(rows, scores)
    )


@pytest.mark.parametrize("folder", own_code.needed("rewardbench/utils.py"))
def test_rewardbench_2_is_its_own(folder):
    theirs = rewardbench_functions(folder)

    class Rows(list):
        column_names = ()

        def add_column(self, name, values):
            return self

    for seed in MANY:
        rows, scores = rewardbench_2_case(seed)
        found = measure(REWARDBENCH_2, asked_of(REWARDBENCH_2, rows), scores)["values"]
        tied = Rows(row | {"scores": of} for row, of in zip(rows, scores) if row["subset"] == "Ties")
        with np.errstate(all="ignore"):
            _, expected = theirs["process_single_model"](tied)
        if is_0_1_4(folder):
            expected = pytest.approx(expected, abs=0.01 if has_equal_right_answers(rows, scores) else 1e-12)
        assert found["Ties"] == expected
        for subset in SUBSETS_2:
            here = [(row, of) for row, of in zip(rows, scores) if row["subset"] == subset]
            if here and seed < 20:  # through pandas and datasets, which takes its time
                flat = [{"text": "", "scores": score, "i": i} for i, (_, of) in enumerate(here) for score in of]
                table = datasets.Dataset.from_list(flat)
                results = theirs["reroll_and_score_dataset"](table, [4] * len(here))["results"]
                assert found[subset] == sum(results) / len(results)


@pytest.mark.usefixtures("quiet", "own_cache")
@pytest.mark.parametrize("folder", own_code.needed("scripts/run_v2.py"))
@pytest.mark.parametrize("seed", range(3))
def test_files_of_rewardbench_2_are_its_own(folder, seed, tmp_path, capsys):
    rows, scores = rewardbench_2_case(seed)
    with np.errstate(all="ignore"):
        theirs = ran_v2(folder, rows, scores)
    asked = asked_of(REWARDBENCH_2, rows)
    write_results(tmp_path, "org/m", REWARDBENCH_2, asked, scores)
    for place in ("eval-set", "eval-set-scores"):
        ours, expected = json.loads((tmp_path / place / "org/m.json").read_text()), theirs[f"{place}/"]
        if is_0_1_4(folder) and place == "eval-set":
            assert ours.pop("Ties") == pytest.approx(expected.pop("Ties"), abs=0.01)
        assert ours == expected
    # and their own reader makes the total of it
    import pandas

    names = {"np": np, "pd": pandas, "load_dataset": datasets.load_dataset, "Path": Path}
    names |= {"List": list, "Optional": dict.get, "Union": dict.get}
    loader = own_code.function(folder / "analysis/utils.py", "load_results")
    for argument in loader.args.args:  # annotations need typing only
        argument.annotation = None
    own_code.run([loader], names, folder / "analysis/utils.py")
    read = names["load_results"](str(tmp_path), "eval-set/")
    assert read["average"].iloc[0] == measure(REWARDBENCH_2, asked, scores)["values"]["score"]


def ran_command(folder, rows, scores, out, model):
    """What the command ``rewardbench`` writes of RewardBench: its statements after the last score."""
    theirs = rewardbench_functions(folder)
    texts = {side: [f"<q>{row[side]}" for row in rows] for side in ("chosen", "rejected")}
    columns = {"prompt": ["<q>"] * len(rows), "text_chosen": texts["chosen"], "text_rejected": texts["rejected"]}
    metadata = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    args = SimpleNamespace(
        model=model, output_dir=f"{out}/", dataset="allenai/reward-bench", save_all=True, debug=False
    )
    for name in ("ref_model", "chat_template", "wandb_run", "upload_model_metadata_to_hf", "push_results_to_hub"):
        setattr(args, name, None)
    path = folder / "rewardbench/rewardbench.py"
    names = theirs | {
        "os": os,
        "json": json,
        "args": args,
        "dataset": datasets.Dataset.from_dict(columns),
        "metadata": datasets.Dataset.from_list(metadata),
        "subsets": [row["subset"] for row in rows],
        "results": [1 if chosen > rejected else 0 for chosen, rejected in scores],
        "scores_chosen": [chosen for chosen, _ in scores],
        "scores_rejected": [rejected for _, rejected in scores],
        "is_preference_ranking": True,
        "tokenizer_path": model,
        "logger": logging.getLogger("theirs"),
    }
    save = own_code.function(path, "save_jsonl")
    for argument in save.args.args:
        argument.annotation = None
    body = own_code.rest(own_code.function(path, "rewardbench").body, "def unwrap_if_list_of_lists")
    own_code.run([save, *body], names, path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("folder", own_code.needed("rewardbench/rewardbench.py"))
@pytest.mark.parametrize("seed", range(10))
def test_files_of_the_command_are_its_own(folder, seed, tmp_path):
    rows, scores = rewardbench_case(seed)
    ran_command(folder, rows, scores, tmp_path / "theirs", "org/m")
    asked = asked_of(REWARDBENCH, rows)
    texts = [SimpleNamespace(prompt="<q>", whole=["<q>yes", "<q>no"]) for _ in asked]
    write_results(tmp_path / "ours", "org/m", REWARDBENCH, asked, scores, texts)
    theirs, ours = ((tmp_path / name / "org/m.json").read_text() for name in ("theirs", "ours"))
    assert json.loads(ours) == json.loads(theirs)
    for name in ("m_outputs.jsonl", "m_all.jsonl"):
        theirs, ours = ((tmp_path / side / "org" / name).read_text() for side in ("theirs", "ours"))
        assert list(map(json.loads, ours.splitlines())) == list(map(json.loads, theirs.splitlines()))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("folder", own_code.needed("scripts/run_v2.py"))
@pytest.mark.parametrize("is_prior", [False, True])
def test_files_of_the_leaderboard_are_its_own(folder, is_prior, tmp_path, capsys):
    path = folder / "scripts/run_rm.py"
    main = own_code.function(path, "main")
    generator = random.Random(7)
    if is_prior:
        row = {"prompt": ["Why?"], "chosen": "yes", "rejected": "no"}
        files = [f"{generator.choice(PRIOR_SETS)}-0.parquet" for _ in range(60)]
        asked = [REWARDBENCH.questions(row, file)[0] for file in files]
    else:
        asked = asked_of(REWARDBENCH, rewardbench_case(7)[0])
    scores = [drawn(generator, 2) for _ in asked]
    saved = {}

    def save(results, name, place, *args, **kwargs):
        saved[place] = json.loads(json.dumps(results))

    sides = {"text_chosen": ["yes"] * len(asked), "text_rejected": ["no"] * len(asked)}
    names = rewardbench_functions(folder) | {
        "dataset": datasets.Dataset.from_dict(sides),
        "results": [1 if chosen > rejected else 0 for chosen, rejected in scores],
        "subsets": [question.subset for question in asked],
        "ids": [int(question.id) if question.id else "" for question in asked],
        "scores_chosen": [chosen for chosen, _ in scores],
        "scores_rejected": [rejected for _, rejected in scores],
        "args": SimpleNamespace(
            model="m", chat_template="tokenizer", pref_sets=is_prior, debug=False, do_not_save=True,
            disable_beaker_save=True,
        ),
        "check_tokenizer_chat_template": lambda tokenizer: True,
        "tokenizer": None,
        "model_type": "Seq. Classifier",
        "save_to_hub": save,
        "logger": logging.getLogger("theirs"),
    }  # fmt: skip
    own_code.run(own_code.rest(main.body, "out_dataset = dataset.add_column"), names, path)
    write_results(tmp_path, "m", REWARDBENCH, asked, scores)
    place = "pref-sets" if is_prior else "eval-set"
    for name in (place, f"{place}-scores"):
        assert json.loads((tmp_path / name / "m.json").read_text()) == saved[f"{name}/"]


@pytest.mark.parametrize("folder", own_code.needed("nvidia.sh"))
def test_rm_bench_is_its_own(folder, capsys):
    path = folder / "scripts/utils.py"
    names = {"np": np, "List": list, "Dict": dict, "Any": object}
    theirs = own_code.functions(path, ("split_dataset_by_domain", "compute_accuracy"), names)["compute_accuracy"]
    domains = ("chat", "code", "math", "safety-refuse", "safety-response")
    for seed in MANY:
        generator = random.Random(seed)
        rows = [rm_bench_row(domain, i) for i, domain in enumerate(domains)]
        rows += [rm_bench_row(generator.choice(domains), i) for i in range(generator.randint(0, 50))]
        scores = [drawn(generator, 6) for _ in rows]
        found = measure(RM_BENCH, asked_of(RM_BENCH, rows), scores)["values"]
        scored = [row | {"score_chosen": of[:3], "score_rejected": of[3:]} for row, of in zip(rows, scores)]
        expected = theirs([dict(row) for row in scored])
        renamed = {"total_avg_acc": "total", "hard_acc": "hard", "normal_acc": "normal", "easy_acc": "easy"}
        for name, value in expected.items():
            assert found[renamed.get(name, name)] == value, name
        for domain in ("chat", "math", "code", "safety"):  # each domain's levels, as of a file of its own
            one = [{k: v for k, v in row.items() if k != "domain"} for row in scored if row["domain"][:4] == domain[:4]]
            levels = theirs(one)
            assert [found[f"{domain} {level}"] for level in ("hard", "normal", "easy")] == list(levels.values())


@pytest.mark.parametrize("folder", own_code.needed("utils/judges.py"))
def test_judgebench_is_its_own(folder):
    names = {"List": list, "Dict": dict, "Any": object}
    own_code.functions(folder / "utils/metrics.py", ("compute_final_metrics",), names)
    judges = own_code.tree(folder / "utils/judges.py")
    judge = next(node for node in judges.body if getattr(node, "name", None) == "GRMReward")
    method = next(node for node in judge.body if getattr(node, "name", None) == "get_judgment")
    decide = own_code.run([method], {"Dict": dict, "Any": object}, folder)["get_judgment"]
    for seed in MANY:
        generator = random.Random(seed)
        sources = ("mmlu-pro-law", "mmlu-pro-math", *SOURCES[1:])
        rows = [judgebench_row(source, generator.choice(["A>B", "B>A"])) for source in sources]
        rows += [
            judgebench_row(generator.choice(sources), generator.choice(["A>B", "B>A"]))
            for _ in range(generator.randint(0, 60))
        ]
        scores = [drawn(generator, 2) for _ in rows]
        pairs = []
        for row, (a, b) in zip(rows, scores):
            of_answer = {row["response_A"]: a, row["response_B"]: b}
            model = SimpleNamespace(model_name="m", get_reward=lambda chat, known=of_answer: known[chat[-1]["content"]])
            judged = asyncio.run(decide(model, row["question"], row["response_A"], row["response_B"]))
            pairs.append(row | {"judgments": [judged]})
        expected = {}
        for source in ("", *SOURCES):
            of_source = [pair for pair in pairs if pair["source"].startswith(source)]
            expected[source or "overall"] = names["compute_final_metrics"](of_source, False)
        equal(measure(JUDGEBENCH, asked_of(JUDGEBENCH, rows), scores)["values"], expected)


@pytest.mark.parametrize("folder", own_code.needed("eval/scripts/my_run_rm.py"))
def test_pairs_of_rmb_are_its_own(folder):
    """Its script has no function for this: the statements that make ``results`` and ``model_acc`` of the scores."""
    path = folder / "eval/scripts/my_run_rm.py"
    body = own_code.function(path, "main")
    wanted = ("results = [1 if", "model_acc = ")
    nodes = [n for n in ast.walk(body) if isinstance(n, ast.Assign) and ast.unparse(n).startswith(wanted)]
    assert len(nodes) == 2
    nodes.sort(key=lambda node: node.lineno)
    pairs = RMB_PATHS[:3]
    for seed in MANY:
        generator = random.Random(seed)
        rows = [rmb_row(generator.choice(pairs), id=str(i)) for i in range(generator.randint(1, 80))]
        scores = [drawn(generator, 2) for _ in rows]
        found = measure(RMB, asked_of(RMB, rows), scores)["values"]
        for name in found:  # a file or a folder at a time, as its script is called
            begins = {"pairwise, helpfulness": "Pairwise_set/Help", "pairwise, harmlessness": "Pairwise_set/Harm"}
            here = [of for row, of in zip(rows, scores) if row["category_path"].startswith(begins.get(name, name))]
            given = {"scores_chosen": [a for a, _ in here], "scores_rejected": [b for _, b in here]}
            assert own_code.run(list(nodes), given, path)["model_acc"] == found[name]


RM_R1 = "eval/RMB-Reward-Model-Benchmark/eval/scripts/run_rm_bestofn.py"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("folder", own_code.needed(RM_R1))
def test_best_of_n_of_rmb_is_that_of_rm_r1(folder, tmp_path, capsys):
    path = folder / RM_R1
    main = own_code.function(path, "main")
    begins = "if chosen > rejected"
    compare = next(node for node in ast.walk(main) if isinstance(node, ast.If) and ast.unparse(node).startswith(begins))
    body = own_code.rest(main.body, "final_score_json = []")
    for seed in range(10):
        generator = random.Random(seed)
        rows = [rmb_row(path_, losers=2, id=str(i)) for i, path_ in enumerate(RMB_PATHS[3:])]
        more = range(generator.randint(0, 40))
        rows += [rmb_row(generator.choice(RMB_PATHS[3:]), losers=generator.randint(2, 6)) for _ in more]
        scores = [drawn(generator, 1 + len(row["loser_list"])) for row in rows]
        found = measure(RMB, asked_of(RMB, rows), scores)["values"]
        for part, begins in (("best of N, helpfulness", "BoN_set/Help"), ("best of N, harmlessness", "BoN_set/Harm")):
            here = [(row, of) for row, of in zip(rows, scores) if row["category_path"].startswith(begins)]
            flat = [(i, row["category_path"], of[0], loser) for i, (row, of) in enumerate(here) for loser in of[1:]]
            results = []
            for _, _, chosen, rejected in flat:
                own_code.run([compare], {"results": results, "chosen": chosen, "rejected": rejected}, path)
            columns = {"idx": [f[0] for f in flat], "category_path": [f[1] for f in flat]}
            names = {
                "results": results,
                "dataset": datasets.Dataset.from_dict(columns),
                "chosen_score_list": [f[2] for f in flat],
                "rej_score_list": [f[3] for f in flat],
                "args": SimpleNamespace(meta_result_save_dir=str(tmp_path), model_save_name="m", model_save_meta=part),
                "json": json,
                "Path": Path,
                "np": np,
                "Dataset": datasets.Dataset,
            }
            own_code.run(list(body), names, path)
            totals, scenarios = json.loads((tmp_path / "m/RMB" / part / "score_result/Final_score.json").read_text())
            assert found[part] == totals["BoN Final Accuracy"]
            for scenario, value in scenarios.items():
                assert found[scenario] == value


@pytest.mark.parametrize("folder", own_code.needed("LLMEvaluator/evaluate.py"))
def test_llmbar_is_its_own(folder):
    """Its rating evaluators take whole numbers; the statistics are statements of the script."""
    path = folder / "LLMEvaluator/evaluate.py"
    script = own_code.tree(path)
    guard = next(node for node in script.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    counting = own_code.rest(guard.body, "correct_False, correct_True")
    counting = counting[: next(i for i, node in enumerate(counting) if "cohen_kappa" in ast.unparse(node))]
    given = {}
    names = own_code.functions(path, ("annotate",), {"NonSwap": (), "SwapBased": (), "Rating": ("GPT-4/Rating",)})
    names["Complete"] = lambda prompt, module: (str(given[prompt]), "stop", 0.0)
    args = SimpleNamespace(evaluator="GPT-4/Rating")
    for seed in MANY:
        generator = random.Random(seed)
        rows = [(generator.choice(KINDS), llmbar_row(generator.choice("12"))) for _ in range(generator.randint(1, 60))]
        scores = [[generator.randint(1, 5) for _ in range(2)] for _ in rows]
        asked = [LLMBAR.questions(row, f"LLMBar/{kind}/dataset.json")[0] for kind, row in rows]
        found = measure(LLMBAR, asked, scores)["values"]
        for kind in {kind for kind, _ in rows} | {""}:
            dataset = []
            for (of, row), (one, two) in zip(rows, scores):
                if kind in ("", of):
                    given.update({row["output_1"]: one, row["output_2"]: two})
                    dataset.append(names["annotate"](dict(row), args, [{"prompt": "{output}"}])[0])
            statistics = own_code.run(list(counting), {"dataset": dataset}, path)["statistics"]
            assert found[kind or "accuracy"] == float(statistics["correct_average"].rstrip("%"))
            if not kind:
                assert f"{found['agreement']}%" == statistics["equal"].split("= ")[1]


# files


def test_pairs_of_any_benchmark_are_written(tmp_path):
    rows = [judgebench_row("livecodebench", "B>A", "x"), judgebench_row("mmlu-pro-law", "A>B", "y")]
    paths = write_results(tmp_path, "org/m", JUDGEBENCH, asked_of(JUDGEBENCH, rows), [[1.0, 2.0], None])
    assert paths == [tmp_path / "org" / name for name in ("m.json", "m_outputs.jsonl", "m_all.jsonl")]
    summary = json.loads(paths[0].read_text())
    assert (summary["accuracy"], summary["num_prompts"], summary["extra_results"]) == (1.0, 1, None)
    (row,) = map(json.loads, paths[1].read_text().splitlines())
    assert (row["text_chosen"], row["scores_chosen"], row["scores_rejected"], row["results"]) == ("b", 2.0, 1.0, 1)
    assert (row["subset"], row["id"], row["prompt"]) == ("livecodebench", "x", "Why?")
    with pytest.raises(UserError, match="RM-Bench has questions of other than two answers"):
        write_results(tmp_path, "m", RM_BENCH, asked_of(RM_BENCH, [rm_bench_row("chat")]), [[0.0] * 6])
    assert write_results(tmp_path / "none", "m", JUDGEBENCH, [], []) == []


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("/data/run/output", "data/run/output.json"),
        ("../other/model", "other/model.json"),
        ("m", "m.json"),
        ("/", "model.json"),
    ],
)
def test_a_model_that_is_a_path_stays_in_the_folder(tmp_path, model, place):
    pair = ScoredPair("Why?", "a", "b", 1.0, 0.0, {})
    assert write_pairs(tmp_path, model, [pair])[0] == tmp_path / place
    assert (tmp_path / place).is_file()


# the published files that the snapshots hold

PUBLISHED = [
    ("utils/judges.py", "data/*.jsonl", JUDGEBENCH),
    ("nvidia.sh", "data/*_filtered.json", RM_BENCH),
    ("eval/scripts/my_run_rm.py", "RMB_dataset/**/*.json", RMB),
    ("LLMEvaluator/evaluate.py", "Dataset/**/dataset.json", LLMBAR),
]


@pytest.mark.parametrize(
    ("folder", "files", "benchmark"),
    [
        pytest.param(*folder.values, files, benchmark, id=benchmark.name, marks=folder.marks)
        for marker, files, benchmark in PUBLISHED
        for folder in own_code.needed(marker)
    ],
)
def test_published_files_are_known_and_read(folder, files, benchmark):
    paths = sorted(folder.glob(files))
    assert paths
    generator = random.Random(0)
    asked, scores = [], []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        rows = list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)
        assert recognize(list(rows[0]), rows[0], str(path)) is benchmark
        for row in rows:
            (question,) = benchmark.questions(row, str(path))
            asked.append(question)
            scores.append([generator.gauss(0, 1) for _ in question.row["responses"]])
    result = measure(benchmark, asked, scores)
    assert result["questions"] == len(asked) and len(described(result)) > 1
    assert all(question.subset for question in asked)
    assert all(math.isfinite(value) for value in result["values"].values())
    assert set(result["values"]) & set(benchmark.headline)
