# SPDX-License-Identifier: Apache-2.0
"""Rows to Comparisons: what each form of row is read as, what is refused, what is cut, cached and held out."""

import datetime
import itertools
import json
import math
import os
import random
import re

import datasets
import numpy as np
import pyarrow
import pytest
import tiny
from flags import loss_of
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from reward_model.common.errors import UserError
from reward_model.data import preprocessing as data
from reward_model.data.chat_template import settle_template
from reward_model.data.comparisons import BadRow, Comparison
from reward_model.data.encoding import Encoding, end_text
from reward_model.data.files import Source
from reward_model.data.layouts import Layout, Part
from reward_model.data.preprocessing import (
    PreprocessingConfig,
    load_answers,
    load_comparisons,
    nothing_judged,
    tokenize,
)
from reward_model.data.rows import judge_answer, judge_list, judge_pair, read_row
from reward_model.data.sources import read_sources
from reward_model.data.tokenizer import SpecialTokens, choose_special_tokens
from reward_model.objectives.objective import Objective

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = {"prompt": "question: what does the cat eat? answer:", "chosen": " fish", "rejected": " the mat"}
LIST = {"prompt": TEXT["prompt"], "responses": [" fish", " the mat", " the other cat"], "scores": [3, 0.5, 1]}
ANSWER = {"prompt": TEXT["prompt"], "response": " fish", "score": 0.25}


def rules(tmp_path, **changes):
    return PreprocessingConfig(
        **{"max_seq_len": 64, "on_bad_row": "stop", "cache": tmp_path / "cache", "processes": 1, **changes}
    )


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:  # a new time of change would be a new file to the cache
        path.write_text(text)
    return str(path)


def missing(flags):
    """Why the loss of some flags has nothing to learn from a training row."""
    return Objective(loss_of(flags)).missing


def chatml(**special):
    """A tokenizer as training has it, its template rewritten to end at the token that closes a turn."""
    tokenizer = tiny.chatml(**special)
    settle_template(tokenizer, datetime.datetime(2026, 11, 26))
    return tokenizer


def compare(prompt, whole, special, *args, **kwargs):
    """Texts closed first, as rows of plain text are."""
    return data.compare(prompt, [end_text(ids, special) for ids in whole], special, *args, **kwargs)


def special_tokens(tokenizer):
    return choose_special_tokens(tokenizer, len(tokenizer))


def tokenize_rows(rows, tmp_path, tokenizer=None, **changes):
    """Comparisons of a file of these rows."""
    tokenizer = tokenizer or tiny.tokenizer()
    (source,), _ = read_sources(write(tmp_path / "rows.jsonl", rows), seed=0)
    made = rules(tmp_path, **changes)
    return tokenize(source, tokenizer, special_tokens(tokenizer), made, made.missing)


def load(train, tmp_path, evaluation=(), tokenizer=None, seed=0, **changes):
    tokenizer = tokenizer or tiny.tokenizer()
    made = rules(tmp_path, **changes)
    named = {"": list(evaluation)} if evaluation else {}
    rows, sets = load_comparisons(list(train), named, tokenizer, special_tokens(tokenizer), made, seed)
    return rows, sets[""]


def whole(comparison):
    """Ids of each whole text."""
    return [comparison.prompt + response for response in comparison.responses]


def texts(comparisons, tokenizer=None):
    """Each row's texts, without special tokens."""
    tokenizer = tokenizer or tiny.tokenizer()
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in whole(row)] for row in comparisons]


def said(values):
    """Numbers, None where they are NaN: it equals itself."""
    return [None if math.isnan(value) else value for value in values]


def everything(comparisons):
    return [
        (row.prompt, row.responses, row.better, row.worse, row.ranks, row.prompt_tokens)
        + tuple(said(values) for values in (row.margin, row.rating, row.probability, row.targets))
        for row in comparisons
    ]


# The forms of a row: text, text with the prompt inside, chat messages; of pairs, lists and single answers.


def test_prompt_and_answers_are_joined_as_they_are():
    text = read_row({**TEXT, "margin": 2}, tiny.tokenizer())
    fish, mat = "question: what does the cat eat? answer: fish", "question: what does the cat eat? answer: the mat"
    assert (text.prompt, text.whole, text.templated) == (TEXT["prompt"], [fish, mat], False)
    assert text.judged["margin"] == [2.0]
    assert said(read_row(TEXT, tiny.tokenizer()).judged["margin"]) == [None]
    text = read_row(LIST, tiny.tokenizer())
    assert (text.prompt, text.templated) == (TEXT["prompt"], False)
    assert text.whole == [fish, mat, "question: what does the cat eat? answer: the other cat"]
    text = read_row(ANSWER, tiny.tokenizer())
    assert (text.prompt, text.whole, text.templated) == (TEXT["prompt"], [fish], False)


@pytest.mark.parametrize("answers", [{}, {"responses": [" fish"]}, {"response": " fish"}])
def test_empty_prompt_is_a_prompt(answers):
    row = {"prompt": ""} | (answers or {"chosen": " fish", "rejected": " the mat"})
    assert read_row(row, tiny.tokenizer()).whole[0] == " fish"


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("\n\nHuman: Hi\n\nAssistant:", " Hello", " Hey"),
        ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant:", " same start, then this", " same start, then that"),
        ("\n\nHuman: Hi\n\nAssistant:", " Hello", " Bye\n\nHuman: Why?\n\nAssistant: So"),
        ("User: the cat ", "sat", "sits"),  # not Anthropic's turns: whole words are shared
        ("User: the cat\n", "sat", "sits"),
        ("", "User: yes", "Human: no"),
    ],
)
def test_prompt_inside_the_answers(prompt, chosen, rejected):
    whole = [prompt + chosen, prompt + rejected]
    for row in (dict(zip(("chosen", "rejected"), whole)), {"responses": whole}):
        text = read_row(row, tiny.tokenizer())
        assert (text.prompt, text.whole) == (prompt, whole)


@pytest.mark.parametrize(
    "whole, prompt",
    [
        (["User: the cat sat", "User: the cat sits", "User: the catch", "User: the cat is"], "User: the "),
        (["User: the cat sat", "User: the cat sits", "A user: a cat"], ""),
        (["\n\nHuman: Hi\n\nAssistant: same A", "\n\nHuman: Hi\n\nAssistant: same B", "\n\nHuman: Hi\n\nAssistant: C"],
         "\n\nHuman: Hi\n\nAssistant:"),
        (["\n\nHuman: Hi\n\nAssistant: alone"], ""),  # nothing says where its prompt ends
    ],
)  # fmt: skip
def test_prompt_inside_the_answers_of_a_list_is_what_all_of_them_share(whole, prompt):
    text = read_row({"responses": whole}, tiny.tokenizer())
    assert (text.prompt, text.whole) == (prompt, whole)
    single = read_row({"response": whole[0]}, tiny.tokenizer())
    assert (single.prompt, single.whole) == ("", whole[:1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"system": "Be kind", "question": "Is it?", "chosen": "the cat sat", "rejected": "the cat sits"},
         "; if it is in system or question, add --columns prompt=COLUMN"),
        ({"chosen": "yes", "rejected": "no"}, 'give "prompt": "" if there really is none'),
        ({"responses": ["yes", "no"], "ranks": [1, 2]}, "there is no prompt"),
        ({"response": "yes", "score": 1}, "there is no prompt"),
    ],
)  # fmt: skip
def test_texts_without_prompt_and_turns_are_no_row(row, said):
    with pytest.raises(BadRow, match="there is no prompt, and the texts have no marks of turns") as caught:
        read_row(row, tiny.tokenizer())
    assert said in str(caught.value)
    assert read_row({**row, "prompt": ""}, tiny.tokenizer()).prompt == ""


@pytest.mark.parametrize(
    "mark", ["<|im_start|>user\n", "[INST] ", "### Instruction:\n", "USER: ", "<start_of_turn>user\n"]
)
def test_turns_of_templates_in_use_are_known(mark):
    text = read_row({"chosen": f"{mark}Hi there", "rejected": f"{mark}Hi you"}, tiny.tokenizer())
    assert text.prompt == f"{mark}Hi "


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_half_a_character_is_a_bad_row(field, tmp_path):
    with pytest.raises(BadRow, match=rf"{field} has half a character, .ud83d"):
        read_row({**TEXT, field: "oh \ud83d"}, tiny.tokenizer())
    chat = {"prompt": [message("user", "Hi")], "chosen": [message("assistant", "a")]}
    chat |= {"rejected": [message("assistant", "b")]}
    chat[field] = [{**chat[field][0], "content": "\udc00"}]
    with pytest.raises(BadRow, match=f"{field} has half a character"):
        read_row(chat, tiny.chatml())
    rows = [{**TEXT, "chosen": f"{i}"} for i in range(3)] + [{**TEXT, field: "oh \ud83d"}]
    assert len(tokenize_rows(rows, tmp_path, on_bad_row="skip")) == 3
    assert read_row(
        {**TEXT, field: "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}, tiny.tokenizer()
    )


def test_an_empty_list_is_no_prompt():
    whole = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    found, plain = (read_row(row, tiny.tokenizer()) for row in ({"prompt": [], **whole}, whole))
    assert (
        (found.prompt, found.whole) == (plain.prompt, plain.whole) == ("Human: a\n\nAssistant:", list(whole.values()))
    )


def test_scores_that_tie_teach_no_pair_and_those_that_deny_the_order_are_refused(tmp_path, capsys):
    tie = read_row({**TEXT, "chosen_score": 2, "rejected_score": 2}, tiny.tokenizer()).judged
    assert (tie["better"], tie["worse"], tie["targets"]) == ([], [], [2, 2])
    kept = read_row({**TEXT, "chosen_score": 2, "rejected_score": 2, "margin": 1}, tiny.tokenizer()).judged
    assert (kept["better"], kept["margin"]) == ([0], [1.0])
    with pytest.raises(BadRow, match="chosen has the lower score: 1, and rejected 3"):
        read_row({**TEXT, "chosen_score": 1, "rejected_score": 3}, tiny.tokenizer())
    scores = [(3, 1), (2, 2), (1, 3), (2, 2)]
    rows = [{**TEXT, "chosen": f"{i}", "chosen_score": a, "rejected_score": b} for i, (a, b) in enumerate(scores)]
    assert len(tokenize_rows(rows, tmp_path, missing=missing(""), on_bad_row="skip")) == 1
    said = capsys.readouterr().out
    assert "skipped 2 of 4 rows: --loss logistic needs a preferred answer, and the row has two answers" in said
    assert "skipped 1 of 4 rows: chosen has the lower score" in said


def test_columns_under_other_names(tmp_path, capsys):
    rows = [{"question": f"Q{i}", "good": "a", "bad": "b", "system": "s", "id": i} for i in range(12)]
    path = write(tmp_path / "rows.jsonl", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    train, held = load([path], tmp_path, names=names)
    assert len(train) + len(held) == 12
    assert f"{path}: columns that are not read: system, id" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--columns prompt=query: .*rows.jsonl has no such column; it has question, good"
    ):
        load([path], tmp_path, names={"prompt": "query"})
    with pytest.raises(UserError, match="--columns promt=question: no field promt; there is prompt, chosen"):
        load([path], tmp_path, names={"promt": "question"})
    both = write(tmp_path / "both.jsonl", [{**row, "prompt": "other"} for row in rows])
    with pytest.raises(UserError, match=r"--columns prompt=question: .* has a column prompt, too: keep one of them"):
        load([both], tmp_path, names=names)
    renamed = [{"prompt": row["question"], "chosen": "a", "rejected": "b"} for row in rows]
    again, _ = load([write(tmp_path / "plain.jsonl", renamed)], tmp_path)
    assert [again[i].prompt for i in range(len(again))] == [train[i].prompt for i in range(len(train))]


def message(role, content):
    return {"role": role, "content": content}


HI, HELLO, HEY = message("user", "Hi"), message("assistant", "Hello"), message("assistant", "Hey")
SYSTEM = message("system", "Be kind")
OPEN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
OPEN_SYSTEM = "<|im_start|>system\nBe kind<|im_end|>\n" + OPEN

CHATS = [
    ({"chosen": [HI, HELLO], "rejected": [HI, HEY]}, OPEN),
    ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, HEY]}, OPEN),  # UltraFeedback: the prompt twice
    ({"prompt": "Hi", "chosen": [HELLO], "rejected": [HEY]}, OPEN),
    ({"prompt": [HI], "chosen": [HELLO], "rejected": [HEY]}, OPEN),
    ({"prompt": [HI], "chosen": "Hello", "rejected": "Hey"}, OPEN),
    ({"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [HEY]}, OPEN_SYSTEM),
    ({"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, HEY]}, OPEN_SYSTEM),
    ({"prompt": "Hi", "chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, HEY]}, OPEN_SYSTEM),  # OrcaDPO
    ({"prompt": [HI], "chosen": [HI, HELLO], "rejected": [HI, HEY]}, OPEN),
    ({"chosen": [HI, HEY, HI, HELLO], "rejected": [HI, HEY, HI, HEY]}, OPEN + "Hey<|im_end|>\n" + OPEN),
    ({"chosen": [HI, {**HELLO, "name": None}], "rejected": [HI, HEY]}, OPEN),  # Arrow fills in what a message lacks
]


@pytest.mark.parametrize("row, prompt", CHATS)
def test_chat_messages_go_through_the_template(row, prompt):
    tokenizer = chatml()
    rest = {"prompt": row["prompt"]} if "prompt" in row else {}
    hello, hey = f"{prompt}Hello<|im_end|>", f"{prompt}Hey<|im_end|>"
    for form, whole in (
        (row, [hello, hey]),
        (rest | {"responses": [row["chosen"], row["rejected"]]}, [hello, hey]),
        (rest | {"responses": [row["chosen"]]}, [hello]),
        (rest | {"response": row["rejected"]}, [hey]),
    ):
        text = read_row(form, tokenizer)
        assert (text.prompt, text.whole, text.templated) == (prompt, whole, True)


def test_chats_of_a_list_share_the_turns_that_all_of_them_have():
    chats = [[HI, HELLO, HI, HELLO], [HI, HELLO, HI, HEY], [HI, HELLO, HI, HELLO, HI, HEY], [HI, HEY]]
    assert read_row({"responses": chats}, chatml()).prompt == OPEN
    three = read_row({"responses": chats[:3]}, chatml())
    assert three.prompt == f"{OPEN}Hello<|im_end|>\n{OPEN}"
    assert three.whole[2] == f"{OPEN}Hello<|im_end|>\n{OPEN}Hello<|im_end|>\n{OPEN}Hey<|im_end|>"
    assert read_row({"response": [HELLO]}, chatml()).prompt == ""  # no turn comes before it


def test_dialogues_that_differ_from_the_start_share_no_prompt():
    chosen, rejected = [HI, HELLO], [message("user", "Ho"), HEY]
    text = read_row({"chosen": chosen, "rejected": rejected}, chatml())
    assert text.prompt == ""
    assert text.whole[1] == "<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\nHey<|im_end|>"


def test_answers_of_several_turns_begin_where_they_differ():
    text = read_row({"chosen": [HI, HELLO, HI, HELLO], "rejected": [HI, HEY]}, chatml())
    assert text.prompt == OPEN
    assert text.whole[0] == f"{OPEN}Hello<|im_end|>\n{OPEN}Hello<|im_end|>"


def test_template_that_ignores_the_generation_prompt_keeps_what_is_shared():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if messages|length < 2 %}!{% endif %}"
    )
    text = read_row({"chosen": [HI, HELLO], "rejected": [HI, HEY]}, tiny.tokenizer(chat_template=template))
    assert (text.prompt, text.whole[0]) == ("[user]Hi", "[user]Hi[assistant]Hello")


@pytest.mark.parametrize("more", [{"response": " fish"}, {"responses": ["a"], "scores": "none"}, LIST | {"score": 3}])
def test_a_row_with_chosen_and_rejected_stays_a_pair(more):
    row = {**TEXT, "margin": 1, "rating": 2, "probability": 0.5, "chosen_score": 3, "rejected_score": 1}  # no NaN
    text = read_row({**more, **row}, None)  # text needs no tokenizer
    assert text == read_row(row, None)
    assert text.names == ("chosen", "rejected")


# What was judged of the answers.


def test_a_list_comes_before_a_single_answer():
    assert read_row({**ANSWER, **LIST}, None).whole == read_row(LIST, None).whole


NONE = [None, None]
PAIRS = [
    ({}, None, NONE),
    ({"chosen_score": 3, "rejected_score": 1}, 2.0, [3.0, 1.0]),
    ({"score_chosen": 3, "score_rejected": 1.5}, 1.5, [3.0, 1.5]),
    ({"chosen_score": 3, "rejected_score": 1, "margin": 0}, 0.0, [3.0, 1.0]),  # a margin of its own, be it 0
    ({"chosen_score": 3}, None, [3.0, None]),
    ({"chosen_score": None, "score_chosen": 3, "rejected_score": 1, "margin": None}, 2.0, [3.0, 1.0]),  # Arrow's nulls
]


@pytest.mark.parametrize("row, margin, targets", PAIRS)
def test_scores_of_a_pair_are_targets_and_make_a_margin(row, margin, targets):
    judged = judge_pair(row)
    assert (judged["better"], judged["worse"], judged["ranks"]) == ([0], [1], [0, 1])
    assert (said(judged["margin"]), said(judged["targets"])) == ([margin], targets)
    assert (said(judged["rating"]), said(judged["probability"])) == ([None], [None])


RATINGS = [("significantly better", 3.0), ("Better", 2.0), ("  SLIGHTLY\t better ", 1.0), ("negligibly better", 0.0)]
RATINGS += [("Negligibly Better / Unsure", 0.0), ("unsure", 0.0), (3, 3.0), (0, 0.0), (1.5, 1.5), (None, None)]


@pytest.mark.parametrize("rating, grade", RATINGS)
def test_ratings_are_words_or_numbers(rating, grade):
    assert said(judge_pair({"rating": rating})["rating"]) == [grade]


@pytest.mark.parametrize("rating", ["best", "2", 3.5, -1, math.nan, True, [2], {"a": 1}])
def test_a_rating_of_another_kind_is_none(rating):
    """Other data sets call other things so: whoever needs the grades of Llama 2 misses them."""
    assert said(judge_pair({"rating": rating})["rating"]) == [None]


@pytest.mark.parametrize("probability", [1.01, -0.5, math.nan, "even", True, 73])
def test_a_probability_of_another_kind_is_none(probability):
    assert said(judge_pair({"probability": probability})["probability"]) == [None]


@pytest.mark.parametrize("probability", [0, 0.3, 1])
def test_a_probability_may_be_certain_or_favor_the_rejected_answer(probability):
    assert judge_pair({"probability": probability})["probability"] == [probability]


LISTS = [  # scores, ranks → (better, worse) of each pair, their margins, dense ranks, targets
    ([5.0], None, [], [], [0], [5.0]),
    (None, [7], [], [], [0], [None]),
    (None, None, [], [], [], NONE),
    ([1.0, 3.0], None, [(1, 0)], [2.0], [1, 0], [1.0, 3.0]),
    (None, [1, 2], [(0, 1)], [None], [0, 1], NONE),
    ([2.0, 2.0], None, [], [], [0, 0], [2.0, 2.0]),
    ([3.0, 1.0], [2, 1], [(1, 0)], [-2.0], [1, 0], [3.0, 1.0]),  # ranks decide
    ([3.0, 1.0], [1, 1], [], [], [0, 0], [3.0, 1.0]),
    ([1.0, 4.0, 2.0, 4.0], None, [(1, 0), (1, 2), (2, 0), (3, 0), (3, 2)], [3.0, 2.0, 1.0, 3.0, 2.0], [2, 0, 1, 0],
     [1.0, 4.0, 2.0, 4.0]),
    (None, [10, -2, 7.5, 7.5], [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)], [None] * 5, [2, 0, 1, 1], [None] * 4),
]  # fmt: skip


@pytest.mark.parametrize("scores, ranks, pairs, margins, dense, targets", LISTS)
def test_numbers_of_a_list_give_pairs_margins_ranks_and_targets(scores, ranks, pairs, margins, dense, targets):
    size = len(targets)
    numbers = {name: values for name, values in (("scores", scores), ("ranks", ranks)) if values is not None}
    read = read_row({"prompt": "p", "responses": [f"r{i}" for i in range(size)], **numbers}, None).judged
    for judged in (read, judge_list(size, **numbers)):
        assert list(zip(judged["better"], judged["worse"])) == pairs
        assert (said(judged["margin"]), judged["ranks"], said(judged["targets"])) == (margins, dense, targets)
        assert said(judged["rating"]) == said(judged["probability"]) == [None] * len(pairs)


def test_every_untied_pair_of_a_list_is_judged_once():
    scores = [float(random.Random(k).randrange(3)) for k in range(6)]
    pairs = {(i, j) for i, j in itertools.permutations(range(6), 2) if scores[i] > scores[j]}
    judged = judge_list(6, scores)
    found = list(zip(judged["better"], judged["worse"]))
    assert 0 < len(pairs) < 15  # some are tied
    assert (len(found), set(found)) == (len(pairs), pairs)


SINGLE = [({"score": 2}, 2.0), ({"label": 0.5}, 0.5), ({"label": True}, 1.0), ({"label": False}, 0.0), ({}, None)]
SINGLE += [({"score": None, "label": 0}, 0.0), ({"score": 0, "label": None}, 0.0)]


@pytest.mark.parametrize("row, target", SINGLE)
def test_a_single_answer_has_a_score_or_a_label(row, target):
    judged = judge_answer(row)
    assert said(judged.pop("targets")) == [target]
    assert set(map(tuple, judged.values())) == {()}


FIELDS = (
    "and needs prompt, chosen, rejected (or responses with scores or ranks, or response with a score or label); "
    "--columns chosen=COLUMN names what has another name"
)
BAD_JUDGEMENTS = [
    (TEXT, {"chosen_score": "high"}, "chosen_score is text, not a number"),
    (TEXT, {"score_rejected": True}, "score_rejected is a truth value, not a number"),
    (TEXT, {"rejected_score": -math.inf}, "rejected_score is -inf"),
    (LIST, {"responses": []}, "responses is empty, not a list of answers"),
    (LIST, {"responses": "fish"}, "responses is text, not a list of answers"),
    (LIST, {"responses": {"a": "fish"}}, "responses is an object, not a list of answers"),
    (LIST, {"responses": [" a", None, " b"]}, "response 2 is missing"),
    (LIST, {"responses": [" a", " b", 5]}, "response 3 is a number, not text or chat messages"),
    (
        LIST,
        {"responses": [HI, HELLO, HEY]},
        "response 1 ends with a message of role user, not assistant",
    ),  # one dialogue
    (LIST, {"responses": [" a", " b", " a"]}, "response 1 and response 3 are equal"),
    (LIST, {"responses": [" a", "\n ", " b"]}, "response 2 is empty"),
    (LIST, {"scores": [1, 2]}, "scores has 2 numbers, and there are 3 responses"),
    (LIST, {"scores": 5}, "scores is a number, and there are 3 responses"),
    (LIST, {"scores": [1, None, 2]}, "number 2 of scores is missing"),
    (LIST, {"scores": [1, 2, "good"]}, "number 3 of scores is text, not a number"),
    (LIST, {"scores": [True, 1, 2]}, "number 1 of scores is a truth value, not a number"),
    (LIST, {"scores": [1, math.nan, 2]}, "number 2 of scores is nan"),
    (LIST, {"ranks": [1, 2, 3, 4]}, "ranks has 4 numbers, and there are 3 responses"),
    (LIST, {"ranks": "1 2 3"}, "ranks is text, and there are 3 responses"),
    (LIST, {"ranks": [None, 1, 2]}, "number 1 of ranks is missing"),
    (LIST, {"prompt": None}, "prompt is missing"),
    (LIST, {"prompt": 5}, "prompt is a number, not text or chat messages"),
    (ANSWER, {"label": 1}, "the row has a score and a label: keep one of them"),
    (ANSWER, {"score": "good"}, "score is text, not a number"),
    (ANSWER, {"score": True}, "score is a truth value, not a number"),
    (ANSWER, {"score": None, "label": math.inf}, "label is inf"),
    (ANSWER, {"response": " "}, "response is empty"),
    (ANSWER, {"response": ["fish"]}, "response is a list, not text or chat messages"),
    (ANSWER, {"prompt": None}, "prompt is missing"),
    (ANSWER, {"response": None}, "response is missing"),
    (ANSWER, {"response": None, "reponse": " a"}, "response is missing; is reponse a misspelling of it?"),
    (LIST, {"responses": None}, "responses is missing"),
    ({"text": "fish"}, {}, f"chosen is missing; the row has text, {FIELDS}"),
    (ANSWER, {"chosen": None, "rejected": None, "response": None}, "chosen is missing"),  # the columns are there
]


@pytest.mark.parametrize("row, change, reason", BAD_JUDGEMENTS)
def test_a_bad_judgment_is_refused(row, change, reason):
    with pytest.raises(BadRow) as caught:
        read_row({**row, **change}, None)
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("backwards", [False, True])
def test_rows_of_all_forms_in_one_file(name, backwards, tmp_path):
    rows = [{**TEXT, "rating": "better"}, LIST, ANSWER, {"prompt": "p", "response": " r", "label": 1}, TEXT]
    rows = rows[::-1] if backwards else rows
    if name.endswith("parquet"):  # one schema: null where a row has no such column
        names = dict.fromkeys(name for row in rows for name in row)
        datasets.Dataset.from_dict({n: [row.get(n) for row in rows] for n in names}).to_parquet(tmp_path / name)
    else:
        lines = [json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    (source,), _ = read_sources(str(tmp_path / name), seed=0)
    found = tokenize(source, tiny.tokenizer(), special_tokens(tiny.tokenizer()), rules(tmp_path))
    order = slice(None, None, -1 if backwards else 1)
    assert [said(row.targets) for row in found][order] == [NONE, [3.0, 0.5, 1.0], [0.25], [1.0], NONE]
    assert [said(row.rating) for row in found][order] == [[2.0], [None] * 3, [], [], [None]]
    assert found.pairs.tolist()[order] == [1, 3, 0, 0, 1]
    written = [[TEXT["prompt"] + answer for answer in LIST["responses"]], [TEXT["prompt"] + " fish"], ["p r"]]
    assert texts(found)[order][1:4] == written


# Tokens.


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.llama, tiny.bert])
def test_merges_across_the_boundary_stay(make, tmp_path):
    tokenizer = make()
    row = {"prompt": "the ca", "chosen": "t sat", "rejected": "r"}
    joint = tokenizer("the cat sat")["input_ids"]
    cat = tokenizer.convert_tokens_to_ids("Ġcat")
    assert cat in joint
    assert cat not in tokenizer("the ca")["input_ids"] + tokenizer("t sat")["input_ids"]
    comparison = tokenize_rows([row], tmp_path, tokenizer)[0]
    assert cat == comparison.responses[0][0]


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.llama, tiny.bert, tiny.chatml])
def test_every_text_ends_with_one_end_token(make, tmp_path):
    tokenizer = make()
    end = special_tokens(tokenizer).end
    comparison = tokenize_rows([TEXT], tmp_path, tokenizer)[0]
    for ids, answer in zip(whole(comparison), (TEXT["chosen"], TEXT["rejected"])):
        joint = tokenizer(TEXT["prompt"] + answer)["input_ids"]
        assert ids == (joint if joint[-1] == end else [*joint, end])
        assert ids.count(end) == 1


def test_end_token_written_in_the_text_gets_no_second(tmp_path):
    row = {**TEXT, "chosen": " fish<|endoftext|>"}
    assert everything(tokenize_rows([row], tmp_path)) == everything(tokenize_rows([TEXT], tmp_path))


@pytest.mark.parametrize("eos", [tiny.EOS, "<|im_end|>"])
def test_end_of_turn_gets_no_second_end(eos, tmp_path):
    tokenizer = chatml(eos_token=eos)
    row = {"chosen": [HI, HELLO], "rejected": [HI, HEY]}
    comparison = tokenize_rows([row], tmp_path, tokenizer)[0]
    expected = [tokenizer(f"{OPEN}{answer}<|im_end|>")["input_ids"] for answer in ("Hello", "Hey")]
    assert whole(comparison) == expected


@pytest.mark.parametrize("end", ["", "\n", " <|endoftext|>\n"])
def test_a_chat_is_what_the_template_gives_to_the_letter(end, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}"
    tokenizer = tiny.tokenizer(chat_template=template.replace("END", end))
    comparison = tokenize_rows([{"chosen": [HI, HELLO], "rejected": [HI, HEY]}], tmp_path, tokenizer)[0]
    given = tokenizer.apply_chat_template([HI, HELLO], tokenize=False)
    assert given.endswith(f"Hello{end}")
    assert whole(comparison)[0] == tokenizer(given, add_special_tokens=False)["input_ids"]


def test_template_writes_its_own_start_token(tmp_path):
    tokenizer = tiny.llama(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    comparison = tokenize_rows([{"chosen": [HI, HELLO], "rejected": [HI, HEY]}], tmp_path, tokenizer)[0]
    for ids in whole(comparison):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def slow_common_prefix(first, second):
    length = 0
    while length < min(len(first), len(second)) and first[: length + 1] == second[: length + 1]:
        length += 1
    return length


def random_text(rng, low):
    words = ["cat", " cat", "the ", "mat", "é", "猫", "\n", " ", "?", "ca", "t", "Hu", "man:", "<|endoftext|>", "🐟"]
    return "".join(rng.choice(words) for _ in range(rng.randint(low, 8)))


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.llama, tiny.bert])
def test_prompt_and_responses_reassemble_the_joint_ids(make, tmp_path, capsys):
    rng = random.Random(0)
    tokenizer = make(pad_token="<|pad|>")
    end = special_tokens(tokenizer).end
    rows = [
        {"prompt": random_text(rng, 0), "chosen": random_text(rng, 1), "rejected": random_text(rng, 1)}
        for _ in range(300)
    ]
    expected = []
    for row in rows:
        ids = [tokenizer(row["prompt"] + row[answer])["input_ids"] for answer in ("chosen", "rejected")]
        ids = [joint if joint[-1] == end else [*joint, end] for joint in ids]
        if row["chosen"].strip() and row["rejected"].strip() and ids[0] != ids[1]:
            expected.append(ids)
    assert 200 < len(expected) < 300
    comparisons = tokenize_rows(rows, tmp_path, tokenizer, on_bad_row="skip", max_seq_len=10_000)
    assert [whole(row) for row in comparisons] == expected
    for row, (chosen, rejected) in zip(comparisons, expected):
        shared = slow_common_prefix(chosen, rejected)
        assert len(row.prompt) == min(shared, len(chosen) - 1, len(rejected) - 1)
        assert (row.better, row.worse) == ([0], [1])
    assert comparisons.lengths.tolist() == [max(map(len, ids)) for ids in expected]
    skipped = re.findall(r"skipped (\d+) of 300 rows", capsys.readouterr().out)
    assert sum(map(int, skipped)) + len(comparisons) == 300


def test_response_that_begins_with_the_other_keeps_its_end_token():
    special = SpecialTokens(end=9, pad=8, endings=frozenset({9}), starts=frozenset(), rows=10)
    record = compare([1, 2], [[1, 2, 3], [1, 2, 3, 9, 4]], special, max_seq_len=20)
    assert record["prompt"] == [1, 2, 3]
    assert record["responses"] == [[9], [9, 4, 9]]


FORMS = [  # prompt alone, whole texts → prompt, responses, tokens of what was asked; 9 ends a text
    ([1, 2], [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 6]], [1, 2, 3], [[4, 9], [5, 9], [4, 6, 9]], 2),
    ([1, 2], [[1, 2, 3, 4], [1, 2, 3, 4, 6], [1, 5]], [1], [[2, 3, 4, 9], [2, 3, 4, 6, 9], [5, 9]], 1),
    ([1], [[1, 2], [1, 2, 9, 3], [1, 2, 9, 3, 9, 4]], [1, 2], [[9], [9, 3, 9], [9, 3, 9, 4, 9]], 1),
    ([1, 2, 3], [[1, 2, 3, 4, 5]], [1, 2, 3], [[4, 5, 9]], 3),
    ([1, 2], [[1, 7, 8]], [1], [[7, 8, 9]], 1),  # the prompt's last token merged with the answer's first
    ([1, 2, 9], [[1, 2, 9]], [1, 2], [[9]], 2),  # nothing but the token that the score is read at
    ([], [[4]], [], [[4, 9]], 0),
]


@pytest.mark.parametrize("prompt, whole, shared, responses, asked", FORMS)
def test_prompt_is_what_all_texts_share_and_each_response_keeps_a_token(prompt, whole, shared, responses, asked):
    special = SpecialTokens(end=9, pad=8, endings=frozenset({9}), starts=frozenset(), rows=10)
    record = compare(prompt, whole, special, max_seq_len=20, names=[f"response {i}" for i in range(1, 4)])
    assert (record["prompt"], record["responses"], record["prompt_tokens"]) == (shared, responses, asked)
    assert record["length"] == max(len(shared + response) for response in responses)
    assert record["tokens"] == len(shared) + sum(map(len, responses))
    assert record["text_lengths"] == [len(shared + response) for response in responses]
    assert record["cut"] is False


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.bert])
def test_lists_and_single_answers_reassemble_the_joint_ids(make, tmp_path):
    rng = random.Random(1)
    tokenizer = make()
    end = special_tokens(tokenizer).end
    rows = []
    for i in range(60):
        prompt = random_text(rng, 0)
        answers = [f"{random_text(rng, 0)} cat{n}" for n in range(i % 4 + 1)]  # no two are equal
        rows.append({"prompt": prompt} | ({"responses": answers} if i % 3 else {"response": answers[0]}))
    comparisons = tokenize_rows(rows, tmp_path, tokenizer, max_seq_len=10_000)
    assert len(comparisons) == 60
    for row, comparison, tokens, length in zip(rows, comparisons, comparisons.tokens, comparisons.lengths):
        answers = row.get("responses") or [row["response"]]
        joint = [tokenizer(row["prompt"] + answer)["input_ids"] for answer in answers]
        joint = [ids if ids[-1] == end else [*ids, end] for ids in joint]
        assert whole(comparison) == joint
        others = joint[1:] or [tokenizer(row["prompt"])["input_ids"]]
        shared = min(slow_common_prefix(joint[0], other) for other in others)
        assert len(comparison.prompt) == min([shared, *(len(ids) - 1 for ids in joint)])
        assert tokens == comparison.tokens == sum(map(len, joint)) - (len(joint) - 1) * len(comparison.prompt)
        assert length == max(map(len, joint))


def test_answer_of_characters_that_the_tokenizer_does_not_know_is_empty(tmp_path):
    """A tokenizer without an alphabet of bytes drops what it does not know."""
    words = Tokenizer(
        BPE({"<|endoftext|>": 0, "<|pad|>": 1, **{letter: i for i, letter in enumerate(" acehst", 2)}}, [])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|pad|>")
    rows = [{"prompt": "the cat ", "chosen": "sat", "rejected": "\u200b4"}]
    with pytest.raises(UserError, match="row 1: rejected is empty once tokenized"):
        tokenize_rows(rows, tmp_path, tokenizer)


# Cutting.


@pytest.mark.parametrize("make, start", [(tiny.tokenizer, 0), (tiny.llama, 1), (tiny.bert, 1)])
def test_prompt_is_cut_from_the_left(make, start, tmp_path, capsys):
    tokenizer = make()
    end = special_tokens(tokenizer).end
    long = {**TEXT, "prompt": "the cat sat on the mat and " * 5 + TEXT["prompt"]}
    joint = [tokenizer(long["prompt"] + long[answer])["input_ids"] for answer in ("chosen", "rejected")]
    joint = [ids if ids[-1] == end else [*ids, end] for ids in joint]
    comparisons = tokenize_rows([TEXT, long, long], tmp_path, tokenizer, max_seq_len=30)
    surplus = max(map(len, joint)) - 30
    assert surplus > 10
    for row in (comparisons[1], comparisons[2]):
        assert whole(row) == [ids[:start] + ids[start + surplus :] for ids in joint]
        assert tokenizer.decode(row.responses[0], skip_special_tokens=True).endswith("fish")
        assert tokenizer.decode(row.responses[1], skip_special_tokens=True).endswith("the mat")
    assert comparisons.lengths.tolist()[1:] == [30, 30]
    assert "rows.jsonl: 3 rows, 2 with the prompt cut from the left to fit 30 tokens" in capsys.readouterr().out


def test_longer_answer_decides_how_much_is_cut():
    special = SpecialTokens(end=9, pad=8, endings=frozenset({9}), starts=frozenset({0}), rows=10)
    whole = [[0, 1, 2, 3, 5], [0, 1, 2, 3, 6, 7, 6]]
    record = compare([0, 1, 2, 3], whole, special, max_seq_len=6)
    assert (record["prompt"], record["responses"]) == ([0, 3], [[5, 9], [6, 7, 6, 9]])
    assert (record["length"], record["cut"]) == (6, True)
    names = [f"response {i}" for i in range(1, 4)]
    record = compare([0, 1, 2, 3], [*whole, [0, 1, 2, 3, 4, 4]], special, max_seq_len=6, names=names)
    assert (record["prompt"], record["responses"]) == ([0, 3], [[5, 9], [6, 7, 6, 9], [4, 4, 9]])
    assert (record["length"], record["tokens"], record["prompt_tokens"], record["cut"]) == (6, 11, 2, True)
    record = compare([0, 1, 2, 3], whole[1:], special, max_seq_len=6)
    assert (record["prompt"], record["responses"], record["prompt_tokens"]) == ([0, 3], [[6, 7, 6, 9]], 2)


def test_whole_prompt_may_go_but_no_token_of_an_answer():
    special = SpecialTokens(end=9, pad=8, endings=frozenset({9}), starts=frozenset({0}), rows=10)
    row = ([0, 1, 2], [[0, 1, 2, 5], [0, 1, 2, 6, 7]], special)
    assert compare(*row, max_seq_len=6)["cut"] is False
    assert compare(*row, max_seq_len=4)["prompt"] == [0]  # the start token, two of the answer, the end token
    with pytest.raises(BadRow, match="rejected alone is longer than --max_seq_len 3: 4 tokens"):
        compare(*row, max_seq_len=3)


# Rows that cannot be used.

LONG = "the cat sat on the mat and " * 20
CHAT = {"prompt": [HI], "chosen": [HELLO], "rejected": [HEY]}
BAD_ROWS = [
    ({"chosen": None}, "chosen is missing"),
    ({"rejected": None}, "rejected is missing"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": None, "promt": "2 + 2 =", "prompt_id": 7}, "prompt is missing; is promt a misspelling of it?"),
    ({"chosen": 5}, "chosen is a number, not text or chat messages"),
    ({"rejected": ["x"]}, "rejected is a list, not text or chat messages"),
    ({"prompt": {"text": "x"}}, "prompt is an object, not text or chat messages"),
    ({"chosen": True}, "chosen is a truth value, not text or chat messages"),
    ({"chosen": ""}, "chosen is empty"),
    ({"rejected": " \n"}, "rejected is empty"),
    ({"margin": math.nan}, "margin is nan"),
    ({"margin": math.inf}, "margin is inf"),
    ({"margin": -math.inf}, "margin is -inf"),
    ({"margin": 1e39}, "margin is "),  # infinite as a float32
    ({"margin": "big"}, "margin is text, not a number"),
    ({"margin": True}, "margin is a truth value, not a number"),
    ({"margin": [1.0]}, "margin is a list, not a number"),
    ({"chosen": TEXT["rejected"]}, "chosen and rejected are equal"),
    ({"chosen": f"{TEXT['rejected']}<|endoftext|>"}, "chosen and rejected are equal once tokenized"),
    ({"chosen": LONG}, "chosen alone is longer than --max_seq_len 64"),
    ({"rejected": LONG}, "rejected alone is longer than --max_seq_len 64"),
    (CHAT, "chat messages need a tokenizer with a chat template, and this one has none"),
    ({"chosen": [{"text": "x"}]}, "chosen is a list, not text or chat messages"),
]


@pytest.mark.parametrize("change, reason", BAD_ROWS)
def test_bad_row_stops_or_is_counted(change, reason, tmp_path, capsys):
    row = {name: value for name, value in {**TEXT, "margin": 1.0, **change}.items() if value is not None}
    rows = [{**TEXT, "margin": 1.0}, row, {**TEXT, "margin": 2.0}]
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'rows.jsonl'}, row 2: {reason}")) as caught:
        tokenize_rows(rows, tmp_path)
    assert "1 of 3 rows cannot be used; --on_bad_row skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = tokenize_rows(rows, tmp_path, on_bad_row="skip")
    assert [row.margin for row in kept] == [[1.0], [2.0]]
    out = capsys.readouterr().out
    assert f"rows.jsonl: skipped 1 of 3 rows: {reason}" in out
    assert "rows.jsonl: 2 rows" in out


BAD_CHATS = [
    ({"chosen": [HI, HELLO, HI]}, "chosen ends with a message of role user, not assistant"),
    ({"chosen": [HI, message("assistant", " ")]}, "chosen is empty"),
    ({"rejected": [HI, message("assistant", None)]}, "rejected is empty"),
    ({"rejected": [HI, HELLO]}, "chosen and rejected are equal"),
    ({"rejected": [message("tool", "x"), HEY]}, "the chat template refuses it: no tool"),
    ({"rejected": []}, "rejected is a list, not text or chat messages"),
]
STRICT = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tool') }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("change, reason", BAD_CHATS)
def test_bad_chat_stops_or_is_counted(change, reason, tmp_path, capsys):
    tokenizer = tiny.chatml(chat_template=STRICT + tiny.CHATML)
    good = {"chosen": [HI, HELLO], "rejected": [HI, HEY]}
    with pytest.raises(BadRow, match=reason):
        read_row({**good, **change}, tokenizer)
    rows = [good, {**good, **change}, good]
    with pytest.raises(UserError, match=f"rows.jsonl, row 2: {reason}"):
        tokenize_rows(rows, tmp_path, tokenizer)
    assert len(tokenize_rows(rows, tmp_path, tokenizer, on_bad_row="skip")) == 2
    assert f"skipped 1 of 3 rows: {reason}" in capsys.readouterr().out


def test_answers_that_the_template_makes_equal():
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    with pytest.raises(BadRow, match="chosen and rejected are equal"):
        read_row(
            {"chosen": [HI, HELLO], "rejected": [HI, message("assistant", "Hello ")]},
            tiny.tokenizer(chat_template=template),
        )


def test_margin_may_be_needed(tmp_path):
    rows = [{**TEXT, "margin": 1.5}, TEXT]
    assert said(tokenize_rows(rows, tmp_path)[1].margin) == [None]
    with pytest.raises(UserError, match="row 2: margin is missing"):
        tokenize_rows(rows, tmp_path, missing=missing("--margin column"))
    kept = tokenize_rows(rows, tmp_path, missing=missing("--margin column"), on_bad_row="skip")
    assert [row.margin for row in kept] == [[1.5]]


def test_what_a_row_lacks_for_the_loss_is_said_after_what_is_wrong_with_it(tmp_path, capsys):
    rows = [ANSWER, {**TEXT, "chosen": ""}, TEXT]
    with pytest.raises(UserError, match=r"row 1: --loss logistic needs a preferred answer, .* \(2 of 3 rows cannot"):
        tokenize_rows(rows, tmp_path, missing=missing(""))
    with pytest.raises(UserError, match=r"row 1: .* \(none of the 3 rows can be used\)"):
        tokenize_rows(rows, tmp_path, missing=missing("--margin column"))
    assert len(tokenize_rows(rows, tmp_path, missing=missing(""), on_bad_row="skip")) == 1
    out = capsys.readouterr().out
    assert "skipped 1 of 3 rows: chosen is empty\n" in out
    assert "skipped 1 of 3 rows: --loss logistic needs a preferred answer, and the row has one answer;" in out


def test_bad_list_and_answer_stop_or_are_counted(tmp_path, capsys):
    """As in BAD_ROWS; what only the ids show carries the response's number too."""
    rows = [LIST, {**LIST, "responses": [" a", " b<|endoftext|>", " b"]}, {**ANSWER, "label": 1}, ANSWER]
    reason = "response 2 and response 3 are equal once tokenized"
    with pytest.raises(UserError, match=f"rows.jsonl, row 2: {reason} .2 of 4 rows cannot be used"):
        tokenize_rows(rows, tmp_path)
    kept = tokenize_rows(rows, tmp_path, on_bad_row="skip")
    assert [row.targets for row in kept] == [[3.0, 0.5, 1.0], [0.25]]
    out = capsys.readouterr().out
    assert f"skipped 1 of 4 rows: {reason}\n" in out
    assert "skipped 1 of 4 rows: the row has a score and a label: keep one of them\n" in out
    assert "rows.jsonl: 2 rows\n" in out


def test_numbers_and_words_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,rating,chosen_score,rejected_score\np,a,b,Better,2,1\nq,a,b,3,,1\n")
    (source,), _ = read_sources(str(path), seed=0)
    found = tokenize(source, tiny.tokenizer(), special_tokens(tiny.tokenizer()), rules(tmp_path))
    assert [row.rating for row in found] == [[2.0], [3.0]]
    assert [said(row.margin) for row in found] == [[1.0], [None]]


def test_nan_margin_of_a_csv_is_no_missing_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,margin\np,a,b,1\nq,a,b,NaN\nr,a,b,\n")
    with pytest.raises(UserError, match="row 2: margin is nan"):
        load([str(path)], tmp_path)


def test_row_that_the_data_set_adapter_cannot_read(tmp_path):
    def given(row):
        return {"prompt": "p", "chosen": row["answers"][0], "rejected": row["answers"][1]}

    layout = Layout((Part("made", ("answers",), given),))
    table = datasets.Dataset.from_list([{"answers": ["a", "b"]}, {"answers": ["a"]}])
    tokenizer = tiny.tokenizer()
    with pytest.raises(UserError, match="made, row 2: the row lacks what its layout needs"):
        tokenize(Source("made", table, layout), tokenizer, special_tokens(tokenizer), rules(tmp_path))


def test_every_row_is_kept_or_counted_under_its_reason(tmp_path, capsys):
    bad = [({**TEXT, **change}, reason) for change, reason in BAD_ROWS[:9]]
    rng = random.Random(1)
    rows = [(TEXT, None)] * 50 + [rng.choice(bad) for _ in range(100)]
    rng.shuffle(rows)
    comparisons = tokenize_rows([row for row, _ in rows], tmp_path, on_bad_row="skip")
    out = capsys.readouterr().out
    reasons = [reason for _, reason in rows if reason]
    for reason in set(reasons):
        assert f"skipped {reasons.count(reason)} of 150 rows: {reason}\n" in out
    assert len(comparisons) == 50


def test_row_number_is_that_of_the_file_after_a_split(tmp_path):
    rows = [{**TEXT, "prompt": f"{i}"} for i in range(1, 31)]
    rows[20]["chosen"] = ""
    path = write(tmp_path / "rows.jsonl", rows)
    (source,), _ = read_sources(path, seed=0, data_split="0,1,0")
    assert source.numbers.tolist() != list(range(1, 31))
    tokenizer = tiny.tokenizer()
    with pytest.raises(UserError, match="row 21: chosen is empty"):
        tokenize(source, tokenizer, special_tokens(tokenizer), rules(tmp_path))


def test_nothing_left_is_an_error(tmp_path):
    train = write(tmp_path / "train.jsonl", [{**TEXT, "chosen": ""}] * 3)
    with pytest.raises(UserError, match="no training rows are left"):
        load([train], tmp_path, on_bad_row="skip")
    good = write(tmp_path / "good.jsonl", [TEXT] * 3)
    with pytest.raises(UserError, match="no evaluation rows are left"):
        load([good], tmp_path, evaluation=[train], on_bad_row="skip")


# The cache.


@pytest.fixture
def encoded(monkeypatch):
    """Batches of rows tokenized so far."""
    batches = []
    encode = Encoding.encoded
    monkeypatch.setattr(Encoding, "encoded", lambda *args: batches.append(args) or encode(*args))
    return batches


@pytest.mark.parametrize("processes", [1, 2])
def test_second_call_reads_the_cache(processes, tmp_path, encoded, capsys):
    rows = [TEXT, {**TEXT, "chosen": ""}, TEXT]
    first = tokenize_rows(rows, tmp_path, on_bad_row="skip", processes=processes)
    before = len(encoded)
    assert before == (1 if processes == 1 else 0)  # else it happens in other processes
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")}
    printed = capsys.readouterr().out
    (source,), _ = read_sources(str(tmp_path / "rows.jsonl"), seed=0)
    tokenizer = tiny.tokenizer()
    made = rules(tmp_path, on_bad_row="skip", processes=processes)
    second = tokenize(source, tokenizer, special_tokens(tokenizer), made)  # as another run does
    assert everything(second) == everything(first)
    assert len(encoded) == before
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")}
    assert capsys.readouterr().out == printed  # what is skipped is said again


CHANGES = {
    "content": {"rows": [{**TEXT, "chosen": " meat"}]},
    "tokenizer": {"tokenizer": lambda: tiny.tokenizer(sentences=["fish fish fish"])},
    "special tokens around a text": {"tokenizer": tiny.llama},
    "limit": {"max_seq_len": 10},
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_not_answered_from_the_cache(name, tmp_path, encoded):
    change = dict(CHANGES[name])
    rows = change.pop("rows", [TEXT])
    tokenizer = change.pop("tokenizer", tiny.tokenizer)()
    before = everything(tokenize_rows([TEXT], tmp_path))
    after = everything(tokenize_rows(rows, tmp_path, tokenizer, **change))
    assert after != before
    assert after == everything(tokenize_rows(rows, tmp_path, tokenizer, cache=tmp_path / "other", **change))
    assert len(encoded) == 3


def test_losses_share_the_cache(tmp_path, encoded, capsys):
    """What a row lacks for a loss is found after tokenizing: the rows are tokenized once for all losses."""
    rows = [{**TEXT, "margin": 1.5}, TEXT, ANSWER]
    files = []
    for flags, kept in (("--margin column", 1), ("", 2), ("--loss mse", 1), ("--loss logistic mse", 3)):
        assert len(tokenize_rows(rows, tmp_path, missing=missing(flags), on_bad_row="skip")) == kept
        files.append(sorted((tmp_path / "cache").glob("*.arrow")))
    assert files == [files[0]] * 4
    assert (len(files[0]), len(encoded)) == (1, 1)
    assert "skipped 1 of 3 rows: margin is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"chat_template": "!" + tiny.CHATML}, {"eos_token": "<|im_end|>"}, {"bos_token": "<|im_start|>"}],
    ids=lambda change: next(iter(change)),
)
def test_changed_chat_template_or_special_token_is_not_answered_from_the_cache(change, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    first = {"bos_token": "<s>", "chat_template": template}
    roles = {"reserved": ["<s>", "<|im_start|>", "<|im_end|>"], "pad_token": "<|pad|>"}
    rows = [{"chosen": [HI, HELLO], "rejected": [HI, HEY]}]
    tokenizers = []
    for special in (first, {**first, **change}):
        tokenizers.append(tiny.tokenizer(bos_token=None, **{"eos_token": tiny.EOS, **roles}))
        tokenizers[-1].chat_template = special.pop("chat_template")
        tokenizers[-1].add_special_tokens(special)  # all of them are in the vocabulary already
    before, after = (everything(tokenize_rows(rows, tmp_path, tokenizer)) for tokenizer in tokenizers)
    assert after != before
    assert after == everything(tokenize_rows(rows, tmp_path, tokenizers[1], cache=tmp_path / "other"))


@pytest.mark.parametrize("start", ["<s>", tiny.EOS])
def test_other_start_token_is_not_answered_from_the_cache(start, tmp_path):
    rows = [{**TEXT, "prompt": start + "the cat sat on the mat " * 5}]
    with_start, without = tiny.tokenizer(bos_token=start), tiny.tokenizer(reserved=[start])
    assert with_start.get_vocab() == without.get_vocab()
    kept = tokenize_rows(rows, tmp_path, with_start, max_seq_len=20)[0]
    cut = tokenize_rows(rows, tmp_path, without, max_seq_len=20)[0]
    assert kept.prompt[0] == with_start.bos_token_id
    assert cut.prompt[0] != with_start.bos_token_id


def test_changed_content_with_the_old_time_is_not_answered_from_the_cache(tmp_path):
    tokenize_rows([TEXT], tmp_path)
    before = (tmp_path / "rows.jsonl").stat()
    write(tmp_path / "rows.jsonl", [{**TEXT, "chosen": " meat"}])
    os.utime(tmp_path / "rows.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # as tar and rsync do
    assert texts(tokenize_rows([{**TEXT, "chosen": " meat"}], tmp_path))[0][0].endswith(" meat")


def test_cache_is_private_and_holds_arrow_only(tmp_path):
    tokenize_rows([TEXT] * 4, tmp_path, cache=tmp_path / "some" / "cache", processes=2)
    folder = tmp_path / "some" / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [path for path in folder.rglob("*") if path.suffix != ".lock"]
    assert len(files) == 2
    for path in files:
        with pyarrow.memory_map(os.fspath(path)) as file:
            assert pyarrow.ipc.open_stream(file).read_all().num_rows == 2


def test_two_processes_give_the_same_rows(tmp_path):
    rows = [{**TEXT, "prompt": f"question {i}: ", "margin": float(i)} for i in range(21)]
    alone = tokenize_rows(rows, tmp_path, processes=0)
    assert everything(tokenize_rows(rows, tmp_path, cache=tmp_path / "two", processes=2)) == everything(alone)
    assert len(alone) == 21


# Training and evaluation rows.


def questions(numbers, each=2):
    """Rows about numbered questions, several to a question."""
    return [{"prompt": f"question {i}: ", "chosen": f"a{k}", "rejected": "b"} for i in numbers for k in range(each)]


def asked(comparisons):
    return [int(re.match(r"question (\d+):", chosen)[1]) for chosen, _ in texts(comparisons)]


def test_held_out_by_prompt(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", questions(range(40)))
    train, evaluation = load([path], tmp_path)
    assert not set(asked(train)) & set(asked(evaluation))
    assert sorted(asked(train) + asked(evaluation)) == sorted([*range(40)] * 2)
    assert len(evaluation) == 8
    note = "no evaluation rows: held out 8 of 80 rows, 4 of 40 prompts"
    assert note in capsys.readouterr().out


def test_held_out_prompts_depend_on_the_seed_alone(tmp_path):
    rows = questions(range(40))
    first = load([write(tmp_path / "pairs.jsonl", rows)], tmp_path, seed=1)[1]
    again = load([str(tmp_path / "pairs.jsonl")], tmp_path, seed=1, cache=tmp_path / "other")[1]
    other = load([str(tmp_path / "pairs.jsonl")], tmp_path, seed=2)[1]
    shuffled = load([write(tmp_path / "shuffled.jsonl", rows[::-1])], tmp_path, seed=1)[1]
    assert everything(first) == everything(again)
    assert set(asked(first)) == set(asked(shuffled))
    assert set(asked(first)) != set(asked(other))


def test_no_prompt_is_on_both_sides_of_several_paths(tmp_path):
    paths = [write(tmp_path / f"{first}.jsonl", questions(range(first, first + 40))) for first in (0, 20)]
    train, evaluation = load(paths, tmp_path)
    assert len(train) + len(evaluation) == 160
    assert not set(asked(train)) & set(asked(evaluation))


def test_one_prompt_cannot_be_held_out(tmp_path):
    with pytest.raises(UserError, match="one prompt and there are no evaluation rows: name some with --eval_data_path"):
        load([write(tmp_path / "pairs.jsonl", questions([1], each=5))], tmp_path)


def test_eval_data_path_takes_no_training_rows(tmp_path, capsys):
    train_path = write(tmp_path / "pairs.jsonl", questions(range(20)))
    eval_path = write(tmp_path / "more.jsonl", questions(range(30, 35)))
    train, evaluation = load([train_path], tmp_path, evaluation=[eval_path])
    assert asked(train) == [i for i in range(20) for _ in range(2)]
    assert asked(evaluation) == [i for i in range(30, 35) for _ in range(2)]
    assert "held out" not in capsys.readouterr().out


def test_folder_as_eval_data_path_stands_for_its_evaluation_rows(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", questions(range(5)))
    write(tmp_path / "set" / "eval.jsonl", questions(range(10, 12)))
    train, evaluation = load([str(tmp_path / "set")], tmp_path)
    assert (set(asked(train)), set(asked(evaluation))) == ({0, 1, 2, 3, 4}, {10, 11})
    other = write(tmp_path / "other.jsonl", questions(range(20, 25)))
    train, evaluation = load([other], tmp_path, evaluation=[str(tmp_path / "set")])
    assert (set(asked(train)), set(asked(evaluation))) == ({20, 21, 22, 23, 24}, {10, 11})


def test_data_paths_are_concatenated(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", questions([i, i + 10])) for i in (3, 1, 2)]
    evaluation = write(tmp_path / "eval.jsonl", questions([50]))
    train, held = load(paths, tmp_path, evaluation=[evaluation, evaluation])
    assert asked(train) == [3, 3, 13, 13, 1, 1, 11, 11, 2, 2, 12, 12]
    assert asked(held) == [50] * 4


def test_known_data_set_with_eval_data_path_trains_on_every_row(tmp_path, monkeypatch):
    path = write(tmp_path / "eval.jsonl", questions([50]))
    rows = datasets.Dataset.from_list([{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(20)])
    read = datasets.load_dataset
    hub = {"Dahoas/synthetic-instruct-gptj-pairwise": datasets.DatasetDict(train=rows)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **kwargs: hub.get(name) or read(name, **kwargs))
    train, _ = load(hub, tmp_path, evaluation=[path])
    assert len(train) == 20


def test_known_data_set_too_small_for_its_split(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows))
    with pytest.raises(UserError, match="eval_data_path"):  # a tenth of three rounds to none
        load(["Dahoas/synthetic-instruct-gptj-pairwise"], tmp_path)


def unjudged(count):
    """A list without numbers."""
    return {"prompt": "question: ", "responses": [f"a{i}" for i in range(count)]}


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    "row, count",
    [({"prompt": "p", "response": "r"}, "one answer"), (unjudged(1), "one answer"), (unjudged(2), "two answers")],
)
def test_evaluation_row_with_nothing_judged_is_refused(row, count, folder, tmp_path):
    """Whether --eval_data_path or a folder of --data_path brings it."""
    (tmp_path / "set").mkdir()
    train = write(tmp_path / "set" / "train.jsonl", questions(range(3)))
    held = write(tmp_path / "set" / "eval.jsonl", [LIST, row])
    reason = f"{held}, row 2: the row has {count} and no order, score or label: nothing to evaluate (1 of 2 rows"
    data = ([str(tmp_path / "set")], tmp_path) if folder else ([train], tmp_path, [held])
    with pytest.raises(UserError, match=re.escape(reason)):
        load(*data)
    _, evaluation = load(*data, on_bad_row="skip")
    assert texts(evaluation)[0][0].endswith(" fish")
    assert len(evaluation) == 1


@pytest.mark.parametrize(
    "count, words", [(1, "one answer"), (3, "three answers"), (4, "four answers"), (12, "12 answers")]
)
def test_nothing_judged_counts_the_answers(count, words):
    row = Comparison([], [], **judge_list(count))
    assert nothing_judged(row) == f"the row has {words} and no order, score or label: nothing to evaluate"


@pytest.mark.parametrize(
    "judged", [judge_pair({}), judge_list(2, ranks=[2, 1]), judge_list(2, [1.0, 1.0]), judge_answer({"label": 0})]
)
def test_an_order_a_score_or_a_label_is_something_to_evaluate(judged):
    assert nothing_judged(Comparison([], [], **judged)) is None


def test_evaluation_rows_need_not_have_what_the_loss_needs(tmp_path):
    train = write(tmp_path / "train.jsonl", [{**TEXT, "margin": 1}])
    held = write(tmp_path / "held.jsonl", [TEXT, LIST, ANSWER])
    needs = {"missing": missing("--margin column")}
    assert [len(part) for part in load([train], tmp_path, [held], **needs)] == [1, 3]
    with pytest.raises(UserError, match=r"held\.jsonl, row 1: margin is missing"):
        load([held], tmp_path, [train], **needs)


def test_rows_that_lack_something_are_held_out_no_more_than_trained_on(tmp_path, capsys):
    """Held-out rows are the training file's, and what is needed there they have."""
    rows = [row | ({"margin": i % 7} if i % 4 else {}) for i, row in enumerate(questions(range(40)))]
    path = write(tmp_path / "pairs.jsonl", rows)
    needs = {"missing": missing("--margin column")}
    with pytest.raises(
        UserError, match=r"row 1: margin is missing, and --margin column needs one, or two scores .20 of 80 rows"
    ):
        load([path], tmp_path, **needs)
    train, evaluation = load([path], tmp_path, on_bad_row="skip", **needs)
    assert not any(math.isnan(row.margin[0]) for part in (train, evaluation) for row in part)
    assert (len(train) + len(evaluation), len(evaluation)) == (60, 6)
    assert not set(asked(train)) & set(asked(evaluation))
    assert "held out 6 of 60 rows, 5 of 40 prompts" in capsys.readouterr().out


def test_lists_and_answers_are_held_out_by_prompt(tmp_path):
    """A prompt's pair, list and single answer go to one side."""
    rows = []
    for i in range(20):
        prompt = {"prompt": f"question {i}: "}
        rows += [prompt | {"chosen": "a", "rejected": "b"}, prompt | {"responses": ["a", "b"], "ranks": [1, 2]}]
        rows += [prompt | {"response": "c", "score": i}]
    train, evaluation = load([write(tmp_path / "rows.jsonl", rows)], tmp_path)
    sides = [[int(whole[0].split()[1][:-1]) for whole in texts(part)] for part in (train, evaluation)]
    assert not set(sides[0]) & set(sides[1])
    assert [len(set(side)) * 3 for side in sides] == [len(side) for side in sides] == [54, 6]


def test_load_answers_takes_rows_that_judge_nothing(tmp_path):
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "p", "response": " r"}, unjudged(3), TEXT]

    def answers(path, **changes):
        made = rules(tmp_path, missing=missing("--loss mse"), **changes)  # of training rows alone
        return load_answers(str(path), tokenizer, special_tokens(tokenizer), made, seed=0)

    found = answers(write(tmp_path / "rows.jsonl", rows))
    assert [len(row.responses) for row in found] == [1, 3, 2]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [TEXT])
    write(tmp_path / "set" / "eval.jsonl", rows[:2])
    assert everything(answers(tmp_path / "set")) == everything(found)[:2]  # a folder stands for its evaluation rows
    with pytest.raises(UserError, match=r"bad\.jsonl, row 2: response is empty"):
        answers(write(tmp_path / "bad.jsonl", [ANSWER, {**ANSWER, "response": ""}]))


# Columns of Comparisons.


def test_targets_are_those_of_every_response_in_turn(tmp_path):
    rows = [LIST, TEXT, ANSWER, {**TEXT, "score_chosen": 2}]
    found = tokenize_rows(rows, tmp_path)
    assert said(found.targets()) == [3.0, 0.5, 1.0, None, None, 0.25, 2.0, None]
    assert said(found.select(np.array([2, 0])).targets()) == [0.25, 3.0, 0.5, 1.0]


def test_similarity_goes_to_the_judged_pairs_in_turn(tmp_path):
    found = tokenize_rows([ANSWER, TEXT, LIST, ANSWER, TEXT], tmp_path)
    assert found.pairs.tolist() == [0, 1, 3, 0, 1]
    assert found[1].similarity == []
    with_them = found.with_similarity(np.array([0.5, 0.25, -1.0, 0.0, 0.75]))
    expected = [[], [0.5], [0.25, -1.0, 0.0], [], [0.75]]
    assert [row.similarity for row in with_them] == expected
    assert everything(with_them) == everything(found)
    assert [row.similarity for row in with_them.select(np.array([4, 2, 0]))] == [expected[i] for i in (4, 2, 0)]
    picked = found.select(np.array([2, 1])).with_similarity(np.array([0.25, -1.0, 0.0, 0.5]))
    assert [row.similarity for row in picked] == [expected[2], expected[1]]


USER, GOOD, BAD = message("user", "Hi"), message("assistant", "Hello"), message("assistant", "Hey")


def in_parts(turn):
    halves = turn["content"][:1], turn["content"][1:]
    return turn | {"content": [{"type": "text", "text": half} for half in halves]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [in_parts(USER)], "chosen": [in_parts(GOOD)], "rejected": [in_parts(BAD)]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD], indent=1)},
        {"prompt": "Hi ", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the prompt twice, but for a space
        {"prompt": "Hi", "chosen": [message("user", "Hi\n"), GOOD], "rejected": [message("user", "Hi\n"), BAD]},
    ],
)
def test_structure_is_not_taken_for_text(row):
    tokenizer = tiny.chatml()
    plain = read_row({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, tokenizer)
    found = read_row(row, tokenizer)
    assert ["".join(text.split()) for text in found.whole] == ["".join(text.split()) for text in plain.whole]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": str([GOOD])}, "chosen is a list of messages that was written out as text"),
        ({"prompt": str([USER])}, "prompt is a list of messages that was written out as text"),
        (
            {"rejected": [message("assistant", [{"type": "image", "url": "x"}])]},
            "rejected has a message part of type image",
        ),
        ({"rejected": [message("assistant", ["Hey"])]}, r"rejected .* part of type None"),
        ({"chosen": [message("assistant", [{"type": "text", "text": " "}])]}, "chosen is empty"),
    ],
)
def test_structure_that_cannot_be_read_is_a_bad_row(change, reason):
    with pytest.raises(BadRow, match=reason):
        read_row({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], **change}, tiny.chatml())


def test_text_that_looks_like_a_list_stays_text():
    row = {"prompt": "p", "chosen": '[{"a": 1}]', "rejected": "[{role: x}]"}
    assert read_row(row, tiny.tokenizer()).whole == ['p[{"a": 1}]', "p[{role: x}]"]


def test_one_start_token(tmp_path):
    """The tokenizer adds one; text that begins with one has it once."""
    tokenizer = tiny.llama()
    start = tokenizer.bos_token
    rows = [{"prompt": f"{mark}the cat", "chosen": " sat", "rejected": " is"} for mark in ("", start)]
    plain, marked = tokenize_rows(rows, tmp_path, tokenizer)
    assert plain.prompt[0] == tokenizer.bos_token_id
    assert marked.prompt[:1] + plain.prompt[1:] == plain.prompt
    assert marked.prompt.count(tokenizer.bos_token_id) == 1


def numbered(name, count):
    return [{**TEXT, "prompt": f"{name} {i}", "chosen": f"{i}"} for i in range(count)]


def test_a_prompt_that_has_many_of_the_rows_and_is_held_out_is_said(tmp_path, capsys):
    rows = [{**TEXT, "prompt": name, "chosen": f"{i}"} for name in "ab" for i in range(60)]
    load([write(tmp_path / "train.jsonl", rows)], tmp_path)
    assert "60 of 120 rows are held out, more than one in 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "held", "said"),
    [
        (numbered("a", 400), numbered("b", 60), []),
        (numbered("a", 400), numbered("b", 49), ["49 held-out rows: the metrics say little"]),
        (numbered("a", 400), numbered("b", 1), ["1 held-out row: the metrics say little"]),
        (numbered("a", 100), numbered("b", 60), []),  # as somebody wants it
        (
            numbered("a", 400),
            numbered("b", 50) + numbered("a", 10),
            ["10 of 60 held-out rows have only texts that are trained on"],
        ),
    ],
)
def test_what_makes_an_evaluation_say_little_is_said(train, held, said, tmp_path, capsys):
    load([write(tmp_path / "train.jsonl", train)], tmp_path, [write(tmp_path / "held.jsonl", held)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "held" in line and ".jsonl" not in line]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said))
