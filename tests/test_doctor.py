# SPDX-License-Identifier: Apache-2.0
"""The doctor for data: each finding on generated rows, a healthy set, the cleaned set, the page."""

import gzip
import json
import os
import random
import subprocess
import sys

import browser as chromium
import models
import numpy as np
import pytest
import runs
from test_report import DRAWN, HOSTILE, MOST, Tags, require_inert

import reward_model
from reward_model.__main__ import main
from reward_model.common.errors import UserError
from reward_model.config.doctor import DoctorConfig
from reward_model.data.preprocessing import PreprocessingConfig, load_comparisons, read_text
from reward_model.data.sources import read_sources
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.doctor.near import ALIKE, groups, signature, similarity
from reward_model.doctor.reading import PLAIN
from reward_model.doctor.style import STYLES, refuses, script_of, styles_of

WORDS = ["".join(random.Random(seed).choices("abcdefghijklmnop", k=6)) for seed in range(3_000)]


def sentence(draw, count=12):
    return " ".join(draw.choices(WORDS, k=count))


def healthy(count=120, seed=0):
    draw = random.Random(seed)
    return [
        {"prompt": f"Tell me: {sentence(draw)}\n", "chosen": sentence(draw), "rejected": sentence(draw)}
        for _ in range(count)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def found_in(tmp_path, rows, held=None, **options):
    path = written(tmp_path / "train.jsonl", rows)
    if held is not None:
        options["eval_data_path"] = [written(tmp_path / "eval.jsonl", held)]
    return reward_model.examine(path, DoctorConfig(**options))


def test_healthy_data_have_no_findings(tmp_path):
    found = found_in(tmp_path, healthy(), healthy(60, seed=1))
    assert found.is_healthy(strict=True) and {each.level for each in found.findings} == {"fine"}
    assert found.counts["training"] == {"rows": 120, "pairs": 120, "prompts": 120, "answers": 240}
    assert len(found.not_looked_at) == 4 and not found.strengths and not found.suspicious


def test_repetitions_contradictions_and_circles(tmp_path):
    rows = healthy(20)
    again = rows[3] | {"prompt": rows[3]["prompt"] + " "}  # but for white space
    swapped = rows[5] | {"chosen": rows[5]["rejected"], "rejected": rows[5]["chosen"]}
    a, b, c = "the first one", "the second one", "the third one"
    ring = [{"prompt": "Which? ", "chosen": one, "rejected": other} for one, other in ((a, b), (b, c), (c, a))]
    tail = [{"prompt": "Which? ", "chosen": "a better one", "rejected": a}]  # on no circle
    found = found_in(tmp_path, rows + [again, swapped] + ring + tail)
    assert found.named("duplicates").count == 1 and found.named("duplicates").rows == ["train.jsonl, row 21 (as row 4)"]
    assert found.named("contradictions").count == 2 and found.named("contradictions").level == "hurts"
    assert found.named("contradictions").rows == [
        "train.jsonl, row 6 (against row 22)",
        "train.jsonl, row 22 (against row 6)",
    ]
    assert found.named("cycles").count == 3 and "1 circle," in found.named("cycles").line
    assert found.named("near_duplicates").count == 0 and not found.is_healthy()
    spaced = [row | {"rejected": f"{row['chosen']} "} for row in rows[:2]]
    found = found_in(tmp_path, rows[2:] + spaced)
    assert found.named("same").rows == ["train.jsonl, row 19", "train.jsonl, row 20"]
    assert found.named("same").level == "hurts"
    assert not any(found.named(name).count for name in ("contradictions", "cycles", "alike"))


def test_what_is_nearly_there_already(tmp_path):
    rows = healthy(20)
    changed, other = ({name: text + " indeed" for name, text in rows[place].items()} for place in (2, 9))
    held = [*healthy(30, seed=2), rows[0], rows[1] | {"chosen": sentence(random.Random(7))}, other]
    found = found_in(tmp_path, [*rows, changed], held)
    assert found.named("near_duplicates").count == 1
    assert found.named("near_duplicates").rows == ["train.jsonl, row 21 (like row 3)"]
    assert found.named("prompts_in_both").rows == [
        "eval.jsonl, row 31 (as train.jsonl, row 1)",
        "eval.jsonl, row 32 (as train.jsonl, row 2)",
    ]
    assert found.named("pairs_in_both").rows == ["eval.jsonl, row 31 (as train.jsonl, row 1)"]
    for name in ("near_prompts_in_both", "near_pairs_in_both"):
        assert found.named(name).rows == ["eval.jsonl, row 33 (like train.jsonl, row 10)"]
    assert found.named("prompts_in_both").count == 2 and found.named("pairs_in_both").count == 1
    assert found.named("pairs_in_both").level == "hurts"
    assert found.named("near_prompts_in_both").count == found.named("near_pairs_in_both").count == 1
    alike = [{"prompt": "Say: ", "chosen": sentence(random.Random(3), 40)} for _ in range(1)]
    alike[0]["rejected"] = alike[0]["chosen"] + "x"
    assert found_in(tmp_path, alike + rows).named("alike").count == 1


def test_minhash_estimates_the_share_of_stretches_in_common():
    draw = random.Random(0)
    errors = []
    for _ in range(200):
        words = draw.choices(WORDS, k=40)
        other = [word if draw.random() > 0.1 else draw.choice(WORDS) for word in words]
        one, two = " ".join(words), " ".join(other)
        sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, two)]  # slow, by hand
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        errors.append(similarity(signature(one)[None], signature(two.upper())[None])[0] - exact)
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.08
    assert signature("too short") is None


def test_groups_are_those_that_all_comparisons_give():
    draw = random.Random(1)
    texts = [sentence(draw, 60) for _ in range(60)]
    texts += [text + " and a little more" for text in texts[:20]]
    signatures = np.stack([signature(text) for text in texts])
    found = groups(signatures)
    for i in range(len(texts)):
        for j in range(i):
            is_near = similarity(signatures[i : i + 1], signatures[j : j + 1])[0] >= ALIKE
            assert (found[i] == found[j]) == is_near == (i - j == 60), (i, j)


def test_length_place_and_style_that_win(tmp_path):
    draw = random.Random(0)
    rows = [
        row | {"chosen": f"- **{row['chosen']}**! See https://a.b", "rejected": row["rejected"]} for row in healthy()
    ]
    found = found_in(tmp_path, rows)
    for name in ("style_list_items", "style_bold_text", "style_exclamation_marks", "style_links"):
        assert found.named(name).level == "doubtful" and found.named(name).share.value == 1, name
    assert found.named("length").level == "hurts" and found.biases.length_correlation > 0.5
    assert not found.is_healthy() and found.named("style_headings") is None
    of_few = found_in(tmp_path, [row | {"prompt": f"Of three: {i % 3} "} for i, row in enumerate(rows)]).named("length")
    assert of_few.share.low is None and of_few.level == "doubtful"  # too few prompts to prove that it hurts
    longer = [row | {"chosen": f"{row['chosen']} and more of it"} for row in healthy(30)]
    assert found_in(tmp_path, longer).named("length").level == "hurts"  # few, and without a doubt
    few = found_in(tmp_path, longer[:6]).named("length")
    assert few.level == "fine" and few.line.endswith("too few pairs to tell")
    rows = [
        {"prompt": f"Q: {i} ", "response_a": sentence(draw), "response_b": sentence(draw), "winner": "model_" + w}
        for i, w in enumerate("aaab" * 30)
    ]
    placed = found_in(tmp_path, rows).named("position")
    assert placed.level == "doubtful" and placed.share.value == 0.75 and placed.share.pairs == 120


def test_rows_that_cannot_be_used_ties_glued_and_refusals(tmp_path):
    rows = healthy(20)
    rows[0] |= {"rejected": " "}
    rows[1] |= {"rejected": rows[1]["chosen"]}
    rows[2] |= {"chosen_score": 1, "rejected_score": 1}
    rows[3] |= {"chosen": "I'm sorry, but I can't help with that."}
    for row in rows[4:]:
        row["prompt"] = row["prompt"].strip()
    found = found_in(tmp_path, rows)
    assert found.named("unusable").count == 2 and found.named("unusable").level == "hurts"
    assert found.named("unusable").examples == [
        "1 × rejected is empty (train.jsonl, row 1)",
        "1 × chosen and rejected are equal (train.jsonl, row 2)",
    ]
    assert found.named("empty").count == 1 and found.named("empty").rows == ["train.jsonl, row 1"]
    assert found.named("ties").count == 1 and found.named("refusals").count == 1
    assert found.named("glued").count == 16 and found.named("glued").level == "hurts"


def test_scripts(tmp_path):
    assert [script_of(text) for text in ("Hello", "Привет", "12 + 3", "漢字とかな", "مرحبا", "한국어 a")] == [
        *("LATIN", "CYRILLIC", "", "JAPANESE OR CHINESE", "ARABIC", "HANGUL")
    ]
    rows = healthy(20)
    rows[0] |= {"chosen": "Это хороший ответ на вопрос"}
    found = found_in(tmp_path, rows)
    assert found.named("scripts_differ").count == found.named("script_of_prompt").count == 1
    assert "cyrillic" in found.named("scripts").line


@pytest.mark.parametrize(
    "text", ["I cannot help with that.", "As an AI language model, I …", "Sorry, but no.", "I’m unable to say."]
)
def test_a_refusal_is_one(text):
    assert refuses(text)
    assert not refuses("You cannot see it, and I can help you with that. " * 9 + text)


def test_marks_of_style_are_counted():
    text = "# Title\n\n1. one\n- two **bold**!\n```\n3.5\n```\nhttps://x.y I can't assist"
    assert dict(zip(STYLES, styles_of(text))) == {
        "list items": 2, "headings": 1, "code blocks": 2, "bold text": 1, "exclamation marks": 1,
        "refusing phrases": 1, "links": 1, "numbers": 2,
    }  # fmt: skip


def test_chats_lists_and_single_answers_are_read(tmp_path):
    def chat(text):
        return [{"role": "assistant", "content": text}]

    prompt = [{"role": "user", "content": "Which one?"}]
    chats = [{"prompt": prompt, "chosen": chat(f"yes {i}"), "rejected": chat(f"no {i}")} for i in range(12)]
    found = found_in(tmp_path, [*chats, chats[0]])
    assert found.named("duplicates").count == 1 and found.counts["training"]["prompts"] == 1
    lists = [{"prompt": "Which? ", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}, {"prompt": "?", "response": "x"}]
    found = found_in(tmp_path, lists)
    assert found.counts["training"]["pairs"] == 3 and found.named("without_pairs").count == 1


# Strengths


def strong(count=40):
    """Of which row i has strength i − 5; both answers have columns of their own."""
    rows = healthy(count)
    for i, row in enumerate(rows):
        row |= {"strength_mean": i - 5.0, "strength_std": 1.0, "strength_agree": 0.25, "margin": 1.0}
        row |= {"chosen_model": "good", "rejected_model": "bad"}
    return rows


def read_again(path):
    """What the trainer makes of a cleaned file: texts of better and worse, and the fields."""
    (source,), _ = read_sources(str(path), 0)
    for _, stored in source.stored():
        texts = read_text(source, stored, PLAIN, False)
        assert not isinstance(texts, str), texts
        yield [texts.whole[texts.judged[side][0]] for side in ("better", "worse")], texts.judged, source.named(stored)


def test_strengths_are_described(tmp_path):
    found = found_in(tmp_path, strong())
    assert found.strengths["pairs"] == 40 and found.strengths["below_zero"]["value"] == 5 / 40
    assert found.strengths["deciles"][0] == -5 and found.strengths["deciles"][10] == 34
    assert [each["row"] for each in found.suspicious[:2]] == [1, 2] and len(found.suspicious) == 5  # below 0
    assert found.suspicious[0]["chosen"] == strong()[0]["chosen"]
    assert found.named("strength_below_zero").level == "doubtful"
    json.dumps(found.to_json(), allow_nan=False)


def test_a_cleaned_set_is_read_by_the_trainer(tmp_path):
    out = tmp_path / "cleaned.jsonl.gz"
    options = {"flip": 0.1, "remove": 0.2, "soften": True, "temperature": 2.0, "margin": True, "output": str(out)}
    found = found_in(tmp_path, strong(), **options)
    rows = strong()
    again = list(read_again(out))
    done = found.cleaned
    assert (done.flipped, done.removed, done.written, done.softened, done.margins) == (4, 8, 32, 32, 32)
    assert (done.removed_above_zero, done.flipped_above_zero, done.not_flipped) == (6, 0, 0)
    for place, (texts, judged, row) in enumerate(again):
        number = place if place < 4 else place + 8
        expected = [rows[number]["prompt"] + rows[number][name] for name in ("chosen", "rejected")]
        strength = number - 5.0
        if place < 4:
            expected, strength = expected[::-1], -strength
            assert row["chosen_model"] == "bad" and row["strength_agree"] == 0.75
        assert texts == expected and row["strength_mean"] == strength
        assert judged["margin"] == [max(0.0, strength)] and judged["probability"] == [
            pytest.approx(1 / (1 + np.exp(-strength / 2)))
        ]


def test_no_pair_is_suspicious_that_the_models_agree_with(tmp_path):
    rows = strong()[5:]
    found = found_in(tmp_path, rows, report=str(tmp_path / "page.html"))
    assert found.strengths["pairs"] == 35 and found.suspicious == []
    assert "uspicious" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    written(tmp_path / "train.jsonl", strong())
    page = tmp_path / "page.html"
    found = reward_model.examine(str(tmp_path / "train.jsonl"), DoctorConfig(report=str(page)))
    assert "5 suspicious pairs" in page.read_text(encoding="utf-8")
    assert "the lowest of the 5 pairs below 0 that --report and --json have" in "\n".join(found.lines())


def test_repetitions_are_left_out_and_contradictions_stay(tmp_path):
    """With and without strengths; of a list only if all its judgements are there before."""
    rows = healthy(6)
    swapped = rows[1] | {"chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    again = rows[0] | {"prompt": rows[0]["prompt"] + " ", "note": "kept nowhere"}
    out = tmp_path / "once.jsonl"
    found = found_in(tmp_path, [*rows, again, swapped, rows[2], rows[2]], drop_repetitions=True, output=str(out))
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [*rows, swapped]
    assert (found.cleaned.repetitions, found.cleaned.written, found.cleaned.rows) == (3, 7, 10)
    assert "3 left out, as they repeat rows before them" in "\n".join(found.cleaned.lines())
    lists = [
        {"prompt": "Which? ", "responses": [f"{a} one", f"{b} one"], "ranks": [0, 1]} for a, b in ("ab", "bc", "ab")
    ]
    more = {"prompt": "Which? ", "responses": ["a one", "b one", "d one"], "ranks": [0, 1, 2]}
    (tmp_path / "lists").mkdir()
    found = found_in(tmp_path / "lists", [*lists, more], drop_repetitions=True, output=str(tmp_path / "lists.jsonl"))
    assert (found.cleaned.repetitions, found.cleaned.written) == (1, 3)
    (tmp_path / "strong").mkdir()
    rows, out = [*strong(20), strong(20)[0]], tmp_path / "strong.jsonl"
    found = found_in(tmp_path / "strong", rows, drop_repetitions=True, remove=0.1, output=str(out))
    assert (found.cleaned.repetitions, found.cleaned.removed, found.cleaned.written) == (1, 1, 19)


def test_an_encoder_is_given_pairs_as_in_training(tmp_path, caplog):
    """Pairs have a separator more, so that prompts are cut which would fit joined."""
    rows, folder = healthy(40), tmp_path / "bert"
    tokenizer = models.write("bert", folder, max_position_embeddings=256)
    path = written(tmp_path / "train.jsonl", rows)
    special = choose_special_tokens(tokenizer, len(tokenizer), fill=0)
    sizes = [len(ids) for row in rows for ids in tokenizer([row["prompt"]], [row["chosen"]])["input_ids"]]
    limit = int(np.median(sizes))
    cut = {}
    for pairs in (True, False):
        how = PreprocessingConfig(limit, "stop", tmp_path / f"cache {pairs}", pairs=pairs)
        train, _ = load_comparisons([path], {"": [path]}, tokenizer, special, how, 0)
        cut[pairs] = sum(train.table["cut"])
    assert cut[True] > cut[False] > 0
    found = reward_model.examine(path, DoctorConfig(tokenizer=str(folder), max_seq_len=limit))
    assert found.named("cut").count == cut[True] and "read as pairs" in found.named("cut").line
    assert "give --max_seq_len more tokens" in found.named("cut").advice and "positions" not in caplog.text
    long = [row | {"chosen": f"{row['chosen']} " * 40} for row in rows[:3]]
    found = found_in(tmp_path, rows + long, tokenizer=str(folder), max_seq_len=1024)
    assert "--max_seq_len 1024: the model's positions are 256, and a training would take no more" in caplog.text
    bad = found.named("unusable_once_tokenized")
    assert bad.count == 3 and "the model takes no more tokens: shorten them" in bad.advice
    assert bad.reasons[0]["rows"] == [f"train.jsonl, row {n}" for n in (41, 42, 43)] and "… tokens" in bad.examples[0]
    (folder / "config.json").unlink()
    found = reward_model.examine(path, DoctorConfig(tokenizer=str(folder), max_seq_len=limit))
    assert found.named("cut").count == cut[False] and "read as pairs" not in found.named("cut").line
    assert "texts are joined, as for a decoder: there is no config.json beside it" in caplog.text


def test_a_cleaned_set_keeps_its_columns(tmp_path):
    out = tmp_path / "cleaned.jsonl"
    found_in(tmp_path, strong(), remove=0.5, output=str(out))
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == strong()[20:]


def chat_rows():
    def turns(text):
        return [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]

    return [{"chosen": turns(f"y{i}"), "rejected": turns(f"n{i}"), "strength_mean": float(i)} for i in range(4)]


def fnlp_rows():
    return [
        {
            "chosen": [f"What is {i}?", f"A number, {i}."],
            "rejected": [f"What is {i}?", "Who knows."],
            "GPT4 label": 1,
            "mean preference difference": float(i),
            "std preference difference": 0.5,
            "chosen score list": [i + 1.0, i + 2.0],
            "rejected score list": [1.0, 2.0],
        }
        for i in range(4)
    ]


def preference(name, other, **judged):
    return [
        {"prompt": f"Q{i}? ", name: f"a {i}", other: f"b {i}", "strength_mean": float(i)} | judged for i in range(4)
    ]


@pytest.mark.parametrize(
    "rows",
    [
        chat_rows(),
        fnlp_rows(),
        preference("response_a", "response_b", winner="model_a"),
        preference("response_1", "response_2", preference_strength=-2),
        preference("response_0", "response_1", better_response_id=0),
        preference("chosen", "rejected", chosen_score=5, rejected_score=1, rating=2),
        preference("chosen", "rejected", chosen_rating=5, rejected_rating=1),
        preference("response_j", "response_k"),
    ],
    ids=["chats", "fnlp", "winner", "preference_strength", "better_response_id", "scores", "ratings", "j and k"],
)
def test_every_layout_is_swapped(tmp_path, rows):
    out = tmp_path / "cleaned.jsonl"
    found = found_in(tmp_path, rows, flip=0.25, output=str(out))
    before, after = list(read_again(tmp_path / "train.jsonl")), list(read_again(out))
    assert found.cleaned.flipped == 1 and found.cleaned.not_flipped == 0
    assert [texts for texts, _, _ in after] == [before[0][0][::-1]] + [texts for texts, _, _ in before[1:]]
    again = reward_model.examine(str(out))
    assert again.strengths["pairs"] == 4 and again.named("unusable").count == 0


def test_without_strengths_a_cleaned_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="reward-model ensemble"):
        found_in(tmp_path, healthy(), flip=0.1, output=str(tmp_path / "x.jsonl"))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flip": 0.1}, "--flip needs --output"),
        ({"output": "x.jsonl"}, "there is nothing else to write"),
        ({"output": "x.csv", "margin": True}, "end it with .jsonl"),
        ({"output": "x.jsonl", "flip": 0.6, "remove": 0.5}, "take all pairs"),
        ({"temperature": 2.0}, "--soften"),
        ({"chat_template": "human_assistant"}, "give --tokenizer"),
        ({"remove": 1.0, "output": "x.jsonl"}, "not in"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        DoctorConfig(**options)


# The command and the page


def test_the_command_says_what_hurts(tmp_path, capsys):
    path = written(tmp_path / "train.jsonl", healthy())
    assert main(["doctor", path]) == 0
    assert "0 findings hurt, 0 are doubtful" in capsys.readouterr().out
    bad = written(tmp_path / "bad.jsonl", [*healthy(200), healthy()[0], healthy()[1], healthy()[2]])
    assert main(["doctor", bad]) == 0 and main(["doctor", bad, "--strict"]) == 1
    capsys.readouterr()
    assert main(["doctor", bad, "--json", "--report", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and not found["healthy_strict"] and found["counts"]["training"]["rows"] == 203
    assert json.loads((tmp_path / "page.json").read_text()) == found
    worse = written(tmp_path / "worse.jsonl", healthy(20) * 2)
    assert main(["doctor", worse]) == 1
    cleaned = ["--drop_repetitions", "--output", str(tmp_path / "once.jsonl")]
    assert main(["doctor", worse, *cleaned]) == 0 and "in the data as they were read" in capsys.readouterr().out
    assert main(["doctor"]) == 1 and "name the data" in capsys.readouterr().err


def hostile_page(tmp_path):
    rows = [
        {"prompt": f"{HOSTILE} {i} ", "chosen": HOSTILE * 2, "rejected": f"{i}", "strength_mean": i - 50.0}
        for i in range(120)
    ]
    rows[0]["rejected"] = HOSTILE * 2
    rows[3]["chosen"] = "漢字 " * 40_000
    rows[4] |= {HOSTILE: HOSTILE, "margin": HOSTILE}
    path = tmp_path / "page.html"
    found_in(tmp_path, rows, report=str(path), soften=True, output=str(tmp_path / "cleaned.jsonl"))
    return path


def test_hostile_texts_are_texts_on_the_page(tmp_path):
    path = hostile_page(tmp_path)
    page = Tags(path.read_text(encoding="utf-8"))
    require_inert(page)
    assert path.stat().st_size < MOST and page.text.count("window.hacked=1") > 100
    assert page.titles() == ["length-of-answers", "distribution-of-the-strengths"] and "The cleaned set" in page.text


def test_the_text_is_for_a_terminal(tmp_path):
    found = found_in(tmp_path, [{"prompt": "Q ", "chosen": "a\x1b[2J", "rejected": "b", "strength_mean": -1.0}])
    assert "\x1b" not in "\n".join(found.lines())


@pytest.mark.slow
@pytest.mark.skipif(chromium.path() is None, reason="no Chromium on PATH (apt install chromium)")
def test_a_browser_shows_the_page_and_asks_for_nothing(tmp_path):
    pytest.importorskip("playwright.sync_api", reason="no Playwright (pip install playwright)")
    path = hostile_page(tmp_path)
    phone = {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}
    with chromium.started() as browser:
        for options in ({}, {"color_scheme": "dark"}, phone):
            with chromium.shown(browser, path, **options) as seen:
                assert seen.errors == [] and seen.requests == [path.as_uri()] and seen.overflow == 0
                drawn = seen.page.evaluate(DRAWN)
                assert drawn == [True, True] and seen.page.evaluate("window.hacked") is None
                dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
                assert dark == ("color_scheme" in options)


@pytest.mark.slow
def test_gzip_parquet_and_a_tokenizer(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from tiny import tokenizer

    rows = strong()
    long = "word " * 200
    rows[0] |= {"chosen": f"a {long}", "rejected": f"b {long}"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "cleaned.jsonl.gz"
    options = DoctorConfig(tokenizer=str(tmp_path / "tokenizer"), max_seq_len=64, margin=True, output=str(out))
    found = reward_model.examine(str(tmp_path / "train.parquet"), options)
    assert found.named("equal_once_cut").count == 1
    with gzip.open(out, "rt", encoding="utf-8") as file:
        assert json.loads(file.readline())["margin"] == 0.0


def test_nothing_that_is_there_is_replaced(tmp_path):
    path, there = written(tmp_path / "train.jsonl", strong()), tmp_path / "cleaned.jsonl"
    with pytest.raises(UserError, match=r"--output .*train.jsonl is there: name another file"):
        reward_model.examine(path, DoctorConfig(flip=0.1, output=path))
    with pytest.raises(UserError, match=r"--report .*train.jsonl: a page of HTML is written; end it with .html"):
        DoctorConfig(report=path)
    other = written(tmp_path / "data.json", strong())
    with pytest.raises(UserError, match=r"--report .*data.html writes data.json, which is the data"):
        reward_model.examine(other, DoctorConfig(report=str(tmp_path / "data.html")))
    assert "smaller share" in "\n".join(reward_model.examine(path, DoctorConfig(remove=0.9, output=str(there))).lines())


def test_a_reader_that_has_enough_and_ctrl_c_end_it_in_a_line(tmp_path, monkeypatch, capsys):
    path = written(tmp_path / "train.jsonl", healthy(6))
    command = [sys.executable, "-m", "reward_model", "doctor", path, "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    environment = runs.environment(HF_HUB_OFFLINE="1", RANK=None)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 0 and "Error" not in done.stderr and "Exception" not in done.stderr

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("reward_model.doctor.api.examine", interrupted)
    assert main(["doctor", path]) == 130
    assert capsys.readouterr().err == "\nended by Ctrl-C\n"
