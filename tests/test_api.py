# SPDX-License-Identifier: Apache-2.0
"""Training from Python: the numbers of main.py, again in the same process, and silence when it is wanted."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import runs

import reward_model

AGAIN = """\
import json, logging, sys
import reward_model
model, data, folder, level, *flags = sys.argv[1:]
if level != "INFO":
    logging.getLogger("reward_model").setLevel(level)
values = dict(model_name_or_path=model, data_path=data, max_seq_len=256, learning_rate=1e-3, max_steps=8)
values |= json.loads(flags[0])
for run in json.loads(flags.pop()):
    result = reward_model.train(reward_model.RunConfig.of(**values, output_dir=f"{folder}/{run}"))
    assert result.report.is_file() and (result.folder / "model.safetensors").is_file()
    print("RESULT", json.dumps([result.metrics, result.steps, str(result.folder)]))
"""


def train_in_one_process(demo, folder, level="INFO", times=2, **flags):
    words = [sys.executable, "-c", AGAIN, demo / "model", demo / "data", folder, level, json.dumps(flags)]
    words.append(json.dumps([f"run {i}" for i in range(times)]))
    values = {name: v for name, v in runs.environment(PYTHONPATH=str(runs.TOP)).items() if name != "RANK"}
    result = subprocess.run(list(map(str, words)), env=values, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = result.stdout.splitlines()
    return [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("RESULT")], lines


@pytest.fixture(scope="module")
def of_main(demo, tmp_path_factory):
    return runs.train(demo, tmp_path_factory.mktemp("main") / "out", "--max_steps", 8)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_gives_main_s_numbers_and_does_so_again(demo, tmp_path, of_main, times):
    results, lines = train_in_one_process(demo, tmp_path, times=times)
    for metrics, steps, folder in results:
        assert metrics == {name: value for name, value in of_main.final.items() if name in metrics}
        assert metrics["pairs"] == runs.HELD_OUT
        assert steps == len(of_main.losses)
        losses = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert [record["loss"] for record in losses if record["split"] == "train"] == of_main.losses
    assert sum(line.startswith("held-out accuracy") for line in lines) == times


@pytest.mark.slow
def test_zero_3_can_be_run_again_in_a_process(demo, tmp_path, of_main):
    results, _ = train_in_one_process(demo, tmp_path, zero_stage=3)
    for metrics, _, _ in results:
        assert metrics["loss"] == pytest.approx(of_main.final["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_library_user_can_silence_it(demo, tmp_path):
    results, lines = train_in_one_process(demo, tmp_path, level="WARNING")
    assert len(results) == 2
    assert [line for line in lines if not line.startswith("RESULT")] == []


def test_an_error_is_raised():
    config = reward_model.RunConfig.of(model_name_or_path="./nowhere", data_path="x")
    with pytest.raises(reward_model.UserError, match=r"--model_name_or_path \./nowhere: no such folder"):
        reward_model.train(config)
    assert config.given == {"model_name_or_path", "data_path"}


def test_logging_that_was_set_up_before_is_left_as_it_is():
    from reward_model.common.logging import logger, show_messages

    before = list(logger.handlers), logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    try:
        show_messages()
        assert (logger.level, logger.propagate, logger.handlers) == (logging.ERROR, True, before[0])
    finally:
        logger.setLevel(before[1])


@pytest.mark.slow
def test_python_m_reward_model_train(demo, tmp_path):
    """The command is main.py, which the package has even where there is no checkout."""
    flags = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--learning_rte", 1]
    words = [sys.executable, "-m", "reward_model", "train", *map(str, flags)]
    result = subprocess.run(words, cwd=runs.TOP, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "--learning_rte 1; did you mean --learning_rate?" in result.stderr.splitlines()[-1]
    flags = [*flags[:4], "--output_dir", tmp_path / "out", "--max_seq_len", 256, "--learning_rate", 1e-3]
    (tmp_path / "run.yaml").write_text("learning_rate: 7\nseed: 1234\n")
    words = [sys.executable, "-m", "reward_model", "train", "--config", str(tmp_path / "run.yaml"), *map(str, flags)]
    result = subprocess.run(words, cwd=runs.TOP, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    again = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (again["learning_rate"], "seed" in again["given"]) == (1e-3, True)
