# SPDX-License-Identifier: Apache-2.0
"""torch.compile that traces a function, forward and backward, and compiles no kernel."""

import functools

import torch

compiled = torch.compile  # PyTorch's own


@functools.wraps(compiled)
def traced(model=None, *, fullgraph=False, dynamic=None, **_):
    """torch.compile with the backend aot_eager, whatever backend, mode and options a caller names."""
    if model is None:
        return functools.partial(traced, fullgraph=fullgraph, dynamic=dynamic)
    return compiled(model, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")


def install() -> None:
    """In place of torch.compile from now on; a decorator of a module that is imported already has done its work."""
    torch.compile = traced
