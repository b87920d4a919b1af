# SPDX-License-Identifier: Apache-2.0
"""The model as a run wants it, its optimizer, and the DeepSpeed engine around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_scheduler

from reward_model.common.errors import UserError, first_line
from reward_model.config.groups import TrainingConfig
from reward_model.config.settings import Settings
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, resize_embedding
from reward_model.training.compiling import require_whole_layers
from reward_model.training.precision import set_tf32
from reward_model.training.recompute import recompute_layers
from reward_model.training.trackers import SECTIONS

BETAS = (0.9, 0.95)  # upstream's


def partition_while_loading(ds_config: dict[str, Any]):
    """While the returned object lives, Transformers partitions the weights it loads (ZeRO 3); None at other stages."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None


def build_scorer(settings: Settings, rows: int) -> Scorer:
    """The model as the run wants it, with an embedding of at least ``rows`` rows."""
    from deepspeed.accelerator import get_accelerator

    model, engine = settings.model, settings.engine
    if engine.compile:
        require_whole_layers(engine.zero_stage)
    scorer = load_for_training(
        model.model_name_or_path,
        DTYPES[engine.dtype],
        settings.training.seed,
        model.pooling,
        model.dropout,
        trust_remote_code=model.trust_remote_code,
        new_head=model.new_head,
        bits=model.lora_bits,
        device=get_accelerator().current_device_name(),
        heads=model.heads,
        anchored=settings.loss.head_anchor > 0,
    )
    if settings.loss.level == "token" and scorer.pooling != "last":
        raise UserError("--loss_level token: this model has no score per token; leave the flag out")
    resize_embedding(scorer, rows)
    if model.gradient_checkpointing:
        recompute_layers(scorer, engine.zero_stage == 3, bool(model.lora_dim), model.offload_activations)
    if model.lora_dim:
        alpha = model.lora_alpha or model.lora_dim
        add_lora(scorer, model.lora_dim, alpha, model.lora_module_name, model.lora_dropout)
    if engine.tf32:
        set_tf32(scorer, engine.dtype)
    return scorer


def parameter_groups(scorer: Scorer, training: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases and norms do not; LoRA and what is no backbone have learning rates."""
    inside = {id(parameter) for parameter in scorer.backbone.parameters()}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in scorer.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        rate = training.learning_rate
        if id(parameter) not in inside:
            rate = training.head_learning_rate or rate
        elif is_matrix and "lora_" in name:
            rate = training.lora_learning_rate
        groups.setdefault((rate, training.weight_decay if is_matrix else 0.0), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def _optimizer(settings: Settings, scorer: Scorer) -> torch.optim.Optimizer:
    training = settings.training
    groups = parameter_groups(scorer, training)
    common: dict[str, Any] = {"lr": training.learning_rate, "betas": BETAS}
    if settings.engine.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **common)
    if training.optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, **common, fused=True)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[training.optim](groups, **common)


def start_engine(settings: Settings, scorer: Scorer, steps: int):
    """DeepSpeed's engine with AdamW and the learning-rate schedule of so many steps."""
    import deepspeed

    training = settings.training
    # a monitor of the engine's own would write at other steps than ours, and Weights & Biases takes none that is lower
    ds_config = {key: value for key, value in settings.deepspeed.config.items() if key not in SECTIONS}
    optimizer = _optimizer(settings, scorer)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.num_warmup_steps or math.ceil(training.warmup_ratio * steps),
        num_training_steps=steps,
    )
    try:
        engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        if not settings.engine.deepspeed_config:
            raise
        raise UserError(f"{settings.engine.deepspeed_config}: DeepSpeed refuses it: {first_line(error)}") from error
    if settings.engine.zero_stage == 0 and settings.engine.dtype != "fp32":
        # DeepSpeed's half-precision optimizer at stage 0 has taken a step with zero gradients by now, which leaves
        # Adam's bias correction one step ahead: the first updates come out at 0.73, 0.83, … of their size
        optimizer.state.clear()
    if settings.batches.tokens_per_batch and hasattr(engine.optimizer, "gradient_accumulation_steps"):
        # how many micro-batches a step has is not known; ZeRO 1 and 2 with offload ask only whether it is one
        engine.optimizer.gradient_accumulation_steps = max(2, settings.batches.gradient_accumulation_steps)
    return engine
