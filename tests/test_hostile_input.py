# SPDX-License-Identifier: Apache-2.0
"""Any input ends in a result or in one line, and every row is used or reported.

The properties are hypothesis's: a short, fixed choice of inputs always, 100,000 with ``--all``. ``fuzz/guided.py`` gives
the same properties to atheris, which looks for inputs that reach new code.
"""

import contextlib
import csv
import datetime
import io
import json
import os
import shutil
from pathlib import Path

import hostile
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_model import inference
from reward_model.common.errors import UserError
from reward_model.config import deepspeed
from reward_model.config.config_file import read_config_file
from reward_model.config.options import parse
from reward_model.config.parser import run_parser
from reward_model.data import files, preprocessing, rendering, sources
from reward_model.data.chat_template import settle_template
from reward_model.data.layouts import layout_of
from reward_model.data.tokenizer import choose_special_tokens

TOTAL = 100_000
SHARES = {  # of the inputs, by what one takes
    "lines": 30, "csv": 12, "arrow": 12, "chats": 20, "deepspeed": 8, "yaml": 8, "run_json": 4, "folders": 3, "bytes": 3,
}  # fmt: skip
FEW = {"folders": 25, "deepspeed": 40}
SLOW = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.function_scoped_fixture,
]
PLACE = Path(os.environ.get("TMPDIR", "/tmp"), f"hostile-{os.getuid()}-{os.getpid()}")
TODAY = datetime.datetime(2026, 11, 27)


@pytest.fixture(scope="module", autouse=True)
def place():
    PLACE.mkdir(mode=0o700, exist_ok=True)
    yield
    shutil.rmtree(PLACE)


def tokenizer_with(template=tiny.CHATML):
    made = tiny.chatml(chat_template=template)
    return made, choose_special_tokens(made, len(made))


TOKENIZERS = [tiny.chatml, tiny.bert, tiny.llama]
MADE = [(made, choose_special_tokens(made, len(made))) for made in (make() for make in TOKENIZERS)]


def require_whole(source, count, chat=False, tokenizer=0, limit=24):
    """Every row of a source comes back, as token ids that fit, or with the reason why it cannot be used."""
    made, special = MADE[tokenizer]
    rows = source.rows[:] if len(source.rows) else {name: [] for name in source.rows.column_names}
    assert len(source.rows) == len(source.numbers) == count
    if not count:
        return
    bare = files.Source(source.name, None, source.layout, None, source.columns, source.names, source.is_text)
    found = preprocessing._tokenize_rows(rows, bare, made, special, limit, chat)
    table = pyarrow.Table.from_pydict(found, schema=preprocessing.FEATURES.arrow_schema)
    assert table.num_rows == count
    for row in table.to_pylist():
        if row["problem"] is not None:
            hostile.require_line(row["problem"])
            assert not row["responses"]
            continue
        assert row["responses"] and all(row["responses"])
        assert all(0 < len(row["prompt"] + response) <= limit for response in row["responses"])
        assert row["length"] == max(len(row["prompt"] + response) for response in row["responses"])
        assert all(abs(margin) < float("inf") for margin in row["margin"] if margin == margin)


def read(name, content, count=None, chat=False, tokenizer=0):
    """A file as ``read_file`` reads it, without the cache of datasets."""
    path = PLACE / name
    path.write_bytes(content)
    with hostile.only_user_errors(path):
        source = files.read_file(path, first=1_000)
        source.layout = sources._layout(source, chat)
        hostile_columns = list(sources.unread(source.fields(), source.layout))
        assert all(isinstance(column, str) for column in hostile_columns)
        require_whole(source, len(source.rows) if count is None else count, chat, tokenizer)


@given(hostile.lines(), st.booleans(), st.integers(0, 2))
def lines(found, chat, tokenizer):
    """JSON lines: as many rows as lines that are not blank."""
    content = b"\n".join(found)
    text = content.decode("utf-8", "surrogateescape")
    first = next((line for line in text.split("\n") if line.strip()), "")
    is_lines = False
    with contextlib.suppress(ValueError, RecursionError):
        is_lines = isinstance(json.loads(first), dict) and not set(files.DOCUMENTS) & set(json.loads(first))
    count = sum(bool(line.strip()) for line in io.StringIO(text, newline="")) if is_lines else None
    read("rows.jsonl", content, count, chat, tokenizer)


@given(st.binary(max_size=200), st.sampled_from(("a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.csv.gz")))
def raw(content, name):
    read(name, content)


@given(
    st.lists(
        st.sampled_from(("prompt", "chosen", "rejected", "score", "a\x1b[2J")), min_size=1, max_size=5, unique=True
    ),
    st.lists(st.lists(hostile.texts, min_size=1, max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
def csv_rows(header, cells, chat):
    """As many rows as were written; one that is blank is none."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    count = 0
    for row in cells:
        if "\0" in "".join(row):
            continue  # Python 3.10 refuses it
        writer.writerow(row)
        count += 1
    read("rows.csv", text.getvalue().encode("utf-8", "surrogatepass"), count, chat)


@given(st.lists(hostile.rows, min_size=1, max_size=4), st.booleans())
def arrow_rows(found, chat):
    """Parquet has what Arrow can hold: rows whose columns have one type each."""
    try:
        table = pyarrow.Table.from_pylist(found)
        pyarrow.parquet.write_table(table, PLACE / "rows.parquet")
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError, NotImplementedError):
        return
    if table.num_columns:
        read("rows.parquet", (PLACE / "rows.parquet").read_bytes(), len(found), chat)


@given(st.lists(hostile.chats, min_size=1, max_size=3), hostile.templates, hostile.values)
def chats(found, template, arguments):
    """Chats and the template that writes them, as a run and as ``score_chats`` takes them."""
    made, special = tokenizer_with()
    with hostile.patience():
        made.chat_template = template if isinstance(template, str) else None
        with contextlib.suppress(UserError):
            settle_template(made, TODAY)
        row = {"prompt": found[0], "chosen": found[-1], "rejected": found[len(found) // 2]}
        row |= {"chat_template_kwargs": arguments}
        source = files.Source("rows", None, layout_of(list(row), row))
        record = preprocessing._tokenize_rows({k: [v] for k, v in row.items()}, source, made, special, 48, False)
        if record["problem"][0] is not None:
            hostile.require_line(record["problem"][0])
        else:
            assert all(record["responses"][0])


ZERO = [json.loads(file.read_text()) for file in sorted(deepspeed.ZERO_FOLDER.glob("*.json"))]
MORE = {
    "communication_data_type": "fp32", "prescale_gradients": False, "wall_clock_breakdown": False, "aio": {"block_size": 1},
    "activation_checkpointing": {"partition_activations": False}, "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False, "verbose": False}, "checkpoint": {"tag_validation": "Warn"},
    "data_types": {"grad_accum_dtype": "fp32"}, "zero_allow_untested_optimizer": True, "compile": {}, "steps_per_print": 5,
}  # fmt: skip


@given(st.sampled_from(ZERO).flatmap(lambda zero: hostile.changed(zero | MORE)))
def deepspeed_json(content):
    """What set-up lets pass, DeepSpeed's own class takes."""
    path = PLACE / "ds.json"
    path.write_text(json.dumps(content))
    flags = ["--model_name_or_path", "m", "--data_path", "d", "--deepspeed_config", str(path)]
    with hostile.only_user_errors():
        nvme = ["--nvme_path", str(PLACE)] if "nvme" in path.read_text() else []
        config = parse([*flags, *nvme])
        with hostile.only_user_errors(path):
            decided = deepspeed.set_up_deepspeed(config, "fp32", 1, 64)
            assert not deepspeed._complaint(decided.config)


KNOWN = {"learning_rate": 1e-5, "data_path": ["a"], "num_train_epochs": 2, "offload": False, "loss": ["bt"], "seed": 7}


@given(
    st.one_of(hostile.changed(KNOWN).map(yaml.dump), st.binary(max_size=60), st.text(hostile.characters, max_size=60))
)
def config_yaml(content):
    path = PLACE / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with hostile.only_user_errors(path):
        words = read_config_file(path, PARSER)
        assert all(isinstance(word, str) for word in words)


PARSER = run_parser()
RUN_JSON = {"model_name_or_path": "m", "given": ["seed", "data_path"], "versions": {"torch": "2"}} | KNOWN


@given(hostile.changed(RUN_JSON))
def run_json(content):
    path = PLACE / "run.json"
    path.write_text(json.dumps(content))
    with hostile.only_user_errors(path):
        read_config_file(path, PARSER)


@st.composite
def folder_changes(draw):
    """Which file of a model folder becomes what."""
    name = draw(st.sampled_from(("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "weights")))
    if name == "weights":
        return name, draw(st.one_of(st.binary(max_size=64), st.tuples(st.integers(0, 600), st.binary(max_size=8))))
    if draw(st.integers(0, 5)) == 0:
        return name, draw(st.binary(max_size=40))
    return name, draw(hostile.changed(json.loads((folder() / name).read_text())))


def folder():
    """A model that was saved, made once."""
    place = PLACE / "model"
    if not place.is_dir():
        import models

        PLACE.mkdir(mode=0o700, exist_ok=True)
        tiny.tokenizer(place)
        kind, config, sizes = models.DECODERS["llama"]
        import transformers

        made = getattr(transformers, "LlamaForSequenceClassification")(  # noqa: B009
            getattr(transformers, config)(**sizes, num_labels=1, pad_token_id=1)
        )
        made.save_pretrained(place)
    return place


@given(st.data())
def model_folders(data):
    """A saved model with a spoilt file is loaded, or refused in a line that names the folder."""
    name, content = data.draw(folder_changes())
    place = PLACE / "spoilt"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder(), place)
    if name == "weights":
        file = place / "model.safetensors"
        before = file.read_bytes()
        spoilt = content if isinstance(content, bytes) else before[: content[0]] + content[1] + before[content[0] :]
        file.write_bytes(spoilt)
    else:
        (place / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with hostile.only_user_errors(place):
        reward = inference.load(place)
        assert len(reward.score(["the cat"], [" sat"])) == 1


PROPERTIES = {
    "lines": lines, "csv": csv_rows, "arrow": arrow_rows, "chats": chats, "deepspeed": deepspeed_json,
    "yaml": config_yaml, "run_json": run_json, "folders": model_folders, "bytes": raw,
}  # fmt: skip


def tried(name, inputs, **how):
    """A property for so many inputs."""
    wanted = settings(max_examples=inputs, deadline=None, suppress_health_check=SLOW, database=None, **how)
    return wanted(PROPERTIES[name])


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_result_or_one_line(name, monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 2.0)
    tried(name, FEW.get(name, 100), derandomize=True)()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_result_or_one_line_for_a_hundred_thousand_inputs(name):
    assert sum(SHARES.values()) == 100
    tried(name, TOTAL * SHARES[name] // 100)()
