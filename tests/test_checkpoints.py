# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the disk, and runs that go on from them: the bytes of a run that was never interrupted."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs
import torch

from reward_model.common.errors import UserError
from reward_model.common.files import remove_folder, write_whole
from reward_model.config.groups import seconds_of
from reward_model.training import checkpoint, random_states
from reward_model.training.best import Best
from reward_model.training.checkpoint import Checkpoint, Writer, listed, prune, remove_unfinished
from reward_model.training.resume import differences
from reward_model.training.stopping import StopRequest

CPU = torch.device("cpu")


def written(folder, step=40, **more):
    """A small checkpoint, by the functions that write a real one."""
    staging = folder / "checkpoints" / f".step-{step:08d}.partial"
    checkpoint._make_anew(staging)
    writer = Writer(staging)
    writer.write_bytes("state.json", b'{"step": 40}')
    writer.write_tensors(str(staging / "engine" / "model.pt"), {"w": torch.arange(1000.0)})
    manifest = {"format": checkpoint.FORMAT, "step": step, "world_size": 1, "versions": {}, "files": writer.files}
    place = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint._finish(staging, place, manifest | more)
    return Checkpoint(place)


def test_a_whole_checkpoint_has_no_fault(tmp_path):
    made = written(tmp_path)
    assert made.fault() == ""
    assert made.step == 40
    assert made.fault(0, 2) == made.fault(1, 2) == ""
    assert listed(tmp_path) == [made]
    assert torch.equal(torch.load(made.folder / "engine" / "model.pt", weights_only=True)["w"], torch.arange(1000.0))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "engine/model.pt", "manifest.json"])
def test_every_flipped_byte_is_found(name, tmp_path):
    made = written(tmp_path)
    path = made.folder / name
    size = path.stat().st_size
    for at in random.Random(0).sample(range(size), min(size, 60)):
        flip(path, at)
        fault = made.fault()
        assert fault, at
        assert "\n" not in fault
        flip(path, at)
    assert made.fault() == ""


@pytest.mark.parametrize("name", ["state.json", "engine/model.pt", "manifest.json"])
@pytest.mark.parametrize("left", [0, 1, 11])
def test_a_torn_or_missing_file_is_found(name, left, tmp_path):
    made = written(tmp_path)
    os.truncate(made.folder / name, left)
    assert made.fault()
    (made.folder / name).unlink()
    assert made.fault()


def test_a_manifest_that_is_rewritten_or_names_files_elsewhere_is_found(tmp_path):
    made = written(tmp_path)
    made.folder.rename(made.folder.with_name("step-00000050"))
    assert "of step 40" in Checkpoint(made.folder.with_name("step-00000050")).fault()
    other = written(tmp_path, 60, files={"../secret": {"bytes": 1, "sha256": ""}})
    assert "manifest" in other.fault()
    for text in ("[]", "{}", "null", '{"files": 3, "sha256": ""}', "[" * 10_000):
        (made.folder.with_name("step-00000050") / "manifest.json").write_text(text)
        assert "manifest" in Checkpoint(made.folder.with_name("step-00000050")).fault()


def test_only_the_newest_are_kept_and_unfinished_ones_removed(tmp_path):
    for step in (10, 20, 30):
        written(tmp_path, step)
    (tmp_path / "checkpoints" / ".step-00000040.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-00000005.removed").mkdir()
    prune(tmp_path, 2)
    assert [each.step for each in listed(tmp_path)] == [30, 20]
    assert sorted(remove_unfinished(tmp_path)) == [".step-00000005.removed", ".step-00000040.partial"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000020", "step-00000030"]
    assert listed(tmp_path / "nowhere") == []


def test_a_full_disk_is_a_problem_and_no_exception(tmp_path):
    """By this process's own limit of a file's size, which writes like a full disk."""
    script = """\
import resource, signal, sys
import torch
from reward_model.training.checkpoint import Writer
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writer = Writer(Path(sys.argv[1]))
writer.write_bytes("small", b"1")
writer.write_tensors(sys.argv[1] + "/large", {"w": torch.zeros(100_000)})
writer.write_bytes("after", b"1")
print(sorted(writer.files), writer.problem)
"""
    words = [sys.executable, "-c", script, str(tmp_path)]
    values = runs.environment(PYTHONPATH=str(runs.TOP))
    said = subprocess.run(words, env=values, capture_output=True, text=True, timeout=60)
    assert said.stdout == f"['small'] {tmp_path}/large: File too large\n", said.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_random_states_come_back():
    torch.manual_seed(3)
    random.seed(4)
    random.gauss(0, 1)  # leaves one for the next call
    np.random.seed(5)
    np.random.normal(size=3)
    kept = random_states.captured(CPU)
    first = torch.rand(3), random.gauss(0, 1), random.random(), np.random.normal(size=4)
    random_states.restore(kept, CPU)
    second = torch.rand(3), random.gauss(0, 1), random.random(), np.random.normal(size=4)
    assert torch.equal(first[0], second[0])
    assert first[1:3] == second[1:3]
    assert np.array_equal(first[3], second[3])
    with pytest.raises(UserError, match="random states"):
        random_states.restore(kept[:50], CPU)


def test_a_file_is_replaced_whole_and_a_folder_removed_at_once(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    remove_folder(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["a.json"]


RUN = {
    "learning_rate": 1e-3,
    "output_dir": "a",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "sequence_parallel_size": 1,
    "world_size": 2,
    "data_path": ["x"],
    "max_seq_len": 512,
    "content": {"train": "1", "evaluation": "2", "model": "3"},
    "versions": {"torch": "2.13.0", "numpy": "1"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output_dir": "b", "data_path": ["moved"], "num_train_epochs": 3}, []),
        ({"learning_rate": 1e-4}, ["--learning_rate (0.001 there, 0.0001 here)"]),
        ({"world_size": 1, "gradient_accumulation_steps": 2}, []),
        ({"world_size": 1}, ["the global batch (16 there, 8 here)"]),
        ({"gradient_accumulation_steps": 2}, ["--gradient_accumulation_steps (1 there, 2 here)"]),
        (
            {"max_seq_len": 128, "content": RUN["content"] | {"train": "9"}},
            ["the training rows (by content; --max_seq_len changed)"],
        ),
        ({"content": RUN["content"] | {"model": "9"}}, ["the model (by content)"]),
        ({"versions": {"torch": "2.14.0", "numpy": "2"}}, ["torch (2.13.0 there, 2.14.0 here)"]),
    ],
)
def test_what_differs_is_named(change, said):
    assert differences(RUN, RUN | change) == said


def test_the_best_evaluation_and_when_to_stop():
    best = Best("loss")
    assert not best.judge({"loss": 0.1}, 0)
    assert [best.judge({"loss": loss}, step) for step, loss in enumerate((0.5, 0.4, 0.4, 0.6), 1)] == [1, 1, 0, 0]
    assert (best.step, best.value, best.since) == (2, 0.4, 2)
    assert Best(**best.state()) == best
    with pytest.raises(UserError, match="no pairs"):
        Best("accuracy").judge({"point_loss": 1.0}, 0)
    assert Best("loss").judge({"point_loss": 1.0}, 1)


@pytest.mark.parametrize("text", ["", "x", "1:2", "0", "1:00:60", "-5"])
def test_a_time_limit_has_a_form(text):
    with pytest.raises(UserError, match="time_limit"):
        seconds_of(text)


def test_a_time_limit_leaves_time_to_save(monkeypatch):
    stop = StopRequest("00:10:00")
    assert not stop.asked
    stop.save_seconds = 1_000.0
    assert not stop.is_late  # never more than half of the limit is kept
    stop.end -= 301
    assert stop.is_late
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 7_200))
    assert StopRequest().limit == pytest.approx(7_200, abs=60)


def test_a_second_signal_is_heard_only_seconds_after_the_first():
    before = signal.getsignal(signal.SIGUSR1)
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with StopRequest().listening() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal == "SIGUSR1"
            assert heard == []
            stop.asked_at -= 10
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- runs ----


def flags_of(demo, output, *flags):
    fixed = ["--max_seq_len", 128, "--learning_rate", 1e-3, "--data_output_path", demo / "cache"]
    fixed += ["--per_device_train_batch_size", 32, "--max_train_samples", 160, "--max_eval_samples", 24]
    return [
        "--model_name_or_path", demo / "model", "--data_path", demo / "data", "--output_dir", output, *fixed, *flags,
    ]  # fmt: skip


def ran(demo, output, *flags, status=0, **launching):
    result = runs.launch(*flags_of(demo, output, *flags), **launching)
    said = result.stdout + result.stderr
    assert result.returncode == status, said[-4000:]
    assert "Traceback" not in said
    return said


def what_is_left(output):
    """Hashes of the saved weights, and the records without their speeds."""
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("**/*.safetensors")
              if "checkpoints" not in path.parts}  # fmt: skip
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = re.compile("per_second")
    return hashes, [{k: v for k, v in record.items() if not timed.search(k)} for record in records]


def stop_at(step, name="SIGTERM", rank=0, **more):
    return [{"rank": rank, "step": step, "signal": name, **more}]


def same_bytes(demo, folder, flags, stops, processes=1):
    """A run without interruption, and one that is stopped; what they leave has to be the same."""
    flags = ["--num_train_epochs", 2, "--dropout", 0.1, *flags]
    ran(demo, folder / "whole", *flags, processes=processes)
    for stop in stops:
        said = ran(demo, folder / "cut", *flags, processes=processes, signals=stop, status=75)
        assert "the same command goes on from here" in said
        assert (folder / "cut" / "interrupted.json").exists()
    said = ran(demo, folder / "cut", *flags, processes=processes)
    assert "resumed from step" in said
    assert what_is_left(folder / "cut") == what_is_left(folder / "whole")
    assert (folder / "cut" / "finished.json").exists()
    assert not (folder / "cut" / "interrupted.json").exists()
    return said


def test_a_run_that_is_stopped_twice_leaves_the_same_bytes(demo, tmp_path):
    """In the middle of an epoch, and in the middle of an evaluation."""
    stops = stop_at(3), stop_at(6, "SIGUSR1", in_evaluation=True)
    same_bytes(demo, tmp_path, ["--eval_interval", 2], stops)
    again = ran(demo, tmp_path / "cut", "--num_train_epochs", 2, "--dropout", 0.1, "--eval_interval", 2)
    assert "finished after 10 steps: nothing to do" in again


@pytest.mark.slow
def test_two_processes_that_are_stopped_leave_the_same_bytes(demo, tmp_path):
    same_bytes(demo, tmp_path, ["--zero_stage", 2], [stop_at(2, rank=1)], processes=2)


SETTINGS = [
    (1, "--zero_stage 1 --dtype bf16 --gradient_accumulation_steps 2 --per_device_train_batch_size 8"),
    (1, "--zero_stage 0 --dtype bf16"),
    (1, "--zero_stage 3 --gradient_checkpointing"),
    (1, "--zero_stage 2 --offload"),
    (1, "--zero_stage 3 --offload --dtype bf16"),
    (1, "--tokens_per_batch 2000 --gradient_accumulation_steps 2 --zero_stage 2"),
    (1, "--lora_dim 4 --lora_dropout 0.1"),
    (1, "--merge prompt --loss plackett_luce"),
    (1, "--pair_weight norm --margin similarity"),
    (1, "--contrastive_weight 1 --zero_stage 3"),
    (1, "--sft_weight 0.01 --keep_best loss --eval_interval 1"),
    (2, "--sft_weight 0.01 --zero_stage 3 --gradient_checkpointing"),
    (2, "--zero_stage 1 --dtype bf16"),
    (2, "--zero_stage 2 --gradient_accumulation_steps 2 --per_device_train_batch_size 8 --eval_interval 2"),
    (2, "--zero_stage 3 --dtype bf16"),
    (2, "--zero_stage 2 --dtype bf16 --pair_weight norm --contrastive_weight 1 --contrastive difference"),
    (2, "--lora_dim 4 --zero_stage 3"),
    (2, "--lora_dim 4 --zero_stage 2 --dtype bf16"),
    (2, "--keep_best loss --save_interval 2 --eval_interval 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), SETTINGS)
def test_every_setting_leaves_the_same_bytes(processes, flags, demo, tmp_path):
    stops = stop_at(2), stop_at(5, "SIGINT", rank=processes - 1)
    same_bytes(demo, tmp_path, ["--per_device_train_batch_size", 16, *flags.split()], stops, processes)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), [(1, ["--merge", "prompt"]), (2, ["--zero_stage", 2])])
def test_shifted_texts_leave_the_same_bytes(processes, flags, demo, tmp_path):
    flags = ["--meta_data", demo / "data" / "eval.jsonl", "--meta_batch_size", 3, "--meta_rate", 0.1, *flags]
    flags += ["--per_device_train_batch_size", 16]
    same_bytes(demo, tmp_path, flags, [stop_at(2), stop_at(5)], processes)


@pytest.mark.slow
def test_on_nvme_no_checkpoint_is_written_and_that_is_said(demo, tmp_path):
    """DeepSpeed writes one, and loads it without a word, and the weights are those of the start."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio (apt install libaio-dev)")
    (tmp_path / "disk").mkdir()
    flags = ["--deepspeed_config", "zero3_nvme.json", "--nvme_path", tmp_path / "disk", "--save_interval", 1]
    said = ran(demo, tmp_path / "out", *flags, signals=stop_at(2), status=1)
    assert "no checkpoints, so that an interrupted run is lost: DeepSpeed does not give back" in said
    assert "step 2: ended by SIGTERM before the end of the run, without a checkpoint of this step" in said
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_ordinal_thresholds_and_a_mixture_leave_the_same_bytes(demo, tmp_path):
    rows = [json.loads(line) for line in (demo / "data" / "train.jsonl").read_text().splitlines()[:120]]
    points = [{"prompt": r["prompt"], "response": r["chosen"], "score": i % 4} for i, r in enumerate(rows)]
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(row) + "\n" for row in points))
    flags = ["--data_path", demo / "data", f"{tmp_path}/points.jsonl:0.5", "--loss", "logistic", "ordinal"]
    same_bytes(demo, tmp_path, flags, [stop_at(2), stop_at(5)])


def test_a_killed_run_goes_on_from_the_newest_whole_checkpoint(demo, tmp_path):
    """With the newest one altered, from the one before; and what a kill left unfinished is removed."""
    flags = ["--num_train_epochs", 2, "--save_interval", 2]
    ran(demo, tmp_path / "whole", *flags)
    ran(demo, tmp_path / "cut", *flags, signals=stop_at(7, "SIGKILL"), status=-signal.SIGKILL)
    flip(next((tmp_path / "cut" / "checkpoints" / "step-00000006").glob("engine/*.pt")), 5_000)
    said = ran(demo, tmp_path / "cut", *flags)
    assert re.search(r"step-00000006 is not whole, and is left out: engine/\S+ has other bytes than were written", said)
    assert "resumed from step 4 of 10" in said
    assert what_is_left(tmp_path / "cut") == what_is_left(tmp_path / "whole")
    kept = sorted(os.listdir(tmp_path / "cut" / "checkpoints"))
    assert kept == ["step-00000008", "step-00000010"]


def test_other_settings_are_refused_by_name_and_more_epochs_are_not(demo, tmp_path):
    flags = ["--save_interval", 2, "--lr_scheduler_type", "constant"]
    ran(demo, tmp_path / "out", *flags)
    said = ran(demo, tmp_path / "out", *flags, "--learning_rate", 1e-4, status=1)
    assert "holds another run: --learning_rate (0.001 there, 0.0001 here). Name a new folder" in said
    said = ran(demo, tmp_path / "out", *flags, "--resume", "none", status=1)
    assert "name a new folder" in said
    for fewer in (["--max_steps", 3], ["--learning_rate", 1e-4, "--resume_anyway"]):  # nothing is left to be done
        before = (tmp_path / "out" / "run.json").read_bytes()
        said = ran(demo, tmp_path / "out", *flags, *fewer, status=1)
        assert "that run is finished after 5 steps, and these flags ask for" in said
        assert (tmp_path / "out" / "run.json").read_bytes() == before
    said = ran(demo, tmp_path / "out", *flags, "--num_train_epochs", 2)
    assert "resumed from step 5 of 10" in said
    ran(demo, tmp_path / "whole", *flags, "--num_train_epochs", 2)
    assert what_is_left(tmp_path / "out")[0] == what_is_left(tmp_path / "whole")[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(stage, before, after, demo, tmp_path):
    def flags(processes):
        return ["--zero_stage", stage, "--per_device_train_batch_size", 32 // processes, "--num_train_epochs", 2]

    ran(demo, tmp_path / "whole", *flags(before), processes=before)
    ran(demo, tmp_path / "cut", *flags(before), processes=before, signals=stop_at(3), status=75)
    said = ran(demo, tmp_path / "cut", *flags(after), processes=after)
    assert "resumed from step" in said
    one, other = (what_is_left(tmp_path / name)[1] for name in ("whole", "cut"))
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for first, second in zip(one, other):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
        assert first["pairs"] == second["pairs"]


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        pytest.param(1, "", marks=pytest.mark.slow),
        pytest.param(2, "--zero_stage 3", marks=pytest.mark.slow),
        pytest.param(1, "--lora_dim 4", marks=pytest.mark.slow),
        pytest.param(1, "--pooling mean", marks=pytest.mark.slow),
        pytest.param(2, "--zero_stage 2 --dtype bf16", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_becomes_the_model_that_the_run_would_have_saved(processes, flags, demo, tmp_path):
    """The run's last checkpoint is of its last step."""
    from reward_model.commands.export import main

    ran(demo, tmp_path / "out", "--save_interval", 1, *flags.split(), processes=processes)
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    assert main([str(newest), str(tmp_path / "model")]) == 0
    saved, exported = (what_is_left_of_model(tmp_path / name) for name in ("out", "model"))
    assert saved.keys() == exported.keys()
    for name, weight in saved.items():
        assert torch.equal(weight, exported[name]), name
    with pytest.raises(UserError, match="in use"):
        main([str(newest), str(tmp_path / "model")])


def what_is_left_of_model(folder):
    from safetensors.torch import load_file

    return {name: weight for path in folder.rglob("*model*.safetensors") for name, weight in load_file(path).items()}


def test_the_best_weights_are_saved_and_training_ends_early(demo, tmp_path):
    flags = ["--eval_interval", 1, "--num_train_epochs", 4, "--learning_rate", 1e-1, "--keep_best", "loss"]
    said = ran(demo, tmp_path / "out", *flags, "--early_stop", 3, "--save_interval", 2)
    _, records = what_is_left(tmp_path / "out")
    evaluations = {r["step"]: r["loss"] for r in records if r["split"] == "eval" and r["step"]}
    best = min(evaluations, key=evaluations.get)
    assert f"what is saved is the best of all evaluations, step {best}" in said
    assert max(evaluations) == best + 3
    assert f"no better loss in 3 evaluations since step {best}" in said
    assert "verified: loaded afresh" in said
    finished = json.loads((tmp_path / "out" / "finished.json").read_text())
    assert finished["metrics"]["loss"] == pytest.approx(evaluations[best], abs=1e-6)


def test_a_folder_is_one_run_s_alone(demo, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        said = ran(demo, tmp_path / "out", status=1)
    assert "another run is writing there" in said
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_pickle_in_a_checkpoint_is_not_run(demo, tmp_path):
    """Even where the manifest was written anew around it."""
    flags = ["--save_interval", 2]
    ran(demo, tmp_path / "out", *flags, signals=stop_at(3, "SIGKILL"), status=-signal.SIGKILL)
    place = tmp_path / "out" / "checkpoints" / "step-00000002"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    file = next(place.glob("engine/*.pt"))
    torch.save({"module": Malicious()}, file)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest.pop("sha256")
    name = f"engine/{file.name}"
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (place / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoint._hash_of(manifest)}))
    assert Checkpoint(place).fault() == ""
    result = runs.launch(*flags_of(demo, tmp_path / "out", *flags))
    assert result.returncode == 1
    assert "holds more than tensors and numbers" in result.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_an_adapter_alone_is_a_model_to_start_from(demo, tmp_path):
    """With its head: the first evaluation is the last one of the run that trained it."""
    ran(demo, tmp_path / "out", "--lora_dim", 4, "--lora_learning_rate", 1e-2)
    shutil.copytree(tmp_path / "out" / "adapter", tmp_path / "moved")
    said = ran(demo, tmp_path / "again", "--model_name_or_path", tmp_path / "moved", "--lora_dim", 4)
    assert f"moved is a LoRA adapter of {demo / 'model'}: merged into" in said
    (before, after) = (what_is_left(tmp_path / name)[1] for name in ("out", "again"))
    for name in ("loss", "chosen_mean", "rejected_std"):
        assert after[0][name] == pytest.approx(before[-1][name], abs=1e-5)
    said = ran(demo, tmp_path / "beside", "--model_name_or_path", tmp_path / "out" / "adapter")
    assert f"starting from {tmp_path / 'out'}, where it is merged" in said
