# SPDX-License-Identifier: Apache-2.0
"""Device "cuda" for fake tensors on a CPU build of PyTorch, so that code for a GPU can be tried without one.

A fake tensor has a device, a shape and a dtype, and no numbers. Whatever has to see a number, and so would make the
host wait for the GPU, raises; so do operations on tensors of two devices. A build with CUDA knows the device, and asks
the driver for it where gradients are computed. A CPU build does not know it: it has no guard for it, and no hooks.
:func:`install` compiles both, which say that there is one GPU and do nothing, and loads them before torch, which asks
for the hooks only once. Hence a process of its own. It ends by ``os._exit``: autograd has a thread for the GPU, which
nothing joins.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device the_gpu(c10::DeviceType::CUDA, 0);
const c10::Stream the_stream(c10::Stream::DEFAULT, the_gpu);

struct NoGpuGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return static_type; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return the_gpu; }
  c10::Device exchangeDevice(c10::Device) const override { return the_gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return the_stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return the_stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return the_stream; }
};

struct NoGpuHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs) { return std::make_unique<NoGpuHooks>(); }

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, NoGpuGuard)

[[maybe_unused]] const bool registered = [] {
  at::CUDAHooksRegistry()->Register("CUDAHooks", make_hooks);
  return true;
}();
"""


def install() -> None:
    """Let fake tensors be on "cuda"; for a CPU build.

    Raises:
        RuntimeError: torch has been imported, or is built with CUDA.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported, and asks for the hooks of CUDA only once")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    version = (torch_folder / "version.py").read_text()
    if re.search(r"^cuda\b.* = '", version, re.MULTILINE):
        raise RuntimeError("a build of torch with CUDA asks the driver for its device")
    library = folder() / f"{hashlib.sha256((SOURCE + version).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        compile_guard(torch_folder, library)
    ctypes.CDLL(str(library))


def folder() -> Path:
    """Where compiled guards are kept: beside DeepSpeed's ops, or with this process."""
    kept = Path(sys.prefix) / "var" / "fake_cuda"
    if os.access(sys.prefix, os.W_OK):
        kept.mkdir(parents=True, exist_ok=True)
        return kept
    return Path(tempfile.mkdtemp())


def compile_guard(torch_folder: Path, library: Path) -> None:
    """Compile the guard with g++, in a few seconds; two processes that do it at once do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        source, made = Path(place, "guard.cpp"), Path(place, "guard.so")
        source.write_text(SOURCE)
        headers = [f"-I{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
        words = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", str(source), "-o", str(made), *headers, *libraries]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++: {done.stderr[:2000]}")
        made.replace(library)
