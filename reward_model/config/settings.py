# SPDX-License-Identifier: Apache-2.0
"""What a run was asked to do, and where it runs → what it does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from reward_model.common.errors import UserError, masked
from reward_model.config.deepspeed import DeepSpeedSetup, set_up_deepspeed
from reward_model.config.groups import (
    BatchConfig,
    DataConfig,
    Dtype,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OutputConfig,
    TrainingConfig,
)
from reward_model.config.loss import Loss, resolve_loss
from reward_model.config.options import RunConfig, require_bitsandbytes, require_stage, require_trackers


@dataclass(frozen=True)
class Settings:
    """A run with every value decided.

    The groups are those of :class:`RunConfig`, in which the DeepSpeed file has had its say and no dtype is ``auto``.

    deepspeed: DeepSpeed's whole configuration.
    given: the names of the flags that somebody set.
    """

    model: ModelConfig
    data: DataConfig
    loss: Loss
    batches: BatchConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    output: OutputConfig
    engine: EngineConfig
    deepspeed: DeepSpeedSetup
    given: frozenset[str]

    def to_json(self, versions: dict[str, str], **more: Any) -> str:
        """``run.json``: the value of every flag, the names of those that were given, and the versions of packages.

        Args:
            more: What else it says, by which a run that goes on knows its own.
        """
        groups = (self.data, self.model, self.batches, self.training, self.evaluation, self.output, self.engine)
        values: dict[str, Any] = {name: value for group in groups for name, value in asdict(group).items()}
        values.pop("hub_token")  # the folder is given away with the model
        loss = asdict(self.loss)
        weights = loss.pop("weights")
        values |= {
            "loss": list(weights),
            "loss_weight": list(weights.values()),
            "loss_level": loss.pop("level"),
            **loss,
        }
        values = {name: _without_login(value) for name, value in values.items()}
        return json.dumps(values | {"given": sorted(self.given), "versions": versions} | more, indent=2) + "\n"


def _without_login(value: Any) -> Any:
    """A flag's value as it may be kept: the folder is given away with the model."""
    if isinstance(value, (list, tuple)):
        return [_without_login(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def resolve(
    config: RunConfig,
    default_dtype: Dtype,
    world_size: int,
    hidden_size: int,
    vocab_size: int,
    on_gpu: bool = False,
) -> Settings:
    """Decide what the machine, the model and the DeepSpeed file leave open.

    Args:
        default_dtype: what ``--dtype auto`` means on this machine.
        world_size: the number of processes.
        hidden_size, vocab_size: of the model.
        on_gpu: the run is on GPUs.

    Raises:
        UserError: the DeepSpeed file cannot be used, or contradicts a flag; its micro-batch or ZeRO stage does not go
            with the loss; bitsandbytes is asked for and not there.
    """
    setup = set_up_deepspeed(config, default_dtype, world_size, hidden_size, vocab_size, on_gpu)
    require_stage(config.model, config.training, setup.zero_stage, setup.offload)
    require_bitsandbytes(config.model, config.training)
    require_trackers(setup.config)
    if config.batches.attention in (("slices",) if on_gpu else ("flex",)):
        other = "CPU" if on_gpu else "GPU"
        raise UserError(
            f"--attention {config.batches.attention} is for a {other}: leave the flag out, and one that this model and "
            "this machine take is chosen"
        )
    if config.training.optim == "paged_adamw_8bit" and not on_gpu:
        raise UserError("--optim paged_adamw_8bit: only a GPU has memory to page out of; take adamw_8bit on a CPU")
    loss = resolve_loss(config.loss, config.given)
    if loss.contrastive_weight and setup.micro_batch == 1 and config.batches.batch_element == "pair":
        raise UserError(
            "--contrastive_weight and --per_device_train_batch_size 1: one pair has no other pair to be told from; "
            "give 2 or more"
        )
    if loss.contrastive_weight and setup.zero_stage == 3 and config.model.gradient_checkpointing:
        raise UserError(  # layers that are recomputed there have a backward pass of their own for each forward pass
            "--contrastive_weight and --gradient_checkpointing at ZeRO stage 3: DeepSpeed takes one gradient of each "
            "weight in a backward pass, and two passes give two; take --zero_stage 2, or leave one of them out"
        )
    if config.data.meta_data and setup.zero_stage == 3:
        raise UserError(
            "--meta_data at ZeRO stage 3: the weights are divided among the processes, and DeepSpeed gives no gradient "
            "of them outside of a step; take --zero_stage 2"
        )
    if config.data.meta_data and setup.dtype == "fp16":
        raise UserError(
            "--meta_data and --dtype fp16: the gradient that the weights move by is not scaled, and would vanish; take "
            "--dtype fp32, or bf16"
        )
    return Settings(
        model=config.model,
        data=config.data,
        loss=loss,
        batches=replace(
            config.batches,
            per_device_train_batch_size=setup.micro_batch,
            gradient_accumulation_steps=setup.accumulation,
        ),
        training=replace(config.training, max_grad_norm=setup.max_grad_norm),
        evaluation=config.evaluation,
        output=config.output,
        engine=replace(config.engine, zero_stage=setup.zero_stage, offload=setup.offload, dtype=setup.dtype),
        deepspeed=setup,
        given=config.given,
    )
