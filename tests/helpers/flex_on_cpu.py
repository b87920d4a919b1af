# SPDX-License-Identifier: Apache-2.0
"""FlexAttention with its backward pass on a CPU: the operator's own arithmetic, not compiled to kernels.

    python tests/helpers/flex_on_cpu.py FLAGS…        main.py by the backend that a GPU takes

torch refuses gradients on a CPU before it looks for kernels; the operator itself has a reference for both passes.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def allow() -> None:
    """From now on FlexAttention takes CPU tensors, with gradients."""
    import torch
    from torch.nn.attention import flex_attention

    flex_attention._validate_device = lambda query, key, value: None
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    from reward_model.models import attention

    attention._compiled_flex_attention.cache_clear()


if __name__ == "__main__":
    from reward_model.common.distributed import prepare_environment

    prepare_environment()
    allow()
    from reward_model.commands import train
    from reward_model.models import attention

    attention.ON_CPU = attention.ON_CUDA[:1]
    sys.exit(train.main())
