# SPDX-License-Identifier: Apache-2.0
"""torch.cuda as it answers on a machine with one GPU, of a kind to choose; nothing is computed.

Together with the guard of fake_cuda.py this is enough for DeepSpeed's engine, and for PyTorch's compiler, to do on the
host what they do beside that GPU.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import fake_cuda


@dataclass(frozen=True)
class Gpu:
    """name; multiprocessors, and bytes of shared memory that a block may have at most (CUDA's programming guide)."""

    name: str
    multiprocessors: int
    shared: int


GPUS = {
    80: Gpu("NVIDIA A100-SXM4-80GB", 108, 163 * 1024),
    89: Gpu("NVIDIA L4", 58, 99 * 1024),
    90: Gpu("NVIDIA H100 80GB HBM3", 132, 227 * 1024),
    100: Gpu("NVIDIA B200", 148, 227 * 1024),
    120: Gpu("NVIDIA GeForce RTX 5090", 170, 99 * 1024),
}


def install(capability: int = 90, waits: Callable[[str], None] = lambda kind: None) -> None:
    """Before torch is imported. ``waits`` is told of each call that would make the host wait."""
    fake_cuda.install()
    import torch

    gpu, major, minor = GPUS[capability], *divmod(capability, 10)
    properties = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        total_memory=80 * 2**30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if capability in (80, 90, 100) else 1536,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=gpu.shared,
        shared_memory_per_multiprocessor=gpu.shared + 1024,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        is_integrated=0,
    )
    torch.version.cuda = "13.0"
    answers = {
        "_is_compiled": True,
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "get_device_name": gpu.name,
        "is_bf16_supported": True,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.memory_stats = lambda *_: collections.defaultdict(int)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.device = torch.cuda._DeviceGuard = _Device
    for name in ("_cuda_setDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, lambda _: 0)
    torch._C._cuda_getDeviceCount = lambda: 1
    torch._C._cuda_emptyCache = lambda: None
    # a tensor that is made of a number is made on the CPU and "copied", as where there is no GPU
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.avoid_device_init = property(lambda _: True)
    _streams(torch, waits)


class _Device(contextlib.AbstractContextManager):
    def __init__(self, *_):
        self.idx = 0

    def __exit__(self, *_):
        return None


def _streams(torch, waits: Callable[[str], None]) -> None:
    class Event:
        def __init__(self, *_, **__):
            pass

        def record(self, *_):
            pass

        wait = record

        def query(self):
            return True

        def synchronize(self):
            waits("Event.synchronize")

        def elapsed_time(self, _):
            return 1.0

    class Stream(contextlib.AbstractContextManager):
        cuda_stream = 0
        device = torch.device("cuda", 0)

        def __init__(self, *_, **__):
            pass

        def __exit__(self, *_):
            return None

        def record_event(self, event=None):
            return event or Event()

        def wait_stream(self, _):
            pass

        wait_event = wait_stream

        def query(self):
            return True

        def synchronize(self):
            waits("Stream.synchronize")

    only = Stream()
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.StreamContext = Event, Stream, Stream
    for name in ("stream", "current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *_: only)  # a function each: PyTorch's compiler tells them apart
    torch.cuda.synchronize = lambda *_: waits("cuda.synchronize")
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.record_stream = lambda *_: None
