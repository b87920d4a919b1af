# SPDX-License-Identifier: Apache-2.0
"""A tokenizer whose pad is never the token that ends a text."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_model.common.errors import UserError, why_not
from reward_model.common.hub import look_into_the_cache_alone
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking

EOT_TOKEN = "<|endoftext|>"  # what upstream's --add_eot_token adds
NEW_PAD_TOKEN = "<|pad|>"
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
RESERVED = re.compile(r"reserved|unused|placeholder|^<extra_\d+>$", re.IGNORECASE)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the trainer needs.

    end: closes a text that does not close itself.
    pad: fills rows; differs from ``end``.
    endings: tokens after which no ``end`` is added (the end token, and what a chat template closes a turn with).
    starts: tokens that open a text.
    rows: embedding rows needed to hold every id.
    """

    end: int
    pad: int
    endings: frozenset[int]
    starts: frozenset[int]
    rows: int


def load_tokenizer(
    name_or_path: str, add_eot_token: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; with ``add_eot_token``, ``<|endoftext|>`` is one token and ends every text.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if name_or_path.startswith((".", "/", "~")) and not os.path.isdir(name_or_path):
        raise UserError(f"{name_or_path}: no such folder")
    if not os.path.isdir(name_or_path):
        look_into_the_cache_alone()
    try:
        with never_asking(trust_remote_code):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        tokenizer("a b")  # what its files say wrongly of lengths, patterns or tokens shows at the first text
    except Exception as error:  # Transformers raises OSError, ValueError, KeyError and the tokenizers' own
        raise UserError(f"no tokenizer in {name_or_path}: {why_not(error)}") from error
    if add_eot_token:
        tokenizer.add_special_tokens({"eos_token": EOT_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def choose_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    embedding_rows: int,
    added: int = 0,
    may_grow: bool = False,
    fill: int | None = None,
) -> SpecialTokens:
    """Find the end token, and a pad that differs from it; adds a pad to the tokenizer if it has none.

    The pad is the tokenizer's own if it differs from the end token, else one that the vocabulary reserves, else a new
    one. Transformers' classification models score at the last token that is not the pad, so a pad that is also the end
    token would have them read one token too early.

    Args:
        embedding_rows: rows of the model's input embedding.
        added: tokens that we added ourselves, for which the embedding may have to grow.
        may_grow: the embedding may grow for tokens that somebody added to the tokenizer alone, a pad most often.
        fill: the pad, where a model is scored and not trained: none is chosen, and the tokenizer stays as it is.

    Raises:
        UserError: no end token, or more tokens than embedding rows.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values()) + 1
    own = max((vocabulary[token] for token in vocabulary.keys() - tokenizer.get_added_vocab().keys()), default=-1) + 1
    if may_grow and own <= embedding_rows < largest - added:
        beyond = largest - embedding_rows
        have = "token has" if beyond == 1 else "tokens have"
        logger.warning(f"{beyond} {have} been added to the tokenizer alone: the model's embedding grows")
    elif largest - added > embedding_rows:
        raise UserError(
            f"the tokenizer has {largest} tokens and the model's embedding {embedding_rows} rows: "
            "they do not belong together"
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no end token (eos_token or sep_token): set one in tokenizer_config.json, "
            f"or let --add_eot_token add {EOT_TOKEN}"
        )
    if fill is None and (tokenizer.pad_token_id is None or tokenizer.pad_token_id == end):
        name = _reserved_token(tokenizer, embedding_rows, end)
        tokenizer.add_special_tokens({"pad_token": name or NEW_PAD_TOKEN})
        logger.info(f"pad token: {tokenizer.pad_token} ({'reserved in' if name else 'added to'} the vocabulary)")
    pad = tokenizer.pad_token_id if fill is None else fill
    starts = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    endings = set(tokenizer.all_special_ids) | _added_special_ids(tokenizer)
    endings -= starts | {pad, tokenizer.unk_token_id, tokenizer.mask_token_id}
    return SpecialTokens(end, pad, frozenset(endings | {end}), frozenset(starts), max(largest, pad + 1))


def _added_special_ids(tokenizer) -> set[int]:
    return {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}


def _reserved_token(tokenizer, embedding_rows: int, end: int) -> str | None:
    vocabulary = tokenizer.get_vocab()
    for name in PAD_NAMES:
        if vocabulary.get(name, end) != end and vocabulary[name] < embedding_rows:
            return name
    candidates = [
        (i, token)
        for token, i in vocabulary.items()
        if i in _added_special_ids(tokenizer) and i < embedding_rows and i != end and RESERVED.search(token)
    ]
    return min(candidates)[1] if candidates else None
