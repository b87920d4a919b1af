# SPDX-License-Identifier: Apache-2.0
"""Strengths of preference: the columns, the fields of rows, and training that swaps, leaves out and weighs by them."""

import json
import math
import re

import numpy as np
import pytest
import runs
import tiny
import torch
from comparisons import table

from reward_model.data.comparisons import Comparison
from reward_model.data.files import read_file
from reward_model.data.layouts import layout_of, unread
from reward_model.data.preprocessing import PreprocessingConfig, tokenize
from reward_model.data.rows import judge_pair, read_row
from reward_model.data.strengths import Strength, strength_of, strength_of_differences, strengths_of_differences
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.data.weakest import rearrange
from reward_model.objectives.losses import strength_smoothing
from reward_model.training.model_card import _data
from reward_model.training.resume import hash_of_rows

# Section 1: columns.


def test_strength_of_differences_worked_by_hand():
    found = strength_of_differences([2.0, -1.0, 0.0, 3.0])
    assert found == Strength(1.0, math.sqrt((1 + 4 + 1 + 4) / 4), (1 + 0 + 0.5 + 1) / 4)
    assert strength_of_differences([-0.5]) == Strength(-0.5, 0.0, 0.0)


def test_many_pairs_are_each_of_those_that_judged_them():
    differences = np.random.default_rng(0).normal(size=(4, 9)).round(1)
    differences[0, 3], differences[:3, 4], differences[:, 5] = np.nan, np.nan, np.nan
    differences[1, 2] = 0.0
    mean, std, agree, counts = strengths_of_differences(differences)
    assert counts.tolist() == [4, 4, 4, 3, 1, 0, 4, 4, 4]
    for i in range(9):
        known = differences[:, i][~np.isnan(differences[:, i])]
        expected = strength_of_differences(known) if len(known) else (math.nan,) * 3
        assert (mean[i], std[i], agree[i]) == pytest.approx(tuple(expected), nan_ok=True)


def test_heads_share_the_vote_of_their_model():
    """Against a loop: a vote of a model with K heads, one of M that have judged, weighs 1 / (M·K)."""
    heads = [3, 1, 2]
    differences = np.random.default_rng(1).normal(size=(6, 8)).round(1)
    differences[:3, 2], differences[3, 3], differences[:, 4], differences[1, 5] = np.nan, np.nan, np.nan, 0.0
    mean, std, agree, counts = strengths_of_differences(differences, heads)
    for i in range(8):
        models = [d for d in np.split(differences[:, i], [3, 4]) if not np.isnan(d).any()]
        assert counts[i] == len(models)
        votes = [(d, 1 / (len(models) * len(each))) for each in models for d in each]
        center = sum(d * w for d, w in votes) if votes else math.nan
        spread = math.sqrt(sum(w * (d - center) ** 2 for d, w in votes)) if votes else math.nan
        share = sum(w * ((d > 0) + 0.5 * (d == 0)) for d, w in votes) if votes else math.nan
        assert (mean[i], std[i], agree[i]) == pytest.approx((center, spread, share), nan_ok=True)
    one = strengths_of_differences(differences[:3, :1], [3])
    assert [each[0] for each in one] == pytest.approx([*strength_of_differences(differences[:3, 0]), 1])


@pytest.mark.parametrize(
    "row, mean, std, agree",
    [
        ({"strength_mean": 1.5, "strength_std": 0.5, "strength_agree": 0.9}, 1.5, 0.5, 0.9),
        ({"strength_mean": -2}, -2.0, math.nan, math.nan),
        ({"strength_mean": "-2.5", "strength_std": "1"}, -2.5, 1.0, math.nan),  # as CSV files have it
        ({"strength_mean": 1.0, "strength_std": -1, "strength_agree": 1.5}, 1.0, math.nan, math.nan),
        ({"mean preference difference": 0.25, "std preference difference": 2.0}, 0.25, 2.0, math.nan),
        ({"mean preference difference": 0.25, "chosen score list": [1, 2], "rejected score list": [2, 2]},
         0.25, math.nan, 0.25),
        ({"chosen score list": [1.0, 2.0], "rejected score list": [0.0, 5.0]}, -1.0, 2.0, 0.5),
        ({"strength_mean": None, "mean preference difference": 3}, 3.0, math.nan, math.nan),
    ],
)  # fmt: skip
def test_columns_of_ours_and_of_theirs(row, mean, std, agree):
    assert tuple(strength_of(row)) == pytest.approx((mean, std, agree), nan_ok=True)


@pytest.mark.parametrize(
    "value", [None, "", "strong", True, math.nan, math.inf, [1.0], 10**400], ids=lambda v: str(v)[:9]
)
def test_what_is_no_finite_number_is_no_strength(value):
    assert strength_of({"strength_mean": value}) is None
    assert judge_pair({"strength_mean": value})["strength"] == []


def test_scores_that_do_not_belong_together_say_nothing():
    for chosen, rejected in (([1.0], [1.0, 2.0]), ([], []), ([None], [1.0]), ("1", "2")):
        assert strength_of({"chosen score list": chosen, "rejected score list": rejected}) is None


def test_swapped_strength():
    assert tuple(Strength(1.5, 0.5, 0.9).flipped()) == pytest.approx((-1.5, 0.5, 0.1))


def test_turns_of_dialogues_as_the_paper_s_authors_published_them():
    turns = ["Hi there ", "Hello.", "Where is the cat?"]
    row = {"chosen": [*turns, "On the mat."], "rejected": [*turns, "Gone."], "GPT4 label": 1}
    row |= {"mean preference difference": 0.5, "chosen score list": [2.0], "rejected score list": [1.5]}
    layout = layout_of(list(row), row)
    texts = read_row(layout.read(row), tokenizer=None)
    asked = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Where is the cat?\n\nAssistant:"
    assert texts.whole == [f"{asked} On the mat.", f"{asked} Gone."]
    assert (texts.prompt, texts.judged["strength"]) == (asked, [0.5])
    assert unread(list(row), layout) == ["GPT4 label"]
    started = read_row(layout.read({"chosen": ["Hi", "Yes?", "No"], "rejected": ["Hi", "Yes?", "Go"]}), tokenizer=None)
    assert started.prompt == "\n\nAssistant: Hi\n\nHuman: Yes?\n\nAssistant:"  # the answer is the assistant's


def test_smoothing_where_the_ensemble_denies_the_label_alone():
    found = strength_smoothing(torch.tensor([-1e4, -2.0, -1e-9, 0.0, 3.0, math.nan]))
    expected = [1.0, 1 / (1 + math.exp(-2)), 0.5, 0.0, 0.0, math.nan]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


# Section 2: rows.


def of_files(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    tokenizer = tiny.tokenizer()
    config = PreprocessingConfig(256, "stop", tmp_path / "cache")
    return tokenize(read_file(path), tokenizer, choose_special_tokens(tokenizer, 320), config)


def row_of(number, strength=None):
    row = {"prompt": f"the cat {number % 7} ", "chosen": f"sat {number}", "rejected": f"eats {number}"}
    return row if strength is None else row | {"strength_mean": strength}


def test_tokenized_rows_keep_their_strength(tmp_path, own_cache):
    found = of_files(tmp_path, [row_of(1, -0.5), row_of(2), row_of(3, 2)])
    assert [found[i].strength for i in range(3)] == [[-0.5], [], [2.0]]
    assert found.floats("strength").tolist() == [-0.5, 2.0]


def test_rows_without_strengths_hash_as_they_did(tmp_path, own_cache):
    """A run that was begun before there were strengths goes on; other strengths are other rows."""
    plain = of_files(tmp_path, [row_of(1), row_of(2)])
    without = plain.table.remove_columns("strength")
    assert hash_of_rows(plain) == hash_of_rows(type(plain)(without, plain.origins))
    one, other = (of_files(tmp_path, [row_of(1, 1.0), row_of(2, mean)], f"{mean}.jsonl") for mean in (1.0, 2.0))
    assert len({hash_of_rows(rows) for rows in (plain, one, other)}) == 3


def pairs(strengths, **facts):
    made = []
    for i, strength in enumerate(strengths):
        judged = {name: [values[i]] for name, values in facts.items()}
        made.append(Comparison([1], [[i, 3], [i, 4]], [0], [1], strength=[strength], ranks=[0, 1], **judged))
    return table(made)


def slow_rearranged(strengths, flips, drops):
    order = sorted(range(len(strengths)), key=lambda i: strengths[i])
    flipped, dropped = set(order[:flips]), set(order[flips : flips + drops])
    return [(i, i in flipped) for i in range(len(strengths)) if i not in dropped]


SHARES = [(0.1, 0, 2, 0), (0, 0.25, 0, 5), (0.2, 0.3, 4, 6), (0.02, 0, 0, 0)]


@pytest.mark.parametrize("flip, drop, flips, drops", SHARES)
def test_the_lowest_are_swapped_and_the_next_left_out(flip, drop, flips, drops):
    values = np.random.default_rng(0).normal(size=20).round(3).tolist()
    rows, found = rearrange(pairs(values), flip, drop)
    expected = slow_rearranged(values, flips, drops)
    assert [(rows[i].responses[0][0], rows[i].better == [1]) for i in range(len(rows))] == expected
    assert (found.pairs, found.flipped, found.dropped) == (20, flips, drops)
    if flips:
        assert found.flipped_to == pytest.approx(sorted(values)[flips - 1])
    if drops:
        assert found.dropped_to == pytest.approx(sorted(values)[flips + drops - 1])


def test_what_is_said_of_the_order_follows_the_swap():
    facts = {"margin": [0.5, 0.25], "rating": [2.0, 1.0], "probability": [0.75, 0.875]}
    rows, _ = rearrange(pairs([-3.0, 1.0], **facts), 0.5)
    first, second = rows[0], rows[1]
    assert (first.better, first.worse, first.margin, first.strength) == ([1], [0], [-0.5], [3.0])
    assert (first.probability, first.ranks) == ([0.25], [1, 0])
    assert math.isnan(first.rating[0])
    assert (second.better, second.margin, second.strength, second.ranks) == ([0], [0.25], [1.0], [0, 1])
    for name in ("better", "worse", "ranks"):  # as planning, evaluation and the hash of a run read them
        assert rows.numbers(name).tolist() == [n for row in (first, second) for n in getattr(row, name)]
    for name in ("margin", "probability", "strength"):
        assert rows.floats(name).tolist() == [n for row in (first, second) for n in getattr(row, name)]
    picked = rows.select(np.array([1, 0]))
    assert [picked[i].strength for i in range(2)] == [[1.0], [3.0]]
    alike = picked.with_similarity(np.array([0.5, 0.25]))
    assert [(alike[i].better, alike[i].similarity) for i in range(2)] == [([0], [0.5]), ([1], [0.25])]


def test_which_pairs_does_not_depend_on_the_order_of_rows():
    made = pairs([1.0, 1.0, 1.0, 1.0, 2.0, 1.0])
    order = np.array([4, 2, 5, 0, 3, 1])
    here, there = (rearrange(rows, 0.3, 0.2)[0] for rows in (made, made.select(order)))

    def content(rows):
        return sorted((rows[i].responses[0][0], tuple(rows[i].better)) for i in range(len(rows)))

    assert content(here) == content(there)
    assert hash_of_rows(here) != hash_of_rows(made)


def test_rows_that_judge_nothing_stay():
    made = [Comparison([1], [[i, 3], [i, 4]], [0], [1], strength=[float(i)]) for i in range(4)]
    rows, found = rearrange(table([*made[:2], Comparison([9], [[8]], targets=[1.0]), *made[2:]]), 0.25, 0.25)
    assert (len(rows), found.pairs, found.flipped, found.dropped) == (4, 4, 1, 1)
    assert [rows[i].prompt for i in range(4)] == [[1], [9], [1], [1]]
    assert rows[0].better == [1]


def test_nothing_asked_nothing_done():
    made = pairs([1.0, 2.0])
    rows, found = rearrange(made)
    assert rows is made
    assert list(found.lines()) == []
    assert found.doubt() == ""


def test_what_was_done_is_said_and_what_speaks_against_it():
    _, found = rearrange(pairs([-2.0, 1.0, 2.0, 3.0]), 0.5, 0.25)
    assert list(found.lines()) == [
        "--flip_share: chosen and rejected swapped in 2 of 4 training pairs, those with a strength_mean up to 1",
        "--drop_share: left out 1 of 4 training pairs, those with a strength_mean above these and up to 2",
    ]
    assert found.doubt().startswith("--flip_share: 1 of the 2 swapped pairs have a strength_mean above 0")
    assert "`--drop_share`: left out 1 of 4 training pairs" in _data({"train": {}, "weakest": found.to_json()})


# Section 3: training.

STEPS = ["--max_steps", 3, "--max_eval_samples", 16, "--learning_rate", 1e-3, "--max_seq_len", 256]


@pytest.fixture(scope="module")
def judged_demo(demo, tmp_path_factory):
    """The quick start's data with strengths: −1 − i/100 for one pair in eight, 1 + i/100 for others."""
    folder = tmp_path_factory.mktemp("strengths")
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (demo / "data" / f"{name}.jsonl").read_text().splitlines()]
        if name == "train":  # those of evaluations need none
            for i, row in enumerate(rows):
                row["strength_mean"] = -1 - i / 100 if i % 8 == 0 else 1 + i / 100
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def start(demo, data, tmp_path, *flags):
    where = ["--model_name_or_path", demo / "model", "--data_path", data, "--data_output_path", tmp_path / "cache"]
    return runs.launch(*where, "--output_dir", tmp_path / "out", *STEPS, *flags)


@pytest.mark.slow
def test_a_run_by_strength_says_what_it_did(demo, judged_demo, tmp_path):
    flags = ["--flip_share", 0.125, "--drop_share", 0.05, "--margin", "strength", "--label_smoothing", "strength"]
    result = start(demo, judged_demo, tmp_path, *flags)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert f"swapped in 40 of {runs.PAIRS} training pairs, those with a strength_mean up to -1\n" in result.stdout
    assert f"left out 16 of {runs.PAIRS} training pairs" in result.stdout
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["flip_share"], run["drop_share"], run["margin"]) == (0.125, 0.05, "strength")
    assert run["label_smoothing"] == "strength"
    assert (run["data"]["weakest"]["flipped"], run["data"]["weakest"]["dropped"]) == (40, 16)
    assert sum(run["data"]["train"].values()) == runs.PAIRS - 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| flip_share \| 0.125 \|", card)
    assert "swapped in 40 of" in card
    again = start(demo, judged_demo, tmp_path, *flags, "--flip_share", 0.25)
    assert again.returncode == 1
    assert re.search(r"another run: .*the training rows \(by content; --flip_share", again.stdout + again.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--flip_share", 0.1], ["--margin", "strength"]])
def test_rows_without_strengths_are_refused(demo, tmp_path, flags):
    result = start(demo, demo / "data" / "train.jsonl", tmp_path, *flags)
    assert result.returncode == 1
    said = f"row 1: the row has no finite strength_mean (reward-model ensemble writes it), and {flags[0]}"
    assert said in result.stdout + result.stderr
    assert "none of the 320 rows can be used" in result.stdout + result.stderr
