# SPDX-License-Identifier: Apache-2.0
"""The files of config/zero/: what each holds, how it is chosen, and that NVMe and hpZ train like ZeRO 3."""

import json
import os
import re

import pytest
import runs
import torch

from reward_model.common import distributed
from reward_model.common.errors import UserError
from reward_model.config.deepspeed import ZERO_FOLDER, set_up_deepspeed
from reward_model.config.options import parse

FILES = sorted(path.name for path in ZERO_FOLDER.glob("*.json"))
README = (ZERO_FOLDER / "README.md").read_text()
NODE = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """By torchrun, two processes on each node; rank 0 speaks."""
    for name in ("LOCAL_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in NODE.items():
        monkeypatch.setenv(name, value)


def options(name, *flags):
    return parse(["--model_name_or_path", "m", "--deepspeed_config", str(name), *map(str, flags)])


def build(name, *flags, world_size=4, hidden=1024, vocab=32000):
    if name == "zero3_nvme.json" and not flags:
        flags = ("--nvme_path", "/local")
    return set_up_deepspeed(options(name, *flags), "bf16", world_size, hidden, vocab).config


def refusal(*arguments, **sizes):
    with pytest.raises(UserError) as caught:
        build(*arguments, **sizes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed():
    """file → the flag that chooses it, as the table of the folder's README has them."""
    rows = re.findall(r"^\| `(\w+\.json)` \| `([^`]+)` \|", README, re.MULTILINE)
    return dict(rows)


def test_the_readme_lists_each_file_with_the_flag_that_chooses_it():
    assert sorted(listed()) == FILES
    for name, line in listed().items():
        chosen = parse(["--model_name_or_path", "m", *line.split()])
        assert set_up_deepspeed(chosen, "bf16", 4, 1024, 32000).config == build(name), name


@pytest.mark.parametrize("key", ["loss_scale_window", "pin_memory", "sub_group_size", "buffer_count", "max_in_cpu"])
def test_the_readme_says_why_of_a_value(key):
    assert f"`{key}" in README


def test_every_key_that_a_file_adds_is_explained():
    def keys(value):
        return {key for k, v in value.items() for key in {k} | (keys(v) if isinstance(v, dict) else set())}

    used = set().union(*(keys(json.loads((ZERO_FOLDER / name).read_text())) for name in FILES))
    sections = {"zero_optimization", "bf16", "fp16", "enabled", "stage", "device"}
    assert sorted(key for key in used - sections if key not in README) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FILES)
def test_deepspeed_reads_what_was_written(name, dtype, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    flags = ["--dtype", dtype, *(["--nvme_path", "/local"] if "nvme" in name else [])]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    config = build(name, *flags, world_size=1)  # a process group of one
    assert '"auto"' not in json.dumps(config)
    zero = DeepSpeedConfig(config).zero_config
    given = config["zero_optimization"]
    assert zero.stage == (3 if "pp" in name or "nvme" in name else int(name[4])) or (name, dtype) == (
        "zero0.json",
        "fp16",
    )
    for part in ("offload_optimizer", "offload_param"):
        section = getattr(zero, part)
        device = "none" if section is None else str(getattr(section.device, "value", section.device))
        wanted = "nvme" if "nvme" in name else "cpu" if "offload" in name else "none"
        assert device == (wanted if zero.stage == 3 or part == "offload_optimizer" else "none")
    assert zero.prefetch_bucket_size == given.get("stage3_prefetch_bucket_size", zero.prefetch_bucket_size)


def test_a_file_here_comes_before_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build("zero2.json")["zero_optimization"]["stage"] == 2
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert build("zero2.json")["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("name", ["zero4.json", "zeropp", "README.md"])
def test_a_name_that_no_file_has_gets_the_list(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refusal(name)
    assert [file for file in (f"--deepspeed_config {name}", *FILES) if file not in text] == []


@pytest.mark.parametrize("name", ["./zero2.json", "sub/zero2.json"])
def test_a_path_is_not_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "No such file" in refusal(name)


def test_flags_must_agree_with_a_named_file():
    assert "--zero_stage 2 and stage 3" in refusal("zeropp.json", "--zero_stage", 2)
    assert "--offload" in refusal("zeropp.json", "--offload")
    asked = options("zero3_nvme.json", "--nvme_path", "/local", "--zero_stage", 3, "--offload")
    decided = set_up_deepspeed(asked, "bf16", 1, 64, 100)
    assert (decided.zero_stage, decided.offload) == (3, True)


# --- hpZ ---


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(("world_size", "local", "size"), [(16, 8, 8), (4, 2, 2), (4, 1, 1), (8, 8, 1), (1, 1, 1)])
def test_hpz_is_a_node(monkeypatch, caplog, variable, world_size, local, size):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv(variable, str(local))
    caplog.set_level("INFO", "reward_model")
    assert build("zeropp.json", world_size=world_size)["zero_optimization"]["zero_hpz_partition_size"] == size
    assert ("one node" in caplog.text) is (world_size == local)


def test_hpz_wants_nodes_alike():
    text = refusal("zeropp.json", world_size=5)
    assert "5 processes" in text
    assert "2 on each node" in text


def test_a_launcher_that_says_nothing_of_nodes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "LOCAL_WORLD_SIZE" in refusal("zeropp.json")
    assert build("zeropp.json", world_size=1)["zero_optimization"]["zero_hpz_partition_size"] == 1


def test_quantized_communication_needs_a_gpu(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cpu")
    with pytest.raises(UserError, match=r"^zero_quantized_weights: .* CUDA GPU, this is a cpu"):
        distributed.require_zero(build("zeropp.json")["zero_optimization"], None)
    distributed.require_zero(build("zero3_offload.json")["zero_optimization"], None)


# --- NVMe ---


def test_nvme_needs_a_folder():
    text = refusal("zero3_nvme.json", "--zero_stage", 3)
    assert "--nvme_path" in text
    assert "zero3_nvme.json" in text


@pytest.mark.parametrize("name", ["zero3_offload.json", "zero2.json"])
def test_a_folder_without_nvme(name):
    text = refusal(name, "--nvme_path", "/local")
    assert "--nvme_path /local" in text
    assert name in text


def test_each_run_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    zero = build("zero3_nvme.json", "--nvme_path", "disk")["zero_optimization"]
    paths = {zero[part]["nvme_path"] for part in ("offload_param", "offload_optimizer")}
    assert paths == {f"{tmp_path}/disk/zero-localhost-1234"}
    monkeypatch.setenv("MASTER_PORT", "1235")
    assert build("zero3_nvme.json")["zero_optimization"]["offload_param"]["nvme_path"] == "/local/zero-localhost-1235"


def test_a_path_of_the_file_stays(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/own"}}}')
    assert build(file)["zero_optimization"]["offload_param"]["nvme_path"] == "/own"
    assert "--nvme_path /local" in refusal(file, "--nvme_path", "/local")


@pytest.mark.parametrize(
    ("world_size", "hidden", "vocab", "elements"),
    [(1, 4096, 128256, 128512 * 4096), (8, 4096, 128256, 128512 * 512), (3, 10, 100, 1187), (1, 100, 10, 80000)],
)
def test_an_nvme_buffer_holds_a_ranks_part_of_the_largest_weight(world_size, hidden, vocab, elements):
    zero = build("zero3_nvme.json", world_size=world_size, hidden=hidden, vocab=vocab)["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == elements


@pytest.fixture
def with_libaio(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr(distributed, "_require_compiler", lambda: None)


def check_nvme(folder):
    distributed.require_zero(build("zero3_nvme.json", "--nvme_path", folder)["zero_optimization"], str(folder))


def test_the_folder_must_be_there(with_libaio, tmp_path):
    with pytest.raises(UserError, match=r"^--nvme_path .*/none: No such file or directory$"):
        check_nvme(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        check_nvme(tmp_path / "file")
    folder = tmp_path / "disk"
    folder.mkdir()
    check_nvme(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("code", "words"), [("EINVAL", "O_DIRECT"), ("EACCES", "Permission denied")])
def test_a_folder_that_cannot_be_written(with_libaio, tmp_path, monkeypatch, code, words):
    import errno

    def refuse(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(distributed.os, "open", refuse)
    with pytest.raises(UserError, match=words):
        check_nvme(tmp_path)


def test_nvme_needs_libaio(tmp_path, monkeypatch, with_libaio):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match="libaio"):
        check_nvme(tmp_path)


def test_swap_files_go_with_the_run(tmp_path, monkeypatch):
    zero = build("zero3_nvme.json", "--nvme_path", tmp_path)["zero_optimization"]
    swap = tmp_path / "zero-localhost-1234" / "zero_stage_3" / "rank0"
    swap.mkdir(parents=True)
    (tmp_path / "kept").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.release_swap_files(zero, str(tmp_path))
    assert swap.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    distributed.release_swap_files({"offload_param": {"device": "nvme", "nvme_path": str(swap)}}, str(tmp_path))
    assert swap.exists()  # a path of the file's own
    distributed.release_swap_files(zero, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# --- real runs ---

FLAGS = ("--per_device_train_batch_size", 8, "--add_eot_token")


@pytest.fixture(scope="session")
def wide(demo, tmp_path_factory):
    """The demo with fewer rows, and 512 units: DeepSpeed swaps no part of a weight below 1 MiB."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    (folder / "data").mkdir()
    for name, rows in (("train", 48), ("eval", 24)):
        lines = (demo / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines))
    config = AutoConfig.from_pretrained(demo / "model")
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 1024, 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(demo / "model").save_pretrained(folder / "model")
    return folder


def assert_alike(first, second):
    """Two runs with the same losses, gradient norms and metrics, but for the order of sums in the norm."""
    fields = ("loss", "grad_norm", "accuracy", "gap_mean")
    numbers = [[r[k] for r in m.train + m.evaluations for k in fields if k in r] for m in (first, second)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)


def saved_scores_are_those_of_the_end(folder, data, metrics):
    """What Transformers loads gives the last evaluation's gap."""
    chosen, rejected = (runs.reload_scores(folder, rows) for rows in runs.held_out(data))
    assert float((chosen - rejected).mean()) == pytest.approx(metrics.final["gap_mean"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nvme_trains_and_saves_as_host_memory_does(wide, tmp_path, processes):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio")
    disk = tmp_path / "disk"
    disk.mkdir()
    config = json.loads((ZERO_FOLDER / "zero3_nvme.json").read_text())
    config["zero_optimization"]["offload_param"]["max_in_cpu"] = 0  # every weight of 1 MiB on the disk
    config["zero_optimization"]["sub_group_size"] = 500_000  # more than one
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    how = {"launcher": "torchrun", "processes": processes, "timeout": 540}
    flags = ["--deepspeed_config", tmp_path / "nvme.json", "--nvme_path", disk]
    there = runs.train(wide, tmp_path / "there", *FLAGS, *flags, **how)
    host = runs.train(wide, tmp_path / "host", *FLAGS, "--zero_stage", 3, "--offload", **how)
    assert_alike(there, host)
    saved_scores_are_those_of_the_end(tmp_path / "there", wide, there)
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_copy_of_the_weights_in_each_of_two_nodes_trains_as_zero_3_does(wide, demo, tmp_path):
    config = json.loads((ZERO_FOLDER / "zeropp.json").read_text())
    config["zero_optimization"]["zero_quantized_weights"] = False  # needs a GPU
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    flags = [*FLAGS, "--model_name_or_path", demo / "model"]
    how = {"launcher": "torchrun", "processes": 4, "timeout": 540}
    nodes = runs.train(wide, tmp_path / "nodes", *flags, "--deepspeed_config", tmp_path / "hpz.json", **how)
    plain = runs.train(wide, tmp_path / "plain", *flags, "--zero_stage", 3, **how)
    assert_alike(nodes, plain)
    saved_scores_are_those_of_the_end(tmp_path / "nodes", wide, nodes)
