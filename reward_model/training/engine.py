# SPDX-License-Identifier: Apache-2.0
"""The model as the flags want it, its optimizer, and the DeepSpeed engine around them."""

from __future__ import annotations

import argparse

import torch
from transformers import get_scheduler

from reward_model.common.errors import UserError, first_line
from reward_model.models import saving
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, resize_embedding

BETAS = (0.9, 0.95)  # upstream's


def partition_while_loading(ds_config: dict):
    """While the returned object lives, Transformers partitions the weights it loads (ZeRO 3); None at other stages."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None


def build_scorer(options: argparse.Namespace, rows: int) -> Scorer:
    """The model as the flags want it, with an embedding of at least ``rows`` rows."""
    scorer = load_for_training(
        options.model_name_or_path, DTYPES[options.dtype], options.seed, options.pooling, options.dropout
    )
    if options.loss_level == "token" and scorer.pooling != "last":
        raise UserError("--loss_level token: this model has no score per token; leave the flag out")
    if options.output_dir and options.save_format != "hf":
        saving.require_dschat(scorer)
    resize_embedding(scorer, rows)
    if options.gradient_checkpointing:
        try:
            # reentrant under ZeRO 3: the other kind compares shapes of weights, which ZeRO 3 empties in between
            reentrant = options.zero_stage == 3
            scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and options.lora_dim:
                scorer.backbone.enable_input_require_grads()
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {first_line(error)}") from error
    if options.lora_dim:
        add_lora(scorer, options.lora_dim, options.lora_alpha or options.lora_dim, options.lora_module_name)
    return scorer


def parameter_groups(scorer: Scorer, options: argparse.Namespace) -> list[dict]:
    """AdamW's groups: matrices decay, biases and norms do not; LoRA and what is no backbone have learning rates."""
    inside = {id(parameter) for parameter in scorer.backbone.parameters()}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in scorer.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        rate = options.learning_rate
        if id(parameter) not in inside:
            rate = options.head_learning_rate or rate
        elif is_matrix and "lora_" in name:
            rate = options.lora_learning_rate
        groups.setdefault((rate, options.weight_decay if is_matrix else 0.0), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def start_engine(options: argparse.Namespace, scorer: Scorer, ds_config: dict, steps: int):
    """DeepSpeed's engine with AdamW and the learning-rate schedule of so many steps."""
    import deepspeed

    groups = parameter_groups(scorer, options)
    if options.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, lr=options.learning_rate, betas=BETAS)
    else:
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS, fused=True)
    scheduler = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=options.num_warmup_steps,
        num_training_steps=steps,
    )
    engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    if options.zero_stage == 0 and options.dtype != "fp32":
        # DeepSpeed's half-precision optimizer at stage 0 has taken a step with zero gradients by now, which leaves
        # Adam's bias correction one step ahead: the first updates come out at 0.73, 0.83, … of their size
        optimizer.state.clear()
    if options.tokens_per_batch and hasattr(engine.optimizer, "gradient_accumulation_steps"):
        # how many micro-batches a step has is not known; ZeRO 1 and 2 with offload ask only whether it is one
        engine.optimizer.gradient_accumulation_steps = max(2, options.gradient_accumulation_steps)
    return engine
