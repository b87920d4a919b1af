# SPDX-License-Identifier: Apache-2.0
"""What servers that are not run here would do with a saved model, by the keys that they read of it.

vLLM: ``activations.py`` and ``PoolerConfig`` of its pooling layers; SGLang: its page of reward models.
"""

from __future__ import annotations

from typing import Any

SGLANG = (  # classes that its page of reward models lists, of those that this trainer writes
    *("LlamaForSequenceClassification", "Gemma2ForSequenceClassification", "Qwen2ForSequenceClassification"),
    *("Qwen3ForSequenceClassification",),
)


def labels_of(config: dict[str, Any]) -> int:
    """How many numbers a classifier gives by its ``config.json``; 2 where it says nothing, as Transformers has it."""
    return len(config.get("id2label") or ()) or config.get("num_labels") or 2


def vllm(config: dict[str, Any], form: str | None) -> tuple[str, bool]:
    """What vLLM would do, and whether that is the score.

    Args:
        config: ``config.json``.
        form: ``modules``, ``own`` or ``dschat``; None: Transformers'.
    """
    mean = config.get("score_mean")
    if form == "modules":
        applied = "with the mean subtracted, by the dense layer's bias" if mean is not None else "which is raw"
        return f"embed (--runner pooling) gives the score as an embedding of one number, {applied}", True
    name = _class_of(config)
    if form is not None or not name:
        return "it reads no such form: reward-model export --to hf, or --to sentence-transformers", True
    width, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if width and width != hidden:  # OPT-350m projects 1,024 numbers to 512 before its head
        said = f"it refuses {name} with word_embed_proj_dim {width}, as its head takes hidden_size ({hidden}) numbers"
        return f"{said}: reward-model export --to sentence-transformers, for embed", True
    if labels_of(config) != 1:
        return f"classify would give {labels_of(config)} numbers: config.json has so many labels", False
    if config.get("problem_type") != "regression":
        return "classify would give sigmoid(score): problem_type in config.json is not regression", False
    activation = (config.get("sentence_transformers") or {}).get("activation_fn")
    if activation != "torch.nn.modules.linear.Identity":
        return "/score would give sigmoid(score): config.json names no activation_fn Identity", False
    said = f"classify gives the raw score, if it has {name}"
    if mean is not None:
        said += f"; it subtracts no mean unless told: --pooler-config '{{\"logit_mean\": {mean:.6g}}}'"
    return said, True


def sglang(config: dict[str, Any], form: str | None) -> tuple[str, bool]:
    """What SGLang would do, and whether that is the score."""
    name = _class_of(config)
    if form is not None or name not in SGLANG:
        return f"it has no class for this model ({name or form})", True
    if labels_of(config) != 1:
        return f"it would give {labels_of(config)} numbers: config.json has so many labels", False
    said = "--is-embedding: /v1/embeddings gives the raw score; its /v1/classify makes 1.0 of any single label"
    return said + ("; it subtracts no mean" if config.get("score_mean") is not None else ""), True


def _class_of(config: dict[str, Any]) -> str:
    """The classification class that a config names; empty: none."""
    names = [name for name in config.get("architectures") or [] if name.endswith("Classification")]
    return names[0] if names else ""
