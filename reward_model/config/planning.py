# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model plan`` beside those of main.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reward_model.config.groups import COUNT, POSITIVE, Bounds, Group, flag


@dataclass(frozen=True)
class PlanConfig(Group):
    """The GPUs to plan for."""

    _argument_group_name: ClassVar[str] = "cluster"
    _bounds: ClassVar[Bounds] = {"gpus": COUNT, "gpus_per_node": COUNT, "gpu_memory": POSITIVE, "host_memory": POSITIVE}

    gpus: int | None = flag(None, metavar="N", help="The number of GPUs in all. Default: those of this machine, or 1.")
    gpus_per_node: int | None = flag(
        None, metavar="N", help="The number of GPUs of a node. Default: 8, or --gpus if that is less."
    )
    gpu_memory: float | None = flag(
        None, metavar="GIB", help="The memory of each GPU in GiB. Default: that of this machine's first GPU."
    )
    host_memory: float | None = flag(
        None, metavar="GIB", help="The memory of each node in GiB. Without it, it is not checked."
    )
    verbose: bool = flag(False, help="Show what each number is made of, and DeepSpeed's own estimate beside it.")
