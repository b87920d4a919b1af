# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed configuration: every "auto" filled, and no file and flag that disagree in silence."""

import itertools
import json
import shlex

import pytest

from reward_model.common.errors import UserError
from reward_model.config.deepspeed import ZERO_FOLDER, set_up_deepspeed
from reward_model.config.options import parse

FILES = sorted(path.stem for path in ZERO_FOLDER.glob("zero?*.json") if path.stem not in ("zero3_nvme", "zeropp"))
LINES = (
    "",
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --max_grad_norm 0.5",
    "--max_grad_norm 0 --enable_tensorboard --tensorboard_path logs",
)


def options(line=""):
    return parse(["--model_name_or_path", "m", *shlex.split(line)])


def setup(line="", world_size=1, hidden=64, dtype="fp32"):
    """``dtype``: what auto means on the machine."""
    return set_up_deepspeed(options(line), dtype, world_size, hidden)


def configured(line="", world_size=1, hidden=64, dtype="fp32"):
    return setup(line, world_size, hidden, dtype).config


def flags_of(name):
    """The flags that choose a file of zero/."""
    return f"--zero_stage {name[4]}" + (" --offload" if name.endswith("_offload") else "")


def autos(value):
    if isinstance(value, dict):
        return sum(autos(inner) for inner in value.values())
    return sum(autos(inner) for inner in value) if isinstance(value, list) else int(value == "auto")


@pytest.fixture
def write(tmp_path):
    """Writes a configuration and returns the flag that names it."""

    def write_file(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"--deepspeed_config {path}"

    return write_file


def message(line, dtype="fp32", world_size=1):
    with pytest.raises(UserError) as caught:
        setup(line, world_size, dtype=dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_is_a_file_for_every_stage_with_and_without_offload():  # those chosen by name: test_zero.py
    assert FILES == ["zero0", "zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_does_what_its_name_says(name):
    zero = configured(flags_of(name), 1, 64)["zero_optimization"]
    offloaded = {key for key in zero if key.startswith("offload")}
    assert zero["stage"] == int(name[4])
    assert offloaded == {
        "zero1_offload": {"offload_optimizer"},
        "zero2_offload": {"offload_optimizer"},
        "zero3_offload": {"offload_optimizer", "offload_param"},
    }.get(name, set())
    assert all(zero[key]["device"] == "cpu" for key in offloaded)


@pytest.mark.parametrize("name", FILES)
def test_no_auto_is_left(name):
    for line, dtype, world_size in itertools.product(LINES, ("fp32", "bf16", "fp16"), (1, 2, 8)):
        config = configured(f"{flags_of(name)} {line} --dtype {dtype}", world_size, 4096)
        assert autos(config) == 0
        assert config["bf16"]["enabled"] is (dtype == "bf16")
        assert config["fp16"]["enabled"] is (dtype == "fp16")


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_what_is_filled_in(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    for line, dtype in itertools.product(LINES, ("fp32", "bf16", "fp16")):
        words = f"{flags_of(name)} {line} --dtype {dtype}"
        decided = setup(words)
        accepted = DeepSpeedConfig(decided.config)  # a process group of one
        assert accepted.zero_config.stage == decided.zero_stage
        assert accepted.train_micro_batch_size_per_gpu == decided.micro_batch
        assert accepted.gradient_accumulation_steps == decided.accumulation
        assert accepted.gradient_clipping == decided.max_grad_norm
        assert (accepted.bfloat16_config.enabled, accepted.float16_config.enabled) == (dtype == "bf16", dtype == "fp16")
        assert (accepted.zero_config.offload_optimizer is not None) is decided.offload
        assert accepted.monitor_config.tensorboard.enabled is options(words).output.enable_tensorboard


def test_the_global_batch_is_the_product():
    line = "--per_device_train_batch_size 4 --gradient_accumulation_steps 3"
    config = configured(line, 5, 64)
    assert config["train_batch_size"] == 60
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3


def test_buckets_follow_the_hidden_size():
    zero = configured("--zero_stage 3", 1, 10_000)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 100_000_000
    assert zero["stage3_prefetch_bucket_size"] == 90_000_000
    assert zero["stage3_param_persistence_threshold"] == 100_000
    assert all(type(size) is int for key, size in zero.items() if key.endswith(("_size", "_threshold")))


@pytest.mark.parametrize("flags", ["--zero_stage 1", "--zero_stage 1 --offload", "--zero_stage 2", "--zero_stage 3"])
def test_a_small_model_sends_what_fills_a_link(flags):
    zero = configured(flags, 1, 1000)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096**2
    assert zero.get("stage3_prefetch_bucket_size", 15_099_494) == 15_099_494  # 0.9 of it
    assert zero.get("stage3_param_persistence_threshold", 10_000) == 10_000


def test_a_bucket_size_of_the_file_stays(write):
    zero = {"stage": 2, "reduce_bucket_size": 12345}
    assert configured(write({"zero_optimization": zero}), 1, 64)["zero_optimization"] == zero


def test_keys_that_no_flag_knows_stay(write):
    extra = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}}
    config = configured(write(extra | {"steps_per_print": 7}), 1, 64)
    assert config["steps_per_print"] == 7
    assert {key: config[key] for key in extra} == extra


FILE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 5,
    "gradient_clipping": 0.25,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def test_values_of_the_file_are_taken_where_no_flag_is_given(write):
    decided = setup(write(FILE), 3)
    assert (decided.micro_batch, decided.accumulation) == (2, 5)
    assert (decided.max_grad_norm, decided.dtype, decided.zero_stage, decided.offload) == (0.25, "bf16", 2, True)
    assert decided.config["train_batch_size"] == 30
    assert decided.config["bf16"]["enabled"] is True


def test_flags_that_say_what_the_file_says_are_no_contradiction(write):
    same = (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 5 --max_grad_norm 0.25 --dtype bf16 "
        "--zero_stage 2 --offload"
    )
    line = write(FILE | {"train_batch_size": 10})
    assert configured(f"{line} {same}") == configured(line)


@pytest.mark.parametrize(
    ("content", "dtype", "key"),
    [
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16", "bf16.check_grad_overflow"),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "fp32",
            "zero_optimization.compute_grad_norm",
        ),
    ],
)
def test_gradients_have_to_be_looked_at(write, content, dtype, key):
    assert f"with {key} false, a gradient that is not finite" in message(f"{write(content)} --dtype {dtype}")


def test_offload_false_contradicts_a_file_that_offloads(write):
    assert "--offload false and" in message(f"{write(FILE)} --offload=false")


def test_flags_fill_what_the_file_leaves_out(write):
    line = "--per_device_train_batch_size 3 --gradient_accumulation_steps 7 --max_grad_norm 2 --dtype bf16"
    config = configured(f"{write({})} {line}", 1, 64)
    assert (config["train_batch_size"], config["gradient_clipping"], config["bf16"]["enabled"]) == (21, 2.0, True)


def test_the_stage_flag_fills_a_file_without_a_stage(write):
    config = configured(f"{write({'gradient_clipping': 'auto'})} --zero_stage 2", 1, 64)
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (FILE, "--per_device_train_batch_size 4", ["--per_device_train_batch_size 4", "2"]),
        (FILE, "--gradient_accumulation_steps 1", ["--gradient_accumulation_steps 1", "5"]),
        (FILE, "--max_grad_norm 1.0", ["--max_grad_norm 1.0", "gradient_clipping 0.25"]),
        (FILE, "--zero_stage 3", ["--zero_stage 3", "stage 2"]),
        (FILE, "--dtype fp16", ["--dtype fp16", "bf16"]),
        (FILE, "--dtype fp32", ["--dtype fp32", "bf16"]),
        ({"fp16": {"enabled": True}}, "--dtype bf16", ["--dtype bf16", "fp16"]),
        ({"bf16": {"enabled": False}}, "--dtype bf16", ["--dtype bf16", "disabled"]),
        ({"zero_optimization": {"stage": 1}}, "--offload", ["--offload", "offload_optimizer"]),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}},
            "--offload",
            ["--offload", "offload_optimizer"],
        ),
        (
            {"train_batch_size": 7},
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
            ["train_batch_size 7", "--per_device_train_batch_size", "8"],
        ),
        (
            {"tensorboard": {"enabled": True, "output_path": "there"}},
            "--enable_tensorboard --tensorboard_path here",
            ["--tensorboard_path", "here", "there"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_names_file_and_flag(write, content, line, words):
    flag = write(content)
    text = message(f"{flag} {line}")
    assert [word for word in [flag.split()[1], *words] if word not in text] == []


def test_the_global_batch_of_the_file_counts_all_processes(write):
    line = f"{write({'train_batch_size': 8})} --per_device_train_batch_size 2"
    assert configured(line, 4, 64)["train_batch_size"] == 8
    assert "3 processes" in message(line, world_size=3)


@pytest.mark.parametrize("half", [{"device": "none"}, {}, None], ids=str)
def test_an_offload_section_that_offloads_nothing_is_no_offload(write, half):
    assert setup(write({"zero_optimization": {"stage": 1, "offload_optimizer": half}})).offload is False


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_sections_that_the_trainer_makes_are_refused(write, section):
    text = message(write({section: {"type": "AdamW", "params": {"lr": "auto"}}}))
    assert f"section {section}" in text
    assert {"optimizer": "--learning_rate", "scheduler": "--lr_scheduler_type"}[section] in text


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}, "stage3_max_live_parameters"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}, "offload_optimizer.device"),
        ({"fp16": {"enabled": "auto", "loss_scale": "auto"}}, "fp16.loss_scale"),
        ({"data_types": {"grad_accum_dtype": "auto"}}, "data_types.grad_accum_dtype"),
        ({"comms_logger": {"prof_ops": ["all_reduce", "auto"]}}, "comms_logger.prof_ops.1"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_auto_that_nothing_fills_is_refused_with_its_path(write, content, where):
    flag = write(content)
    text = message(flag)
    assert where in text
    assert flag.split()[1] in text


@pytest.mark.parametrize("content", ["", "{", "{'stage': 1}", '{"a": 1,}', "[]", "3", "null", '"auto"'])
def test_what_is_not_a_json_object_is_refused(write, content):
    flag = write(content)
    text = message(flag)
    assert flag.split()[1] in text
    assert "JSON" in text


def test_a_missing_file_is_refused(tmp_path):
    text = message(f"--deepspeed_config {tmp_path}/none.json")
    assert f"{tmp_path}/none.json" in text
    assert "No such file" in text


def test_a_folder_is_no_file(tmp_path):
    assert str(tmp_path) in message(f"--deepspeed_config {tmp_path}")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    assert "ds.json" in message(f"--deepspeed_config {tmp_path}/ds.json")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"zero_optimization": True}, "zero_optimization"),
        ({"fp16": "auto"}, "fp16"),
        ({"zero_optimization": {"stage": 5}}, "stage"),
        ({"zero_optimization": {"stage": "2"}}, "stage"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu"),
        ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps"),
        ({"gradient_clipping": "often"}, "gradient_clipping"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, "offload_optimizer"),
    ],
    ids=str,
)
def test_a_value_of_the_file_is_checked_like_a_flag(write, content, key):
    assert key in message(write(content))


def test_both_half_precisions_are_refused(write):
    text = message(write({"bf16": {"enabled": True}, "fp16": {"enabled": True}}))
    assert "both bf16 and fp16" in text


def test_both_half_precisions_disabled_is_float32(write):
    decided = setup(write({"bf16": {"enabled": False}, "fp16": {"enabled": False}}), dtype="bf16")  # as on a GPU
    assert decided.dtype == "fp32"
    assert decided.config["bf16"]["enabled"] is decided.config["fp16"]["enabled"] is False


def test_the_files_loss_scale_stays(write):
    config = configured(f"{write({'fp16': {'enabled': 'auto', 'loss_scale': 64}})} --dtype fp16", 1, 64)
    assert config["fp16"] == {"enabled": True, "loss_scale": 64}


@pytest.mark.parametrize("from_file", [False, True])
def test_float16_at_stage_0_becomes_stage_1_and_says_so(write, caplog, monkeypatch, from_file):
    monkeypatch.setenv("RANK", "0")
    decided = setup(write({"fp16": {"enabled": True}}) if from_file else "--dtype fp16 --zero_stage 0")
    assert decided.zero["stage"] == decided.zero_stage == 1
    assert "using stage 1" in caplog.text


def test_bfloat16_at_stage_0_becomes_stage_1_on_gpus_and_says_so(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    decided = set_up_deepspeed(options("--dtype bf16"), "bf16", 1, 64, on_gpu=True)
    assert decided.zero["stage"] == decided.zero_stage == 1
    assert "bfloat16 at ZeRO stage 0" in caplog.text
    assert set_up_deepspeed(options("--dtype fp32"), "bf16", 1, 64, on_gpu=True).zero_stage == 0


def test_the_timer_that_waits_for_the_gpu_is_off_unless_the_file_has_it(write):
    assert setup("").config["timers"] == {"throughput": {"enabled": False}}
    assert setup(write({"timers": {"throughput": {"enabled": True}}})).config["timers"]["throughput"]["enabled"] is True


@pytest.mark.parametrize("line", ["--dtype fp16 --zero_stage 2", "--dtype bf16", "--dtype fp32"])
def test_no_other_stage_or_dtype_is_changed(line, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    decided, asked = setup(line), options(line).engine
    assert decided.zero["stage"] == decided.zero_stage == asked.zero_stage
    assert decided.dtype == ("fp32" if asked.dtype == "auto" else asked.dtype)
    assert caplog.text == ""


def test_tensorboard_goes_where_the_flag_says():
    assert configured("--enable_tensorboard --tensorboard_path logs", 1, 64)["tensorboard"] == {
        "enabled": True,
        "output_path": "logs/ds_tensorboard_logs/",
        "job_name": "step2_model_tensorboard",
    }
    assert "tensorboard" not in configured("--tensorboard_path logs", 1, 64)


def test_the_tensorboard_section_of_the_file_stays_without_the_flag(write):
    section = {"enabled": True, "output_path": "there", "job_name": "run"}
    assert configured(write({"tensorboard": section}), 1, 64)["tensorboard"] == section
