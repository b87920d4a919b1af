# SPDX-License-Identifier: Apache-2.0
"""FlexAttention as this package calls it, compiled for a GPU that is not there, in a process of its own.

python triton_trials.py matrix --capability 90 --dtype bf16 --dims 64 128     a line of JSON a kernel
python triton_trials.py graphs                              a line of JSON: how often it is compiled
python triton_trials.py programs --file FILE                writes what triton_interpret.py runs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fake_triton

LENGTHS = (512, 768, 1024, 640, 2048, 896, 1280, 4096, 384, 1536, 1152, 3072)  # rows that a run may have
HEADS, GROUPS = 4, 2
ROW, DIM = 384, 16  # of what is interpreted
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def batch_of(length: int):
    """Two comparisons that fill a packed row of a length, one of them with a long prompt."""
    from reward_model.batching.collate import collate
    from reward_model.batching.layout import Layout
    from reward_model.data.comparisons import Comparison
    from reward_model.models.attention import ON_CUDA

    backend = ON_CUDA[0]
    part = (length - 20) // 8
    rows = [
        Comparison([1] * 4 * part, [[2] * part, [3] * part], [0], [1], [0.0]),
        Comparison([1] * 9, [[2] * part, [3] * part], [0], [1], [0.0]),
    ]
    batch = collate(rows, Layout(backend.layout, 0, block=backend.block))
    assert batch.tokens.input_ids.shape == (1, length)
    return batch


def on_gpu(mode, batch):
    """The batch, copied to the GPU in one buffer."""
    import torch

    packed = batch.packed()
    with mode:
        return replace(packed, buffer=mode.from_tensor(packed.buffer)).to(torch.device("cuda", 0))


def attend(mode, length: int, dim: int, dtype: str, training: bool = True) -> dict:
    """Forward and backward pass of one layer's attention, by the function and the mask that the trainer would take.

    Returns:
        The tensors that went in, by name.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from reward_model.models import attention

    backend, kind = attention.ON_CUDA[0], getattr(torch, DTYPES[dtype])
    batch = on_gpu(mode, batch_of(length))
    with mode, torch.set_grad_enabled(training):
        mask = attention.attention_mask(batch, backend, kind)
        query, key, value = (
            torch.empty(1, length, heads, dim, dtype=kind, device="cuda").transpose(1, 2).requires_grad_(training)
            for heads in (HEADS, GROUPS, GROUPS)
        )
        layer = torch.nn.Module().train(training)
        out, _ = ALL_ATTENTION_FUNCTIONS[backend.attention](layer, query, key, value, mask, scaling=dim**-0.5)
        if training:
            out.sum().backward()
    return {"query": query, "key": key, "value": value} | tensors_of(mask)


def tensors_of(mask) -> dict:
    """The tensors of a BlockMask, and those that its rule looks at, by name."""
    import inspect

    import torch

    parts = {name: getattr(mask, name) for name in vars(mask)}
    parts |= inspect.getclosurevars(mask.mask_mod).nonlocals
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def matrix(options: argparse.Namespace) -> None:
    """The kernels for each head size: for one length, and for any, which the second length asks for."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dim in options.dims:
        torch._dynamo.reset()
        mode = FakeTensorMode()
        for shapes, length in (("static", LENGTHS[0]), ("dynamic", LENGTHS[1])):
            fake_triton.kernels.clear()
            error = None
            try:
                attend(mode, length, dim, options.dtype)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"[:400]
            found = [asdict(kernel) | {"fits": kernel.fits} for kernel in fake_triton.kernels if "_tem_" in kernel.name]
            line = {"capability": options.capability, "dtype": options.dtype, "dim": dim, "shapes": shapes}
            print(json.dumps(line | {"error": error, "kernels": found}), flush=True)


def graphs(options: argparse.Namespace) -> None:
    """Graphs that there are after each of twelve lengths, each of them for training and for an evaluation."""
    import torch
    from torch._dynamo.utils import counters
    from torch._subclasses.fake_tensor import FakeTensorMode

    counts = []
    mode = FakeTensorMode()
    for length in LENGTHS:
        attend(mode, length, 64, options.dtype)
        attend(mode, length, 64, options.dtype, training=False)
        counts.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    limit = torch._dynamo.config.recompile_limit
    print(json.dumps({"graphs": counts, "breaks": breaks, "recompile_limit": limit}), flush=True)


def programs(options: argparse.Namespace) -> None:
    """The programs that PyTorch's compiler made of the attention, forward and backward, and what they are given."""
    from torch._inductor import output_code
    from torch._subclasses.fake_tensor import FakeTensorMode

    def place(tensor):
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)

    given = []
    call = output_code.CompiledFxGraph.__call__

    def noted(graph, inputs):
        given.append([place(tensor) for tensor in inputs])
        return call(graph, inputs)

    output_code.CompiledFxGraph.__call__ = noted
    known = {place(tensor): name for name, tensor in attend(FakeTensorMode(), ROW, DIM, "fp32").items()}
    forward, backward = fake_triton.programs[-2:]
    names = [known[one] for one in given[-2]]
    options.file.write_text(json.dumps({"forward": forward, "backward": backward, "names": names}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("matrix", "graphs", "programs"))
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--dims", type=int, nargs="+", default=[64])
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    fake_triton.install(options.capability)
    {"matrix": matrix, "graphs": graphs, "programs": programs}[options.what](options)
    os._exit(0)  # autograd has a thread for the GPU, which nothing joins


if __name__ == "__main__":
    main()
