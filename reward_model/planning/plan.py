# SPDX-License-Identifier: Apache-2.0
"""What a run needs, before it is paid for: memory of a GPU and of a node, and what a GPU sends in a step.

Only the model's ``config.json`` is read; what DeepSpeed holds is in ``model_states.py``, activations in
``activations.py``, and the command ``reward-model plan`` prints it.

Notation: Ψ parameters, N GPUs, b pairs, s tokens. Sizes are bytes unless GiB is said.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from reward_model.common.errors import UserError
from reward_model.config.deepspeed import set_up_deepspeed
from reward_model.config.options import RunConfig, parse, require_stage
from reward_model.models.loading import DTYPES
from reward_model.models.scorer import Scorer
from reward_model.planning.activations import activations, count_parameters, inputs_on_host
from reward_model.planning.model_states import (
    MOMENTS,
    SETTINGS,
    Cluster,
    Setting,
    States,
    communication,
    model_states,
)

GIB = 2**30
CONTEXT = 2 * GIB  # allowance: CUDA context and kernels (about ½), cuBLAS's workspace, NCCL's channels (about 1)
FRAGMENTS = 0.05  # allowance: of all the rest, what the allocator holds and cannot use


@dataclass(frozen=True)
class Estimate:
    """One line of the plan, in bytes; with and without recomputed activations."""

    setting: Setting
    checkpointing: bool
    states: States
    gpu: float
    host: float
    sent: float
    fits: bool

    @property
    def cost(self) -> tuple:
        """Fastest first, as expected: no offload before the host before NVMe; keeping activations before recomputing
        them, a third more compute; exact sums before ZeRO++, which rounds; then what is sent. Of those that send the
        same, stage 2 reduces during the backward pass and updates a share; one GPU has nothing to share.
        """
        slow = ("none", "cpu", "nvme").index(self.setting.offload)
        stage = -self.setting.stage if self.sent else self.setting.stage
        return slow, self.checkpointing, self.setting.plus, self.sent, stage


class Plan:
    """A model and a configuration, whose dtype is not ``auto``; estimates for any cluster and micro-batch."""

    def __init__(self, scorer: Scorer, config: RunConfig):
        self.scorer, self.config = scorer, config
        self.counts = count_parameters(scorer, config.model.lora_bits)
        self.width = DTYPES[config.engine.dtype].itemsize
        self.known: dict[tuple[int, bool], int] = {}

    def activations(self, pairs: int, checkpointing: bool) -> int:
        """Of b pairs, none of which share a token: 2·b answers of ``--max_seq_len``."""
        key = (pairs, checkpointing)
        if key not in self.known:
            offload = checkpointing and self.config.model.offload_activations
            self.known[key] = activations(self.scorer, 2 * pairs, self.config.data.max_seq_len, checkpointing, offload)
        return self.known[key]

    def on_host(self, pairs: int) -> int:
        """Of a GPU's activations: those that ``--offload_activations`` keeps on the host."""
        if not self.config.model.offload_activations:
            return 0
        return inputs_on_host(self.counts, 2 * pairs, self.config.data.max_seq_len, self.width)

    def zero(self, setting: Setting, gpus: int) -> dict:
        """``zero_optimization`` as the trainer would have it; ZeRO++ has stage 3's sizes."""
        line = "--zero_stage 3" if setting.plus else setting.flags
        config = _parsed(f"--model_name_or_path - --dtype {self.config.engine.dtype} {line}")
        return set_up_deepspeed(config, "bf16", gpus, self.counts.hidden, self.counts.vocabulary).zero

    def can_be(self, setting: Setting) -> bool:
        """Whether the trainer takes a setting with a base, or an optimizer, of few bits."""
        try:
            require_stage(self.config.model, self.config.training, setting.stage, setting.offload != "none")
        except UserError:
            return False
        return True

    def estimates(self, cluster: Cluster, pairs: int) -> list[Estimate]:
        """Every setting, first without checkpointing (unless the flag is given), then with it.

        Fewer pairs than the flag says means that much more accumulation.
        """
        batches, found, moments = self.config.batches, [], MOMENTS[self.config.training.optim]
        accumulation = batches.gradient_accumulation_steps * batches.per_device_train_batch_size // pairs
        for checkpointing in (True,) if self.config.model.gradient_checkpointing else (False, True):
            size = self.activations(pairs, checkpointing)
            for setting in filter(self.can_be, SETTINGS):
                if setting.plus and (cluster.gpus <= cluster.per_node or cluster.gpus & (cluster.gpus - 1)):
                    continue  # its gain is between nodes, and DeepSpeed's 8-bit blocks want a power of two
                if setting.stage == 0 and self.config.engine.dtype != "fp32":
                    continue  # on GPUs a run takes stage 1 for it
                zero = self.zero(setting, cluster.gpus)
                states = model_states(self.counts, setting, cluster, self.width, zero, accumulation > 1, moments)
                gpu = CONTEXT + (1 + FRAGMENTS) * states.peak(size)
                # processes that load a model read all of it, under ZeRO 3 only the first
                load = self.width * self.counts.total * (1 if setting.stage == 3 else cluster.per_node)
                host = max(load, (states.host + self.on_host(pairs)) * cluster.per_node)
                sent = communication(self.counts, setting, cluster.gpus, self.width, accumulation)
                fits = gpu <= cluster.gpu_memory * GIB and host <= (cluster.host_memory or math.inf) * GIB
                found.append(Estimate(setting, checkpointing, states, gpu, host, sent, fits))
        return found

    def best(self, cluster: Cluster, pairs: int, offload: bool = True) -> Estimate | None:
        """The first choice of those that fit."""
        fitting = [e for e in self.estimates(cluster, pairs) if e.fits and (offload or e.setting.offload == "none")]
        return min(fitting, key=lambda estimate: estimate.cost, default=None)


@functools.cache
def _parsed(line: str) -> RunConfig:
    return parse(line.split())
