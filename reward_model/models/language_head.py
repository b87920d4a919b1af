# SPDX-License-Identifier: Apache-2.0
"""The language-model head of a pretrained decoder, kept while a reward model is trained (GRM).

Notation: m tokens, h hidden units, v rows of the head.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.models.heads import find_weights, read_weights
from reward_model.models.pair_encoding import is_encoder
from reward_model.models.saved_forms import form_of
from reward_model.models.scorer import Scorer, count, embedding_rows, head_layer

FLAG = "--sft_weight"
NO_DECODER = "only a decoder that is scored at its last token has a language-model head to keep"
LOGITS = 2**24  # that are there at a time: 64 MiB of float32, and as much again for their gradient
OTHER_NAMES = ("lm_head", "embed_out")  # in a checkpoint; Transformers 5 renames GPT-NeoX's as it loads it
# fields of a config by which a model changes its logits, and the values at which it does not
CHANGES = {"final_logit_softcapping": (None, 0), "logit_scale": (None, 1), "logits_scaling": (None, 1)}


class LanguageHead(nn.Module):
    """−log p of tokens, given the states before them: a linear layer and a softmax.

    Args:
        weight: (v, h); that of the input embedding, where the two are tied.
        bias: (v,), or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States (m, h) and the ids that follow them (m,) → −log p (m,), float32.

        The logits of a part of the tokens are there at a time, and are computed again in the backward pass.
        """
        rows = max(1, LOGITS // getattr(self.weight, "ds_shape", self.weight.shape)[0])
        parts = zip(states.split(rows), tokens.split(rows))
        return torch.cat([checkpoint(self._losses, *part, use_reentrant=False) for part in parts])

    def _losses(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states.to(self.weight.dtype), self.weight, self.bias)
        return F.cross_entropy(logits.float(), tokens, reduction="none")


def keep_language_head(scorer: Scorer, name_or_path: str, trains: bool, trust_remote_code: bool = False) -> None:
    """Give a scorer the language-model head of the checkpoint that it was loaded from, once its embedding has its size.

    Args:
        trains: Whether a head of its own trains, too; one that is tied to the embedding does what the embedding does.
        trust_remote_code: Run the code that the model brings.

    Raises:
        UserError: the model is no decoder that is scored at its last token, or it has no such head, or one that does
            more than a linear layer.
    """
    if scorer.pooling != "last":
        raise UserError(f"{FLAG}: {NO_DECODER}")
    with never_asking(trust_remote_code):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    name, is_tied = require_language_head(name_or_path, config, trust_remote_code)
    if is_tied:
        weight, bias = scorer.backbone.get_input_embeddings().weight, None
    else:
        weight, bias = _read(scorer, name_or_path, name, trains)
    width = head_layer(scorer).in_features
    if getattr(weight, "ds_shape", weight.shape)[1] != width:
        raise UserError(f"{FLAG}: the language-model head of {name_or_path} does not fit its states ({width} units)")
    scorer.language_head = LanguageHead(weight, bias)
    what = "the input embedding" if is_tied else f"{count(weight):,} parameters{'' if trains else ', frozen'}"
    logger.info(f"language-model head: {name}, {what}; the saved model is without it")


def require_language_head(name_or_path: str, config, trust_remote_code: bool = False) -> tuple[str, bool]:
    """The name of a language model's last layer, and whether its weight is the input embedding's.

    Of a model in a folder it looks into the headers of the weights, and of one of the hub at its configuration alone.

    Raises:
        UserError: the model is a reward model or an encoder, or has no such head, or one that does more than a linear
            layer.
    """
    has_form = Path(name_or_path).is_dir() and form_of(Path(name_or_path))
    if has_form or any(name.endswith("Classification") for name in config.architectures or []):
        raise UserError(
            f"{FLAG}: {name_or_path} is a reward model, which has lost its language-model head; start from a "
            "pretrained language model"
        )
    if is_encoder(config, trust_remote_code):
        raise UserError(f"{FLAG}: {NO_DECODER}, and {name_or_path} is an encoder; leave the flag out")
    with never_asking(trust_remote_code):
        name, is_tied = _output_of(config, name_or_path, trust_remote_code)
    text = config.get_text_config()
    for field, neutral in CHANGES.items():
        if getattr(text, field, None) not in neutral:
            raise UserError(
                f"{FLAG}: {name_or_path} changes its logits by {field} {getattr(text, field)}, which is not done here; "
                "leave the flag out"
            )
    if not is_tied and Path(name_or_path).is_dir():
        _stored(name_or_path, name)
    return name, is_tied


def _output_of(config, name_or_path: str, trust_remote_code: bool) -> tuple[str, bool]:
    """The name of a language model's last layer, and whether its weight is the input embedding's."""
    why = ""
    try:
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
        if remote and trust_remote_code:
            kind = get_class_from_dynamic_module(remote, name_or_path)
        with torch.device("meta"):  # by its class: Transformers' from_config would divide it under ZeRO 3
            model = kind(config)
        output = model.get_output_embeddings()
        if isinstance(output, nn.Linear):
            name = next(name for name, module in model.named_modules() if module is output)
            is_tied = output.weight is model.get_input_embeddings().weight
            return name, is_tied or bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    except Exception as error:  # whatever a class that is not made for this refuses with
        why = f": {first_line(error)}"
    raise UserError(f"{FLAG}: {name_or_path} has no language-model head that is one linear layer{why}")


def _stored(name_or_path: str, name: str) -> dict[str, str]:
    """``weight`` and, where there is one, ``bias`` of the head of a checkpoint, each with its name there."""
    found: dict[str, str] = {}
    for each in (name, *OTHER_NAMES):
        found = found or find_weights(name_or_path, [f"{each}.weight", f"{each}.bias"])
    stored = {name.rpartition(".")[2]: name for name in found.values()}
    if "weight" not in stored:
        raise UserError(
            f"{FLAG}: {name_or_path} has no language-model head ({name}.weight); start from a language model that was "
            "saved with it"
        )
    return stored


def _read(scorer: Scorer, name_or_path: str, name: str, trains: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weight and the bias of a head of its own, with as many rows as the embedding has."""
    stored = _stored(name_or_path, name)
    tensors = read_weights(name_or_path, stored.values())
    dtype = head_layer(scorer).weight.dtype
    made: dict[str, nn.Parameter] = {}
    for part in ("weight", "bias"):
        if part not in stored:
            continue
        tensor = tensors[stored[part]]
        missing = max(0, embedding_rows(scorer) - len(tensor))  # of tokens that were added for the training
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        made[part] = nn.Parameter(tensor.to(dtype), requires_grad=trains)
    return made["weight"], made.get("bias")
