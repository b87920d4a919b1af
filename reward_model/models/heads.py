# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint that the model does not read, and among them the score head of another trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.models.scorer import Scorer, gathered, head_layer

ORDINARY = re.compile(  # that a score needs none of: heads of language models, buffers, poolers, towers for images
    r"(^|\.)(lm_head|embed_out|cls|generator_predictions|lm_predictions|mask_predictions|pred_layer|predictions|pooler|"
    r"vocab_projector|vocab_transform|vocab_layer_norm|final_logits_bias|position_ids|inv_freq|masked_bias|"
    r"visual|vision_\w+|image_\w+|audio_\w+|mtp|nextn)(\.|$)|\.attn\.bias$|\.attention\.bias$"
)
HEAD = re.compile(
    r"(^|\.)(v_head|score|scores|value|value_head|reward|reward_head|rm_head|regression_head|critic|head|classifier|"
    r"score_head)(\.|$)"
)
LAYER = re.compile(r"(^|\.)(layers|h|blocks|layer)\.\d+\.")


def unread(names: Iterable[str]) -> list[str]:
    """The weights of a checkpoint that were not read and that a score might need."""
    return sorted(name for name in names if not ORDINARY.search(name))


def heads_among(names: Iterable[str]) -> list[str]:
    """Those that seem to be a score head."""
    return [name for name in names if HEAD.search(name) and not LAYER.search(name)]


def adopt_head(scorer: Scorer, name_or_path: str, names: list[str]) -> bool:
    """Load the score head that a checkpoint has under another name, if it is one linear layer with one output.

    Args:
        names: of weights that were not read.

    Returns:
        Whether there was one.

    Raises:
        UserError: there is a head of another form.
    """
    found = heads_among(names)
    if not found:
        return False
    tensors = read_weights(name_or_path, found)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    width = head_layer(scorer).in_features
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if len(weights) != 1 or next(iter(weights.values())).numel() != width:
        raise UserError(
            f"{name_or_path} has a head that is not one linear layer with one output ({shapes}): --new_head leaves it "
            "out and draws a new one"
        )
    ((name, weight),) = weights.items()
    layer = head_layer(scorer)
    with gathered([layer.weight], modify=True), torch.no_grad():
        layer.weight.copy_(weight.reshape(1, width))
    logger.info(f"score head: read from {name}")
    say_bias({each: tensor for each, tensor in tensors.items() if each != name})
    return True


def say_bias(biases: dict[str, torch.Tensor]) -> None:
    """A head here has no bias, which moves every score alike and the order of none."""
    for name, bias in biases.items():
        logger.warning(f"{name} is not read: every score is {float(bias.flatten()[0]):.4g} lower than with it")


def read_weights(name_or_path: str, names: list[str]) -> dict[str, torch.Tensor]:
    """Some weights of a checkpoint on the host, from whichever of its files hold them.

    Raises:
        UserError: one cannot be found.
    """
    found: dict[str, torch.Tensor] = {}
    for path in _weight_files(name_or_path):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                there = set(file.keys())
                found |= {name: file.get_tensor(name) for name in names if name in there}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found |= {name: state[name] for name in names if name in state}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{name_or_path}: cannot read {missing[0]} from its files; --new_head draws a new head")
    return {name: tensor.float() for name, tensor in found.items()}


def _weight_files(name_or_path: str) -> list[Path]:
    if not Path(name_or_path).is_dir():  # a name of the hub, whose files have just been loaded
        config = cached_file(name_or_path, "config.json", local_files_only=True)
        name_or_path = str(Path(config).parent)
    folder = Path(name_or_path)
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
