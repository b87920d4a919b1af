# SPDX-License-Identifier: Apache-2.0
"""Rows as published data sets have them, each read without a flag."""

import csv
import datetime
import json

import datasets
import pytest
import tiny

from reward_model.common.errors import UserError
from reward_model.data.chat_template import settle_template
from reward_model.data.comparisons import BadRow
from reward_model.data.layouts import BY_NAME, layout_of, unread
from reward_model.data.preprocessing import PreprocessingConfig, load_comparisons, nothing_judged
from reward_model.data.rows import read_row
from reward_model.data.sources import Splits, amount_of, read_sources, take
from reward_model.data.tokenizer import choose_special_tokens

pytestmark = pytest.mark.usefixtures("own_cache")


def chatml():
    tokenizer = tiny.chatml()
    settle_template(tokenizer, datetime.datetime(2026, 11, 26))
    return tokenizer


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>"


def chat(*contents, system=None):
    """Turns of a user and an assistant, as the template writes them."""
    turns = [turn("system", system)] if system else []
    roles = ("user", "assistant")
    return "\n".join([*turns, *(turn(roles[i % 2], content) for i, content in enumerate(contents))])


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def shared(*pairs):
    return [{"from": role, "value": content} for role, content in pairs]


Q, SYSTEM = "What?", "Be kind"
ASKED = said(("user", Q))
PAIR = [chat(Q, "good"), chat(Q, "bad")]
PLAIN = ["What?good", "What?bad"]  # text is joined as it is
WORDS = [" Human: What? Assistant: good", " Human: What? Assistant: bad"]  # upstream's
LAYOUTS = {  # a row → the texts it stands for, the best first, and what else is judged
    "orca_dpo_pairs": (
        {"system": SYSTEM, "question": Q, "chosen": "good", "rejected": "bad"},
        [chat(Q, "good", system=SYSTEM), chat(Q, "bad", system=SYSTEM)],
        {},
    ),
    "orca_dpo_pairs, no system": ({"system": "", "question": Q, "chosen": "good", "rejected": "bad"}, PAIR, {}),
    "distilabel-intel-orca-dpo-pairs": ({"system": "", "input": Q, "chosen": "good", "rejected": "bad"}, PAIR, {}),
    "Alpaca's": ({"instruction": "What", "input": "?", "chosen": "good", "rejected": "bad"},
                 [chat("What\n?", "good"), chat("What\n?", "bad")], {}),
    "Alpaca's, no input": ({"instruction": Q, "input": "", "chosen": "good", "rejected": "bad"}, PAIR, {}),
    "Alpaca's with a history": (
        {"instruction": Q, "input": None, "history": [["Hi", "Hello"]], "chosen": "good", "rejected": "bad"},
        [chat("Hi", "Hello", Q, "good"), chat("Hi", "Hello", Q, "bad")],
        {},
    ),
    "ShareGPT": (
        {"conversations": shared(("human", Q)), "chosen": shared(("gpt", "good"))[0],
         "rejected": shared(("gpt", "bad"))[0]},
        PAIR, {},
    ),
    "ShareGPT with a system": (
        {"conversations": shared(("system", SYSTEM), ("human", Q)), "chosen": shared(("gpt", "good")),
         "rejected": shared(("gpt", "bad"))},
        [chat(Q, "good", system=SYSTEM), chat(Q, "bad", system=SYSTEM)], {},
    ),
    "LLaMA-Factory's messages": (
        {"messages": ASKED, "chosen": said(("assistant", "good"))[0], "rejected": said(("assistant", "bad"))[0]},
        PAIR, {},
    ),
    "ms-swift's": ({"messages": ASKED + said(("assistant", "good")), "rejected_response": "bad"}, PAIR, {}),
    "messages as a JSON string": (
        {"messages": json.dumps(ASKED), "chosen": "good", "rejected": "bad"}, PAIR, {},
    ),
    "HelpSteer": ({"prompt": Q, "response": "good", "helpfulness": 4, "correctness": 3}, PLAIN[:1],
                  {"targets": [4.0]}),
    "HelpSteer2-Preference": (
        {"prompt": Q, "response_1": "bad", "response_2": "good", "preference_strength": 2}, PLAIN, {"rating": [2.0]},
    ),
    "HelpSteer3": (
        {"domain": "code", "context": ASKED, "response1": "good", "response2": "bad", "overall_preference": -3},
        PAIR, {"rating": [3.0]},
    ),
    "PKU-SafeRLHF": (
        {"prompt": Q, "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 0},
        PLAIN, {},
    ),
    "KTO": ({"prompt": Q, "completion": "good", "label": True}, PLAIN[:1], {"targets": [1.0]}),
    "KTO, chat": (
        {"prompt": ASKED, "completion": said(("assistant", "good")), "label": False}, PAIR[:1], {"targets": [0.0]},
    ),
    "KTO, ShareGPT": (
        {"conversations": shared(("human", Q), ("gpt", "good")), "kto_tag": True}, PAIR[:1], {"targets": [1.0]},
    ),
    "UltraFeedback": (
        {"source": "evol", "instruction": Q, "completions": [
            {"response": "good", "fine-grained_score": 4.5, "overall_score": 8.0},
            {"response": "bad", "fine-grained_score": 2.0, "overall_score": 10.0}]},
        PAIR, {"targets": [4.5, 2.0]},
    ),
    "UltraFeedback binarized": (
        {"prompt": Q, "messages": ASKED + said(("assistant", "good")), "score_chosen": 8.0, "score_rejected": 6.0,
         "chosen": ASKED + said(("assistant", "good")), "rejected": ASKED + said(("assistant", "bad"))},
        PAIR, {"margin": [2.0]},
    ),
    "Argilla's": (
        {"instruction": Q, "chosen_response": "good", "rejected_response": "bad", "chosen_avg_rating": 4.5,
         "rejected_avg_rating": 4.0},
        PAIR, {"margin": [0.5]},
    ),
    "dpo-mix": (
        {"chosen": ASKED + said(("assistant", "good")), "rejected": ASKED + said(("assistant", "bad")),
         "chosen_rating": 5.0, "rejected_rating": 2.0},
        PAIR, {"margin": [3.0]},
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: What?\n\nAssistant: ", "answers": [
            {"answer": "good", "model": "a", "rank": 1.0}, {"answer": "bad", "model": "b", "rank": 2.0}]},
        ["\n\nHuman: What?\n\nAssistant: good", "\n\nHuman: What?\n\nAssistant: bad"], {"ranks": [0, 1]},
    ),
    "SHP": (
        {"history": Q, "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 3, "score_B": 9},
        WORDS, {"margin": [6.0]},
    ),
    "webgpt_comparisons": (
        {"question": {"full_text": Q}, "answer_0": "bad", "answer_1": "good [1]", "score_0": -1.0, "score_1": 1.0},
        WORDS, {"margin": [2.0]},
    ),
    "Skywork": (
        {"source": "magpie", "chosen": ASKED + said(("assistant", "good")),
         "rejected": ASKED + said(("assistant", "bad"))},
        PAIR, {},
    ),
    "stack-exchange-paired": ({"qid": 1, "question": Q, "response_j": "good", "response_k": "bad"}, PAIR, {}),
    "response_a and response_b": (
        {"prompt": Q, "response_a": "bad", "response_b": "good", "winner": "B"}, PLAIN, {},
    ),
    "Chatbot Arena's conversations": (
        {"conversation_a": ASKED + said(("assistant", "good")), "conversation_b": ASKED + said(("assistant", "bad")),
         "winner": "model_a"},
        PAIR, {},
    ),
    "Chatbot Arena's lists of turns": (
        {"prompt": '["Hi", "What?"]', "response_a": '["Hello", "bad"]', "response_b": '["Hey", "good"]',
         "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        [chat("Hi", "Hey", Q, "good"), chat("Hi", "Hello", Q, "bad")], {},
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: What?\n\nAssistant: good", "rejected": "\n\nHuman: What?\n\nAssistant: bad"},
        ["\n\nHuman: What?\n\nAssistant: good", "\n\nHuman: What?\n\nAssistant: bad"], {},
    ),
    "full-hh-rlhf": (
        {"prompt": "\n\nHuman: What?\n\nAssistant:", "response": " good", "chosen": " good", "rejected": " bad"},
        ["\n\nHuman: What?\n\nAssistant: good", "\n\nHuman: What?\n\nAssistant: bad"], {},
    ),
}  # fmt: skip
TIES = {
    "HelpSteer2": {"prompt": Q, "response_1": "bad", "response_2": "good", "preference_strength": 0},
    "response_a": {"prompt": Q, "response_a": "bad", "response_b": "good", "winner": "tie (bothbad)"},
    "conversation_a": {
        "conversation_a": ASKED + said(("assistant", "good")),
        "conversation_b": ASKED + said(("assistant", "bad")),
        "winner": "both_bad",
    },
    "flags": {"prompt": Q, "response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_model_b": 0},
}


def texts_of(row, **kwargs):
    layout = layout_of(list(row), row, kwargs.get("chat", False))
    return read_row(layout.read(row), chatml(), **kwargs)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout(name, form, tmp_path):
    row, whole, judged = LAYOUTS[name]
    path = tmp_path / f"rows.{form}"
    if form == "csv":  # objects as JSON, as other programs write them
        cells = {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(cells)
    elif form == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps(row) + "\n")
    (source,), _ = read_sources(str(path), seed=0)
    texts = read_row(source.read(source.rows[0]), chatml())
    order = [*texts.judged["better"], *texts.judged["worse"]] or range(len(texts.whole))
    assert [texts.whole[i] for i in order] == whole
    assert {key: texts.judged[key] for key in judged} == judged


@pytest.mark.parametrize("name", TIES)
def test_tie_teaches_no_pair(name):
    texts = texts_of(TIES[name])
    assert len(texts.whole) == 2
    assert texts.judged["better"] == texts.judged["worse"] == []


BAD = [
    (LAYOUTS["HelpSteer3"][0] | {"overall_preference": None}, "overall_preference is None; it should be a number from"),
    (LAYOUTS["HelpSteer3"][0] | {"overall_preference": 9}, "overall_preference is 9; it should be a number from"),
    (LAYOUTS["PKU-SafeRLHF"][0] | {"better_response_id": 2}, "better_response_id is 2; it should be 0 or 1"),
    (LAYOUTS["response_a and response_b"][0] | {"winner": 1}, "winner is 1; it should be model_a, model_b or tie"),
    (LAYOUTS["UltraFeedback"][0] | {"completions": []}, "completions is not a list of objects"),
    (LAYOUTS["UltraFeedback"][0] | {"instruction": None}, "instruction is missing"),
    (LAYOUTS["ShareGPT"][0] | {"conversations": "x"}, "conversations is not a list of messages"),
    (LAYOUTS["Alpaca's with a history"][0] | {"history": ["Hi"]}, "history is not a list of pairs of texts"),
    (LAYOUTS["orca_dpo_pairs"][0] | {"question": 5}, "question is not text"),
    (LAYOUTS["Chatbot Arena's lists of turns"][0] | {"response_a": '["Hello", null]'}, "a turn is null"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_row_that_does_not_fit_its_layout(row, reason):
    """The layout is known by the first row; a later one may differ."""
    first = next(good for good, *_ in LAYOUTS.values() if list(good) == list(row))
    layout = layout_of(list(first), first)
    with pytest.raises(BadRow, match=reason):
        read_row(layout.read(row), chatml())


@pytest.mark.parametrize(
    ("a", "b", "better"), [("0", "1", "b"), ("1.0", "0.0", "a"), ("False", "False", None), (1, 0, "a")]
)
def test_flags_of_the_arena_may_be_text(a, b, better):
    row = {"prompt": Q, "response_a": "a", "response_b": "b", "winner_model_a": a, "winner_model_b": b}
    texts = texts_of(row)
    assert [texts.whole[i] for i in texts.judged["better"]] == ([f"{Q}{better}"] if better else [])
    for wrong in ({"winner_model_a": "1", "winner_model_b": "1"}, {"winner_model_a": "yes"}):
        with pytest.raises(BadRow, match=r"winner_model_a (is yes|and winner_model_b are both set)"):
            texts_of(row | wrong)


def test_numbers_under_other_names_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("request,answer,quality\nWho?,he,0.5\n")
    names = {"prompt": "request", "response": "answer", "score": "quality"}
    (source,), _ = read_sources(str(tmp_path / "a.csv"), seed=0, names=names)
    assert read_row(source.read(source.rows[0]), None).judged["targets"] == [0.5]


def test_whole_dialogues_need_no_question_beside_them():
    texts = [chat(Q, "good"), chat(Q, "bad")]
    row = {"question": Q, "chosen": ASKED + said(("assistant", "good")), "rejected": ASKED + said(("assistant", "bad"))}
    assert texts_of(row).whole == texts
    marked = {"question": Q, "chosen": "Human: What? Assistant: a", "rejected": "Human: What? Assistant: b"}
    assert texts_of(marked).whole == [marked["chosen"], marked["rejected"]]
    assert unread(marked, layout_of(list(marked), marked)) == ["question"]


def test_system_beside_whole_dialogues_and_beside_text():
    dialogues = {"system": SYSTEM, "prompt": ASKED, "chosen": ASKED + said(("assistant", "good"))}
    dialogues |= {"rejected": ASKED + said(("assistant", "bad"))}
    assert texts_of(dialogues).whole == [chat(Q, "good", system=SYSTEM), chat(Q, "bad", system=SYSTEM)]
    del dialogues["prompt"]
    assert texts_of(dialogues).whole == [chat(Q, "good", system=SYSTEM), chat(Q, "bad", system=SYSTEM)]
    text = {"system": SYSTEM, "prompt": Q, "chosen": "good", "rejected": "bad"}
    assert texts_of(text).whole == PLAIN  # joined as it is; the system is named as not read
    assert unread(text, layout_of(list(text), text)) == ["system"]
    assert texts_of(text, chat=True).whole == [chat(Q, "good", system=SYSTEM), chat(Q, "bad", system=SYSTEM)]


def test_a_text_called_context_is_no_chat():
    row = {"context": "A long text.", "question": Q, "chosen": "good", "rejected": "bad"}
    assert texts_of(row).whole == PAIR
    assert unread(row, layout_of(list(row), row)) == ["context"]


def test_columns_beside_a_layout_are_named_once(tmp_path, capsys):
    row = LAYOUTS["HelpSteer3"][0] | {"language": "en", "individual_preference": "[]"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    read_sources(str(tmp_path / "rows.jsonl"), seed=0)
    out = capsys.readouterr().out
    read = "read context as the chat that is answered; response1 and response2 by overall_preference\n"
    assert f"{tmp_path / 'rows.jsonl'}: {read}" in out
    assert "columns that are not read: domain, language, individual_preference\n" in out


def test_upstreams_names_keep_their_words():
    row = {"prompt": Q, "chosen": "good", "rejected": "bad"}
    texts = read_row(BY_NAME["Dahoas/synthetic-instruct-gptj-pairwise"].read(row), None)
    assert texts.whole == WORDS


# Which rows.


def rows_in(path, count, prompts=None, first=0):
    rows = [{"prompt": f"q{i % (prompts or count)} ", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[first:]))
    return str(path)


def test_share_or_number_of_rows_at_the_end_of_a_path(tmp_path, capsys):
    path = rows_in(tmp_path / "rows.jsonl", 40)
    assert amount_of(path) == (path, None)
    assert amount_of(f"{path}:0.25") == (path, 0.25)
    assert amount_of(f"{path}:1.0") == (path, None)
    assert amount_of(f"{path}:7") == (path, 7)
    for wrong in ("0", "0.0", "2.5"):
        with pytest.raises(UserError, match=r"end it with a share up to 1\.0, such as :0\.5, or with a number of rows"):
            amount_of(f"{path}:{wrong}")
    sources, _ = read_sources(path, seed=0)
    (some,) = take(sources, 0.25, 1, "x")
    assert len(some.rows) == 10
    assert some.numbers.tolist() == sorted(some.numbers.tolist())
    assert take(sources, 0.25, 1, "x")[0].numbers.tolist() == some.numbers.tolist()
    assert take(sources, 0.25, 2, "x")[0].numbers.tolist() != some.numbers.tolist()
    assert len(take(sources * 3, 100, 0, "x")) == 3
    assert sum(len(source.rows) for source in take(sources * 3, 100, 0, "x")) == 100
    assert len(take(sources, 100, 0, "x")[0].rows) == 40
    assert "x: 100 rows are wanted, and there are 40" in capsys.readouterr().out


def test_a_file_whose_name_ends_like_a_number_of_rows_is_a_file(tmp_path):
    path = rows_in(tmp_path / "rows:5", 3)
    assert amount_of(path) == (path, None)


@pytest.mark.parametrize("saved", [True, False])
def test_named_splits(saved, tmp_path, capsys):
    parts = {"train_prefs": 5, "train_sft": 4, "test_prefs": 3, "test_sft": 2}
    folder = tmp_path / "data"
    if saved:
        tables = {n: datasets.Dataset.from_list([{"prompt": "", "chosen": "a", "rejected": "b"}] * c)
                  for n, c in parts.items()}  # fmt: skip
        datasets.DatasetDict(tables).save_to_disk(folder)
    else:
        for name, count in parts.items():
            rows_in(folder / f"{name}-00000-of-00001.jsonl", count)

    def sizes(*splits):
        return [
            sum(len(source.rows) for source in part) for part in read_sources(str(folder), 0, splits=Splits(*splits))
        ]

    assert sizes("train_prefs") == [5, 3]
    assert sizes("train_sft", "test_prefs") == [4, 3]
    if saved:
        with pytest.raises(UserError, match=r"no split named train, only train_prefs, .*; take one with --split"):
            sizes()
    else:
        assert sizes() == [9, 5]
        assert "trained on train_prefs, train_sft together; --split names one of them" in capsys.readouterr().out
    for wrong in (("train_x",), ("train_prefs", "test_x")):
        with pytest.raises(UserError, match=r"no (split named|file called) t\w+_x"):
            sizes(*wrong)


def test_files_that_are_not_read_are_named_and_links_to_nothing_refused(tmp_path, capsys):
    rows_in(tmp_path / "train-00000-of-00002.jsonl", 3)
    rows_in(tmp_path / "notes.jsonl", 3)
    read_sources(str(tmp_path), 0)
    assert "files that are not read: notes.jsonl" in capsys.readouterr().out
    (tmp_path / "train-00001-of-00002.jsonl").symlink_to("../blobs/1234")
    with pytest.raises(UserError, match=r"00001-of-00002.jsonl is a link to \.\./blobs/1234, which is not there"):
        read_sources(str(tmp_path), 0)


def load(paths, tmp_path, tokenizer=None, evaluation=(), **kwargs):
    most = kwargs.pop("most", (0, 0))
    tokenizer = tokenizer or tiny.tokenizer()
    rules = PreprocessingConfig(64, "stop", tmp_path / "cache", 1, nothing_judged, **kwargs)
    special = choose_special_tokens(tokenizer, len(tokenizer))
    named = {"": list(evaluation)} if evaluation else {}
    train, sets = load_comparisons(paths, named, tokenizer, special, rules, 0, None, most)
    return train, sets[""]


def test_at_most_so_many_rows(tmp_path, capsys):
    path = rows_in(tmp_path / "rows.jsonl", 100)
    train, held = load([path], tmp_path, most=(20, 5))
    assert (len(train), len(held)) == (20, 5)
    assert "20 of 90 training rows, drawn at random" in capsys.readouterr().out
    train, held = load([f"{path}:50"], tmp_path, evaluation=[f"{path}:0.1"])
    assert (len(train), len(held)) == (50, 10)


def test_split_of_a_file(tmp_path):
    with pytest.raises(UserError, match=r"--split x: .*rows.jsonl is one file, which has no splits"):
        load([rows_in(tmp_path / "rows.jsonl", 5)], tmp_path, splits=Splits("x"))


@pytest.mark.parametrize("sizes", [[39, 1], [95, 3, 2], [1] * 30 + [285]])
def test_no_prompt_with_most_of_the_rows_is_held_out(sizes, tmp_path):
    rows = [{"prompt": f"q{p} ", "chosen": f"a{i}", "rejected": f"b{i}"} for p, n in enumerate(sizes) for i in range(n)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = load([str(tmp_path / "rows.jsonl")], tmp_path)
    assert len(train) + len(held) == sum(sizes)
    assert 1 <= len(held) <= round(sum(sizes) / 10)


def test_plain_text_for_a_tokenizer_with_a_template(tmp_path, capsys):
    path = rows_in(tmp_path / "rows.jsonl", 20)
    load([path], tmp_path, tiny.chatml())
    line = "20 of 20 rows are plain text, joined as it is, and the tokenizer has a chat template: --chat puts them"
    assert line in capsys.readouterr().out
    train, _ = load([path], tmp_path, chatml(), chat=True)
    assert "plain text" not in capsys.readouterr().out
    tokenizer = chatml()
    assert tokenizer.decode(train[0].prompt + train[0].responses[0]) == chat("q0", "a0")
    load([path], tmp_path)
    assert "plain text" not in capsys.readouterr().out


def test_nothing_between_prompt_and_answer_is_said(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Who {i}?", "chosen": "He", "rejected": "She"}) + "\n" for i in range(20))
    )
    load([str(tmp_path / "rows.jsonl")], tmp_path)
    assert "20 of 20 rows are joined with nothing between prompt and answer" in capsys.readouterr().out
    load([rows_in(tmp_path / "spaced.jsonl", 20)], tmp_path)
    assert "nothing between" not in capsys.readouterr().out
