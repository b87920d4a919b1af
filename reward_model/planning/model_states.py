# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed holds on a GPU and in host memory, and what a GPU sends, for every ZeRO setting.

``tests/test_planning.py`` compares the formulas with the tensors of real runs.

Notation: Ψ parameters, N GPUs, w bytes of a parameter (2, in fp32 4). Sizes are bytes unless GiB is said.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

DEFAULT_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, and what stage 0 reduces at once
# bytes: float32 twice; or 8 bits twice, with a float32 scale for 256 of each
MOMENTS = {"adamw_torch_fused": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
LIVE = 1_000_000_000  # elements: its stage3_max_live_parameters, which ZeRO 3 keeps gathered
SUB_GROUP = 1_000_000_000  # elements: its sub_group_size, which ZeRO 3 updates at once


@dataclass(frozen=True)
class Setting:
    """One way to run DeepSpeed. ``offload``: none, cpu or nvme. ``flags``: those of main.py that choose it."""

    name: str
    stage: int
    flags: str
    offload: str = "none"
    plus: bool = False  # ZeRO++: hpZ and qwZ
    quantized_gradients: bool = False  # and qgZ


SETTINGS = (
    *(Setting(f"{stage}", stage, f"--zero_stage {stage}") for stage in range(4)),
    *(Setting(f"{stage} + CPU", stage, f"--zero_stage {stage} --offload", "cpu") for stage in (1, 2, 3)),
    Setting("3 + NVMe", 3, "--deepspeed_config zero3_nvme.json --nvme_path /local_nvme", "nvme"),
    Setting("ZeRO++", 3, "--deepspeed_config zeropp.json", plus=True),
)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: all, those that train, and of the module that has most of its own.

    heads: those of several score heads; 0: there is one. initial: the weights that ``--head_anchor`` keeps beside all.
    quantized: those in 4 or 8 bits. packed: the bytes of these. unpacked: bytes of one layer of them while it computes.
    """

    total: int
    trained: int
    largest: int
    hidden: int = 0
    vocabulary: int = 0
    layers: int = 0
    quantized: int = 0
    packed: int = 0
    unpacked: int = 0
    heads: int = 0
    initial: int = 0

    def weights(self, width: int) -> int:
        """Bytes of all parameters."""
        return width * (self.total - self.quantized) + self.packed


@dataclass(frozen=True)
class Cluster:
    """GPUs, how many of them a node has, and memory of a GPU and of a node (0: not said)."""

    gpus: int
    per_node: int
    gpu_memory: float = math.inf
    host_memory: float = 0.0


@dataclass(frozen=True)
class States:
    """What DeepSpeed holds on a GPU, and its share of the host's memory.

    resident: parameters and optimizer. gradients: after the last backward pass. buffers: buckets and what ZeRO 3 has
    gathered. step: all that is there while the optimizer steps, when there are no activations. bucket: what stage 0
    reduces at once, after the backward pass.
    """

    resident: float
    gradients: float
    buffers: float
    step: float
    host: float
    bucket: float = 0

    def peak(self, activations: float) -> float:
        """The most at once."""
        return max(self.resident + self.buffers + self.gradients + max(activations, self.bucket), self.step)


def model_states(
    counts: Counts,
    setting: Setting,
    cluster: Cluster,
    width: int,
    zero: dict,
    accumulates: bool = False,
    moments: float = MOMENTS["adamw_torch_fused"],
) -> States:
    """Bytes that DeepSpeed 0.19 holds for AdamW, as :func:`_of_parameters`, and what each GPU keeps whole beside it."""
    found = _of_parameters(counts, setting, cluster, width, zero, accumulates, moments)
    kept = width * counts.initial  # ZeRO divides parameters, and no buffers
    return replace(found, resident=found.resident + kept, step=found.step + kept)


def _of_parameters(
    counts: Counts, setting: Setting, cluster: Cluster, width: int, zero: dict, accumulates: bool, moments: float
) -> States:
    """Bytes that DeepSpeed 0.19 holds for AdamW, as counted in runs.

    Frozen parameters (LoRA) have neither gradients nor optimizer states; ZeRO 3 shares them out too. Without ZeRO a
    half-precision step holds float32 gradients beside the others; ZeRO 1 to 3 flatten their share before that.

    Args:
        width: w. zero: the section ``zero_optimization`` of DeepSpeed's configuration. accumulates: more than one
            micro-batch in a step. Then stage 1 keeps all gradients and stage 2 a second copy of its share, with
            offload both do so on the host. moments: bytes of the optimizer's two moments of a parameter.
    """
    total, trained, n = counts.total, counts.trained, cluster.gpus
    weights = counts.weights(width)
    if setting.stage == 0:
        half = width < 4
        resident = weights + (4 * half + moments) * trained
        gradients = width * trained
        step = resident + gradients + (4 * trained if half else 0)
        bucket = width * min(trained, DEFAULT_BUCKET) if n > 1 else 0
        return States(resident, gradients, counts.unpacked, step, 0, bucket=bucket)
    own = trained / n
    bucket = width * zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if setting.stage < 3:
        # stage 2 fills one while it sends the other
        buffers: float = bucket * (2 if setting.stage == 2 else 1) + counts.unpacked
        again = width * own if accumulates else 0
        if setting.offload == "cpu":
            return States(weights, 0, buffers, weights, (16 + width) * own + again)
        states = weights + (4 + moments) * own
        kept = width * (own + trained) if accumulates and setting.stage == 1 else width * own + again
        return States(states, kept, buffers, states + 8 * own, 0)  # flattened, then in float32
    gathered = width * min(total, zero.get("stage3_max_live_parameters", LIVE) + counts.largest)
    buffers = gathered + bucket
    if setting.plus and n > cluster.per_node:
        buffers += width * total / cluster.per_node  # hpZ: a second copy of the shares within each node
    share, group = width * total / n, min(own, zero.get("sub_group_size", SUB_GROUP))
    if setting.offload == "cpu":
        return States(0, 0, buffers, bucket, share + (16 + width) * own)
    if setting.offload == "nvme":
        part = zero["offload_param"]
        read = width * part["buffer_count"] * part["buffer_size"]
        in_memory = min(share, width * part["max_in_cpu"])
        return States(0, 0, buffers, bucket, in_memory + read + 4 * zero["offload_optimizer"]["buffer_count"] * group)
    partitioned = share + (4 + moments) * own
    again = (6 if width < 4 else 4) * group  # flattened, then in float32
    # stage 3 keeps its bucket, where 1 and 2 make it anew in each backward pass
    return States(partitioned, width * own, buffers, partitioned + width * own + again + bucket, 0)


def deepspeed_estimate(counts: Counts, setting: Setting, cluster: Cluster) -> float | None:
    """What DeepSpeed's own estimators say of a GPU (model states in half precision, all parameters trained)."""
    logging.disable(logging.WARNING)  # DeepSpeed tells those without a GPU
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    logging.disable(logging.NOTSET)
    nodes, offloads = max(1, cluster.gpus // cluster.per_node), setting.offload != "none"
    place = {"num_gpus_per_node": cluster.gpus // nodes, "num_nodes": nodes, "cpu_offload": offloads}
    if setting.stage == 2:
        return estimate_zero2_model_states_mem_needs(counts.total, **place)[1]
    if setting.stage == 3 and not setting.plus:
        return estimate_zero3_model_states_mem_needs(
            counts.total, counts.largest, cpu_offload_params=offloads, **place
        )[1]
    return None


def communication(counts: Counts, setting: Setting, gpus: int, width: int, accumulation: int = 1) -> float:
    """Bytes that a GPU sends in a step, to leading order.

    An all-reduce is a reduce-scatter and an all-gather: 2Ψ for stages 0 to 2. Stage 3 gathers parameters forward and
    backward and scatters gradients, 3Ψ. ZeRO++ (arXiv 2306.10209) leaves of that between nodes ½Ψ (qwZ, 8 bits), 0
    (hpZ, within the node) and Ψ, or ¼Ψ (qgZ, 4 bits). Stages 2 and 3 send in every micro-step, 0 and 1 in a step's
    last. LoRA has gradients of the adapters alone, but ZeRO 3 gathers the frozen base too. Bits are of 16.
    """
    if gpus == 1:
        return 0
    total, trained = width * counts.total, width * counts.trained
    if setting.plus:
        return accumulation * (total / 2 + trained / (4 if setting.quantized_gradients else 1))
    if setting.stage == 3:
        return accumulation * (2 * total + trained)
    return trained * (accumulation + 1 if setting.stage == 2 else 2)  # the last: updated parameters to all
