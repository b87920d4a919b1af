# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed needs of a machine before it can start, and the dtype of a device."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from torch.utils import cpp_extension

from reward_model.common import distributed
from reward_model.common.distributed import link_from_a_path_with_spaces
from reward_model.common.errors import UserError


@pytest.mark.parametrize("cache", ["cache", "a cache"])
def test_ops_are_linked_by_a_path_without_spaces(cache, tmp_path, monkeypatch):
    library = tmp_path / "a folder" / "lib"
    library.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    found = []
    for _ in range(2):
        monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(library))
        link_from_a_path_with_spaces()
        found.append(cpp_extension.TORCH_LIB_PATH)
        assert " " not in found[-1]
        assert Path(found[-1]).resolve() == library.resolve()
    assert (found[0] == found[1]) == (cache == "cache")  # the same link compiles nothing anew


def test_a_path_without_spaces_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(tmp_path))
    link_from_a_path_with_spaces()
    assert str(tmp_path) == cpp_extension.TORCH_LIB_PATH


def test_default_dtype_follows_the_device(monkeypatch):
    import deepspeed.accelerator as accelerators

    class Device:
        def __init__(self, name, bfloat16):
            self.device_name = lambda: name
            self.is_bf16_supported = lambda: bfloat16

    expected = {("cuda", True): "bf16", ("cuda", False): "fp16", ("cpu", True): "fp32"}
    for device, dtype in expected.items():
        monkeypatch.setattr(accelerators, "get_accelerator", lambda device=device: Device(*device))
        assert distributed.default_dtype() == dtype


@pytest.mark.parametrize("listed, environment, refused", [
    ("GPU 0: H100 (UUID: x)\nGPU 1: H100 (UUID: y)\n", {}, True),
    ("GPU 0: H100 (UUID: x)\n", {"CUDA_VISIBLE_DEVICES": ""}, False),
    ("GPU 0: H100 (UUID: x)\n", {"DS_ACCELERATOR": "cpu"}, False),
    ("No devices were found\n", {}, False),
])  # fmt: skip
def test_gpus_that_torch_does_not_see_stop_the_run(listed, environment, refused, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = r"nvidia-smi lists 2 GPUs and torch \S+ sees none: .*CUDA_VISIBLE_DEVICES= trains"
    with pytest.raises(UserError, match=message) if refused else contextlib.nullcontext():
        distributed.require_no_unseen_gpu()


def test_the_soft_limit_of_open_files_rises():
    code = (
        "import resource, reward_model.common.distributed as d; _, hard = resource.getrlimit(resource.RLIMIT_NOFILE);"
    )
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard)); d.allow_open_files(900);"
    code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "900\n"


@pytest.mark.parametrize("environment, message", [
    pytest.param(
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is set in the environment without MASTER_ADDR, M",
        marks=pytest.mark.slow,
    ),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: each process of mpirun would be a run of its own"),
])  # fmt: skip
def test_half_of_a_launcher_ends_in_a_line(environment, message, demo, tmp_path):
    flags = ("--model_name_or_path", demo / "model", "--data_path", demo / "data", "--output_dir", tmp_path / "out")
    words = [sys.executable, str(runs.SCRIPTS / "main.py"), *map(str, flags)]
    result = subprocess.run(words, env=runs.environment(**environment), capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
