# SPDX-License-Identifier: Apache-2.0
"""Nothing that comes with a model or with data is run, and nothing secret is written down."""

import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from reward_model import inference
from reward_model.commands import check, plan
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import REMOTE_CODE, UserError, first_line, printable
from reward_model.common.logging import logger
from reward_model.config.options import RunConfig
from reward_model.config.settings import resolve
from reward_model.data.comparisons import BadRow
from reward_model.data.preprocessing import PreprocessingConfig, tokenize
from reward_model.data.sources import read_sources
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.models.loading import load_for_training, read_config
from reward_model.objectives.answer_similarity import with_cosines
from reward_model.training import fresh_load
from reward_model.training.engine_files import load_file as load_file_of_engine

pytestmark = pytest.mark.usefixtures("own_cache")


class Code:
    """Unpickled by whoever does not look, it writes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"echo run > {self.trace}",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    made = tiny.tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(**sizes, vocab_size=len(made), num_labels=1, pad_token_id=made.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def trace(tmp_path):
    """Where code of a model or a pickle would leave a file."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists(), "code of a file was run"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(path, trace, how):
    state = {"model.norm.weight": torch.ones(32), "evil": Code(trace)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(Code(trace)))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")


def refused(load, *says):
    """The one line that a loader ends with, which advises nobody to run the file."""
    with pytest.raises((UserError, BadRow)) as caught:
        load()
    message = str(caught.value)
    assert message == printable(message)
    assert "weights_only" not in message
    assert "=True" not in message
    for word in says:
        assert str(word) in message
    return message


@pytest.mark.parametrize("how", ["zip", "old form", "bare pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "value_head.bin"])
@pytest.mark.parametrize("load", [inference.load, lambda place: load_for_training(str(place), torch.float32, 0)])
def test_no_pickle_is_run(load, name, how, folder, trace):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    else:
        weights = load_file(folder / "model.safetensors")
        weights.pop("score.weight")  # so that a head is looked for
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pickled(folder / name, trace, how)
    refused(lambda: load(folder), folder)


def test_the_planted_pickle_would_run(tmp_path):
    trace = tmp_path / "trace"
    pickled(tmp_path / "a.bin", trace, "zip")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert trace.read_text() == "run\n"


@pytest.mark.parametrize("how", ["zip", "old form", "bare pickle"])
def test_no_pickle_of_a_checkpoint_is_run(how, tmp_path, trace):
    """Not even where somebody has written a manifest to match."""
    pickled(tmp_path / "mp_rank_00_model_states.pt", trace, how)
    refused(lambda: load_file_of_engine(str(tmp_path / "mp_rank_00_model_states.pt")), tmp_path)


def test_a_pickle_named_like_other_files_is_not_read(folder, trace):
    """Optimizer states, arguments, a tokenizer of old, an adapter: nothing of it belongs to a saved reward model."""
    for name in ("training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin", "rng_state.pth"):
        pickled(folder / name, trace, "zip")
    assert len(inference.load(folder).score(["the cat"], [" sat"])) == 1


def test_an_adapter_beside_a_model_is_not_followed_elsewhere(folder, trace, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / "model.safetensors").unlink()
    pickled(elsewhere / "pytorch_model.bin", trace, "zip")
    adapter = {"base_model_name_or_path": str(elsewhere), "peft_type": "LORA", "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    pickled(folder / "adapter_model.bin", trace, "zip")
    refused(lambda: inference.load(folder), folder)


MODULE = """
import pathlib
pathlib.Path({trace!r}).write_text("run")
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "brought"
class Model(LlamaForSequenceClassification):
    config_class = Config
class Backbone(LlamaModel):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(folder, trace, monkeypatch):
    """A model that brings its own classes, with somebody at the terminal who says yes to everything."""
    (folder / "brought.py").write_text(MODULE.format(trace=str(trace)))
    classes = {"AutoConfig": "brought.Config", "AutoModel": "brought.Backbone"}
    classes |= {"AutoModelForSequenceClassification": "brought.Model"}
    edit(folder / "config.json", model_type="brought", auto_map=classes)
    words = {"AutoTokenizer": [None, "brought.Words"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Words", auto_map=words)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1_000))
    return folder


def similarity(place):
    context = DistributedContext(0, 1, torch.device("cpu"))
    with_cosines(None, None, str(place), context)


def question(place):
    return {"folder": str(place), "forms": ["hf"], "ids": [[1]], "written": [], "settings": []}


LOADERS = {
    "config": lambda place: read_config(str(place)),
    "tokenizer": lambda place: load_tokenizer(str(place)),
    "model": lambda place: load_for_training(str(place), torch.float32, 0),
    "inference": inference.load,
    "encoder of sentences": similarity,
    "plan": lambda place: plan.main(["--model_name_or_path", str(place), "--gpu_memory", "80"]),
    "check": lambda place: check.main(["--model_name_or_path", str(place), "--data_path", str(place / "rows.jsonl")]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_code_of_a_model_is_refused_without_asking(name, with_code):
    row = {"prompt": "the cat", "chosen": " sat", "rejected": " eats"}
    (with_code / "rows.jsonl").write_text(json.dumps(row))
    refused(lambda: LOADERS[name](with_code), REMOTE_CODE)
    assert sys.stdin.read().count("y") == 1_000


def test_the_process_that_verifies_asks_nobody_either(with_code):
    with pytest.raises(Exception, match="custom code"):
        fresh_load.answer(question(with_code))
    assert sys.stdin.read().count("y") == 1_000


def test_code_of_a_model_runs_with_the_flag(with_code, trace):
    config = read_config(str(with_code), trust_remote_code=True)
    assert type(config).__name__ == "Config"
    assert trace.read_text() == "run"
    trace.unlink()


def test_attention_from_the_hub_is_code_too(folder):
    edit(folder / "config.json", attn_implementation="someone/kernel")
    for load in (LOADERS["config"], inference.load):
        refused(lambda load=load: load(folder), "someone/kernel", REMOTE_CODE)


@pytest.mark.slow
def test_yes_to_a_run_runs_nothing(with_code, demo, tmp_path):
    flags = ["--model_name_or_path", with_code, "--data_path", demo / "data", "--output_dir", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "main.py", *map(str, flags)],
        input="y\n" * 100, cwd=runs.SCRIPTS, env=runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert REMOTE_CODE in result.stderr
    assert "Traceback" not in result.stderr


def test_advice_of_others_is_not_passed_on():
    loose = "Weights only load failed. (1) Re-running `torch.load` with `weights_only` set to `False` will …\nmore"
    for text in (loose, "use weights_only=False", "Please pass the argument `trust_remote_code=True` to allow"):
        found = first_line(ValueError(text))
        assert "weights_only" not in found
        assert "=True" not in found


SECRET = "hf_" + "s3cr3t" * 5
NAMES = (f"https://me:{SECRET}@host/data.jsonl", f"https://host/data.jsonl?token={SECRET}", f"someone/{SECRET}")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_not_written_down(name, capsys):
    assert SECRET not in str(UserError(f"--data_path {name}: no such file"))
    logger.warning(f"{name}: read")
    config = RunConfig.of(model_name_or_path=name, data_path=[name], output_dir="out")
    written = resolve(config, "fp32", 1, 64, 100).to_json({})
    assert SECRET not in written + capsys.readouterr().out
    assert "***" in written


@pytest.mark.slow
def test_a_run_leaves_nothing_of_its_environment(demo, tmp_path):
    """Neither in what it prints nor in any of its files, the cache among them."""
    variables = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET[3:], "AWS_SECRET_ACCESS_KEY": SECRET[4:]}
    cache = tmp_path / "cache"
    flags = ["--max_train_samples", 32, "--data_output_path", cache]
    metrics = runs.train(demo, tmp_path / "out", *flags, environment=variables)
    files = [file for place in (tmp_path / "out", cache) for file in place.rglob("*") if file.is_file()]
    assert {"run.json", "metrics.jsonl", "model.safetensors"} <= {file.name for file in files}
    assert "s3cr3t" not in metrics.output
    assert not any(b"s3cr3t" in file.read_bytes() for file in files)


def test_the_cache_of_rows_is_its_users_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "the cat", "chosen": " sat", "rejected": " eats"}))
    (source,), _ = read_sources(str(path), seed=0)
    made = tiny.tokenizer()
    before = os.umask(0)
    try:
        rules = PreprocessingConfig(64, "stop", tmp_path / "cache", 1)
        tokenize(source, made, choose_special_tokens(made, len(made)), rules)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_is_garbage_is_one_line(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04garbage\x1b[2J")
    refused(lambda: inference.load(folder), folder)
