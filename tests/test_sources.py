# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files of every format, folders, saved data sets, and the names that upstream knows."""

import gzip
import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from reward_model.common.errors import UserError
from reward_model.data.comparisons import BadRow
from reward_model.data.files import ROWS_AT_ONCE
from reward_model.data.layouts import BY_NAME, NO_REJECTED
from reward_model.data.sources import read_sources, split_indices

pytestmark = pytest.mark.usefixtures("own_cache")

ROWS = [{"prompt": f"question {i}: ", "chosen": f"good {i}", "rejected": f"bad\n{i}, é"} for i in range(3)]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows=ROWS):
    """Rows in the format that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    table = datasets.Dataset.from_list(rows)
    if plain.suffix == ".parquet":
        table.to_parquet(plain)
    elif plain.suffix == ".csv":
        table.to_csv(plain, index=False)
    elif plain.name.endswith("array.json"):
        plain.write_text(json.dumps(rows, indent=1))
    else:
        plain.write_text(json_lines(rows))
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def read(path, **kwargs):
    return read_sources(str(path), **{"seed": 0, **kwargs})


def rows_of(source):
    return [source.read(row) for row in source.rows]


def refusal(path, text=None):
    """The one line with which a file of this text is refused."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


FILES = ["a.jsonl", "array.json", "lines.json", "a.csv", "a.parquet", "v1.2.JSONL"]
FILES += [f"{name}.gz" for name in FILES[:4]]


@pytest.mark.parametrize("name", FILES)
def test_file_of_every_format(name, tmp_path):
    path = write(tmp_path / name)
    train, evaluation = read(path)
    assert [rows_of(source) for source in train] == [ROWS]
    assert evaluation == []
    assert train[0].name == str(path)
    assert train[0].numbers.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "a.csv"])
def test_answers_that_look_like_something_else_are_text(name, tmp_path):
    answers = ["4", "None", "1.50", "N/A", "True", "2020-01-01"]
    rows = [{"prompt": "p", "chosen": answer, "rejected": answer + "!"} for answer in answers]
    (source,), _ = read(write(tmp_path / name, rows))
    assert [row["chosen"] for row in rows_of(source)] == answers


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("answer", ["4", "2020-01-01", "true"])
def test_answers_that_all_look_like_something_else_are_text(name, answer, tmp_path):
    (source,), _ = read(write(tmp_path / name, [{"prompt": "p", "chosen": answer, "rejected": "5"}] * 2))
    assert [row["chosen"] for row in rows_of(source)] == [answer] * 2


# datasets takes the types of a file from its first 10 MB of JSON, or 10,000 rows of CSV
LATE = [
    ({"margin": 1}, {"margin": 1.5}),
    ({}, {"margin": 1.5}),
    ({"prompt": "2020-01-01"}, {"prompt": "when?"}),
    ({}, {"chosen": 5}),
    ({}, {"chosen": [{"role": "user", "content": "Hi"}]}),
]


@pytest.mark.parametrize("early, late", LATE)
def test_json_field_that_changes_late_in_a_large_file(early, late, tmp_path):
    path = tmp_path / "a.jsonl"
    early, late = {**ROWS[0], **early}, {**ROWS[1], **late}
    padding = {**early, "rejected": "x" * 1_000_000}
    path.write_text(json_lines([early, *[padding] * 11, late]))
    (source,), _ = read(path)
    last = rows_of(source)[12]
    assert {name: last[name] for name in late} == late
    assert {name: rows_of(source)[0][name] for name in early} == early


def test_csv_margin_that_is_whole_for_many_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("chosen,rejected,margin\n" + "a,b,1\n" * 10_000 + "a,b,1.5\n")
    (source,), _ = read(path)
    assert rows_of(source)[10_000]["margin"] == 1.5


@pytest.mark.parametrize("name", ["margin", "rating", "probability", "score", "label", "chosen_score", "rejected_score",
                                  "score_chosen", "score_rejected"])  # fmt: skip
def test_csv_columns_of_numbers(name, tmp_path):
    """Words are left to what reads the row, which refuses them or, of a rating, knows them; answers stay text."""
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response,{name}\n1,2,3\n1,2, -0.5 \n1,2, \n1,2,better\n1,2\n")
    (source,), _ = read(path)
    assert rows_of(source) == [
        {"prompt": "1", "response": "2", name: value} for value in (3.0, -0.5, None, "better", None)
    ]


LAYOUTS = [
    (["train.jsonl", "eval.jsonl"], ["train.jsonl"], ["eval.jsonl"]),
    (["train.csv", "test.csv"], ["train.csv"], ["test.csv"]),
    (["train.json.gz", "validation.jsonl"], ["train.json.gz"], ["validation.jsonl"]),
    (["train_pairs.jsonl", "dev-1.jsonl"], ["train_pairs.jsonl"], ["dev-1.jsonl"]),
    (["train/1.jsonl", "train/2.jsonl", "valid/1.csv"], ["train/1.jsonl", "train/2.jsonl"], ["valid/1.csv"]),
    (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/test-00000-of-00001.parquet"],
    ),
    (["train.jsonl", "notes.jsonl", "evaluate.jsonl", "trained.jsonl"], ["train.jsonl"], []),
    (["train.jsonl", "eval/train.jsonl"], ["train.jsonl"], ["eval/train.jsonl"]),
    (["train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"], ["train.jsonl"], []),
]


@pytest.mark.parametrize("files, train, evaluation", LAYOUTS)
def test_folder_with_train_and_eval_files(files, train, evaluation, tmp_path):
    for name in files:
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    found = [[source.name for source in part] for part in read(tmp_path)]
    assert found == [[str(tmp_path / name) for name in part] for part in (train, evaluation)]


def test_folder_without_a_train_file_says_what_is_there(tmp_path):
    assert "no data file" in refusal(tmp_path)
    write(tmp_path / "pairs.jsonl")
    write(tmp_path / "more.jsonl")
    assert re.search(r"no file called train, .* \(more.jsonl, pairs.jsonl found\)", refusal(tmp_path))


def test_saved_data_set(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    train, evaluation = read(tmp_path / "one")
    assert ([len(s.rows) for s in train], evaluation) == ([3], [])
    train, evaluation = read(tmp_path / "two")
    assert [len(s.rows) for s in train + evaluation] == [3, 1]
    assert evaluation[0].name == f"{tmp_path / 'two'}, split test"
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "three")
    assert "has no split named train, only test" in refusal(tmp_path / "three")


def test_local_jsonfile_is_upstreams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"put train\.json and eval\.json into a folder data/"):
        read("local/jsonfile")
    write(tmp_path / "data" / "train.json", [{"prompt": "Q", "chosen": "yes", "rejected": "no", "margin": 2.0}])
    write(tmp_path / "data" / "eval.json", ROWS[:2])
    (train,), (evaluation,) = read("local/jsonfile")
    adapted = train.read(train.rows[0])
    assert {name: adapted[name] for name in ROWS[0]} == {"prompt": " Q", "chosen": " yes", "rejected": " no"}
    assert adapted["margin"] == 2.0
    assert len(evaluation.rows) == 2


GOOD = json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize(
    "text, line, reason",
    [
        (GOOD + GOOD + GOOD[:30] + "\n", 3, "it is not JSON: "),
        (GOOD + "hello\n" + GOOD, 2, "it is not JSON: Expecting value at column 1"),
        ("\n" + GOOD + "\n{]\n", 4, "it is not JSON: "),
        (GOOD + "5\n" + GOOD, 2, "it is not an object"),
        (GOOD + "[1]\n", 2, "it is not an object"),
        ("{]\n" + 3 * GOOD, 1, "it is not JSON: "),
        (GOOD + "[" * 100_000 + "\n" + GOOD, 2, "it is nested too deeply"),
        (GOOD + '{"margin": ' + "9" * 5_000 + "}\n", 2, "Exceeds the limit"),
        (GOOD + '{"prompt": "\udcff"}\n', 2, "it is not UTF-8: byte 0xff at character 13"),
        (f"[{GOOD}, 5, {GOOD}]", 2, "it is not an object"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_bad_row(text, line, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode("utf-8", "surrogateescape")))
    for name in ("a.json", "a.json.gz"):
        (source,), _ = read(tmp_path / name)
        bad = []
        for number, row in zip(source.numbers, source.rows):
            try:
                assert source.read(row) == json.loads(GOOD)
            except BadRow as problem:
                bad.append((number, str(problem)))
        assert [number for number, _ in bad] == [line]
        assert bad[0][1].startswith(reason)
        assert len(source.rows) == sum(bool(part.strip()) for part in text.splitlines()) or text.startswith("[")


def test_text_that_is_neither_lines_nor_a_document_is_refused(tmp_path):
    text = json.dumps(ROWS, indent=1).replace("},", "}")
    assert "line 7 is not JSON" in refusal(tmp_path / "a.json", text)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode()))
    assert "line 7 is not JSON" in refusal(tmp_path / "a.json.gz")
    document = json.dumps({"data": ROWS[:1], "examples": ROWS[1:]}, indent=1)
    assert "it has rows under data and under examples" in refusal(tmp_path / "two.json", document)
    assert "data is given twice" in refusal(tmp_path / "twice.json", '{"data": [{}],\n "data": [{}]}')
    beyond = json.dumps(ROWS[0], indent=1) + "\n]\n" + json.dumps(ROWS[1], indent=1)
    assert "is not JSON" in refusal(tmp_path / "bracket.json", beyond)


def test_rows_under_a_key_are_those_at_the_top(tmp_path):
    text = json.dumps({"meta": {"data": [1, 2]}, "data": ROWS}, indent=1)
    (source,), _ = read(write_text(tmp_path / "a.json", text))
    assert rows_of(source) == ROWS


def write_text(path, text):
    path.write_text(text)
    return path


def test_csv_cells_beyond_the_header_and_columns_given_twice(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nWhat?,Yes, sure,No\nWhat?,Yes,No,,\nWhat?,Yes\n")
    (source,), _ = read(tmp_path / "a.csv")
    with pytest.raises(BadRow, match=r"the row has more cells than the file has columns, 'No' the first of them"):
        source.read(source.rows[0])
    assert source.read(source.rows[1]) == {
        "prompt": "What?",
        "chosen": "Yes",
        "rejected": "No",
    }  # blank cells say nothing
    assert source.read(source.rows[2])["rejected"] is None
    assert "column chosen is given twice" in refusal(tmp_path / "b.csv", "prompt,chosen,chosen\n1,2,3\n")


@pytest.mark.parametrize("text", ["{0}\n{1}\n", "[{0}, {1}]", '{{\n "type": "x",\n "instances": [{0}, {1}]\n}}'])
def test_key_given_twice_is_a_bad_row(text, tmp_path):
    row = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
    (tmp_path / "a.json").write_text(text.format(row, row.replace("{", '{"chosen": "c", ')))
    (source,), _ = read(tmp_path / "a.json")
    assert source.read(source.rows[0])["chosen"] == "a"
    with pytest.raises(BadRow, match="chosen is given twice"):
        source.read(source.rows[1])


DOCUMENTS = {
    "instances": json.dumps({"type": "pairs", "instances": ROWS}, indent=1),
    "instances in a line": json.dumps({"type": "pairs", "instances": ROWS}),
    "data": json.dumps({"version": "data", "data": ROWS}, indent=1),
    "objects over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_document_over_several_lines(name, tmp_path):
    (tmp_path / "a.json").write_text(DOCUMENTS[name])
    (source,), _ = read(tmp_path / "a.json")
    assert rows_of(source) == ROWS
    assert source.numbers.tolist() == [1, 2, 3]


def test_broken_document_names_its_line(tmp_path):
    text = DOCUMENTS["data"].replace('"chosen": "good 1",', '"chosen": good,')
    assert "line 11 is not JSON" in refusal(tmp_path / "a.json", text)


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_first_rows_alone(name, tmp_path):
    path = write(tmp_path / name, ROWS * 50)
    (source,), _ = read(path, first=100)
    assert rows_of(source) == [row for _, row in zip(range(100), ROWS * 50)]
    (whole,), _ = read(path)
    assert source.columns == whole.columns


def test_json_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD, encoding="utf-16")
    assert "it is not UTF-8: byte 0xff at character 1" in refusal(path)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(GOOD.encode())
    assert "gzip" in refusal(path)


def test_broken_parquet_and_csv(tmp_path):
    assert "arquet" in refusal(tmp_path / "a.parquet", "no parquet")
    assert "row 1" in refusal(tmp_path / "a.csv", 'prompt,chosen,rejected\n"p,a,b\n')


def test_empty_file(tmp_path):
    assert refusal(tmp_path / "a.jsonl", "").endswith("holds no rows")


@pytest.mark.parametrize("name, text", [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,chosen,rejected\n")])
def test_file_without_rows(name, text, tmp_path):
    assert refusal(tmp_path / name, text).endswith("holds no rows")


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.zip", "a.gz"])
def test_unknown_extension(name, tmp_path):
    assert "give a file ending in .jsonl, .json, .parquet, .csv" in refusal(tmp_path / name, GOOD)


@pytest.mark.parametrize("path", ["missing.jsonl", "/missing/folder", "./folder", "a/b.parquet", "nobody/nothing", "x"])
def test_missing_path_is_one_line(path):
    with pytest.raises(UserError, match=f"{path}: no such file or folder") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_numbers_are_those_of_the_file_after_selection(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"chosen": f"a{i}", "rejected": "b"} for i in range(1, 41)])
    (source,), _ = read(path, data_split="2,4,4")
    assert len(source.rows) == 16
    assert [row["chosen"] for row in rows_of(source)] == [f"a{i}" for i in source.numbers]
    twice = source.select(np.array([5, 2]))
    assert [row["chosen"] for row in rows_of(twice)] == [f"a{i}" for i in source.numbers[[5, 2]]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_as_stored_from_any_place_on(name, tmp_path):
    """They are taken out of their table many at a time."""
    count = 2 * ROWS_AT_ONCE + 5
    rows = [{"prompt": f"{i}: ", "chosen": "yes", "rejected": str(i), "other": [i]} for i in range(count)]
    (source,), _ = read(write(tmp_path / name, rows))
    expected = [(i + 1, dict(source.rows[i])) for i in range(count)]
    assert list(source.stored()) == expected
    for start, most in ((0, 1), (ROWS_AT_ONCE - 1, 3), (5, 2 * ROWS_AT_ONCE), (count - 1, 9), (count, 4)):
        assert list(source.stored(most, start)) == expected[start : start + most]
    assert list(source.stored(start=100)) == expected[100:]
    assert list(source.select(np.array([130, 7, 8])).stored()) == [expected[i] for i in (130, 7, 8)]


def test_row_that_cannot_be_taken_out_is_named(tmp_path):
    texts = pyarrow.array([f"{i}" for i in range(100)]).cast(pyarrow.binary()).to_pylist()
    texts[70] = b"\xff"
    table = pyarrow.table({name: pyarrow.array(texts) for name in ("prompt", "chosen", "rejected")})
    text = pyarrow.schema([(name, pyarrow.string()) for name in table.column_names])
    columns = [pyarrow.Array.from_buffers(pyarrow.string(), 100, table[name].chunk(0).buffers()) for name in text.names]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=text), tmp_path / "rows.parquet")
    (source,), _ = read(tmp_path / "rows.parquet")
    rows = source.stored()
    assert [next(rows)[0] for _ in range(70)] == list(range(1, 71))
    with pytest.raises(UserError, match=r"rows.parquet, row 71 cannot be read: 'utf-8' codec"):
        next(rows)


def test_data_split_says_what_it_takes(tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", ROWS * 10)
    write(tmp_path / "eval.jsonl", ROWS * 4)
    (train,), (evaluation,) = read(tmp_path, data_split="0,5,5")
    assert (len(train.rows), len(evaluation.rows)) == (15, 6)
    assert f"{path}: --data_split 0,5,5 takes 15 of 30 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data_split 1,0,0 leaves no rows of 30"):
        read(path, data_split="1,0,0")


def split_slowly(size, shares, part, seed):
    """Upstream's rule, step by step: round each share, take what is too much or too little from every bound."""
    shares = [float(share) for share in shares.split(",")]
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * float(size)))
    surplus = bounds[-1] - size
    bounds = [0] + [bound - surplus for bound in bounds[1:]]
    order = np.arange(size, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(order)
    return [int(i) for i in order[max(bounds[part], 0) : max(bounds[part + 1], 0)]]


@pytest.mark.parametrize("shares", ["2,4,4", "9,1", "1,1,1", "0,10,0", "0.1,0.25,0.65", "0,1,1"])
def test_split_indices_are_upstreams(shares):
    for size in [*range(1, 40), 1000]:
        parts = [split_indices(size, shares, part, seed=size).tolist() for part in range(len(shares.split(",")))]
        assert parts == [split_slowly(size, shares, part, seed=size) for part in range(len(parts))]
        assert sorted(index for part in parts for index in part) == list(range(size))  # every row in one part


@pytest.mark.parametrize("shares", ["", "2", "a,b", "0,0,0", "2,-1,3", "nan,1,1", "inf,1,1"])
def test_shares_that_are_none(shares):
    with pytest.raises(UserError, match=f"--data_split {shares}: give the shares"):
        split_indices(10, shares, 1, seed=0)


# Rows with the columns of the real data sets, and what upstream's raw_datasets.py makes of them.
HUMAN = "\n\nHuman: Hi\n\nAssistant:"
STATIC = {"prompt": HUMAN, "response": " hello", "chosen": " hello", "rejected": " bye"}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
    "quotes_0": {"title": ["t"], "extract": ["e"]},
    "answer_0": "Since (so they say) it [2] is.[1, 3]",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "quotes_1": {"title": [], "extract": []},
    "answer_1": "Because [1]of that.",
    "tokens_1": {"prefix": [1], "completion": [2]},
    "score_1": 0.5,
}
SHP = {
    "post_id": "x",
    "history": "How?",
    "human_ref_A": "Like so.",
    "human_ref_B": "Like this.",
    "labels": 0,
    "score_ratio": 2.0,
}
MIRACL = {
    "query_id": "1",
    "query": "谁?",
    "positive_passages": [{"docid": "1", "title": "t", "text": "他"}, {"docid": "2", "title": "t", "text": "她"}],
    "negative_passages": [{"docid": "3", "title": "t", "text": "它"}],
}
EXPECTED = [
    ("Dahoas/rm-static", STATIC, HUMAN, " hello", " bye"),
    ("Dahoas/full-hh-rlhf", STATIC, HUMAN, " hello", " bye"),
    (
        "Dahoas/synthetic-instruct-gptj-pairwise",
        {"prompt": "Hi", "chosen": "hello", "rejected": "bye"},
        " Human: Hi Assistant:",
        " hello",
        " bye",
    ),
    (
        "yitingxie/rlhf-reward-datasets",
        {"prompt": "\n\nHuman: Hi ", "chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        "\n\nHuman: Hi ",
        "\n\nAssistant: a",
        "\n\nAssistant: b",
    ),
    ("openai/webgpt_comparisons", WEBGPT, " Human: Why? Assistant:", " Becauseof that.", " Since it is."),
    (
        "openai/webgpt_comparisons",
        {**WEBGPT, "score_0": 0.0, "score_1": 0.0},
        " Human: Why? Assistant:",
        " Since it is.",
        " Becauseof that.",
    ),
    ("stanfordnlp/SHP", SHP, " Human: How? Assistant:", " Like this.", " Like so."),
    ("stanfordnlp/SHP", {**SHP, "labels": 1}, " Human: How? Assistant:", " Like so.", " Like this."),
    ("Cohere/miracl-zh-queries-22-12", MIRACL, " Human: 谁? Assistant:", " 他", " 它"),
    ("Cohere/miracl-ja-queries-22-12", MIRACL, " Human: 谁? Assistant:", " 他", " 它"),
]
SPLITS = {"stanfordnlp/SHP": ("train", "validation", "test")}
SPLITS |= {name: ("train", "dev") for name in BY_NAME if "miracl" in name}
SPLITS |= {"Dahoas/synthetic-instruct-gptj-pairwise": ("train",), "openai/webgpt_comparisons": ("train",)}


def serve(monkeypatch, splits, rows):
    """A hub that holds these rows in every split."""
    hub = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)


def test_every_name_has_an_expected_row():
    assert {name for name, *_ in EXPECTED} | {"local/jsonfile"} == set(BY_NAME)


@pytest.mark.parametrize("name, row, prompt, chosen, rejected", EXPECTED)
def test_upstreams_names_give_upstreams_words(name, row, prompt, chosen, rejected, monkeypatch):
    splits = SPLITS.get(name, ("train", "test"))
    serve(monkeypatch, splits, [row] * 20)
    (train,), (evaluation,) = read(name)
    for source in (train, evaluation):
        found = source.read(source.rows[0])
        assert {key: found[key] for key in ROWS[0]} == {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert train.name == f"{name}, split train"
    assert evaluation.name == f"{name}, split {splits[1] if len(splits) > 1 else 'train'}"
    if len(splits) == 1:  # nine to one
        assert (len(train.rows), len(evaluation.rows)) == (18, 2)
        assert sorted([*train.numbers, *evaluation.numbers]) == list(range(1, 21))


def test_saved_copy_of_a_known_data_set_takes_the_same_split(tmp_path):
    folder = tmp_path / "stanfordnlp" / "SHP"
    table = datasets.Dataset.from_list([SHP] * 3)
    datasets.DatasetDict(train=table, validation=table, test=table).save_to_disk(folder)
    (train,), (evaluation,) = read(folder)
    assert train.read(train.rows[0])["chosen"] == " Like this."
    assert evaluation.name == f"{folder}, split validation"


@pytest.mark.parametrize("name", NO_REJECTED)
def test_name_without_rejected_answers_is_refused(name):
    with pytest.raises(UserError, match=f"data set {name} has no rejected answers"):
        read(name)


def test_hub_data_set_without_a_train_split(monkeypatch):
    serve(monkeypatch, ("test",), ROWS)
    with pytest.raises(UserError, match="someone/pairs has no split named train, only test"):
        read("someone/pairs")
