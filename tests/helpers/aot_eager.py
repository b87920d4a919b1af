# SPDX-License-Identifier: Apache-2.0
"""torch.compile that traces a function, forward and backward, and compiles no kernel."""

import functools

import torch

compiled = torch.compile  # PyTorch's own


def install() -> None:
    """From now on torch.compile takes the backend aot_eager, whatever backend, mode and options a caller names.

    What was compiled before, by a decorator of a module that is imported already, stays as it is.
    """

    @functools.wraps(compiled)
    def traced(model=None, *, fullgraph=False, dynamic=None, **_):
        if model is None:
            return functools.partial(traced, fullgraph=fullgraph, dynamic=dynamic)
        return compiled(model, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    torch.compile = traced
