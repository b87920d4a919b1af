# SPDX-License-Identifier: Apache-2.0
"""A real run that writes what each rank holds while it trains: bytes of tensors, and no more than two steps.

    torchrun --nproc_per_node 2 tests/helpers/planned.py FOLDER --model_name_or_path …    writes FOLDER/rank0.json, …

Resident memory of a process on a CPU says little; here every storage that a live tensor has counts once.
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reward_model.common.distributed import prepare_environment, release_shared_memory

prepare_environment()
from reward_model.common.logging import quieten

quieten(debug=False)
import torch

from reward_model.config.options import parse
from reward_model.models.scorer import count
from reward_model.planning.activations import Meter
from reward_model.training import run, trainer

STEPS = 2  # the first makes the optimizer's states


def tensors():
    """All that live; ``grad`` may be known to its parameter alone."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def storages():
    """Address → bytes of every storage in use."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors()}
    found.pop(0, None)
    return found


class Watched(trainer.Trainer):
    """Counts in the second step: after its last backward pass, while the optimizer steps, and the most in between."""

    def train(self):
        self.most, self.steps, self.meter = {}, 0, None
        self.evaluate = lambda *args, **kwargs: None
        engine = self.engine
        self.engine_step, engine.step = engine.step, self.watched_step
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.inner, inner.step = inner.step, self.watched_inner
        super().train()

    def train_micro_batch(self, batch, log):
        if self.steps < STEPS - 1:
            super().train_micro_batch(batch, log)
            return
        self.note("tokens", batch.tokens.input_ids.numel())
        self.base = self.held()
        with Meter(tensors()) as self.meter:
            super().train_micro_batch(batch, log)
        if self.steps == STEPS:
            self.end()

    def held(self):
        return sum(size for address, size in storages().items() if address not in self.before)

    def note(self, moment, size):
        self.most[moment] = max(size, self.most.get(moment, 0))

    def watched_step(self, *args, **kwargs):
        self.steps += self.engine.is_gradient_accumulation_boundary()
        if self.meter:
            self.note("backward_peak", self.base + self.meter.peak)
            self.meter.peak = self.meter.now
        if self.steps == STEPS:
            self.note("backward", self.held())
        result = self.engine_step(*args, **kwargs)
        if self.steps == STEPS:
            self.note("step_peak", self.base + self.meter.peak)
        return result

    def watched_inner(self, *args, **kwargs):
        if self.steps == STEPS:
            self.note("step", self.held())
        return self.inner(*args, **kwargs)

    def end(self):
        parameters = list(self.engine.module.parameters())
        self.most["total"] = sum(count(p) for p in parameters)
        self.most["trained"] = sum(count(p) for p in parameters if p.requires_grad)
        (Path(sys.argv[1]) / f"rank{self.context.rank}.json").write_text(json.dumps(self.most))
        torch.distributed.barrier()
        release_shared_memory()
        os._exit(0)


def main():
    config = parse(sys.argv[2:])
    build = run.build_scorer

    def build_scorer(*args):
        Watched.before = storages()
        return build(*args)

    run.build_scorer, run.Trainer = build_scorer, Watched
    run.run(config)


if __name__ == "__main__":
    main()
