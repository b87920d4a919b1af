# SPDX-License-Identifier: Apache-2.0
"""A Transformers model with one score on top: scores at given tokens, and its head and embedding.

Notation: b rows, s tokens, h hidden units.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.data.encoding import Encoding
from reward_model.objectives.losses import Thresholds
from reward_model.reward_model import RewardModel, ValueHead

SCORE_PAIRS = "score_pairs"  # field of config.json: whether a text is ``tokenizer(prompt, response)``


class Scorer(nn.Module):
    """Scores of texts, from one of three kinds of model.

    - pooling ``last``: a decoder, scored at the last token of each text: the ``score`` layer of its
      sequence-classification class, or the drop-in's ``v_head`` where Transformers has no such class.
    - pooling ``mean``: a decoder or an encoder, scored at the mean over its tokens; the drop-in's ``v_head``.
    - pooling ``classifier``: an encoder's sequence-classification class, called as it is.

    The linear layer that makes the score is stored in the model's dtype and multiplied in float32.

    takes_segment_ids: whether the model is told by ids which tokens are a pair's second segment: it has an embedding of
        more than one kind of segment. A tokenizer that makes no segment ids turns it off, see :meth:`read_with`.
    heads: outputs of the layer that makes the score, which is their mean; :mod:`reward_model.models.many_heads`.
    """

    def __init__(self, model: nn.Module, pooling: str):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.thresholds: Thresholds | None = None  # of an ordinal loss, which learns them
        self.heads = 1
        takes_cache = "use_cache" in inspect.signature(self.backbone.forward).parameters  # decoders keep one by default
        self.backbone_options = {"use_cache": False} if takes_cache else {}
        self.has_token_types = any(hasattr(module, "token_type_embeddings") for module in self.backbone.children())
        kinds = getattr(self.config.get_text_config(), "type_vocab_size", None) or 0
        takes_them = "token_type_ids" in inspect.signature(self.backbone.forward).parameters
        self.takes_segment_ids = pooling != "last" and takes_them and kinds > 1

    @property
    def unwrapped(self) -> nn.Module:
        """The model without the LoRA wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        model = self.unwrapped
        return model.rwtransformer if isinstance(model, RewardModel) else model.base_model

    @property
    def config(self) -> PretrainedConfig:
        return self.unwrapped.config

    def read_with(self, encoding: Encoding) -> None:
        """Take texts as a tokenizer makes them, which is kept in the config: pairs or not, segment ids or none."""
        self.takes_segment_ids = self.takes_segment_ids and encoding.has_segment_ids
        setattr(self.config, SCORE_PAIRS, encoding.pairs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        at: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        states: bool = False,
        texts: tuple[torch.Tensor, torch.Tensor] | None = None,
        segment_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scores at given tokens, in the shape of ``at``; ``mean`` and ``classifier``: of whole texts, (n,). float32.

        What there is beside them comes with them in a dict: ``thresholds`` of an ordinal loss; ``heads``, the score by
        each of several heads, one more dimension K, of which the scores are the mean; ``anchor``, the squared distance
        of these heads from their initial weights, (). ZeRO 3 has the whole of a weight only while the engine computes.

        Args:
            input_ids: (b, s).
            attention_mask: (b, s), padded on the right, or what ``attention_mask`` of ``attention.py`` makes.
            at: indices into the b·s tokens, any shape. Only these reach the head.
            position_ids: (b, s); None: the model's own.
            states: the hidden states instead of the scores, one more dimension h (pooling ``last`` only).
            texts: where several texts stand in one row, the indices of their tokens, (n, r), and their lengths, (n,);
                only ``mean`` and ``classifier`` look at them.
            segment_ids: (b, s), for a model that takes them; None: zeros.
        """
        found = self._outputs(input_ids, attention_mask, at, position_ids, states, texts, segment_ids)
        extras: dict[str, torch.Tensor] = {}
        if self.thresholds is not None:
            extras["thresholds"] = self.thresholds()
        if not states and self.heads == 1:
            found = found.squeeze(-1)
        elif not states:
            extras["heads"], found = found, found.mean(-1)
            layer: Any = head_layer(self)
            if layer.distance is not None:
                extras["anchor"] = layer.distance
        return (found, extras) if extras else found

    def _outputs(self, input_ids, attention_mask, at, position_ids, states, texts, segment_ids) -> torch.Tensor:
        """Of the layer that makes the score, (…, K), or with ``states`` what it is given, (…, h)."""
        model = self.unwrapped
        options = {} if position_ids is None else {"position_ids": position_ids}
        if segment_ids is not None:
            options["token_type_ids"] = segment_ids
        elif texts is not None and self.has_token_types:  # Transformers 4 has no more of them than the longest text has
            options["token_type_ids"] = torch.zeros_like(input_ids)
        if self.pooling == "classifier":
            with _texts_in_rows(self.backbone, texts):
                return model(input_ids, attention_mask=attention_mask, **options).logits
        backbone, head = self.backbone, model.v_head if isinstance(model, RewardModel) else model.score
        hidden = backbone(input_ids, attention_mask=attention_mask, **self.backbone_options, **options)[0]  # (b, s, h)
        if self.pooling == "mean":
            if texts is not None:
                hidden, attention_mask = hidden.flatten(0, 1)[texts[0]], _is_text(*texts)
            mask = attention_mask.unsqueeze(-1)
            return head((hidden.float() * mask).sum(1) / mask.sum(1))
        # index_select: its backward adds rows, where the one of hidden[at] sorts the indices first
        picked = hidden.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
        return picked if states else head(picked)


def _is_text(spans: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Ones for the tokens of texts, zeros beyond them. (n, r)"""
    return (torch.arange(spans.shape[1], device=spans.device) < lengths[:, None]).long()


@contextmanager
def _texts_in_rows(backbone: nn.Module, texts: tuple[torch.Tensor, torch.Tensor] | None) -> Iterator[None]:
    """While this lasts, an encoder's layers take texts that stand in one row, and give each a row of its own.

    What comes after them, a pooler or a head, takes the first token of each row, or all.
    """
    if texts is None:
        yield
        return

    def into_rows(module: nn.Module, inputs, output):
        if isinstance(output, torch.Tensor):
            return output.flatten(0, 1)[texts[0]]
        output["last_hidden_state"] = output["last_hidden_state"].flatten(0, 1)[texts[0]]
        return output

    hook = _last_of_the_layers(backbone).register_forward_hook(into_rows)
    try:
        yield
    finally:
        hook.remove()


def _last_of_the_layers(backbone: nn.Module) -> nn.Module:
    """What gives an encoder's hidden states: the module around its layers, or the last of them.

    Raises:
        NotImplementedError: neither is found.
    """
    for name in ("encoder", "transformer"):
        if hasattr(backbone, name):
            return getattr(backbone, name)
    lists = [module for module in backbone.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise NotImplementedError(f"where the layers of {type(backbone).__name__} end is not known")
    return max(lists, key=len)[-1]


def layers_of(scorer: Scorer) -> nn.ModuleList:
    """The backbone's layers: its longest list of modules; empty: it has none."""
    lists = [module for module in scorer.backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def first_position(scorer: Scorer) -> int:
    """What an embedding of positions counts from: RoBERTa and its kin count from after the pad's id."""
    for module in scorer.backbone.children():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return module.padding_idx + 1
    return 0


def head_layer(scorer: Scorer) -> nn.Linear:
    """The linear layer whose one output is the score, or whose outputs are those of several heads."""
    model = scorer.unwrapped
    inside = {id(module) for module in scorer.backbone.modules()}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    heads = [module for module in heads if module.out_features == scorer.heads]
    if not heads:
        raise UserError(f"{type(model).__name__} has no linear layer with one output to score with")
    return heads[-1]  # PEFT keeps the one that it does not train before it


def divide_head(scorer: Scorer, by: float) -> None:
    """Divide every score by a number."""
    head = head_layer(scorer)
    for parameter in [head.weight] if head.bias is None else [head.weight, head.bias]:
        with gathered([parameter], modify=True), torch.no_grad():
            parameter.div_(by)


def multiply_in_float32(model: nn.Module) -> None:
    """Give a classification model's last layer the drop-in's float32 product.

    Only the class changes: a new module would lose what DeepSpeed ZeRO 3 has hung on the weight.
    """
    head_layer(Scorer(model, "classifier")).__class__ = ValueHead


def init_head(scorer: Scorer, seed: int) -> None:
    """Draw a new head's weights, the same for every ZeRO stage and number of ranks."""
    weight = head_layer(scorer).weight
    with gathered([weight], modify=True):
        width = weight.shape[1]
        drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1)
        with torch.no_grad():
            weight.copy_(drawn)


def gathered(parameters: list[nn.Parameter], modify: bool = False):
    """The whole of parameters that ZeRO 3 has partitioned; nothing to do for others."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def resize_embedding(scorer: Scorer, rows: int) -> None:
    """Let the embedding hold ``rows`` ids; never shrinks it. Before ``deepspeed.initialize``."""
    model = scorer.unwrapped
    model = model.rwtransformer if isinstance(model, RewardModel) else model
    weight = model.get_input_embeddings().weight
    have = getattr(weight, "ds_shape", weight.shape)[0]
    if rows > have:
        rows = 8 * -(-rows // 8)  # widths that matrix units like
        model.resize_token_embeddings(rows, mean_resizing=False)
        logger.info(f"embedding: {have} → {rows} rows")


def embedding_name(scorer: Scorer) -> str:
    """The input embedding's weight among the backbone's parameters."""
    weight = scorer.backbone.get_input_embeddings().weight
    return next(name for name, parameter in scorer.backbone.named_parameters() if parameter is weight)


def embedding_rows(scorer: Scorer) -> int:
    weight = scorer.backbone.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def count(parameter: nn.Parameter) -> int:
    """Elements of a parameter, partitioned or not, quantized or not."""
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes has two weights of 4 bits in an element
    return packed.shape.numel() if packed else getattr(parameter, "ds_numel", parameter.numel())
