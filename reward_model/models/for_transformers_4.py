# SPDX-License-Identifier: Apache-2.0
"""What Transformers 4 reads of a saved model, written beside what Transformers 5 writes.

Transformers 5 keeps rotary embeddings in ``rope_parameters``, which 4 ignores: it would take its own base and no
scaling, in silence. A tokenizer that 5 saves names a class that 4 has not got. Transformers 5 takes both spellings.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # that Transformers 4 computes
# where Transformers 4 has a base of its own for sliding layers: model type → the keys of the two bases
TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
SLIDING_UNSCALED = ("olmo3",)  # one base for all layers, and a scaling that only full attention gets
THREE_KEYS = ("phi3", "phi4_multimodal")  # of a longrope scaling; any other number of them is refused


def write_old_keys(folder: Path) -> str:
    """Add the keys of Transformers 4 to ``config.json`` and ``tokenizer_config.json`` in a folder.

    Returns:
        What Transformers 4 has no key for, so that the model needs 5; empty: nothing.
    """
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    lacking = add_rope_keys(config)
    _write(config_file, config)
    if tokenizer_file.is_file() and (folder / "tokenizer.json").is_file():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        add_tokenizer_keys(tokenizer)
        _write(tokenizer_file, tokenizer)
    return lacking


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def add_rope_keys(config: dict) -> str:
    """Write the rotary embeddings of a configuration, and of those inside it, under the names of Transformers 4.

    Returns:
        What Transformers 4 has no key for; empty where it has all of them.
    """
    lacking = [add_rope_keys(part) for part in config.values() if isinstance(part, dict) and "model_type" in part]
    rope = config.get("rope_parameters")
    if rope:
        nested = {name: part for name, part in rope.items() if isinstance(part, dict) and name.endswith("_attention")}
        lacking.append(_add_nested(config, nested) if nested else _add_flat(config, rope))
    return ", ".join(dict.fromkeys(filter(None, lacking)))


def _add_flat(config: dict, rope: dict) -> str:
    """One rotary embedding for all layers."""
    kind, model_type = rope.get("rope_type", "default"), config.get("model_type")
    if kind not in ROPE_TYPES:
        return f"rotary embeddings of the type {kind}"
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if str(model_type).startswith("gpt_neox"):
        config["rotary_emb_base"] = rope.get("rope_theta", 10_000)
        config["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
    # null, too, where there is no scaling: gpt-oss has one by default in Transformers 4
    config["rope_scaling"] = _scaling(rope)
    return _longrope(config, rope) if kind == "longrope" else ""


def _scaling(rope: dict) -> dict | None:
    outside = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in outside and value is not None}
    return scaling if set(scaling) - {"rope_type"} else None


def _longrope(config: dict, rope: dict) -> str:
    """Transformers 4 reads the original number of positions outside the scaling, and takes the factor from it."""
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if original:
        config["original_max_position_embeddings"] = original
        positions = config.get("max_position_embeddings")
        given = rope.get("attention_factor")
        if factor and given is None and positions and not math.isclose(factor, positions / original):
            return f"longrope's factor {factor}, which is not {positions} / {original} positions"
    if config.get("model_type") in THREE_KEYS:
        config["rope_scaling"] = {"type": "longrope"} | {name: rope[name] for name in ("short_factor", "long_factor")}
        if rope.get("attention_factor") is not None:
            return "longrope's attention_factor in this model"
    return ""


def _add_nested(config: dict, nested: dict[str, dict]) -> str:
    """Rotary embeddings that differ between layers of full and of sliding attention."""
    model_type = config.get("model_type", "")
    full, sliding = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    scaling, known = _scaling(full), {"rope_type", "rope_theta"}
    odd = set(nested) - {"full_attention", "sliding_attention"} or set(sliding) - known
    unknown = full.get("rope_type", "default") not in ROPE_TYPES or "partial_rotary_factor" in full
    if not full or odd or unknown or (model_type.startswith("modernbert") and scaling):
        return "these rotary embeddings, which differ from layer to layer"
    if model_type in TWO_BASES:
        global_key, local_key = TWO_BASES[model_type]
        config[global_key] = full["rope_theta"]
        config[local_key] = sliding.get("rope_theta", full["rope_theta"])
    elif model_type in SLIDING_UNSCALED and sliding.get("rope_theta") == full["rope_theta"]:
        config["rope_theta"] = full["rope_theta"]
    else:
        return "these rotary embeddings, which differ from layer to layer"
    if not model_type.startswith("modernbert"):
        config["rope_scaling"] = scaling
    return ""


def add_tokenizer_keys(config: dict) -> None:
    """Name the class that takes ``tokenizer.json`` as it is in either version, and what it takes from the class in 5.

    Other classes build parts of the tokenizer anew in Transformers 4, from settings that 5 does not save.
    """
    if "TokenizersBackend" not in _bases(config.get("tokenizer_class", "")):
        return
    kind = _class(config["tokenizer_class"])
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", list(kind.model_input_names))
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # in 4 a dictionary of named tokens
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if named := config.get("model_specific_special_tokens"):
        config["extra_special_tokens"] = named


def _class(name: str):
    import transformers

    return getattr(transformers, name, None)


def _bases(name: str) -> list[str]:
    """Names of a tokenizer class of the installed Transformers and of those it is made of."""
    kind = _class(name)
    return [base.__name__ for base in kind.__mro__] if isinstance(kind, type) else []
