# SPDX-License-Identifier: Apache-2.0
"""FlexAttention with its backward pass on CPU tensors, by PyTorch's reference for the operator; no kernel is compiled.

    python flex_on_cpu.py [flags of main.py]     a whole run that shares prompts as a GPU does

PyTorch refuses gradients of FlexAttention on a CPU, as it has no kernel for them there. The operator itself has a plain
implementation, forward and backward, which the backend aot_eager takes.
"""

import runpy
import sys
from pathlib import Path

import aot_eager
import torch

MAIN = Path(__file__).resolve().parents[2] / "training_scripts" / "main.py"


def allow(monkeypatch) -> None:
    """Until the end of a test."""
    from torch.nn.attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(torch, "compile", aot_eager.traced)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    # Transformers keeps what it has compiled
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)


def install() -> None:
    """Until the end of the process; before the modules are imported that compile FlexAttention when they are."""
    aot_eager.install()
    from torch.nn.attention import flex_attention

    flex_attention._validate_device = lambda query, key, value: None


def main() -> None:
    sys.path.insert(0, str(MAIN.parents[1]))
    from reward_model.common.distributed import prepare_environment

    prepare_environment()  # before the imports that it is for
    install()
    from reward_model.models import shared_prefix

    shared_prefix.ON_CPU = shared_prefix.ON_CUDA
    sys.argv[0] = str(MAIN)
    runpy.run_path(str(MAIN), run_name="__main__")


if __name__ == "__main__":
    main()
