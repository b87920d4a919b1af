# SPDX-License-Identifier: Apache-2.0
"""A run of main.py that has no memory left in its second step.

    python no_memory.py host|python|map|device [flags of main.py]

``host`` asks torch for more than there is, ``python`` Python itself, ``map`` is what mmap says; all of these are real.
``device`` raises what torch raises on a GPU, which is not here.
"""

import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def use_up(kind: str) -> None:
    import torch

    if kind == "host":
        torch.empty(1 << 60, dtype=torch.uint8)
    elif kind == "python":
        bytearray(1 << 62)
    elif kind == "map":
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    else:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def main() -> int:
    kind = sys.argv.pop(1)
    from reward_model.commands.train import main as train
    from reward_model.training.trainer import Trainer

    loss = Trainer.loss

    def planted(trainer, batch):
        if trainer.step == 1:
            use_up(kind)
        return loss(trainer, batch)

    Trainer.loss = planted
    return train()


if __name__ == "__main__":
    sys.exit(main())
