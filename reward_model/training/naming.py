# SPDX-License-Identifier: Apache-2.0
"""What a saved model is, in words that people and other programs read: ``reward_model`` in ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

import reward_model
from reward_model.data.comparisons import Comparison, Comparisons
from reward_model.data.rendering import render
from reward_model.models.saving import NAMING
from reward_model.models.scorer import Scorer
from reward_model.training.texts import CHAT, end_token

ROWS = 8  # that are looked at
SCORED_AT = {"last": "last token", "mean": "mean of the tokens", "classifier": "classification head"}


def name_model(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, run: dict[str, Any]) -> None:
    """Write into a model's config what it was trained for and how it reads a text; nothing of ours scores by it.

    Args:
        run: what ``run.json`` says.

    ``end_token`` is what others have to add to a text; None: the tokenizer adds it.
    """
    config = scorer.config
    setattr(
        config,
        NAMING,
        {
            "objective": _objective(run),
            "margin": _number(run.get("margin")),
            "penalty": _penalty(run),
            "texts": run.get("data", {}).get("texts", "text"),
            "chat": bool(run.get("chat")),
            "end_token": end_token(tokenizer, run.get("special", {}).get("end")),
            "pair_encoding": bool(getattr(config, "score_pairs", False)),
            "max_seq_len": run.get("max_seq_len"),
            "scored_at": SCORED_AT[scorer.pooling],
            "normalized": hasattr(config, "score_mean"),
            "version": reward_model.__version__,
        },
    )


def _objective(run: dict[str, Any]) -> str:
    """The losses with their weights.

    >>> _objective({"loss": ["logistic", "mse"], "loss_weight": [1.0, 0.25]})
    'logistic + 0.25 mse'
    """
    names = run.get("loss") or ["logistic"]
    weights = run.get("loss_weight") or [1.0] * len(names)
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights))


def _penalty(run: dict[str, Any]) -> str | None:
    """What is added to the loss; None: nothing."""
    parts = []
    if run.get("score_penalty"):
        parts.append(f"{run.get('score_penalty_weight'):g} {run['score_penalty']}")
    if run.get("length_penalty"):
        parts.append(f"{run['length_penalty']:g} length")
    return " + ".join(parts) or None


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def kind_of_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Comparisons | Sequence[Comparison], chat: bool = False
) -> str:
    """``chat`` if a chat template wrote most of the first rows, else ``text``.

    Known by what the template writes before a user's words. A template without tokens of its own, whose marks plain
    text may hold as well, is known by the flag alone.

    Args:
        chat: ``--chat``, by which all rows go through the template.
    """
    mark = _mark_of(tokenizer)
    if chat or not mark:
        return "chat" if chat else "text"
    looked_at = [rows[i] for i in range(min(ROWS, len(rows)))]
    written = [tokenizer.decode([*row.prompt, *row.responses[0]], skip_special_tokens=False) for row in looked_at]
    return "chat" if sum(mark in text for text in written) > len(written) / 2 else "text"


def _mark_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before a user's words, from its last token of its own on; empty: it has none."""
    if not tokenizer.chat_template:
        return ""
    try:
        before, found, _ = render(tokenizer, CHAT).partition(CHAT[0]["content"])
    except Exception:  # a template raises what it likes
        return ""
    added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    starts = [before.rfind(token) for token in {*tokenizer.all_special_tokens, *added}]
    begins = max(starts, default=-1)
    return before[begins:].strip() if found and begins >= 0 else ""
