# SPDX-License-Identifier: Apache-2.0
"""FlexAttention with its backward pass on CPU tensors, by PyTorch's reference for the operator; no kernel is compiled.

    python flex_on_cpu.py [flags of main.py]     a whole run that shares prompts as a GPU does

PyTorch refuses gradients of FlexAttention on a CPU, as it has no kernel for them there. The operator itself has a plain
implementation, forward and backward, which the backend aot_eager takes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def allow(set_attribute=setattr) -> None:
    """From now on, or as long as pytest's monkeypatch.setattr holds."""
    import aot_eager
    import torch
    from torch.nn.attention import flex_attention

    from reward_model.models import attention

    set_attribute(torch, "compile", aot_eager.traced)
    set_attribute(flex_attention, "_validate_device", lambda query, key, value: None)
    attention._compiled_flex_attention.cache_clear()


def main() -> int:
    from reward_model.common.distributed import prepare_environment

    prepare_environment()  # before the imports that it is for
    allow()
    from reward_model.commands import train
    from reward_model.models import attention

    attention.ON_CPU = attention.ON_CUDA[:1]
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
