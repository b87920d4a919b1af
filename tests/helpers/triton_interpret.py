# SPDX-License-Identifier: Apache-2.0
"""FlexAttention's kernels on real numbers, by Triton's interpreter, against PyTorch's attention with a dense mask.

    TRITON_INTERPRET=1 python triton_interpret.py FILE     of ``triton_trials.py programs``

Prints a line of JSON: for the output and each gradient the largest difference, and the largest number; and, as a
control, the difference of an output whose rule of what a token sees was given other numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton_trials
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers, triton_heuristics

from reward_model.models import attention

POINTS = 64  # that a program of a pointwise kernel, or of a reduction, takes


class Interpreted:
    """A kernel as the generated programs call it. ``kind``: of the heuristics that PyTorch would launch it by."""

    def __init__(self, kernel, kind: str):
        self.kernel, self.kind = kernel, kind
        self.names = list(inspect.signature(kernel.fn).parameters)

    def run(self, *given, stream=None):
        if self.kind == "template":
            given, grid = given[:-3], given[-3:]
            self.kernel[grid](*given)
            return
        sizes = {name: POINTS for name in ("XBLOCK", "YBLOCK", "R0_BLOCK") if name in self.names}
        counts = dict(zip(self.names, given))
        x, y = (-(-counts.get(name, 1) // POINTS) for name in ("xnumel", "ynumel"))
        self.kernel[(x, y, 1)](*given, **sizes)


def prepare() -> None:
    """Let the generated programs run on CPU tensors."""
    for kind in ("template", "pointwise", "reduction", "persistent_reduction"):
        setattr(triton_heuristics, kind, lambda *_, kind=kind, **__: lambda kernel: Interpreted(kernel, kind))
    triton_helpers.set_driver_to_gpu = lambda: None
    AsyncCompile.triton = lambda self, name, source, **_: getattr(imported(source), name)
    AsyncCompile.wait = lambda self, scope: None
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch.cuda._DeviceGuard = lambda _: contextlib.nullcontext()
    torch.cuda.set_device = lambda _: None
    called = torch._C._dynamo.guards
    # what a kernel forgets to write is to be seen
    called._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype).fill_(
        float("nan") if dtype.is_floating_point else 0
    )
    called.assert_size_stride = called.assert_alignment = lambda *_: None
    called.copy_if_misaligned = lambda tensor: tensor


def imported(source: str):
    """A program as a module: Triton reads a kernel's source in its file."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    warnings.simplefilter("ignore")
    made = json.loads(Path(sys.argv[1]).read_text())
    prepare()
    row, dim = triton_trials.ROW, triton_trials.DIM
    batch = triton_trials.batch_of(row)
    tokens = batch.tokens
    torch.manual_seed(0)
    heads = {"query": triton_trials.HEADS, "key": triton_trials.GROUPS, "value": triton_trials.GROUPS}
    states = {name: torch.randn(1, row, n, dim).transpose(1, 2).requires_grad_() for name, n in heads.items()}
    gradient = torch.randn(1, row, heads["query"], dim).transpose(1, 2) * tokens.attention_mask[:, None, :, None]

    dense = attention.attention_mask(batch, attention.DENSE, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(*states.values(), attn_mask=dense, enable_gqa=True)
    expected.backward(gradient)

    mask = attention.attention_mask(batch, attention.ON_CUDA[0], torch.float32)
    inputs = {name: tensor.detach() for name, tensor in (states | triton_trials.tensors_of(mask)).items()}
    out = imported(made["forward"]).call([inputs[name] for name in made["names"]])
    outputs = len(set(re.findall(r"\btangents_\d+\b", made["backward"])))  # the others are kept for the backward pass
    tangents = [gradient, *[torch.zeros_like(one) for one in out[1:outputs]]]
    gradients = imported(made["backward"]).call([*out[outputs:], *tangents])

    texts = tokens.attention_mask.bool()[0]
    found = {"output": (out[0][:, :, texts], expected[:, :, texts])}
    places = [made["names"].index(name) for name in states]
    found |= {f"gradient of {name}": (gradients[at], states[name].grad) for name, at in zip(states, places)}
    result = {
        name: {"difference": float((one - other).abs().max()), "largest": float(other.abs().max())}
        for name, (one, other) in found.items()
    }
    wrong = {name: torch.zeros_like(inputs[name]) for name in inspect.getclosurevars(mask.mask_mod).nonlocals}
    spoiled = imported(made["forward"]).call([(inputs | wrong)[name] for name in made["names"]])[0][:, :, texts]
    result["control"] = {"difference": float((spoiled - found["output"][1]).abs().max())}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
