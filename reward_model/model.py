# SPDX-License-Identifier: Apache-2.0
"""A Transformers model with one score on top, and what the trainer asks of it: scores at given tokens.

Notation: b rows, s tokens, h hidden units.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from reward_model.errors import UserError, first_line, say
from reward_model.losses import Thresholds
from reward_model.reward_model import RewardModel, ValueHead


class Scorer(nn.Module):
    """Scores of texts, from one of three kinds of model.

    - pooling ``last``: a decoder, scored at the last token of each text: the ``score`` layer of its
      sequence-classification class, or the drop-in's ``v_head`` where Transformers has no such class.
    - pooling ``mean``: a decoder or an encoder, scored at the mean over its tokens; the drop-in's ``v_head``.
    - pooling ``own``: an encoder's sequence-classification class, called as it is.

    The linear layer that makes the score is stored in the model's dtype and multiplied in float32.
    """

    def __init__(self, model: nn.Module, pooling: str):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.thresholds: Thresholds | None = None  # of an ordinal loss, which learns them
        takes_cache = "use_cache" in inspect.signature(self.backbone.forward).parameters  # decoders keep one by default
        self.backbone_options = {"use_cache": False} if takes_cache else {}

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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        at: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Scores at given tokens, in the shape of ``at``; pooling ``mean`` and ``own``: of whole rows, (b,). float32.

        With thresholds, if there are any: ZeRO 3 has the whole of a weight only while the engine computes.

        Args:
            input_ids: (b, s).
            attention_mask: (b, s), padded on the right, or what :func:`reward_model.sharing.attention_mask` makes.
            at: indices into the b·s tokens, any shape. Only these reach the head.
            position_ids: (b, s); None: the model's own.
            states: the hidden states instead of the scores, one more dimension h (pooling ``last`` only).
        """
        scores = self._scores(input_ids, attention_mask, at, position_ids, states)
        return scores if self.thresholds is None else (scores, self.thresholds())

    def _scores(self, input_ids, attention_mask, at, position_ids, states) -> torch.Tensor:
        model = self.unwrapped
        if self.pooling == "own":
            return model(input_ids, attention_mask=attention_mask).logits.squeeze(-1)
        backbone, head = self.backbone, model.v_head if isinstance(model, RewardModel) else model.score
        options = self.backbone_options | ({} if position_ids is None else {"position_ids": position_ids})
        hidden = backbone(input_ids, attention_mask=attention_mask, **options)[0]  # (b, s, h)
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1)
            return head((hidden.float() * mask).sum(1) / mask.sum(1)).squeeze(-1)
        # index_select: its backward adds rows, where the one of hidden[at] sorts the indices first
        picked = hidden.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
        return picked if states else head(picked).squeeze(-1)


def load_for_training(
    name_or_path: str,
    dtype: torch.dtype | str,
    seed: int,
    pooling: str | None = None,
    dropout: float | None = None,
    expect_head: bool = False,
) -> Scorer:
    """A pretrained model with a score head, new or its own.

    Args:
        pooling: ``last``, ``mean`` or None: last for a decoder, an encoder's own head.
        dropout: for every dropout that the model's config names; None: as configured.
        seed: of a new head, N(0, 1/(h+1)²) as in OpenRLHF: the first scores lie near 0 and the first loss near log 2.
        expect_head: a model without a head of its own is an error.

    Raises:
        UserError: no model there, or weights missing.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, num_labels=1)
        labels = _labels_of_head(PretrainedConfig.get_config_dict(name_or_path)[0])
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        raise UserError(f"no model in {name_or_path}: {first_line(error)}") from error
    if dropout is not None:
        set_dropout(config, dropout)
    has_class = type(config) in AutoModelForSequenceClassification._model_mapping
    if labels != 1 and pooling != "mean" and is_deepspeed_zero3_enabled():
        raise UserError(
            f"{name_or_path} is a classifier of {labels} labels: Transformers cannot put a new head on it at "
            "ZeRO stage 3; take --zero_stage 2, or --pooling mean"
        )
    if pooling != "mean" and has_class:
        # never where it is not needed: under ZeRO 3 every weight has the shape (0,) when Transformers 4.56 and 4.57
        # compare, so that they drop the whole checkpoint
        ignore = {"ignore_mismatched_sizes": True} if labels != 1 else {}
        model, missing = _from_pretrained(AutoModelForSequenceClassification, name_or_path, config, dtype, **ignore)
        prefix = model.base_model_prefix + "."
        absent = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
        new_head = any(not name.startswith(prefix) for name in missing)
        is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
        if pooling == "last" and not is_decoder:
            raise UserError(f"--pooling last: {type(model).__name__} has a head of its own; leave the flag out")
        scorer = Scorer(model, "last" if is_decoder else "own")
        multiply_in_float32(model)
    else:
        backbone, absent = _from_pretrained(AutoModel, name_or_path, config, dtype, **no_pooler(config))
        scorer = on_drop_in(backbone, pooling or "last")
        new_head = True
    if absent:
        raise UserError(f"{name_or_path} lacks {len(absent)} of the model's weights, {absent[0]} the first of them")
    if new_head and expect_head:
        raise UserError(f"{name_or_path} has no trained score head")
    if new_head and scorer.pooling != "own":
        init_head(scorer, seed)
    say(f"model: {type(scorer.unwrapped).__name__}, pooling {scorer.pooling}, {'new' if new_head else 'loaded'} head")
    return scorer


def on_drop_in(backbone: nn.Module, pooling: str) -> Scorer:
    """A model without a head under the drop-in's; its pad rule stays unused, since lengths say where a text ends."""
    return Scorer(RewardModel(backbone, SimpleNamespace(pad_token_id=None)), pooling)


def _labels_of_head(config: dict) -> int:
    """How many labels a checkpoint's own classification head has by its config.json; 1 where there is no such head."""
    if not any(name.endswith("Classification") for name in config.get("architectures") or []):
        return 1
    return len(config.get("id2label") or ()) or config.get("num_labels") or 2  # 2 is the default, not written down


def _from_pretrained(auto_class, name_or_path: str, config, dtype: torch.dtype, **kwargs):
    try:
        model, info = auto_class.from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise UserError(f"cannot load the weights of {name_or_path}: {first_line(error)}") from error
    # of another shape: names in Transformers 4, a name and two shapes in 5
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return model, sorted(set(info["missing_keys"]) | mismatched)


def no_pooler(config) -> dict:
    """AutoModel gives BERT's kind a pooling layer that a mean over tokens leaves unused."""
    model_class = AutoModel._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Write one probability to every dropout that a config names (layerdrop, which skips layers, is another thing)."""
    for name, value in list(config.to_dict().items()):
        is_dropout = "drop" in name or name.endswith("_pdrop")
        if is_dropout and "layerdrop" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)


def head_layer(scorer: Scorer) -> nn.Linear:
    """The linear layer whose one output is the score."""
    model = scorer.unwrapped
    inside = {id(module) for module in scorer.backbone.modules()}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    heads = [module for module in heads if module.out_features == 1]
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
    head_layer(Scorer(model, "own")).__class__ = ValueHead


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
        say(f"embedding: {have} → {rows} rows")


def embedding_name(scorer: Scorer) -> str:
    """The input embedding's weight among the backbone's parameters."""
    weight = scorer.backbone.get_input_embeddings().weight
    return next(name for name, parameter in scorer.backbone.named_parameters() if parameter is weight)


def embedding_rows(scorer: Scorer) -> int:
    weight = scorer.backbone.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def add_lora(scorer: Scorer, dim: int, alpha: float, module_name: str | None) -> Scorer:
    """Freeze the backbone and put LoRA adapters (PEFT) beside its linear layers; the head stays trainable.

    Args:
        module_name: only layers whose name contains it; None: every linear layer of the backbone.

    Raises:
        UserError: no such layer.
    """
    from peft import LoraConfig, get_peft_model

    model = scorer.unwrapped
    inside = next(name for name, module in model.named_modules() if module is scorer.backbone)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(inside + ".")
    ]
    targets = [name for name in linear if (module_name or "") in name]
    if not targets:
        raise UserError(f"--lora_module_name {module_name}: in no layer's name; the layers are named like {linear[0]}")
    heads = [name for name, child in model.named_children() if name != inside and any(True for _ in child.parameters())]
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=heads,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        task_type=None if isinstance(model, RewardModel) else "SEQ_CLS",
    )
    # adapters in the base's dtype: DeepSpeed refuses mixed ones under ZeRO 3
    scorer.model = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = sum(count(p) for p in scorer.parameters() if p.requires_grad)
    total = sum(count(p) for p in scorer.parameters())
    say(f"LoRA: {len(targets)} layers, dimension {dim}; the base is frozen, {trained:,} of {total:,} parameters train")
    return scorer


def count(parameter: nn.Parameter) -> int:
    """Elements of a parameter, partitioned or not."""
    return getattr(parameter, "ds_numel", parameter.numel())
