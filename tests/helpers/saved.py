# SPDX-License-Identifier: Apache-2.0
"""Saved reward models with random weights, in every form."""

import models
import torch

from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import head_layer


def save(folder, family="llama", seed=5, save_format="hf", lora=False, template=None, sizes=None, **options):
    """A reward model in ``folder / "out"``."""
    tokenizer = models.write(family, folder / "base", **sizes or {})
    scorer = load_for_training(str(folder / "base"), torch.float32, seed=3, **options)
    if lora:
        add_lora(scorer, 4, 4.0, None)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        head_layer(scorer).weight.add_(0.3 * torch.randn_like(head_layer(scorer).weight))
    for config in (scorer.config, scorer.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    if template:
        tokenizer.chat_template = template
    saving.save(scorer.eval(), tokenizer, folder / "out", save_format)
    return folder / "out"
