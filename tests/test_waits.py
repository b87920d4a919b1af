# SPDX-License-Identifier: Apache-2.0
"""How often a step makes the host wait for the GPU, by place: no more than helpers/waits.json allows, and no fewer.

Counted without a GPU, by the real trainer and DeepSpeed's engine on fake tensors: helpers/ledger.py.
"""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).parent / "helpers"
ALLOWED = json.loads((HELPERS / "waits.json").read_text())
INSTALLED = {name: metadata.version(name).split("+")[0] for name in ALLOWED["versions"]}

pytestmark = [
    pytest.mark.skipif(
        bool(torch.version.cuda) or not shutil.which("g++"),
        reason="needs a CPU build of torch, for which g++ compiles a guard: one with CUDA asks the driver",
    ),
    pytest.mark.skipif(
        ALLOWED["versions"] != INSTALLED, reason=f"waits were counted with {ALLOWED['versions']}, not {INSTALLED}"
    ),
]


def waits(demo, *flags):
    """Place → waits of a step of two micro-batches."""
    paths = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--data_output_path", demo / "cache"]
    sizes = ["--max_seq_len", 256, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    words = [sys.executable, HELPERS / "ledger.py", *paths, *sizes, *flags]
    done = subprocess.run([str(word) for word in words], cwd=HELPERS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=pytest.mark.slow if number else [], id=run["flags"])
        for number, run in enumerate(ALLOWED["runs"])
    ],
)
def test_a_step_waits_no_more_than_it_did(run, demo):
    found, allowed = waits(demo, *run["flags"].split()), run["waits"]
    more = {place: number for place, number in found.items() if number > allowed.get(place, 0)}
    fewer = {place: found.get(place, 0) for place, number in allowed.items() if number > found.get(place, 0)}
    assert not more, f"a step waits for the GPU more often than {allowed}: {more}"
    assert not fewer, f"a step waits less often: lower the numbers in helpers/waits.json to {fewer}"


@pytest.mark.slow
def test_planted_waits_are_counted(demo):
    """Each once in each of two micro-batches, and no other wait changes."""
    run = ALLOWED["runs"][0]
    place = "reward_model/training/trainer.py train_micro_batch"
    planted = {f"{place}: a number is read": 2, f"{place}: a copy to cpu": 2}
    assert waits(demo, "--plant", *run["flags"].split()) == run["waits"] | planted
