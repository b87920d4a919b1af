# SPDX-License-Identifier: Apache-2.0
"""A run of main.py whose loss or gradient is NaN at some steps, and what every step did to the optimizer.

    python bad_steps.py loss|gradient STEPS RANK [flags of main.py]

The fault is planted in the first micro-batch of the rank: ``loss`` adds NaN to the loss, whose gradient stays finite;
``gradient`` leaves the loss as it is and makes its gradient NaN. Each rank writes a file ``states<rank>.json`` beside
--output_dir: for each step the hash of the rank's weights, moments and counts of steps, the first for before step 1.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def state_of(engine) -> list[str]:
    """Hashes of the module's weights, of the optimizer's weights, and of what it keeps of each."""
    import torch

    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    own = [p for group in base.param_groups for p in group["params"]]
    kept = [value for p in own for _, value in sorted(base.state.get(p, {}).items()) if not isinstance(value, dict)]

    def digest(values) -> str:
        found = hashlib.sha256()
        for value in values:
            tensor = torch.as_tensor(value).detach().float().contiguous()
            if tensor.any():  # moments of zeros, and no moments yet, are the same
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    return [digest(weights), digest(own), digest(kept)]


def plant(kind: str, steps: set[int], rank: int, folder: Path) -> None:
    """From now on the trainer's loss is NaN, or its gradient; the states after each step are written to the folder."""
    from reward_model.training.trainer import Trainer

    loss, train, train_micro_batch = Trainer.loss, Trainer.train, Trainer.train_micro_batch
    states: list[list[str]] = []
    done = set()

    def write(trainer):
        states.append(state_of(trainer.engine))
        (folder / f"states{trainer.context.rank}.json").write_text(json.dumps(states))

    def bad_loss(trainer, batch):
        total, *scores = loss(trainer, batch)
        if trainer.step + 1 in steps - done and trainer.context.rank == rank and trainer.engine.module.training:
            done.add(trainer.step + 1)
            total = total + math.nan if kind == "loss" else _nan_backwards()(total)
        return total, *scores

    def watched(trainer, batch, log):
        train_micro_batch(trainer, batch, log)
        if trainer.engine.is_gradient_accumulation_boundary():
            write(trainer)

    def watched_train(trainer):
        write(trainer)
        train(trainer)

    Trainer.loss, Trainer.train, Trainer.train_micro_batch = bad_loss, watched_train, watched


def _nan_backwards():
    import torch

    class NanBackwards(torch.autograd.Function):
        @staticmethod
        def forward(_, value):
            return value.clone()

        @staticmethod
        def backward(_, gradient):
            return gradient * math.nan

    return NanBackwards.apply


def main() -> int:
    kind, steps, rank = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}, int(sys.argv[3])
    del sys.argv[1:4]
    output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    from reward_model.common.distributed import prepare_environment

    prepare_environment()  # before the imports that it is for
    from reward_model.commands import train

    plant(kind, steps, rank, output.parent)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
