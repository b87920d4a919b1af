# SPDX-License-Identifier: Apache-2.0
"""PyTorch's compiler with Triton for a GPU that is not there: kernels are generated and compiled to machine code.

What is launched does nothing, and tensors are fake. :data:`kernels` has each kernel with the registers, the stack (what
is spilled lies there) and the shared memory that ptxas and Triton gave it. Needs Triton, which comes with PyTorch's
builds for CUDA, and else is installed with ``pip install triton``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fake_gpu


@dataclass(frozen=True)
class Kernel:
    """stack: bytes a thread. shared, limit: bytes that a block takes, and may take."""

    name: str
    registers: int
    stack: int
    shared: int
    limit: int
    warps: int
    stages: int

    @property
    def fits(self) -> bool:
        return self.shared <= self.limit


kernels: list[Kernel] = []
programs: list[str] = []  # what the compiler generated, a Python program a graph


def install(capability: int) -> None:
    """Before torch is imported."""
    fake_gpu.install(capability)
    _driver(capability)
    _inductor(fake_gpu.GPUS[capability].shared)


def _driver(capability: int) -> None:
    import torch
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = fake_gpu.GPUS[capability]

    class Utils:
        @staticmethod
        def get_device_properties(_):
            sizes = {"max_shared_mem": gpu.shared, "multiprocessor_count": gpu.multiprocessors, "warpSize": 32}
            return sizes | {"max_num_regs": 65536, "mem_clock_rate": 1, "mem_bus_width": 5120, "sm_clock_rate": 1}

    class Absent:
        utils, launcher_cls = Utils, None

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _=0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_benchmarker(self):
            return lambda *_, **__: 0.0

    driver.set_active(Absent())
    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: driver.set_active(Absent())


def _inductor(limit: int) -> None:
    """Compile in this process, keep what was compiled, launch nothing."""
    import torch
    from torch._dynamo import guards  # noqa: F401  (defines the names that are replaced below)
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    config.compile_threads = 1
    config.fx_graph_cache = functorch.enable_autograd_cache = False
    config.use_static_triton_launcher = config.bundle_triton_into_fx_graph_cache = False
    config.triton.unique_kernel_names = True
    config.joint_graph_constant_folding = False  # it computes
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = lambda *_, **__: None

    def precompile(tuner, *_, **__):
        tuner._precompile_worker()
        kernels.extend(_resources(result, limit) for result in tuner.compile_results)

    CachingAutotuner.precompile = precompile
    CachingAutotuner.run = lambda *_, **__: None
    GraphLowering.save_output_code = staticmethod(programs.append)
    called = torch._C._dynamo.guards  # by the generated programs
    called._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    called._reinterpret_tensor = lambda tensor, size, stride, offset=0: torch.as_strided(
        tensor, size, stride, tensor.storage_offset() + offset
    )
    called.assert_size_stride = called.assert_alignment = lambda *_: None


def _resources(result, limit: int) -> Kernel:
    import triton

    kernel = result.kernel
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        words = [str(program), "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    meta = kernel.metadata
    used = re.search(rf"Function {meta.name}:\s+REG:(\d+) STACK:(\d+)", said)  # functions that it calls have lines too
    registers, stack = int(used[1]), int(used[2])
    return Kernel(meta.name, registers, stack, meta.shared, limit, meta.num_warps, result.config.num_stages)
