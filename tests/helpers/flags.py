# SPDX-License-Identifier: Apache-2.0
"""A command line as one flat object: each flag by its name, the loss as it is resolved, and what was given."""

from types import SimpleNamespace

from reward_model.config.loss import resolve_loss
from reward_model.config.options import parse


def read(words):
    config = parse(words)
    loss = resolve_loss(config.loss, config.given)
    resolved = {"loss": list(loss.weights), "loss_weight": list(loss.weights.values()), "margin": loss.margin}
    resolved |= {"label_smoothing": loss.label_smoothing, "score_penalty": loss.score_penalty}
    return SimpleNamespace(**config.values() | resolved, explicit=config.given)


def loss_of(line):
    """The loss that flags name."""
    config = parse(["--model_name_or_path", "none", *line.split()])
    return resolve_loss(config.loss, config.given)
