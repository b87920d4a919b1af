# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed needs of a machine before it can start, and the dtype of a device."""

from pathlib import Path

import pytest
from torch.utils import cpp_extension

from reward_model.common import distributed
from reward_model.common.distributed import link_from_a_path_with_spaces


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
