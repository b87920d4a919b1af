# SPDX-License-Identifier: Apache-2.0
"""FlexAttention as this package calls it, compiled by Triton for GPUs that are absent, and its kernels' numbers.

Whether a kernel fits a GPU is whether the shared memory that it takes is no more than a block may have there. A kernel
that does not fit is refused by the real GPU when it is first launched, and the trainer then takes another way. All of
it needs Triton, and no GPU: ``pip install --target FOLDER triton==3.7.1``, and FOLDER on PYTHONPATH.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton"),
    pytest.mark.skipif(
        bool(torch.version.cuda) or not shutil.which("g++"),
        reason="needs a CPU build of torch, for which g++ compiles a guard: one with CUDA asks the driver",
    ),
]

HELPERS = Path(__file__).parent / "helpers"
DIMS = (64, 80, 96, 128, 256)
GPUS = {80: "A100", 89: "L4", 90: "H100", 100: "B200", 120: "RTX 5090"}
# capability, dtype → head sizes whose kernels do not fit, forward or backward
TOO_LARGE = {(89, "bf16"): {256}, (120, "bf16"): {256}}  # both ways on the L4, backward on the RTX 5090


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """Runs a program of helpers/; the lines of JSON that it printed."""
    caches = tmp_path_factory.mktemp("compiled")

    def run(program, *words, **environment):
        own = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        done = subprocess.run(
            [sys.executable, str(HELPERS / program), *map(str, words)],
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


def row(line, kernel):
    """A line of the table."""
    which = "backward" if "backward" in kernel["name"] else "forward"
    return (
        f"{GPUS[line['capability']]:8} {line['dtype']} {line['dim']:4} {line['shapes']:7} {which:8} "
        f"shared {kernel['shared']:7} of {kernel['limit']:7}, registers {kernel['registers']:3}, "
        f"stack {kernel['stack']:5}{'' if kernel['fits'] else '  does not fit'}"
    )


@pytest.mark.parametrize(("capability", "dtype"), [*[(one, "bf16") for one in GPUS], (90, "fp32")])
def test_which_kernels_fit(capability, dtype, child):
    """``pytest -s`` shows the table."""
    lines = child("triton_trials.py", "matrix", "--capability", capability, "--dtype", dtype, "--dims", *DIMS)
    print("", *[row(line, kernel) for line in lines for kernel in line["kernels"]], sep="\n")
    assert [(line["dim"], line["shapes"]) for line in lines] == [(d, s) for d in DIMS for s in ("static", "dynamic")]
    assert all(line["error"] is None for line in lines), lines
    for line in lines:
        assert ["backward" in kernel["name"] for kernel in line["kernels"]] == [False, True]
    too_large = {line["dim"] for line in lines for kernel in line["kernels"] if not kernel["fits"]}
    assert too_large == TOO_LARGE.get((capability, dtype), set())


def test_few_graphs_serve_all_lengths(child):
    """The second length asks for kernels of any length, and no other asks for more, in training or in evaluations."""
    (found,) = child("triton_trials.py", "graphs")
    assert found["breaks"] == 0
    assert found["graphs"][1] == found["graphs"][-1] <= found["recompile_limit"]


def test_the_kernels_numbers(child, tmp_path):
    """float32, forward and backward, on a row of two comparisons."""
    child("triton_trials.py", "programs", "--file", tmp_path / "programs.json")
    (found,) = child("triton_interpret.py", tmp_path / "programs.json")
    assert found.pop("control")["difference"] > 0.1
    assert found.keys() == {"output", "gradient of query", "gradient of key", "gradient of value"}
    for name, numbers in found.items():
        assert numbers["difference"] <= 1e-5 * numbers["largest"], name
        assert numbers["largest"] > 1
