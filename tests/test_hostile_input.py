# SPDX-License-Identifier: Apache-2.0
"""Any input ends in a result or in one line, and every row is used or reported.

The properties are hypothesis's: a short, fixed choice of inputs always, 100,000 with ``--all``.
``fuzz/guided.py`` gives the same properties to atheris, which looks for inputs that reach new code.
"""

import contextlib
import csv
import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
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
from reward_model.commands import check, plan
from reward_model.common.errors import UserError, printable
from reward_model.config import deepspeed
from reward_model.config.config_file import read_config_file
from reward_model.config.options import parse
from reward_model.config.parser import run_parser
from reward_model.data import files, preprocessing, rendering, sources
from reward_model.data.chat_template import settle_template
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoding
from reward_model.data.layouts import layout_of
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.models.loading import read_config
from reward_model.training import checkpoint as checkpoints

TOTAL = int(os.environ.get("HOSTILE_INPUTS", 100_000))
SHARES = {  # of the inputs, in hundredths: dear ones are fewer
    "lines": 12, "csv": 10, "arrow": 8, "chats": 28, "deepspeed": 5, "yaml": 15, "run_json": 8, "folders": 1,
    "bytes": 12, "manifests": 1,
}  # fmt: skip
FEW = {"folders": 12, "deepspeed": 30}
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


PROPERTIES = {}


def holds(name, *strategies):
    """A property with the strategies for its arguments, under a name."""

    def keep(check):
        PROPERTIES[name] = strategies, check
        return check

    return keep


def require_whole(source, count, chat=False, tokenizer=0, limit=24):
    """Every row of a source comes back, as token ids that fit, or with the reason why it cannot be used."""
    made, special = MADE[tokenizer]
    rows = source.rows[:] if len(source.rows) else {name: [] for name in source.rows.column_names}
    assert len(source.rows) == len(source.numbers) == count
    if not count:
        return
    bare = files.Source(source.name, None, source.layout, None, source.columns, source.names, source.is_text)
    how = Encoding(made, special, pairs=TOKENIZERS[tokenizer] is tiny.bert)
    found = preprocessing._tokenize_rows(rows, bare, how, limit, chat)
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
        source.layout = sources._layout("", source, chat)
        hostile_columns = list(sources.unread(source.fields(), source.layout))
        assert all(isinstance(column, str) for column in hostile_columns)
        require_whole(source, len(source.rows) if count is None else count, chat, tokenizer)


@holds("lines", hostile.lines(), st.booleans(), st.integers(0, 2))
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


@holds(
    "bytes",
    st.binary(max_size=200),
    st.sampled_from(("a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.csv.gz")),
)
def raw(content, name):
    read(name, content)


@holds(
    "csv",
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


@holds("arrow", st.lists(hostile.rows, min_size=1, max_size=4), st.booleans())
def arrow_rows(found, chat):
    """Parquet has what Arrow can hold: rows whose columns have one type each."""
    try:
        table = pyarrow.Table.from_pylist(found)
        pyarrow.parquet.write_table(table, PLACE / "rows.parquet")
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError, NotImplementedError):
        return
    if table.num_columns:
        read("rows.parquet", (PLACE / "rows.parquet").read_bytes(), len(found), chat)


@holds("chats", st.lists(hostile.chats, min_size=1, max_size=3), hostile.templates, hostile.values)
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
        how = Encoding(made, special, pairs=False)
        record = preprocessing._tokenize_rows({k: [v] for k, v in row.items()}, source, how, 48, False)
        if record["problem"][0] is not None:
            hostile.require_line(record["problem"][0])
        else:
            assert all(record["responses"][0])


ZERO = [json.loads(file.read_text()) for file in sorted(deepspeed.ZERO_FOLDER.glob("*.json"))]
MORE = {
    "communication_data_type": "fp32", "prescale_gradients": False, "wall_clock_breakdown": False,
    "aio": {"block_size": 1},
    "activation_checkpointing": {"partition_activations": False}, "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False, "verbose": False}, "checkpoint": {"tag_validation": "Warn"},
    "data_types": {"grad_accum_dtype": "fp32"}, "zero_allow_untested_optimizer": True, "compile": {},
    "steps_per_print": 5,
}  # fmt: skip


@holds("deepspeed", st.sampled_from(ZERO).flatmap(lambda zero: hostile.changed(zero | MORE)))
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


@holds(
    "yaml",
    st.one_of(hostile.changed(KNOWN).map(yaml.dump), st.binary(max_size=60), st.text(hostile.characters, max_size=60)),
)
def config_yaml(content):
    path = PLACE / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with hostile.only_user_errors(path):
        words = read_config_file(path, PARSER)
        assert all(isinstance(word, str) for word in words)


PARSER = run_parser()
RUN_JSON = {"model_name_or_path": "m", "given": ["seed", "data_path"], "versions": {"torch": "2"}} | KNOWN


@holds("run_json", hostile.changed(RUN_JSON))
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
        _, config, sizes = models.DECODERS["llama"]
        import transformers

        made = getattr(transformers, "LlamaForSequenceClassification")(  # noqa: B009
            getattr(transformers, config)(**sizes, num_labels=1, pad_token_id=1)
        )
        made.save_pretrained(place)
    return place


@holds("folders", st.data())
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


def checkpoint():
    """A small checkpoint, made once, and its manifest."""
    place = PLACE / "checkpoints" / "step-00000040"
    manifest = {"format": checkpoints.FORMAT, "step": 40, "world_size": 1, "versions": {}}
    if not place.is_dir():
        staging = PLACE / "checkpoints" / "new"
        checkpoints._make_anew(staging)
        writer = checkpoints.Writer(staging)
        writer.write_bytes("state.json", b'{"step": 40}')
        writer.write_bytes("engine/model.pt", b"1234")
        checkpoints._finish(staging, place, manifest | {"files": writer.files})
    return checkpoints.Checkpoint(place), json.loads((place / "manifest.json").read_text())


@st.composite
def manifests(draw):
    """A manifest that is changed, with a hash that fits or not, or that is none."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=40))
    made = draw(hostile.changed(checkpoint()[1]))
    if isinstance(made, dict) and draw(st.integers(0, 3)):  # whoever can write to the folder can hash
        made.pop("sha256", None)
        made["sha256"] = checkpoints._hash_of(made)
    return json.dumps(made).encode()


@holds("manifests", manifests(), st.one_of(st.just(b'{"step": 40}'), st.binary(max_size=20), st.just(b"[" * 60_000)))
def checkpoint_manifests(content, state):
    """A checkpoint is whole, or one line says why not."""
    made, _ = checkpoint()
    place = PLACE / "spoilt" / "step-00000040"
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(made.folder, place)
    (place / "manifest.json").write_bytes(content)
    (place / "state.json").write_bytes(state)
    spoilt = checkpoints.Checkpoint(place)
    with hostile.only_user_errors(place):
        spoilt.manifest()
    with hostile.only_user_errors(place):
        assert isinstance(spoilt.state(), dict)
    with hostile.patience():
        if fault := spoilt.fault():
            hostile.require_line(printable(fault))
        else:
            assert state == (made.folder / "state.json").read_bytes()


def tried(name, inputs, **how):
    """A property for so many inputs."""
    wanted = settings(max_examples=inputs, deadline=None, suppress_health_check=SLOW, database=None, **how)
    strategies, check = PROPERTIES[name]
    return wanted(given(*strategies)(check))


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_result_or_one_line(name, monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 2.0)
    tried(name, FEW.get(name, 40), derandomize=True)()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_result_or_one_line_for_a_hundred_thousand_inputs(name):
    assert sum(SHARES.values()) == 100
    tried(name, TOTAL * SHARES[name] // 100)()


# Kinds that were seen, each once.

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}"
)
PAIR = {"prompt": "question: ", "chosen": " fish", "rejected": " the mat"}


def write(path, *found):
    """A file of rows, which are objects or lines as they are."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in found]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.usefixtures("own_cache")
def test_every_row_is_used_or_reported(tmp_path, capsys):
    """A file with a bad row of each kind, through the whole of what a run does with it."""
    bad = [
        b'{"prompt": "a", "chosen": ',
        b"\xff\xfe",
        b"5",
        b"[" * 60_000,
        b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
        PAIR | {"chosen": "\ud83d"},
        PAIR | {"chosen": [{"role": "\ud83d", "content": "a"}]},
        {"\ud800\x1b[2J": 1},
        PAIR | {"chosen": ""},
        PAIR | {"margin": 10**400},
        PAIR | {"chosen_score": 3e38, "rejected_score": -3e38},
    ]
    path = write(tmp_path / "a\x1b[2J\r.jsonl", PAIR, *[each for row in bad for each in (row, PAIR | {"x": "\x1b[2J"})])
    (source,), _ = sources.read_sources(str(path), seed=0)
    made = tiny.chatml()
    special = choose_special_tokens(made, len(made))
    rules = preprocessing.PreprocessingConfig(64, "skip", tmp_path / "cache", 1)
    used = preprocessing.tokenize(source, made, special, rules)
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\r" not in said
    reported = sum(int(count) for count in re.findall(r"skipped (\d+) of 23 rows", said))
    assert (len(used), reported) == (12, len(bad))
    with pytest.raises(UserError, match=r"row 2: it is not JSON: .*11 of 23 rows cannot be used"):
        preprocessing.tokenize(source, made, special, preprocessing.PreprocessingConfig(64, "stop", rules.cache, 1))


def test_an_answer_that_adds_no_token_to_a_prompt_that_is_cut_is_a_bad_row():
    special = preprocessing.SpecialTokens(end=0, pad=1, endings=frozenset({0}), starts=frozenset(), rows=50)
    for limit in (4, 3):
        with pytest.raises(BadRow, match="rejected is empty once tokenized"):
            preprocessing.compare([5, 0], [[5, 0, 7, 8, 9], [5, 0]], special, limit)


@pytest.mark.parametrize("name", ["train-00001-of-00002.jsonl", "train"])
def test_a_broken_link_in_a_folder_stops(name, tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", PAIR)
    (tmp_path / name).symlink_to("../blobs/missing")
    with pytest.raises(UserError, match=r"is a link to \.\./blobs/missing, which is not there"):
        sources.read_sources(str(tmp_path), seed=0)


@pytest.mark.usefixtures("own_cache")
def test_shards_behind_a_linked_folder_are_read_once(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "data").mkdir()
    write(tmp_path / "blobs" / "b.jsonl", PAIR)
    (tmp_path / "data" / "train").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs" / "round").symlink_to(tmp_path / "data")
    (train,), _ = sources.read_sources(str(tmp_path / "data"), seed=0)
    assert len(train.rows) == 1


def test_what_is_no_file_stops(tmp_path):
    write(tmp_path / "train-0.jsonl", PAIR)
    os.mkfifo(tmp_path / "train-1.jsonl")
    with pytest.raises(UserError, match=r"train-1.jsonl is named like a file of rows"):
        sources.read_sources(str(tmp_path), seed=0)


@pytest.mark.usefixtures("own_cache")
def test_a_parquet_file_with_one_column_named_json(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"json": ["{", "5"]}), tmp_path / "a.parquet")
    (source,), _ = sources.read_sources(str(tmp_path / "a.parquet"), seed=0)
    require_whole(source, 2)


@pytest.mark.usefixtures("own_cache")
def test_text_in_parquet_that_is_not_utf8_names_its_row(tmp_path):
    answers = pyarrow.array([b"a", b"b", b"\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["", "", ""], "chosen": answers, "rejected": ["c", "c", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (source,), _ = sources.read_sources(str(tmp_path / "a.parquet"), seed=0)
    rules = preprocessing.PreprocessingConfig(64, "skip", tmp_path / "cache", 1)
    with pytest.raises(UserError, match=r"a.parquet, row 3 cannot be read: 'utf-?8' codec can't decode"):
        preprocessing.tokenize(source, *MADE[0], rules)


def test_a_layout_is_that_of_the_first_row_that_can_be_read(tmp_path):
    row = {"instruction": "Who?", "chosen": "he", "rejected": "she"}
    path = write(tmp_path / "a.jsonl", b"{", row, row)
    (source,), _ = sources.read_sources(str(path), seed=0, first=10)
    assert source.columns == tuple(row)
    assert source.read(source.rows[1])["prompt"] == [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10 ** 10 ** 9 }}", "x{% set y = 9 ** (9 ** 9) %}"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_does_not_end(template, in_thread, monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 0.3)
    made, said = tiny.chatml(chat_template=template), []

    def settle():
        with pytest.raises(UserError, match="chat template does not end") as caught:
            settle_template(made, TODAY)
        said.append(str(caught.value))

    start = time.monotonic()
    if in_thread:
        thread = threading.Thread(target=settle)
        thread.start()
        thread.join(20)
    else:
        settle()
    assert len(said) == 1
    assert time.monotonic() - start < 5


TRACED = """
import sys
from reward_model.data import rendering
with rendering._time_limit(5):
    pass
sys.settrace(lambda *_: None)
print((lambda: "entered")())
"""


def test_the_limit_leaves_nothing_behind():
    """An exception that is taken back stays marked in Python 3.11, where a traced function is then never entered."""
    found = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=60)
    assert found.stdout == "entered\n"


def test_a_template_that_does_not_end_over_some_rows_takes_no_more_than_three_limits(monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 0.3)
    monkeypatch.setattr(rendering, "_overrun", rendering.Counter())
    template = "{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}" + tiny.CHATML
    made = tiny.chatml(chat_template=template)
    settle_template(made, TODAY)
    chat = [{"role": "user", "content": "bad"}]
    start = time.monotonic()
    for _ in range(50):
        with pytest.raises(rendering.TemplateTooSlow, match=r"ran for more than 0\.3 s"):
            rendering.render(made, chat)
    assert time.monotonic() - start < 5


def test_a_template_with_stars_is_no_power():
    template = "**bold** {{ namespace(**{'a': 1}).a }} {{ '**' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    made = tiny.chatml(chat_template=template)
    assert rendering.render(made, [{"role": "user", "content": "x"}]) == "**bold** 1 **x"


SPOILT = {
    "layers": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers in its config.json is 1000000"),
    "width": ({"hidden_size": 10**12}, "hidden_size in its config.json is 1000000000000"),
    "parameters": ({"hidden_size": 2**20, "num_hidden_layers": 50}, "billion parameters, and its weights have 0.1 MB"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_model_of_absurd_size_is_refused_before_it_is_built(case, tmp_path):
    changes, says = SPOILT[case]
    place = shutil.copytree(folder(), tmp_path / "model")
    (place / "config.json").write_text(json.dumps(json.loads((place / "config.json").read_text()) | changes))
    loaders = [inference.load, lambda place: read_config(str(place))]
    loaders += (
        [lambda place: plan.main(["--model_name_or_path", str(place), "--gpu_memory", "80"])]
        if case != "parameters"
        else []
    )
    start = time.monotonic()
    for load in loaders:
        with pytest.raises(UserError, match=says):
            load(place)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, "{"])
def test_deepspeed_json_that_is_none(text):
    path = PLACE / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match="DeepSpeed configuration"):
        deepspeed.set_up_deepspeed(parse([*FLAGS, str(path)]), "fp32", 1, 64)


FLAGS = ["--model_name_or_path", "m", "--data_path", "d", "--deepspeed_config"]


@pytest.mark.parametrize("content, says", [
    ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, "refuses it at zero_optimization.overlap_comm: "),
    ({"comms_logger": 5}, "refuses it at comms_logger: "),
    ({"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"}, "refuses it at zero_optimization.stage: "),
])  # fmt: skip
def test_what_deepspeed_refuses_is_said_before_a_model_is_loaded(content, says, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    look = ["--model_name_or_path", "someone/model", "--data_path", str(tmp_path), *FLAGS[4:], str(path)]
    for refuse in (
        lambda: deepspeed.set_up_deepspeed(parse([*FLAGS, str(path)]), "fp32", 2, 64),
        lambda: check.main(look),
    ):
        with pytest.raises(UserError, match=f"{path}: DeepSpeed {says}"):
            refuse()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
@pytest.mark.parametrize("name", PROPERTIES)
def test_guided(name, tmp_path):
    runs = "200" if name == "folders" else "2000"
    words = [sys.executable, str(Path(__file__).parent / "fuzz" / "guided.py"), name, f"-atheris_runs={runs}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1_200)
    assert done.returncode == 0, done.stderr[-3_000:]
