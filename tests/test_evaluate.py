# SPDX-License-Identifier: Apache-2.0
"""reward-model evaluate: saved models of every form on files of every kind, alone and by several processes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs
from saved import save

from reward_model.__main__ import main
from reward_model.commands.evaluate import models_of
from reward_model.config.evaluation import EvaluateConfig
from reward_model.inference import load
from reward_model.judging.api import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs():
    """Rows whose prompts come two or three times."""
    chance = np.random.default_rng(0)

    def said(count):
        return " ".join(chance.choice(WORDS, count))

    prompts = [said(6) for _ in range(15)]
    rows = [
        {"prompt": prompts[i % 15], "chosen": " " + said(3 + i % 4), "rejected": " " + said(2 + i % 3) + " x"}
        for i in range(40)
    ]
    return [row | {"domain": "even" if i % 2 else "odd", "margin": float(i % 3)} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, pairs):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, *paths, **changes):
    return EvaluateConfig(data=[str(path) for path in paths], data_output_path=str(folder / "cache"), **changes)


def gaps_of(model, rows, **options):
    """By scoring each text alone."""
    reward = load(model, **options)
    sides = [
        [reward.score([row["prompt"]], [row[side]], batch_size=1)[0] for row in rows] for side in ("chosen", "rejected")
    ]
    return np.subtract(*sides)


@pytest.mark.parametrize("form", ["hf", "dschat", "own", "encoder", "lora"])
def test_every_form_is_judged_by_the_scores_of_its_texts(form, pairs, data, tmp_path):
    how = {
        "hf": {},
        "dschat": {"save_format": "dschat"},
        "own": {"family": "bert", "pooling": "mean"},
        "encoder": {"family": "bert"},
        "lora": {"lora": True},
    }[form]
    folder = save(tmp_path, **how)
    gaps = gaps_of(folder, pairs)
    found = evaluate([str(folder)], config(tmp_path, data)).assessments[0]
    assert found["accuracy"]["value"] == np.mean(gaps > 0)
    assert found["gap"]["mean"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert found["loss"] == pytest.approx(np.logaddexp(0, -gaps).mean(), abs=1e-5)
    worst = found["mistakes"][0]
    assert worst["row"] == int(gaps.argmin()) + 1
    assert worst["chosen_score"] - worst["rejected_score"] == pytest.approx(gaps.min(), abs=1e-5)
    row = pairs[int(gaps.argmin())]
    assert (worst["prompt"] + worst["chosen"], worst["file"]) == (row["prompt"] + row["chosen"], str(data))


def test_an_adapter_alone_is_merged_first(pairs, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save(tmp_path, lora=True)
    alone = tmp_path / "adapter"
    (folder / "adapter").rename(alone)
    one, other = (evaluate([str(each)], config(tmp_path, data)).assessments[0] for each in (folder, alone))
    assert other["gap"]["mean"] == pytest.approx(one["gap"]["mean"], abs=1e-5)


def test_a_model_whose_pad_is_its_end_is_scored_where_transformers_scores_it(pairs, data, tmp_path):
    """As TRL trains: at the token before the end, in batches too."""
    folder = save(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["pad_token_id"] = settings["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(settings))
    gaps = gaps_of(folder, pairs)
    found = evaluate([str(folder)], config(tmp_path, data, batch_size=8)).assessments[0]
    assert found["gap"]["mean"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert found["gap"]["std"] == pytest.approx(gaps.std(), abs=1e-5)


def test_sets_subsets_margins_and_two_models(model, pairs, data, tmp_path):
    other = save(tmp_path, seed=9)
    lists = write(
        tmp_path / "lists.jsonl",
        [
            {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " fish"], "scores": [2, 1, 0]}
            | {"domain": "lists"}
            for row in pairs
        ],
    )
    found = evaluate(
        [str(model), str(other)], config(tmp_path, f"pairs={data}", f"lists={lists}", columns=["subset=domain"])
    )
    assert [(each["model"], each["set"]) for each in found.assessments] == [
        (str(each), name) for each in (model, other) for name in ("pairs", "lists")
    ]
    first = found.assessments[0]
    assert {part["subset"]: part["pairs"] for part in first["by_subset"]} == {"even": 20, "odd": 20}
    assert [part["pairs"] for part in first["by_margin"]] == [14, 13, 13]
    assert first["prompts"] == 15 and found.assessments[1]["lists"]["lists"] == 40
    gaps = [gaps_of(each, pairs) for each in (model, other)]
    compared = found.comparisons[0]
    assert compared["value"] == pytest.approx(np.mean(gaps[0] > 0) - np.mean(gaps[1] > 0))
    assert compared["only_one"] == np.sum((gaps[0] > 0) & (gaps[1] < 0))
    apart = [each["row"] for each in compared["disagreements"]]
    assert sorted(apart) == (np.flatnonzero(np.sign(gaps[0]) != np.sign(gaps[1])) + 1).tolist()


def test_a_benchmark_is_known_by_its_columns(model, tmp_path, capsys):
    rows = [
        {"question": f"the cat {word}", "response_A": f"the {word}", "response_B": "fish there", "label": "A>B",
         "source": "livebench-math", "pair_id": str(i), "original_id": str(i), "response_model": "m"}
        for i, word in enumerate(WORDS)
    ]  # fmt: skip
    path = write(tmp_path / "judgebench.jsonl", rows)
    page = tmp_path / "page.html"
    settings = config(
        tmp_path, path, chat_template="human_assistant", output_dir=str(tmp_path / "found"), report=str(page)
    )
    found = evaluate([str(model)], settings)
    assert found.assessments == [] and len(found.benchmarks) == 1
    assert "a page has no place for benchmarks alone" in capsys.readouterr().out and not page.exists()
    assert found.benchmarks[0]["benchmark"] == "JudgeBench" and found.benchmarks[0]["questions"] == 8
    written = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert written["benchmarks"] == found.benchmarks


def test_a_part_of_rewardbench_2_is_told_and_a_model_without_a_template_too(model, tmp_path, capsys):
    row = {"prompt": "the cat", "chosen": ["sat"], "rejected": ["mat", "fish", "there"], "subset": "Math", "id": "1"}
    path = write(tmp_path / "rb2.jsonl", [row | {"num_correct": 1, "total_completions": 4}] * 3)
    words = ["evaluate", str(model), "--data", str(path), "--data_output_path", str(tmp_path / "cache")]
    assert main(words) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "has no chat template: --chat_template gives it one" in said[0]
    assert main([*words, "--chat_template", "human_assistant"]) == 0
    assert "1 of its 6 subsets: the score is not the published one" in capsys.readouterr().out


def test_text_stands_for_a_list_of_one(model, data, tmp_path):
    settings = EvaluateConfig(data=str(data), data_output_path=str(tmp_path / "cache"))
    assert evaluate(str(model), settings).assessments[0]["pairs"] == 40


def test_rows_without_a_better_answer_are_told(model, tmp_path, pairs):
    ties = [{"prompt": "the cat", "responses": [" sat", " mat"], "ranks": [0, 0]}] * 2
    judged = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "ranks": [0, 1]} for row in pairs
    ]
    path = write(tmp_path / "ties.jsonl", judged + ties)
    found = evaluate([str(model)], config(tmp_path, path)).assessments[0]
    assert (found["rows"], found["pairs"], found["undecided"]) == (42, 40, 2)
    assert found["specificity"]["groups"] == 2


def test_models_that_cannot_be_compared_are_told_of(model, tmp_path, capsys):
    rows = [{"prompt": "the cat", "response": f" {word}", "score": float(i)} for i, word in enumerate(WORDS)]
    found = evaluate([str(model)] * 2, config(tmp_path, write(tmp_path / "rated.jsonl", rows)))
    assert len(found.assessments) == 2 and found.comparisons == []
    assert "are not compared: the data have no pairs to compare models on" in capsys.readouterr().out


def test_of_rewardbench_the_filtered_rows_are_taken(model, tmp_path, capsys):
    row = {"prompt": "the cat", "chosen": "sat", "rejected": "the mat", "subset": "alpacaeval-easy", "id": 1}
    row |= {"chosen_model": "a", "rejected_model": "b"}
    (tmp_path / "data").mkdir()
    for name, count in (("raw", 5), ("filtered", 3)):
        write(tmp_path / "data" / f"{name}-00000-of-00001.jsonl", [row] * count)
    found = evaluate([str(model)], config(tmp_path, tmp_path / "data", chat_template="human_assistant"))
    assert [(each["benchmark"], each["questions"]) for each in found.benchmarks] == [("RewardBench", 3)]
    assert "left out" in capsys.readouterr().out


def test_several_processes_find_what_one_does(model, data, tmp_path):
    alone = evaluate([str(model)], config(tmp_path, data)).to_json()
    words = ["evaluate", str(model), "--data", str(data), "--data_output_path", str(tmp_path / "cache"), "--json"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    start += ["--master_port", str(runs.free_port())]
    done = subprocess.run(
        [*start, "-m", "reward_model", *words], env=runs.environment(OMP_NUM_THREADS="1"), cwd=runs.TOP,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout)
    one, two = alone["assessments"][0], together["assessments"][0]
    assert one["accuracy"] == two["accuracy"] and one["rows"] == two["rows"] == 40
    assert two["gap"]["mean"] == pytest.approx(one["gap"]["mean"], abs=1e-6)


def test_the_command_prints_text_or_one_object(model, data, tmp_path, capsys):
    words = ["evaluate", str(model), "--dataset", str(data), "--max_length", "60", "--data_output_path", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{model} on {data}: 40 pairs of 15 prompts" in said and "for the longer answer" in said
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["assessments"][0]["pairs"] == 40
    assert "pairs.jsonl: 40 rows" in printed.err


def test_a_model_that_was_saved_with_a_temperature_of_few_pairs_is_doubted(model, data, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    saved = json.loads((copy / "config.json").read_text())
    fit = {"pairs": 40, "low": 0.25, "high": 1.0}
    saved |= {"score_temperature": 0.5, "score_temperature_fit": fit}
    (copy / "config.json").write_text(json.dumps(saved))
    words = ["evaluate", str(copy), "--data", str(data), "--data_output_path", str(tmp_path)]
    assert main(words) == 0
    doubt = "as the model is saved: the temperature is rough, 0.25 to 1 (95 %, 40 pairs)"
    assert doubt in capsys.readouterr().out
    assert main([*words, "--temperature", "2"]) == 0  # it is the user's then
    said = capsys.readouterr().out
    assert doubt not in said and "σ(gap / 2.000), as --temperature says" in said and "as the model is" not in said


def test_models_are_named_first_or_as_rewardbench_has_it():
    assert models_of(["a", "b", "--data", "x"]) == (["a", "b"], ["--data", "x"])
    assert models_of(["--data", "x", "--model", "a", "--json"]) == (["a"], ["--data", "x", "--json"])


@pytest.mark.parametrize(
    "words, what",
    [
        (["--data", "x.jsonl"], "name a model"),
        (["nowhere", "--data", "DATA"], "nowhere: no such folder"),
        (["MODEL"], "give --data"),
        (["MODEL", "--data", "x.jsonl", "--colums", "a=b"], "did you mean --columns"),
        (["MODEL", "--data", "nowhere.jsonl"], "error: nowhere.jsonl: no such file or folder"),
        (["MODEL", "--dat", "x.jsonl"], "did you mean --data"),
        (["MODEL"] * 9 + ["--data", "a=DATA", "b=DATA", "--report", "x.html"], "9 models on 2 sets"),
        (["MODEL", "BASE", "--data", "DATA"], "base has no trained score head"),
    ],
)
def test_what_is_wrong_is_one_line(words, what, model, data, capsys):
    named = {"MODEL": str(model), "DATA": str(data), "BASE": str(model.parent / "base")}
    assert main(["evaluate", *(named.get(word, word) for word in words)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("error: ") and what in said[0]
