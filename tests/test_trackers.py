# SPDX-License-Identifier: Apache-2.0
"""Trackers: which ones the flags ask for, what they are told, and what becomes of a run when one fails."""

import csv
import json
import shutil
from importlib import metadata

import pytest
from test_checkpoints import ran, stop_at

from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.config.options import RunConfig, require_trackers
from reward_model.training.records import Records
from reward_model.training.trackers import KEPT, Trackers, without_tokens

try:
    metadata.version("wandb")
    HAS_WANDB = True
except metadata.PackageNotFoundError:
    HAS_WANDB = False


def output(**values):
    return RunConfig.of(model_name_or_path="m", **values).output


# --- flags ---


def test_upstreams_flag_is_one_of_the_trackers():
    assert output().trackers == []
    assert output(report_to=["none"]).trackers == []
    assert output(enable_tensorboard=True, report_to=["tensorboard"]).trackers == ["tensorboard"]
    found = output(report_to=["csv", "wandb"], enable_tensorboard=True, output_dir="out")
    assert found.trackers == ["tensorboard", "wandb", "csv"]
    assert found.tensorboard_folder == "out/tensorboard"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"report_to": ["mlflow"]}, "--report_to mlflow: choose from tensorboard, wandb, csv, none"),
        ({"report_to": ["none", "wandb"]}, "--report_to none, and a tracker beside it"),
        ({"report_to": ["none"], "enable_tensorboard": True}, "--enable_tensorboard is one"),
        ({"report_to": ["csv"]}, "--report_to csv without --output_dir"),
    ],
)
def test_what_is_no_choice_is_one_line(values, said):
    with pytest.raises(UserError, match=said) as caught:
        output(**values)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_not_there_is_named_before_the_model_is_loaded(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("reward_model.config.options.metadata.version", missing)
    require_trackers({"csv_monitor": {"enabled": True}, "wandb": {"enabled": False}})
    with pytest.raises(UserError, match=r"--report_to wandb needs a package that is not here: pip install wandb"):
        require_trackers({"wandb": {"enabled": True}})


def test_a_command_line_is_kept_without_its_tokens():
    words = [
        "main.py",
        "--hub_token",
        "abc",
        "--hub-token=abc",
        "--data_path",
        "https://me:pw@host/x",
        "hf_" + "a" * 20,
    ]
    assert without_tokens(words) == [
        *("main.py", "--hub_token", "***", "--hub-token=***"),
        *("--data_path", "https://***@host/x", "hf_***"),
    ]


# --- what they are told ---


class Monitor:
    def __init__(self, fails_at=None):
        self.events, self.fails_at = [], fails_at

    def write_events(self, events):
        if self.fails_at is not None and events[0][2] >= self.fails_at:
            raise OSError(28, "No space left on device")
        self.events += events


def test_one_that_fails_is_said_once_and_the_others_go_on(capsys):
    broken, whole = Monitor(fails_at=2), Monitor()
    records = Records(None, Trackers({"tensorboard": broken, "csv_monitor": whole}), True)
    for step in range(1, 5):
        records.add({"split": "train", "step": step, "loss": 0.5, "pairs": 3, "epoch": 0.1})
    assert broken.events == [("train/loss", 0.5, 1)]
    assert whole.events == [("train/loss", 0.5, step) for step in range(1, 5)]
    said = capsys.readouterr().out
    assert said.count("tensorboard: [Errno 28] No space left on device; the run goes on without it") == 1


def test_a_run_that_goes_on_tells_no_step_twice(tmp_path):
    first = Monitor()
    records = Records(tmp_path, Trackers({"csv_monitor": first}), True)
    for step in range(1, 5):
        records.add({"split": "train", "step": step, "loss": 1.0})
    records.add({"split": "eval", "step": 4, "set": "chat", "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')  # killed while it wrote
    second = Monitor()
    again = Records(tmp_path, Trackers({"csv_monitor": second}), True)
    again.cut(2)  # its checkpoint
    for step in range(3, 6):
        again.add({"split": "train", "step": step, "loss": 1.0})
    for name in ("chat", "code"):
        again.add({"split": "eval", "step": 4, "set": name, "loss": 1.0})
    assert second.events == [("train/loss", 1.0, 5), ("eval/code/loss", 1.0, 4)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 + 3 + 2


def started(monkeypatch, folder, goes_on):
    """Where Weights & Biases, a stand-in for it, cannot be reached."""
    monkeypatch.setattr("reward_model.training.trackers._monitor", lambda name, sections: 1 / 0)
    context = DistributedContext(rank=0, world_size=1, device="cpu")
    monkeypatch.setattr("reward_model.common.distributed.first_text", lambda text: text)
    return Trackers.start({"csv_monitor": {"enabled": True}}, context, folder, None, {}, goes_on)


def test_one_that_cannot_begin_ends_a_new_run_and_no_old_one(monkeypatch, tmp_path, capsys):
    with pytest.raises(UserError, match="--report_to csv_monitor: division by zero"):
        started(monkeypatch, tmp_path, goes_on=False)
    assert started(monkeypatch, tmp_path, goes_on=True).monitors == {}
    assert "csv_monitor: division by zero; the run goes on without it" in capsys.readouterr().out


# --- runs ---


def cells(path):
    with path.open() as file:
        return list(csv.reader(file))


def test_a_killed_run_goes_on_in_its_csv_and_tensorboard_files(demo, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    flags = ["--report_to", "csv", "tensorboard", "--num_train_epochs", 2, "--save_interval", 2]
    ran(demo, out, *flags, signals=stop_at(5, "SIGKILL"), status=-9)
    assert "resumed from step 4" in ran(demo, out, *flags)
    steps = [str(step) for step in range(1, 11)]
    found = cells(out / "csv" / "train_loss.csv")
    assert found[0] == ["step", "loss"]
    assert [step for step, _ in found[1:]] == steps
    assert [step for step, _ in cells(out / "csv" / "eval_accuracy.csv")] == ["step", "0", "5", "10"]
    (board,) = {path.parent for path in (out / "tensorboard").rglob("events.out*")}
    events = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert not [tag for tag in events.Tags()["scalars"] if not tag.startswith(("train/", "eval/"))]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_weights_and_biases_offline(demo, tmp_path):
    """Really by wandb: one run of the same id, although its end was lost; and no token in what it keeps."""
    out, secret = tmp_path / "out", "a-token-that-nobody-may-read"
    flags = ["--report_to", "wandb", "--run_name", "a name", "--num_train_epochs", 2, "--save_interval", 2]
    flags += ["--hub_token", secret]
    offline = {"environment": {"WANDB_MODE": "offline"}, "timeout": 900}
    ran(demo, out, *flags, "--max_steps", 3, **offline)
    (first,) = (out / "wandb").glob("offline-run-*")
    kept = json.loads((out / KEPT).read_text())["wandb"]
    assert first.name.endswith(kept)
    shutil.rmtree(out / "checkpoints" / "step-00000003")  # as if it had been killed before it wrote this
    (out / "finished.json").unlink()
    assert "resumed from step 2" in ran(demo, out, *flags, "--max_steps", 5, **offline)
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(kept) for folder in folders)
    assert [sorted(set(history(folder))) for folder in folders] == [list(range(4)), [4, 5]]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert b"--hub_token" in b"".join(path.read_bytes() for path in files if path.suffix == ".wandb")


def history(folder):
    """The steps in the file that wandb keeps of a run: records of its protobuf in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    content, at, data, steps = path.read_bytes(), 7, b"", []  # after ":W&B", a magic number and a version
    while at < len(content):
        if (left := 32_768 - at % 32_768) < 7:  # what is left of a block has no room for a header
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, data = Record.FromString(data), b""
            steps += [record.history.step.num] if record.WhichOneof("record_type") == "history" else []
    return steps
