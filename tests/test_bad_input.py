# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong ends in one clear line, a non-zero exit status, and nothing overwritten."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def refuse(demo, tmp_path, *flags, says, output=None, **launching):
    """Run main.py; it must fail with one line that holds every word of ``says``, without a traceback."""
    fixed = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--max_seq_len", 256]
    fixed += ["--output_dir", output or tmp_path / "out", "--data_output_path", demo / "cache"]
    result = runs.launch(*fixed, *flags, **launching)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode != 0
    if launching.get("launcher") != "torchrun":  # which prints one of its own
        assert "Traceback" not in result.stdout + result.stderr, result.stderr[-3000:]
    assert len(lines) == 1, result.stderr[-3000:]
    for word in [says] if isinstance(says, str) else says:
        assert word in lines[0]
    assert output or not (tmp_path / "out").exists()
    return result


def model_without(demo, folder, *names):
    """A copy of the demo's model without some of its files."""
    shutil.copytree(demo / "model", folder)
    for name in names:
        (folder / name).unlink()
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FLAGS = {
    "unknown flag": (["--learning_rat", "1"], "--learning_rat"),
    "value": (["--lr_scheduler_type", "square"], ["--lr_scheduler_type", "square"]),
    "contradiction": (["--offload", "--zero_stage", "0"], ["--offload", "--zero_stage"]),
    "data": (["--data_path", "./no/such.jsonl"], "./no/such.jsonl"),
    "hub name": (["--data_path", "nobody/nothing"], ["nobody/nothing", "hub"]),
    "model": (["--model_name_or_path", "no/such/model"], "no/such/model"),
    "config": (["--deepspeed_config", "none.json"], "none.json"),
    "no preferences": (["--data_path", "wangrui6/Zhihu-KOL"], "no rejected"),
    "form": (["--pooling", "mean", "--save_format", "dschat"], ["--save_format dschat", "mean"]),
    "penalty": (["--score_penalty", "l2", "--score_penalty_weight", "-1"], "--score_penalty_weight"),
    "lora": (["--lora_dim", "4", "--lora_module_name", "decoder.layers."], ["--lora_module_name", "self_attn"]),
    "length": (["--max_seq_len", "20"], ["row", "--max_seq_len 20"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, demo, tmp_path):
    flags, says = FLAGS[case]
    refuse(demo, tmp_path, *flags, says=says)


def test_a_bad_row_names_file_row_and_reason(demo, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = (demo / "data" / "train.jsonl").read_text().splitlines()[:20]
    rows[6] = json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"})
    file.write_text("\n".join(rows))
    refuse(demo, tmp_path, "--data_path", file, says=[str(file), "row 7", "equal"])
    rows[3] = '{"prompt": "p", "chosen": '
    file.write_text("\n".join(rows))
    refuse(demo, tmp_path, "--data_path", file, says=[str(file), "row 4: it is not JSON"])
    file.write_text("")
    refuse(demo, tmp_path, "--data_path", file, says=[str(file), "no rows"])


def test_tokenizers(demo, tmp_path):
    none = model_without(demo, tmp_path / "none", "tokenizer.json", "tokenizer_config.json")
    refuse(demo, tmp_path, "--model_name_or_path", none, says="tokenizer")
    no_end = model_without(demo, tmp_path / "no_end")
    edit(no_end / "tokenizer_config.json", eos_token=None)
    refuse(demo, tmp_path, "--model_name_or_path", no_end, says=["no end token", "--add_eot_token"])
    too_large = model_without(demo, tmp_path / "too_large")
    tokenizer = json.loads((too_large / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": 10_000 + i for i in range(50)}
    (too_large / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(demo, tmp_path, "--model_name_or_path", too_large, says=["embedding", "tokens"])


def test_models(demo, tmp_path):
    no_weights = model_without(demo, tmp_path / "no_weights", "model.safetensors")
    refuse(demo, tmp_path, "--model_name_or_path", no_weights, says=[str(no_weights), "model.safetensors"])
    deeper = model_without(demo, tmp_path / "deeper")
    edit(deeper / "config.json", num_hidden_layers=3)
    refuse(demo, tmp_path, "--model_name_or_path", deeper, says=["lacks 9", "layers.2"])
    short = model_without(demo, tmp_path / "short")
    edit(short / "config.json", max_position_embeddings=32)
    refuse(demo, tmp_path, "--model_name_or_path", short, says=["--max_seq_len 32"])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"


def test_pointers_of_git_lfs(demo, tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        model = model_without(demo, tmp_path / name, name)
        (model / name).write_text(LFS)
        refuse(demo, tmp_path, "--model_name_or_path", model, says=[name, "git lfs pull"])
    data = tmp_path / "train.parquet"
    data.write_text(LFS)
    refuse(demo, tmp_path, "--data_path", data, says=["train.parquet", "git lfs pull"])


def test_nan_in_the_weights_is_not_put_down_to_the_learning_rate(demo, tmp_path):
    model = model_without(demo, tmp_path / "model", "model.safetensors")
    weights = load_file(demo / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    says = ["step 0: a held-out score is not finite", "the model's weights hold", ": model.norm.weight (NaN)"]
    result = refuse(demo, tmp_path, "--model_name_or_path", model, says=says, output=tmp_path / "out")
    assert "--learning_rate" not in result.stderr


def test_another_run_is_not_overwritten(demo, tmp_path):
    output = tmp_path / "used"
    output.mkdir()
    (output / "metrics.jsonl").write_text("precious\n")
    refuse(demo, tmp_path, says=[str(output), "another run"], output=output)
    assert [path.name for path in output.iterdir()] == ["metrics.jsonl"]
    assert (output / "metrics.jsonl").read_text() == "precious\n"


def test_an_output_folder_that_cannot_be_made(demo, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(demo, tmp_path, says="file", output=tmp_path / "file" / "out")


def test_a_full_disk(demo, tmp_path):
    """A real one: a small file system of its own, which root can mount."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small file system")
    try:
        refuse(demo, tmp_path, says=["free", "model"], output=small / "out")  # the model has 1.6 MB
        with safe_open(demo / "model" / "model.safetensors", "pt") as file:
            size = sum(file.get_tensor(name).nbytes for name in file.keys() if name != "lm_head.weight")  # noqa: SIM118
        # enough for the weights alone, as is found beforehand, and not for what lies beside them
        subprocess.run(["mount", "-o", f"remount,size={size // 1024 + 28}k", str(small)], check=True)
        refuse(demo, tmp_path, says="space left", output=small / "out2")
        assert not list((small / "out2").glob("*.safetensors"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_the_first_process_alone_fails_and_the_second_is_quiet(demo, tmp_path):
    """Only the first makes the output folder; the second waits for it meanwhile."""
    (tmp_path / "file").write_text("")
    flags = ["--per_device_train_batch_size", 8]
    output = tmp_path / "file" / "out"
    refuse(demo, tmp_path, *flags, says="file", output=output, launcher="deepspeed", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_processes_have_one_voice(launcher, demo, tmp_path, monkeypatch):
    port = runs.free_port()
    monkeypatch.setattr(runs, "free_port", lambda: port)
    refuse(demo, tmp_path, "--data_path", "./no.jsonl", says="./no.jsonl", launcher=launcher, processes=2)
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))  # DeepSpeed's op takes 66 MiB a rank there


@pytest.mark.slow
def test_a_second_process_that_fails_ends_the_first(demo, tmp_path):
    """The second rank is killed while the first waits for it: the launcher ends, non-zero, and leaves nothing."""
    flags = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--max_seq_len", 256]
    flags += ["--num_train_epochs", 500, "--data_output_path", demo / "cache", "--output_dir", tmp_path / "out"]
    words = [*runs.command("deepspeed", 2), *[str(flag) for flag in flags]]
    run = subprocess.Popen(words, cwd=runs.SCRIPTS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count('"train"') > 2):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.2)
        ranks = processes_of(str(tmp_path / "out"))
        second = next(pid for pid, line in ranks.items() if "--local_rank=1" in line)
        os.kill(second, signal.SIGKILL)
        assert run.wait(timeout=60) != 0
        time.sleep(2)
        assert not processes_of(str(tmp_path / "out"))
    finally:
        for pid in [run.pid, *processes_of(str(tmp_path / "out"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


AS_DEEPSPEED = (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("numbers", [pytest.param((signal.SIGINT,), marks=pytest.mark.slow), AS_DEEPSPEED])
def test_ctrl_c_ends_in_a_line(numbers, demo, tmp_path):
    """DeepSpeed's launcher sends SIGTERM at the same time, once or twice."""
    flags = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--num_train_epochs", 50]
    words = [*runs.command("python", 1), *map(str, [*flags, "--output_dir", tmp_path / "out"])]
    values = runs.environment(HF_HUB_OFFLINE="1", RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)
    with (tmp_path / "log").open("w+") as log:
        run = subprocess.Popen(words, cwd=runs.SCRIPTS, env=values, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "out" / "metrics.jsonl").exists():
                assert time.monotonic() < deadline
                assert run.poll() is None
                time.sleep(0.1)
            for number in numbers:
                os.killpg(run.pid, number)
            assert run.wait(60) == 75
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert said.count("ended by SIGINT; the same command goes on from here\n") == 1
    assert "Traceback" not in said


def processes_of(word):
    """Processes whose command line holds a word and main.py's rank: pid → command line."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.strip().split(maxsplit=1) for line in listing.splitlines()[1:]]
    return {int(pid): args for pid, args in lines if word in args and "--local_rank=" in args}


@pytest.mark.slow
def test_debug_shows_the_traceback(demo, tmp_path):
    flags = ["--model_name_or_path", demo / "model", "--data_path", "./no.jsonl", "--debug"]
    result = runs.launch(*flags)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_help_needs_nothing_else():
    result = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=runs.SCRIPTS, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0
    assert "--on_bad_row" in result.stdout


def test_a_wanted_attention_of_another_machine_leaves_nothing_behind(demo, tmp_path):
    """It is told before the data are read; and what is told after the model was loaded leaves the folder free."""
    flags = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--output_dir", tmp_path / "out"]
    result = runs.launch(*flags, "--attention", "flex")
    assert "error: --attention flex is for a GPU: leave the flag out" in result.stderr
    assert "rows" not in result.stdout
    result = runs.launch(*flags, "--pooling", "mean", "--attention", "slices")
    assert "error: --attention slices: this model is scored at more than the last token; take varlen" in result.stderr
    runs.train(demo, tmp_path / "out", "--max_train_samples", 32)
