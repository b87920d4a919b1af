# SPDX-License-Identifier: Apache-2.0
"""This process among the others: rank, device, and what DeepSpeed needs of the machine before it can start."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from reward_model.common import meeting
from reward_model.common.compile_lock import outlive_killed_compilations
from reward_model.common.errors import UserError
from reward_model.common.logging import hushed, logger
from reward_model.common.processes import numbers
from reward_model.common.words import counted

SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHARED_MEMORY = Path("/dev/shm")
BUFFERS = "deepspeed_allreduce_buffer_"  # and the user's number, the first rank's address and port, and the rank
SIZES_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that share their texts, a part of each: which of them this one is, how many, and torch's group of them."""

    rank: int = 0
    size: int = 1
    group: Any = None


ALONE = SequenceGroup()


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process, how many there are, and its device.

    sequence: the ranks with which this one shares its texts.
    """

    rank: int
    world_size: int
    device: torch.device
    sequence: SequenceGroup = ALONE

    @property
    def data_rank(self) -> int:
        """Which share of the rows is this rank's."""
        return self.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        """How many shares there are."""
        return self.world_size // self.sequence.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def prepare_environment() -> None:
    """Settings that DeepSpeed, Transformers and datasets read when they are imported; called before that."""
    if "RANK" not in os.environ:  # python main.py: one process without a launcher
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # DeepSpeed calls ninja by name, and an environment that was not activated has it only beside its interpreter
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"
    # compiled ops fit one environment's torch: keep them in it
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "var" / "torch_extensions"))
    allow_open_files()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ["RANK"] != "0":
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def allow_open_files(wanted: int = 65_536) -> None:
    """Raise this process's soft limit of open files, which is 1,024 on many machines, as far as it may go."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def release_shared_memory() -> None:
    """Remove the 66 MiB a rank that a run on CPUs holds in /dev/shm, and that DeepSpeed leaves there at its end.

    Those of all local ranks: one that has not ended yet keeps what it has opened.
    """
    for path in SHARED_MEMORY.glob(f"{BUFFERS}{os.getuid()}_*_{os.environ.get('MASTER_PORT')}_*"):
        path.unlink(missing_ok=True)


def remove_left_shared_memory(older_than: float = 60.0) -> None:
    """Remove what killed runs of this user have left in /dev/shm: buffers that no process has mapped.

    Called before this run makes its own. A name tells user, address and port of the first rank, and rank.

    Args:
        older_than: seconds since a buffer was written; a run that is starting has not mapped its own yet.
    """
    paths = [path for path in SHARED_MEMORY.glob(f"{BUFFERS}{os.getuid()}_*") if path.stat().st_uid == os.getuid()]
    if not paths:
        return
    mapped: set[str] = set()
    for number in numbers():
        with suppress(OSError):  # it has ended, or is another user's, who cannot have mapped it
            lines = Path(f"/proc/{number}/maps").read_text(errors="replace").splitlines()
            mapped |= {line.split(None, 5)[5] for line in lines if BUFFERS in line}
    for path in paths:
        with suppress(OSError):
            if str(path) not in mapped and time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def end() -> None:
    """Leave the other processes, at the end of the last run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        release_shared_memory()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(local_rank: int = -1, offload: bool = False, debug: bool = False) -> DistributedContext:
    """Join the other processes.

    Args:
        local_rank: as a launcher gives it on the command line; the environment comes first.
        offload: an op for the optimizer on the CPU will be compiled.
        debug: show what DeepSpeed prints meanwhile.

    Raises:
        UserError: half of what a launcher sets, GPUs that torch does not see, or no C++ compiler or ninja where
            DeepSpeed compiles an op before it can communicate.
    """
    if missing := [name for name in SET_BY_LAUNCHERS if name not in os.environ]:
        names = ", ".join(missing)
        raise UserError(f"RANK is set in the environment without {names}: start this by a launcher, or unset RANK")
    for name in SIZES_BY_MPI:
        if os.environ["WORLD_SIZE"] == "1" and int(os.environ.get(name, 1)) > 1:
            raise UserError(
                f"{name}={os.environ[name]}: each process of mpirun would be a run of its own; set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each, or start them by deepspeed or torchrun"
            )
    with hushed(debug):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        require_no_unseen_gpu()
    if on_cpu or offload:
        _require_compiler()
        link_from_a_path_with_spaces()
    local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))
    if not on_cpu:
        if local_rank >= accelerator.device_count():
            raise UserError(f"local rank {local_rank} on {accelerator.device_count()} devices: start fewer processes")
        accelerator.set_device(local_rank)
    else:
        _share_cores()
    if on_cpu and os.environ["RANK"] == "0" and not _has_compiled_ops():
        logger.info("DeepSpeed compiles its communication op, once: about half a minute")
    if os.environ["RANK"] == "0":
        remove_left_shared_memory()
    outlive_killed_compilations()
    with hushed(debug):
        deepspeed.init_distributed(init_method=meeting.method())
    return DistributedContext(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        torch.device(accelerator.current_device_name()),
    )


def join(local_rank: int = -1) -> DistributedContext:
    """Join the other processes for work without an optimizer, where DeepSpeed has nothing to do.

    Args:
        local_rank: as a launcher gives it on the command line; the environment comes first.

    Raises:
        UserError: half of what a launcher sets, or fewer devices than processes.
    """
    if missing := [name for name in SET_BY_LAUNCHERS if name not in os.environ]:
        raise UserError(f"RANK is set in the environment without {', '.join(missing)}: start this by a launcher")
    local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} on {torch.cuda.device_count()} devices: start fewer processes")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        require_no_unseen_gpu()
        _share_cores()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", init_method=meeting.method())
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return DistributedContext(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _share_cores() -> None:
    """Give each process of this machine its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def share_texts(context: DistributedContext, size: int) -> DistributedContext:
    """The same process among neighbors with which it shares its texts; all ranks call it.

    Raises:
        UserError: the number of ranks is no multiple of theirs.
    """
    if size == 1:
        return context
    if context.world_size % size:
        raise UserError(f"--sequence_parallel_size {size}: {context.world_size} processes are no multiple of it")
    groups = [torch.distributed.new_group(range(i, i + size)) for i in range(0, context.world_size, size)]
    own = SequenceGroup(context.rank % size, size, groups[context.rank // size])
    return replace(context, sequence=own)


def require_zero(zero: dict, nvme_path: str | None) -> None:
    """What a filled ZeRO section needs of this node, said before a model is loaded.

    Raises:
        UserError: no GPU for quantized communication, no libaio, or a folder for NVMe that cannot be used.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    device = get_accelerator().device_name()
    quantized = [key for key, value in zero.items() if key.startswith("zero_quantized_") and value]
    if quantized and device != "cuda":
        raise UserError(f"{' and '.join(quantized)}: DeepSpeed's quantizer needs a CUDA GPU, this is a {device}")
    if not any((zero.get(name) or {}).get("device") == "nvme" for name in ("offload_optimizer", "offload_param")):
        return
    _require_compiler()
    if not AsyncIOBuilder().is_compatible():
        raise UserError("NVMe: DeepSpeed's async_io op is built on libaio; install it, e.g. apt install libaio-dev")
    if nvme_path:
        _require_direct_writes(Path(nvme_path))


def _require_direct_writes(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        # EINVAL: tmpfs before Linux 6.6, some network disks
        why = "a file system without direct I/O (O_DIRECT)" if error.errno == errno.EINVAL else error.strerror
        raise UserError(f"--nvme_path {folder}: {why}") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def release_swap_files(zero: dict, nvme_path: str) -> None:
    """Remove what a run leaves in --nvme_path of this node: some 14 bytes a parameter. The file's own paths stay."""
    for name in ("offload_optimizer", "offload_param"):
        folder = Path((zero.get(name) or {}).get("nvme_path", "."))
        if os.environ["LOCAL_RANK"] == "0" and folder.parent == Path(nvme_path).resolve():
            shutil.rmtree(folder, ignore_errors=True)


def link_from_a_path_with_spaces() -> None:
    """Let ops be linked where PyTorch lies in a folder with a space in its path.

    PyTorch gives the linker ``-L`` and that path without quotes. It gets a symbolic link instead, always the same one,
    since another path would compile the ops anew.
    """
    from torch.utils import cpp_extension

    target = cpp_extension.TORCH_LIB_PATH
    if " " not in target:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dschat-reward"
    if " " in str(folder):
        folder = Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    link = folder / f"torch-lib-{hashlib.sha256(target.encode()).hexdigest()[:16]}"
    with suppress(FileExistsError):  # of an earlier run, or of another rank
        link.symlink_to(target)
    cpp_extension.TORCH_LIB_PATH = str(link)


def require_no_unseen_gpu() -> None:
    """Raises UserError where the driver lists GPUs that torch cannot use: the run would be on the CPU in silence.

    ``CUDA_VISIBLE_DEVICES=`` or ``DS_ACCELERATOR=cpu`` says that this is meant.
    """
    meant = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if meant or torch.cuda.is_available() or not (program := shutil.which("nvidia-smi")):
        return
    listed = subprocess.run([program, "-L"], capture_output=True, text=True).stdout
    count = len(re.findall(r"^GPU ", listed, re.MULTILINE))
    if not count:
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise UserError(
        f"nvidia-smi lists {counted(count, 'GPU')} and torch {torch.__version__} sees none: it {built}. "
        "bash training_scripts/setup.sh says which build fits the driver; CUDA_VISIBLE_DEVICES= trains on the CPU"
    )


def _has_compiled_ops() -> bool:
    """Whether any op lies where PyTorch keeps those of this environment."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return any(Path(folder).rglob("*.so"))


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) or shutil.which("g++")):
        raise UserError(f"no C++ compiler ({compiler}): DeepSpeed compiles an op; install one, e.g. apt install g++")
    if not shutil.which("ninja"):
        raise UserError("no ninja: DeepSpeed compiles an op; install it with pip install ninja")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise UserError(f"no {header}: DeepSpeed compiles an op; install it, e.g. apt install python3-dev")


def default_dtype() -> Literal["fp32", "bf16", "fp16"]:
    """bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU, where half precision saves no time."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return "fp32"
    return "bf16" if accelerator.is_bf16_supported() else "fp16"


def require_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that DeepSpeed refuses on this device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[dtype]:
        others = ", ".join(name for name, has in supported.items() if has)
        raise UserError(
            f"--dtype {dtype}: DeepSpeed cannot train in it on this {accelerator.device_name()}; {others} can"
        )


def sum_for_later(tensor: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to sum a tensor in place over all ranks; what is returned gives the sums, on every rank.

    On a GPU they are copied to the host as soon as they are there, so that reading them a step later waits for nothing
    that was queued since.
    """
    work = torch.distributed.all_reduce(tensor, async_op=True)
    assert work is not None  # this process is of the group
    if tensor.device.type != "cuda":

        def read() -> list[float]:
            work.wait()
            return tensor.tolist()

        return read
    work.wait()  # the stream does, not this process
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read_copy() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read_copy


def any_for_later(is_so: bool, device: torch.device) -> Callable[[], bool]:
    """Begin to ask whether something is so on any rank; what is returned gives the answer, on every rank."""
    read = sum_for_later(torch.tensor([float(is_so)], device=device))
    return lambda: read()[0] > 0


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, which may give different numbers of them. (m, …) → (sum of all m, …)"""
    world_size = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def first_text(text: str) -> str:
    """What the first rank that has something to say says; empty: no rank has."""
    return next(filter(None, gather_objects(text)), "")


def largest(value: float) -> float:
    """The largest of the numbers that the ranks give."""
    return max(gather_objects(value))


_by_itself: ContextVar[bool] = ContextVar("by_itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """What this process decides meanwhile it decides without other ranks, whether there are any or not.

    For a saved model that scores inside of somebody's program, of which perhaps one rank asks for scores.
    """
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def gather_objects(value: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks, on every rank. Only plain objects: they are pickled."""
    if _by_itself.get():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What the first rank gives, on every rank."""
    return gather_objects(value)[0]
