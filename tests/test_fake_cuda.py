# SPDX-License-Identifier: Apache-2.0
"""On a GPU nothing of a micro-batch makes the host wait or mixes devices; shown without a GPU, on fake CUDA tensors.

helpers/fake_cuda_trials.py does all trials in one process; each test here reads what one of them raised. Which faults
such tensors notice, and which they do not, is tried too.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda_trials
import pytest
import torch

pytestmark = pytest.mark.skipif(
    bool(torch.version.cuda) or not shutil.which("g++"),
    reason="needs a CPU build of torch, for which g++ compiles a guard: one with CUDA asks the driver",
)

NOT_NOTICED = {
    "index by a CPU tensor",  # a copy that the host waits for
    "cpu",  # likewise
    "a tensor made of a list",  # likewise
    "a CPU number",  # no fault: it goes along with the kernel
}
CAUGHT = [name for name in [*fake_cuda_trials.CONTROLS, fake_cuda_trials.IN_PLACE] if name not in NOT_NOTICED]


@pytest.fixture(scope="module")
def raised():
    """Trial → what it raised; None: nothing."""
    words = [sys.executable, fake_cuda_trials.__file__]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = map(json.loads, done.stdout.splitlines())
    return {result["trial"]: result["raised"] for result in found}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_fault_is_noticed(name, raised):
    error = raised[f"controls {name}"]
    assert error and error.split(":")[0] in (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "FakeTensorDeviceMismatchError",
        "RuntimeError",
    )


@pytest.mark.parametrize("name", sorted(NOT_NOTICED))
def test_what_is_known_to_pass_unnoticed(name, raised):
    """Should one of these fail, fake tensors have learned to notice it: move it out of the set."""
    assert raised[f"controls {name}"] is None


@pytest.mark.parametrize("flags", fake_cuda_trials.FLAGS)
@pytest.mark.parametrize("way", ["separate", "dense"])
def test_an_objective_never_waits(way, flags, raised):
    assert raised[f"objectives {way} {flags}"] is None


@pytest.mark.parametrize("family", fake_cuda_trials.CONFIGS)
@pytest.mark.parametrize("way", ["flex", "varlen"])
def test_the_kernels_of_a_gpu_never_wait(way, family, raised):
    assert raised[f"{way} {family}"] is None
