# SPDX-License-Identifier: Apache-2.0
"""A pretrained model, from a folder or the hub, with a score head: its own or a new one."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from reward_model.common.errors import UserError, first_line, why_not
from reward_model.common.hub import look_into_the_cache_alone
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.common.words import counted
from reward_model.config.model_folder import require_plausible
from reward_model.config.options import require_model_folder, require_no_adapter
from reward_model.models.heads import (
    adopt_head,
    adopt_output,
    heads_among,
    not_read,
    read_weights,
    require_numbers,
    say_bias,
    unread,
)
from reward_model.models.many_heads import begin_heads, say_left
from reward_model.models.quantization import prepare_quantized, quantizing, say_quantized
from reward_model.models.saved_forms import form_of, load_form, no_pooler, on_drop_in, pooling_of, set_dropout
from reward_model.models.scorer import (
    Scorer,
    head_layer,
    init_head,
    multiply_in_float32,
)
from reward_model.models.size import require_its_size


def load_for_training(
    name_or_path: str,
    dtype: torch.dtype | str,
    seed: int,
    pooling: str | None = None,
    dropout: float | None = None,
    expect_head: bool = False,
    trust_remote_code: bool = False,
    new_head: bool = False,
    bits: int | None = None,
    device: str = "cpu",
    heads: int = 1,
    anchored: bool = False,
) -> Scorer:
    """A pretrained model with a score head, new or its own, in any form that a run saves.

    Args:
        dtype: of the weights; ``auto``: as saved.
        pooling: ``last``, ``mean`` or None: last for a decoder, an encoder's own head, and what a form of ours says.
        dropout: for every dropout that the model's config names; None: as configured.
        seed: of a new head, N(0, 1/(h+1)²) as in OpenRLHF: the first scores lie near 0 and the first loss near log 2.
        expect_head: a model without a head of its own is an error.
        trust_remote_code: run the code that the model brings.
        new_head: draw a new head, whatever head there is.
        bits: 4 or 8: the backbone's linear layers are quantized, and frozen; the model is put on ``device``.
        heads: K score heads, whose mean is the score. anchored: they compute how far they are from where they began.

    Raises:
        UserError: no model there, weights missing, a head that cannot be read, or a model that cannot be quantized.
    """
    with never_asking(trust_remote_code):
        scorer, is_new = _load(
            name_or_path, dtype, seed, pooling, dropout, expect_head, trust_remote_code, new_head, bits, device
        )
        if heads > 1:
            begin_heads(scorer, heads, seed, name_or_path, is_new, anchored)
        elif not is_new and not expect_head:
            say_left(scorer, name_or_path)
        return scorer


def _load(
    name_or_path: str, dtype, seed, pooling, dropout, expect_head, trust_remote_code, new_head, bits, device
) -> tuple[Scorer, bool]:
    """The model with one head, and whether that is new."""
    form = form_of(Path(name_or_path)) if Path(name_or_path).is_dir() else None
    if form and bits:
        raise UserError(f"--lora_bits {bits}: {name_or_path} is in a form that is not quantized; leave the flag out")
    if form:
        scorer = _load_own(name_or_path, form, dtype, pooling, dropout, trust_remote_code)
        has_head = True
    else:
        how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "bits": bits, "device": device}
        scorer, has_head = _load_pretrained(name_or_path, dtype, pooling, dropout, new_head, **how)
    if not has_head and expect_head:
        raise UserError(f"{name_or_path} has no trained score head")
    draws = (new_head or not has_head) and scorer.pooling != "classifier"
    if new_head and has_head and not draws:
        raise UserError("--new_head: an encoder's classification head stays as it is; --pooling mean has a new one")
    if draws:
        init_head(scorer, seed)
    if bits:
        say_quantized(scorer, bits)
    is_new = draws or not has_head
    logger.info(
        f"model: {type(scorer.unwrapped).__name__}, pooling {scorer.pooling}, {'new' if is_new else 'loaded'} head"
    )
    return scorer, is_new


def _load_own(name_or_path: str, form, dtype, pooling, dropout, trust_remote_code: bool) -> Scorer:
    its_pooling = pooling_of(Path(name_or_path), form)
    if pooling not in (None, its_pooling):
        raise UserError(f"--pooling {pooling}: {name_or_path} was trained with {its_pooling}; leave the flag out")
    return load_form(Path(name_or_path), form, None if dtype == "auto" else dtype, trust_remote_code, dropout)


def _load_pretrained(
    name_or_path: str, dtype, pooling: str | None, dropout: float | None, new_head: bool, **how: Any
) -> tuple[Scorer, bool]:
    """A model as Transformers stores it, and whether it has a trained score head; how: of :func:`_from_pretrained`."""
    try:
        values = PretrainedConfig.get_config_dict(name_or_path)[0]
        require_plausible(name_or_path, values, how["trust_remote_code"])
        config = AutoConfig.from_pretrained(name_or_path, num_labels=1, trust_remote_code=how["trust_remote_code"])
        labels = _labels_of_head(values)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        raise UserError(f"no model in {name_or_path}: {why_not(error)}") from error
    if not is_deepspeed_zero3_enabled():  # then it was asked before
        require_its_size(name_or_path, config, how["trust_remote_code"])
    if dropout is not None:
        set_dropout(config, dropout)
    require_text_model(name_or_path, config)
    options: dict[str, Any] = whole_numbers(name_or_path, config)
    if options and how["bits"]:
        raise UserError(f"--lora_bits {how['bits']}: {name_or_path} is quantized already; leave the flag out")
    if options:
        logger.warning(f"{name_or_path} is quantized: its weights are loaded, trained and saved as numbers")
    options |= how
    auto_map = getattr(config, "auto_map", None) or {}
    has_class = type(config) in AutoModelForSequenceClassification._model_mapping or (
        "AutoModelForSequenceClassification" in auto_map
    )
    if labels != 1 and pooling != "mean" and is_deepspeed_zero3_enabled():
        raise UserError(
            f"{name_or_path} is a classifier of {labels} labels: Transformers cannot put a new head on it at "
            "ZeRO stage 3; take --zero_stage 2, or --pooling mean"
        )
    may_differ = new_head and not is_deepspeed_zero3_enabled()  # a head that config.json does not speak of
    if pooling != "mean" and has_class:
        # never where it is not needed: under ZeRO 3 every weight has the shape (0,) when Transformers 4.56 and 4.57
        # compare, so that they drop the whole checkpoint
        ignore: dict[str, Any] = {"ignore_mismatched_sizes": True} if labels != 1 or may_differ else {}
        model, missing, beyond = _from_pretrained(
            AutoModelForSequenceClassification, name_or_path, config, dtype, **options, **ignore
        )
        prefix = model.base_model_prefix + "."
        absent = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
        has_head = all(name.startswith(prefix) for name in missing)
        is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
        if pooling == "last" and not is_decoder:
            raise UserError(f"--pooling last: {type(model).__name__} has a head of its own; leave the flag out")
        scorer = Scorer(model, "last" if is_decoder else "classifier")
        multiply_in_float32(model)
    else:
        backbone, absent, beyond = _from_pretrained(
            AutoModel, name_or_path, config, dtype, **options, **no_pooler(config)
        )
        scorer = on_drop_in(text_part(backbone), pooling or "last")
        has_head = scorer.pooling == "last" and scorer.backbone is not backbone and adopt_output(scorer, backbone)
    if "quantization_config" not in options:
        require_numbers(name_or_path, beyond)
    if absent:
        raise UserError(f"{name_or_path} lacks {len(absent)} of the model's weights, {absent[0]} the first of them")
    takes_head = not new_head and (scorer.pooling == "last" or (scorer.pooling == "classifier" and labels == 1))
    return scorer, _read_beyond(scorer, name_or_path, beyond, has_head, takes_head)


def require_text_model(name_or_path: str, config) -> None:
    """Raises UserError for a model whose input is not token ids."""
    kind = AutoModel._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    takes = getattr(kind, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise UserError(f"{name_or_path}: {kind.__name__} reads {takes}, and no text")


def text_part(backbone: nn.Module) -> nn.Module:
    """What of a model gives hidden states: AutoModel makes Llama 4 with its language head, and a tower for images."""
    name = type(backbone).__name__
    try:
        if not isinstance(backbone.get_input_embeddings(), nn.Module):
            raise UserError(f"{name} has no embedding of tokens: it is no text model")
        if backbone.get_output_embeddings() is None:
            return backbone
        part = backbone.get_decoder()
        part = getattr(part, "model", part) if part.get_output_embeddings() is not None else part
    except (NotImplementedError, AttributeError) as error:
        raise UserError(f"{name} gives no hidden states that could be scored: {first_line(error)}") from error
    if part is backbone:
        raise UserError(f"{name} gives no hidden states that could be scored")
    if getattr(backbone, "_auto_class", None) and type(part).__module__.startswith("transformers_modules"):
        type(part).register_for_auto_class("AutoModel")  # so that what is saved brings its code
    logger.info(f"of {name} the text part, {type(part).__name__}, is trained and saved")
    return part


def _read_beyond(scorer: Scorer, name_or_path: str, beyond: list[str], has_head: bool, takes_head: bool) -> bool:
    """Take a score head from the weights that the model does not read, and name the others; whether there is a head."""
    width = head_layer(scorer).in_features
    shapes = unread(name_or_path, beyond, getattr(scorer.config.get_text_config(), "vocab_size", 0), width)
    heads = heads_among(shapes, width) if takes_head else []
    if has_head:
        heads = [name for name in heads if name == "score.bias"]
        say_bias(read_weights(name_or_path, heads))
    elif heads:
        adopt_head(scorer, name_or_path, heads)
        has_head = True
    if names := [name for name in shapes if name not in heads]:
        others = f" and {counted(len(names) - 3, 'other')}" if len(names) > 3 else ""
        logger.warning(f"{name_or_path}: weights that are not read: {', '.join(names[:3])}{others}")
    return has_head


def _labels_of_head(config: dict) -> int:
    """How many labels a checkpoint's own classification head has by its config.json; 1 where there is no such head."""
    if not any(name.endswith("Classification") for name in config.get("architectures") or []):
        return 1
    return len(config.get("id2label") or ()) or config.get("num_labels") or 2  # 2 is the default, not written down


def _from_pretrained(
    auto_class, name_or_path: str, config, dtype: torch.dtype, bits: int | None, device: str, **kwargs
) -> tuple[nn.Module, list[str], list[str]]:
    """A model, the names of its weights that the checkpoint lacks, and those of the checkpoint that it lacks.

    Args:
        bits: 4 or 8: quantize the backbone's linear layers, and put the model on ``device``.
    """
    try:
        if bits:
            own = {name: kwargs[name] for name in ("trust_remote_code", "add_pooling_layer") if name in kwargs}
            kwargs |= quantizing(auto_class, config, bits, dtype, device, **own)
        model, info = auto_class.from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):  # Transformers 5 and 4
            raise UserError(
                f"{name_or_path} has weights of other sizes than its config.json says; if they are the score head's, "
                "--new_head draws a new one"
            ) from error
        raise UserError(f"cannot load the weights of {name_or_path}: {why_not(error)}") from error
    _forget_quantization(model)
    if bits:
        prepare_quantized(model, bits, dtype)
    # of another shape: names in Transformers 4, a name and two shapes in 5
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    beyond = set(info["unexpected_keys"])
    if is_deepspeed_zero3_enabled():
        width = getattr(config.get_text_config(), "hidden_size", 0)
        beyond.update(not_read(name_or_path, model.state_dict(), width))
    return model, sorted(set(info["missing_keys"]) | mismatched), sorted(beyond)


QUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}  # that Transformers can write out as numbers


def whole_numbers(name_or_path: str, config) -> dict[str, Any]:
    """What makes Transformers load a quantized checkpoint as numbers that can be trained and saved.

    Returns:
        Arguments of ``from_pretrained``; none for a checkpoint that is not quantized.

    Raises:
        UserError: a quantization that cannot be undone.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return {}
    method = str(stored["quant_method"] if isinstance(stored, dict) else stored.quant_method)
    method = method.rpartition(".")[2].lower()
    kind: Any = getattr(transformers, QUANTIZED.get(method, ""), None)
    can = kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters
    if not can or is_deepspeed_zero3_enabled():
        at = " at ZeRO stage 3" if can else ""
        raise UserError(
            f"{name_or_path} is quantized ({method}), and cannot be trained and saved as it is evaluated{at}: start "
            "from the checkpoint before quantization"
        )
    return {"quantization_config": kind(dequantize=True)}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _forget_quantization(model: nn.Module) -> None:
    """Transformers 5 would quantize again when it saves a model, with the steps by which it undid that."""
    steps = getattr(model, "_weight_conversions", None) or []
    kept = [
        each
        for each in steps
        if not any("Dequantize" in type(step).__name__ for step in getattr(each, "operations", None) or [])
    ]
    if len(kept) < len(steps):
        model._weight_conversions = kept or None


def read_config(name_or_path: str, trust_remote_code: bool = False):
    """Raises UserError where there is no model, or one that cannot be trained."""
    require_model_folder(name_or_path, trust_remote_code)
    require_no_adapter(Path(name_or_path))
    if not Path(name_or_path).is_dir():
        look_into_the_cache_alone()
    try:
        with never_asking(trust_remote_code):
            require_plausible(name_or_path, PretrainedConfig.get_config_dict(name_or_path)[0], trust_remote_code)
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        place = "" if Path(name_or_path).is_dir() else "no such folder here, and from the hub: "
        raise UserError(f"--model_name_or_path {name_or_path}: {place}{why_not(error)}") from error
    whole_numbers(name_or_path, config)  # refuses before the data is read
    with never_asking(trust_remote_code):
        require_its_size(name_or_path, config, trust_remote_code)
    return config


def most_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[float, str]:
    """How many tokens a text may have by a model's text configuration and its tokenizer, and whose limit that is.

    Infinite where neither says.
    """
    # RoBERTa's kind numbers its positions from 2 and says so only in its tokenizer; XLNet's -1 is no limit
    limits = [
        (getattr(config, "max_position_embeddings", None) or 0, "the model's positions are"),
        (tokenizer.model_max_length, "its tokenizer's model_max_length is"),
    ]
    return min((limit for limit in limits if limit[0] > 0), default=(math.inf, ""))


def is_reward_model(name_or_path: str, config) -> bool:
    """Whether a model has been trained to give one score, by its config and its form."""
    if Path(name_or_path).is_dir() and form_of(Path(name_or_path)):
        return True
    return config.num_labels == 1 and any(name.endswith("Classification") for name in config.architectures or [])
