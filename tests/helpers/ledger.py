# SPDX-License-Identifier: Apache-2.0
"""Where a step of the trainer makes the host wait for the GPU, counted without a GPU.

    python ledger.py --way flex [--plant] [flags of main.py]

The trainer, DeepSpeed's engine and its optimizer are the real ones, on fake tensors on a GPU that is not there, in a
process group that does nothing, with kernels that are not compiled. The last line that is printed is JSON: the waits
of a step by their place, a mean over some steps. A place is the file and the function, and what the wait is: a number
that is read, a shape that depends on numbers, a copy that the host waits for, or a call of synchronize. The copy of a
batch to the GPU comes from page-locked memory there, and is none. --way: separate, or a backend of ON_CUDA. --plant:
faults that have to be counted, a loss that is read and copied once a micro-batch.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
FIRST, LAST = 2, 6  # steps after and up to which waits are counted
SEEN_IN = ("reward_model", "deepspeed", "transformers", "peft")  # folders whose functions are named as places

counted: collections.Counter[str] = collections.Counter()


def note(kind: str) -> None:
    counted[f"{place_of_a_wait()}: {kind}"] += 1


def note_copy(source, target, non_blocking) -> None:
    if source.type != target.type and not non_blocking:
        note(f"a copy to {target.type}")


def place_of_a_wait() -> str:
    """The innermost function that is not PyTorch's own, with its file."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        parts = Path(frame.filename).parts
        folder = next((part for part in SEEN_IN if part in parts), None)
        if folder and frame.filename != __file__:
            inside = "/".join(parts[len(parts) - 1 - parts[::-1].index(folder) :])
            return f"{inside} {frame.name}"
    return "elsewhere"


def prepare() -> None:
    """What has to come before the imports of a run."""
    sys.path.insert(0, str(TOP))
    import fake_gpu

    fake_gpu.install(90, note)
    os.environ |= {"DS_ACCELERATOR": "cuda", "HF_HUB_OFFLINE": "1"}
    from reward_model.common.distributed import prepare_environment

    prepare_environment()
    import aot_eager

    aot_eager.install()


def noting_mode():
    """A mode of fake tensors that notes waits, and makes up the number that is read."""
    import numpy
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from reward_model.training import step_log

    aten = torch.ops.aten
    shapes = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    plain = mode.dispatch

    def dispatch(func, types, args=(), kwargs=None):
        there = (kwargs or {}).get("device")
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                note("a number is read")
            return 0.0 if args[0].dtype.is_floating_point else 0  # no overflow, and a norm that is not clipped
        if func in shapes:
            note("a shape depends on numbers")
        if func is aten._to_copy.default and there is not None:
            note_copy(args[0].device, torch.device(there), kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            note_copy(args[1].device, args[0].device, args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking"))
        return plain(func, types, args, kwargs)

    def tolist(tensor):
        if tensor.device.type == "cuda":
            note("numbers are read")
        numbers = numpy.ones(tuple(tensor.shape))
        if len(tensor) == len(step_log.SUMS):
            numbers[[step_log.SUMS.index(name) for name in ("skipped", "bad", "asked")]] = 0  # good steps, and no end
        return numbers.tolist()

    FakeTensor.tolist, mode.dispatch = tolist, dispatch
    return mode


def fake_weights(scorer, mode):
    """The scorer with weights that are on the GPU and have no numbers."""
    import torch

    with mode:
        for module in scorer.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    there = torch.empty(tuple(weight.shape), dtype=weight.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(there, requires_grad=weight.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(tuple(buffer.shape), dtype=buffer.dtype, device="cuda")
    torch.nn.Module._apply = lambda self, *_, **__: self  # they are where and what they should be already
    return scorer


class Counted(Exception):
    """The steps to count are over."""


def arrange(mode, way: str) -> None:
    """What of a run cannot be done without numbers, or says nothing of a step, is left out or done otherwise."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from reward_model.batching import planner
    from reward_model.models import attention
    from reward_model.models.forward import ForwardPass
    from reward_model.training import run, step_log, trainer

    get_accelerator()._communication_backend_name = "fake"
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    build = run.build_scorer

    def build_fake(settings, rows):
        scorer = fake_weights(build(settings, rows), mode)
        mode.__enter__()  # until the end of the process
        return scorer

    def load(batches, on_gpu, first=0):
        assert on_gpu
        for number in range(first, len(batches)):
            with unset_fake_temporarily():  # by processes of their own, on a CPU
                packed = [batch.packed() for batch in batches[number]]
            yield [replace(one, buffer=mode.from_tensor(one.buffer)) for one in packed]

    def choose(forward, *_):
        backends = {backend.name: backend for backend in (attention.SEPARATE, *attention.ON_CUDA)}
        forward.use(backends[way])
        return way

    end_step = step_log.StepLog.end_step

    def end_counted(log, step, *rest):
        end_step(log, step, *rest)
        if step == FIRST:
            counted.clear()
        if step == LAST:
            raise Counted

    run.build_scorer, planner.loader = build_fake, load
    ForwardPass.choose_attention, ForwardPass.require_scores = choose, lambda forward, end: None
    trainer.Trainer.evaluate = lambda trainer: None
    step_log.StepLog.end_step = end_counted


def plant() -> None:
    import torch

    from reward_model.training.trainer import Trainer

    loss = Trainer.loss

    def curious(trainer, batch):
        found = loss(trainer, batch)
        assert found[0].item() < 1e6
        torch.empty(()).copy_(found[0].detach())
        return found

    Trainer.loss = curious


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", required=True)
    parser.add_argument("--plant", action="store_true")
    given, flags = parser.parse_known_args()
    prepare()
    mode = noting_mode()
    arrange(mode, given.way)
    if given.plant:
        plant()
    from reward_model.config.options import parse
    from reward_model.training.run import run

    status = 1
    try:
        run(parse(flags))
    except Counted:
        status = 0
        places = {place: number / (LAST - FIRST) for place, number in sorted(counted.items())}
        print(json.dumps(places), flush=True)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # autograd has a thread for the GPU, which nothing joins


if __name__ == "__main__":
    main()
