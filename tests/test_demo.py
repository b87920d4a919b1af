# SPDX-License-Identifier: Apache-2.0
"""The demonstration's data set and tiny model."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from reward_model.data import demo
from reward_model.evaluation.metrics import accuracy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def rows(data):
    return {name: [json.loads(line) for line in (data / f"{name}.jsonl").open()] for name in ("train", "eval")}


def test_the_same_seed_writes_the_same_bytes(data, tmp_path):
    for seed in (0, 1):
        demo.write_data(tmp_path / str(seed), seed)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "0" / name).read_bytes() == (data / name).read_bytes()
        assert (tmp_path / "1" / name).read_bytes() != (data / name).read_bytes()


def test_no_request_is_held_out_and_trained_on(rows):
    requests = {
        name: {(task, thing, where) for task, thing, where in map(request_of, part)} for name, part in rows.items()
    }
    assert requests["train"] & requests["eval"] == set()
    assert {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["eval"]} == set()
    assert (len(requests["train"]), len(requests["eval"])) == (764, 100)  # of 6 tasks × 24 things × 6 circumstances


def request_of(row):
    """Task, thing and circumstance that a prompt names."""
    words = f" {row['prompt']} ".replace("?", " ").replace(".", " ")
    (task,) = [t for t in demo.TASKS if f" {t} a " in words]
    (thing,) = [t for t in demo.THINGS if f" a {t} " in words]
    (where,) = [w for w in demo.WHERE if f" {w} " in words]
    return task, thing, where


def test_three_pairs_of_each_prompt(rows):
    assert set(Counter(row["prompt"] for row in rows["train"] + rows["eval"]).values()) == {demo.PAIRS_PER_PROMPT}


def test_rows_have_the_columns_that_the_trainer_reads(rows):
    for row in rows["train"] + rows["eval"]:
        assert row.keys() == {"prompt", "chosen", "rejected", "rating"}
        assert row["chosen"] != row["rejected"]
        assert row["chosen"].startswith(" ")
        assert row["prompt"].endswith("Assistant:")


def test_every_rating_from_1_to_3_occurs(rows):
    assert {row["rating"] for row in rows["train"]} == {row["rating"] for row in rows["eval"]} == {1, 2, 3}


def test_the_chosen_answer_has_the_higher_grade_by_the_rating(monkeypatch):
    monkeypatch.setattr(demo, "answer", lambda grade, *_: str(grade))
    requests = [("clean", "lamp", "at home")] * 50
    found = demo.pairs(requests, random.Random(0))
    assert all(int(row["chosen"]) - int(row["rejected"]) == row["rating"] > 0 for row in found)
    assert len({(row["chosen"], row["rejected"]) for row in found}) == 6  # every pair of four grades


def grade_of(text, row):
    """Mean grade of an answer's sentences, read off the templates."""
    task, thing, _ = request_of(row)
    steps = {step.format(thing=thing, task=task, step=s) for step in demo.STEP for s in demo.TASKS[task]}
    elsewhere = {sentence.format(other=other) for sentence in demo.ELSEWHERE for other in demo.THINGS}
    grades = {0: set(demo.RUDE), 1: elsewhere, 2: set(demo.GENERAL), 3: steps}
    sentences = [f"{sentence.strip()}." for sentence in text.split(".") if sentence.strip()]
    return np.mean([next(g for g, known in grades.items() if sentence in known) for sentence in sentences])


@pytest.mark.parametrize("name", ["train", "eval"])
def test_what_an_answer_says_tells_its_grade(rows, name):
    grades = [(grade_of(row["chosen"], row), grade_of(row["rejected"], row)) for row in rows[name]]
    share = accuracy(*np.array(grades).T)
    assert 0.9 < share < 1.0  # a few stray sentences, so that not every pair can be had


@pytest.mark.parametrize("name", ["train", "eval"])
def test_length_carries_no_signal(rows, name):
    lengths = np.array([(len(row["chosen"]), len(row["rejected"])) for row in rows[name]])
    assert accuracy(*lengths.T) == pytest.approx(0.5, abs=0.05)


def test_every_answer_is_about_as_long_as_drawn(rows):
    low, high = demo.LENGTHS
    longest_sentence = 70
    lengths = [len(row[side]) for row in rows["train"] for side in ("chosen", "rejected")]
    assert low <= min(lengths)
    assert max(lengths) < high + longest_sentence


def test_the_model_and_its_tokenizer_load_and_fit_the_data(data, rows, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo.write_model(tmp_path, data)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [row["prompt"] + row[side] for row in rows["eval"] for side in ("chosen", "rejected")]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts  # no unknown token
    assert max(map(max, ids)) < len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert max(map(len, ids)) < 256  # the quick start's --max_seq_len
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        assert model(torch.tensor(ids[:1])).logits.isfinite().all()
