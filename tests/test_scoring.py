# SPDX-License-Identifier: Apache-2.0
"""reward-model score, RewardScorer.rows and score_rows: every form of row, in order, as one text at a time scores."""

import functools
import gzip
import io
import itertools
import json
import math
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from saved import save

import reward_model
from reward_model.__main__ import main
from reward_model.common.errors import UserError
from reward_model.config.scoring import ScoreConfig
from reward_model.data.files import read_file
from reward_model.data.preprocessing import PreprocessingConfig, tokenize
from reward_model.inference import RowScores, load, load_to_read
from reward_model.serving import stream

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]
FORMS = {
    "hf": {},
    "window": {"family": "gemma2"},
    "dschat": {"save_format": "dschat"},
    "own": {"family": "bert", "pooling": "mean"},
    "encoder": {"family": "bert"},
}


def said(chance, count):
    return " ".join(chance.choice(WORDS, count))


def lists(count, seed=0):
    """Prompts, and for each some responses, one of them twice and one empty."""
    chance = np.random.default_rng(seed)
    prompts = [said(chance, chance.integers(1, 9)) for _ in range(count)]
    responses = [[" " + said(chance, chance.integers(1, 6)) for _ in range(chance.integers(1, 6))] for _ in prompts]
    responses[0] += responses[0][:1]
    responses[1] += [""]
    return prompts, responses


def one_by_one(reward, prompts, responses):
    return [[reward.score([p], [r], batch_size=1)[0] for r in found] for p, found in zip(prompts, responses)]


def flat(values):
    return [number for each in values for number in each]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), template=tiny.CHATML)


@pytest.fixture(scope="module")
def reward(folder):
    return load_to_read(str(folder))[0]


# --- rows and score_rows ---


@pytest.fixture(scope="module")
def of_form(tmp_path_factory):
    return functools.cache(lambda form: load(save(tmp_path_factory.mktemp(form), **FORMS[form])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 40, 8192])
def test_rows_score_as_their_texts_do(form, tokens, of_form):
    reward = of_form(form)
    prompts, responses = lists(9)
    found = reward.score_rows(reward.rows(prompts, responses), tokens)
    assert [len(each) for each in found] == [len(each) for each in responses]
    assert flat(found) == pytest.approx(flat(one_by_one(reward, prompts, responses)), abs=1e-5)
    assert found[0][-1] == pytest.approx(found[0][0], abs=1e-6)  # the same answer
    assert reward.score([prompts[2]], [responses[2][0]]) == pytest.approx(found[2][:1], abs=1e-5)  # as before


def test_chats_score_as_chats(reward):
    prompts = [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "fish?"}]]
    responses = [["sat", {"role": "assistant", "content": "eats"}], [[{"role": "assistant", "content": "there"}]]]
    found = reward.score_rows(reward.rows(prompts, responses))
    chats = [
        [*prompts[i], {"role": "assistant", "content": text}] for i, text in ((0, "sat"), (0, "eats"), (1, "there"))
    ]
    assert flat(found) == pytest.approx(reward.score_chats(chats, batch_size=1), abs=1e-5)
    assert reward.score_rows(reward.rows(["the cat"], [["sat"]], chat=True))[0] == pytest.approx(found[0][:1], abs=1e-5)


def test_text_that_looks_like_messages_stays_text(reward):
    text = ' [{"role": "user", "content": "x"}]'
    (found,) = reward.score_rows(reward.rows(["cat"], [[text]]))
    assert found == pytest.approx(reward.score(["cat"], [text]), abs=1e-5)


def test_a_prompt_is_encoded_once_for_its_answers(reward):
    seen = []
    handle = reward.scorer.backbone.register_forward_pre_hook(
        lambda module, given, named: seen.append((named.get("input_ids", given[0] if given else None)).numel()),
        with_kwargs=True,
    )
    prompt, responses = "the cat sat on the mat and the other cat sat there", [" a", " b", " c", " d"]
    try:
        (row,) = rows = reward.rows([prompt], [responses])
        reward.choose_attention(64)
        seen.clear()
        reward.score_rows(rows)
        # and of rows that were made one at a time, as requests come
        apart = [reward.rows([prompt], [[response]])[0] for response in responses]
        reward.score_rows(apart)
    finally:
        handle.remove()
    once = len(row.prompt) + sum(map(len, row.responses))
    assert seen[0] == once
    # these share what was asked, and not the space with which all answers begin
    assert once <= seen[1] < sum(len(row.prompt) + len(response) for response in row.responses) / 2


def test_ids_are_those_of_training(reward, tmp_path):
    rows = [{"prompt": "the cat", "responses": [" sat", " eats fish"], "scores": [1, 0]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PreprocessingConfig(64, "stop", tmp_path / "cache")
    trained = tokenize(read_file(file), reward.tokenizer, reward.special, config)[0]
    (made,) = reward.rows(["the cat"], [[" sat", " eats fish"]])
    assert (made.prompt, made.responses) == (trained.prompt, trained.responses)


def test_a_long_row_loses_the_left_of_its_prompt(reward):
    whole = reward.tokenizer("where " * 30)["input_ids"]
    (row,) = reward.rows(["where " * 30], [[" cat", " fish"]], max_seq_len=40)
    assert len(row.prompt) + max(map(len, row.responses)) == 40
    assert row.prompt == whole[-len(row.prompt) :]
    with pytest.raises(UserError, match=r"row 1: .* alone is longer"):
        reward.rows(["a"], [["where " * 30]], max_seq_len=20)


@pytest.mark.parametrize(
    ("prompts", "responses", "said"),
    [
        (["a", "b"], [["c"]], "of each prompt a list"),
        (["a"], ["c"], "a list of responses"),
        (["a"], [[]], "row 1: there are no responses"),
        (["a"], [["\ud83d"]], "half a character"),
        (["a"], [[3]], "response is a number"),
        ([[{"role": "user", "content": "a"}]], [[{"role": "user", "content": "b"}]], "of role user"),
    ],
)
def test_what_cannot_be_scored_is_said(reward, prompts, responses, said):
    with pytest.raises(UserError, match=said):
        reward.rows(prompts, responses)


# --- the command ---

ROWS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " eats"},
    {"prompt": "the cat", "responses": [" sat", " sat", " eats fish"], "scores": [3, 3, 1]},
    {"prompt": "where?", "response": " there", "score": 2},
    {"chosen": "\n\nHuman: cat?\n\nAssistant: fish", "rejected": "\n\nHuman: cat?\n\nAssistant: mat"},
    {"prompt": [{"role": "user", "content": "cat?"}], "response": [{"role": "assistant", "content": "mat"}]},
    {"messages": [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "mat"}]},
    {"prompt": "the cat", "chosen": " sat", "rejected": " sat", "chosen_score": 1, "rejected_score": 2},
]


def run(folder, capsys, *words, rows=None, stdin=None, monkeypatch=None):
    """Exit status, the lines of standard output as objects, and standard error."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    status = main(["score", str(folder), *map(str, words)])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_an_input_without_rows_is_an_error(folder, capsys, tmp_path):
    """Else a wrong ``zcat | reward-model score`` goes by unseen."""
    for content in ("", "\n\n"):
        (tmp_path / "rows.jsonl").write_text(content)
        status, found, said = run(folder, capsys, tmp_path / "rows.jsonl")[:3]
        assert (status, found) == (1, []) and "rows.jsonl holds no rows" in said


def test_a_row_without_a_response_is_told_what_scoring_needs(folder, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    status, (found,), _ = run(folder, capsys, tmp_path / "rows.jsonl")[:3]
    assert status == 1
    assert found["error"].startswith("no response; the row has prompt, completion, and needs prompt and response")
    assert "--columns response=COLUMN" in found["error"]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_form_of_row_in_order(folder, reward, tmp_path, capsys):
    status, found, _ = run(folder, capsys, write(tmp_path / "rows.jsonl", ROWS))
    assert (status, [each["row"] for each in found]) == (0, list(range(1, 8)))
    score = reward.score
    expected = [
        score(["the cat"] * 2, [" sat", " eats"]),
        score(["the cat"] * 3, [" sat", " sat", " eats fish"]),
        score(["where?"], [" there"]),
        score(["\n\nHuman: cat?\n\nAssistant:"] * 2, [" fish", " mat"]),
        reward.score_chats([ROWS[5]["messages"]]),
        reward.score_chats([ROWS[5]["messages"]]),
        score(["the cat"] * 2, [" sat", " sat"]),
    ]
    for each, scores in zip(found, expected):
        assert each.get("scores", [each.get("score")]) == pytest.approx(scores, abs=1e-5)
    assert ["score" in each for each in found] == [False, False, True, False, True, True, False]
    gap = found[0]["scores"][0] - found[0]["scores"][1]
    assert found[0]["probability"] == pytest.approx(1 / (1 + math.exp(-gap)))
    assert "raw" not in found[0] and "probability" not in found[1]
    assert found[6]["probability"] == pytest.approx(0.5, abs=1e-6)


def test_a_bad_row_is_a_line(folder, tmp_path, capsys):
    rows = [ROWS[0], "{not JSON", {"prompt": "x"}, {"prompt": "x", "response": "\ud800"}, "", ROWS[2]]
    status, found, error = run(folder, capsys, write(tmp_path / "rows.jsonl", rows))
    assert status == 1
    assert [each["row"] for each in found] == [1, 2, 3, 4, 6]
    assert ["error" in each for each in found] == [False, True, True, True, False]
    assert "not JSON" in found[1]["error"] and "half a character" in found[3]["error"]
    assert "3 of 5 rows could not be scored" in error


@pytest.mark.parametrize("kind", ["gz", "stdin", "csv", "parquet", "array"])
def test_every_kind_of_input(kind, folder, tmp_path, capsys, monkeypatch):
    rows = ROWS[:1] + [{"prompt": "fish", "chosen": " a", "rejected": " b"}]
    expected = run(folder, capsys, write(tmp_path / "rows.jsonl", rows))[1]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    stdin, path = None, tmp_path / f"x.{kind}"
    if kind == "gz":
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "stdin":
        path, stdin = "-", text.encode()
    elif kind == "csv":
        path.write_text("prompt,chosen,rejected,margin\n" + "".join(",".join(r.values()) + ",\n" for r in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = write(tmp_path / "x.json", [json.dumps(rows, indent=1)])
    assert run(folder, capsys, path, stdin=stdin, monkeypatch=monkeypatch)[:2] == (0, expected)


def test_lines_of_text(folder, reward, tmp_path, capsys, monkeypatch):
    text = b"the cat sat\n\nwhere? there\r\nno end\nnot \xff UTF-8\n"
    status, found, _ = run(folder, capsys, "-", "--lines", stdin=text, monkeypatch=monkeypatch)
    assert status == 1 and [each["row"] for each in found] == [1, 2, 3, 4, 5]
    scores = reward.score([""] * 3, ["the cat sat", "where? there", "no end"])
    assert [found[i]["score"] for i in (0, 2, 3)] == pytest.approx(scores, abs=1e-5)
    assert "empty" in found[1]["error"] and "half a character" in found[4]["error"]


def test_published_layouts_and_columns(folder, tmp_path, capsys):
    rows = [{"instruction": "cat?", "response_1": "mat", "response_2": "fish", "preference_strength": 2}]
    status, found, error = run(folder, capsys, write(tmp_path / "rows.jsonl", rows))
    assert status == 0 and len(found[0]["scores"]) == 2 and "preference_strength" in error
    rows = [{"prompt": "cat?", "completion": " mat"}]
    words = (write(tmp_path / "rows.jsonl", rows), "--columns", "response=completion")
    assert "score" in run(folder, capsys, *words)[1][0]


def test_the_best_answer_of_each_prompt(folder, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS)
    scores = [each.get("scores", [each.get("score")]) for each in run(folder, capsys, path)[1]]
    found = run(folder, capsys, path, "--best")[1]
    for each, best in zip(scores, found):
        assert best["best"] == int(np.argmax(each)) and best["score"] == max(each)
    assert found[0]["answer"] == [" sat", " eats"][found[0]["best"]]


def test_a_model_that_stores_a_mean_and_a_temperature(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"score_mean": 0.5, "score_temperature": 2.0}))
    path = write(tmp_path / "rows.jsonl", ROWS[:3])
    plain, found = (run(each, capsys, path)[1] for each in (folder, other))
    assert found[0]["raw"] == pytest.approx(plain[0]["scores"], abs=1e-6)
    assert found[0]["scores"] == pytest.approx([score - 0.5 for score in plain[0]["scores"]], abs=1e-6)
    assert found[2]["raw"] == pytest.approx(plain[2]["score"], abs=1e-6)
    gap = np.subtract(*found[0]["scores"])
    assert found[0]["probability"] == pytest.approx(1 / (1 + math.exp(-gap / 2)))


def test_an_encoder_reads_pairs_and_refuses_lines(tmp_path, capsys):
    encoder = save(tmp_path, "bert")
    capsys.readouterr()  # what DeepSpeed's import says
    status, found, error = run(encoder, capsys, write(tmp_path / "texts", ["the cat"]), "--lines")
    assert (status, found) == (1, []) and "pairs" in error
    rows = [
        {"prompt": "where is the cat", "responses": [" there", " on the mat", " there"]},
        {"prompt": "", "response": " a fish"},
    ]
    status, found, _ = run(encoder, capsys, write(tmp_path / "rows.jsonl", rows))
    reward = load(encoder)
    assert status == 0 and reward.encoding.pairs
    expected = reward.score(["where is the cat"] * 3, rows[0]["responses"])
    assert found[0]["scores"] == pytest.approx(expected, abs=1e-5) and expected[0] != expected[1]
    assert found[1]["score"] == pytest.approx(reward.score([""], [" a fish"])[0], abs=1e-5)


def test_no_text_is_longer_than_the_model_takes(tmp_path, capsys):
    encoder = save(tmp_path, "bert", sizes={"max_position_embeddings": 40})
    (encoder / "run.json").write_text(json.dumps({"max_seq_len": 512, "pair_encoding": True}))
    capsys.readouterr()
    rows = write(
        tmp_path / "rows.jsonl", [{"prompt": "where " * 60, "response": " cat"}, {"prompt": "a", "response": "b"}]
    )
    status, found, _ = run(encoder, capsys, rows)
    assert (status, found[0]["cut"], "score" in found[1]) == (0, True, True)
    status, _, error = run(encoder, capsys, rows, "--max_seq_len", "512")
    assert status == 1 and "takes 40 tokens" in error


def test_what_was_cut_is_counted_and_said(folder, tmp_path, capsys):
    rows = [{"prompt": "where " * 30, "response": " cat"}, ROWS[2]]
    status, found, error = run(folder, capsys, write(tmp_path / "rows.jsonl", rows), "--max_seq_len", "40")
    assert (status, found[0]["cut"], "cut" in found[1]) == (0, True, False)
    assert "the prompts of 1 row lost their left, to fit 40 tokens" in error


def test_rows_of_python_are_read_as_they_are_asked_for(folder):
    taken = []

    def rows():
        for number in itertools.count():
            taken.append(number)
            yield {"prompt": "cat", "response": f" {number}"}

    found = reward_model.score(str(folder), rows())
    first = [next(found) for _ in range(3)]
    assert [each["row"] for each in first] == [1, 2, 3] and all("score" in each for each in first)
    assert len(taken) <= stream.ROWS
    texts = reward_model.score(str(folder), ["the cat"], ScoreConfig(lines=True))
    assert [each["row"] for each in texts] == [1]


def test_a_window_ends_with_its_tokens(folder, monkeypatch):
    scoring = stream.Scoring.load(str(folder), ScoreConfig(tokens_per_batch=4))
    taken = []
    rows = ({"prompt": "cat", "response": f" {taken.append(i) or i}"} for i in itertools.count())
    next(scoring.outcomes(rows))
    assert len(taken) <= max(stream.PART, 100)


# --- restarting ---


def test_a_run_goes_on_after_the_last_whole_line(folder, tmp_path, capsys):
    chance = np.random.default_rng(1)
    rows = [{"prompt": said(chance, 3), "response": " " + said(chance, 2)} for _ in range(30)]
    rows[4] = {"prompt": "x"}
    path, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "scores.jsonl"
    words = (path, "--output", output)
    assert run(folder, capsys, *words)[0] == 1
    whole = output.read_bytes()
    assert whole.count(b"\n") == 30
    for kept in (len(whole) // 2, 0, len(whole)):
        output.write_bytes(whole[:kept])
        status, found, error = run(folder, capsys, *words, "--resume")
        same = [json.loads(line) for line in output.read_text().splitlines()]
        wanted = [json.loads(line) for line in whole.decode().splitlines()]
        assert [each["row"] for each in same] == [each["row"] for each in wanted]
        assert [each.get("score", 0) for each in same] == pytest.approx([e.get("score", 0) for e in wanted], abs=1e-5)
        assert status == 1 and "1 of 30 rows could not be scored" in error and found == []
    assert "goes on after 30 lines" in error
    status = run(folder, capsys, *words)
    assert status[0] == 1 and "--resume goes on with it" in status[2] and output.read_bytes() == whole


@pytest.mark.parametrize("what", ["model", "input", "flags", "sidecar", "another file"])
def test_a_run_that_is_another_is_refused(what, folder, tmp_path, capsys):
    path, output = write(tmp_path / "rows.jsonl", ROWS[:3]), tmp_path / "scores.jsonl"
    words = [path, "--output", output]
    run(folder, capsys, *words)
    before = output.read_bytes()
    used, said = folder, what
    if what == "model":
        used = save(tmp_path, seed=6, template=tiny.CHATML)
        capsys.readouterr()
    elif what == "input":
        write(path, ROWS[1:4])
    elif what == "flags":
        words.append("--best")
        said = "flags: best False, now True"
    elif what == "sidecar":
        (tmp_path / "scores.jsonl.resume.json").unlink()
        said = "is missing"
    else:
        before = b"something else\n"
        output.write_bytes(before)
        said = "line 1"
    status, _, error = run(used, capsys, *words, "--resume")
    assert status == 1 and "--resume" in error and said in error
    assert output.read_bytes() == before


def test_standard_input_is_known_by_its_first_line(folder, tmp_path, capsys, monkeypatch):
    text = "".join(json.dumps(row) + "\n" for row in ROWS[:3]).encode()
    output = tmp_path / "scores.jsonl"
    words = ("-", "--output", output, "--resume")
    assert run(folder, capsys, *words, stdin=text, monkeypatch=monkeypatch)[0] == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"\n") + 5])
    status, _, error = run(folder, capsys, *words, stdin=text, monkeypatch=monkeypatch)
    assert status == 0 and output.read_bytes().count(b"\n") == 3 and "only the first line" in error
    status, _, error = run(folder, capsys, *words, stdin=text[5:], monkeypatch=monkeypatch)
    assert status == 1 and "other input: first line" in error


# --- ends ---


def test_a_reader_that_has_enough_ends_it_quietly(folder, tmp_path, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8"))
    try:
        assert main(["score", str(folder), str(write(tmp_path / "rows.jsonl", ROWS))]) == 0
    finally:
        sys.stdout.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a model"),
        (["MODEL", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["MODEL", "a", "b"], "one model and one file"),
        (["MODEL", "FILE", "--resume"], "--resume needs --output"),
        (["MODEL", "FOLDER"], "name one of its files"),
        (["MODEL", "FILE", "--columns", "nothing"], "write FIELD=COLUMN"),
        (["MODEL", "FILE", "--columns", "response=nothing"], "no such column"),
        (["MODEL", "FILE", "--device", "nothing"], "--device nothing"),
        (["MODEL", "TEXT"], "or --lines"),
        (["nowhere", "FILE"], "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, said, folder, tmp_path, capsys):
    names = {"MODEL": folder, "FILE": write(tmp_path / "rows.jsonl", ROWS), "FOLDER": tmp_path}
    names["TEXT"] = write(tmp_path / "rows.txt", ROWS)
    assert main(["score", *(str(names.get(word, word)) for word in words)]) == 1
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error


def test_scores_that_are_not_finite_are_errors(folder, reward, monkeypatch):
    scoring = stream.Scoring.load(str(folder), ScoreConfig())
    monkeypatch.setattr(type(scoring.reward), "assess_rows", lambda self, rows, tokens: [RowScores([math.nan], {})])
    (found,) = scoring.outcomes([ROWS[2]])
    assert found["row"] == 1 and "not finite" in found["error"]


def test_a_float16_model_on_a_cpu_is_taken_as_float32(folder, tmp_path):
    made, reading = load_to_read(str(folder), dtype="bf16", device="cpu", max_seq_len=48)
    assert made.forward.dtype == torch.bfloat16 and reading.max_seq_len == 48 and not reading.chat
