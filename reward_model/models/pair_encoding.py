# SPDX-License-Identifier: Apache-2.0
"""Whether a model reads prompt and response as a pair of texts, ``tokenizer(prompt, response)``, or joined.

Encoders read pairs, as cross-encoders do; decoders read one text. What a model was trained on is kept with it as
``score_pairs`` in ``config.json``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.config.options import read_run
from reward_model.data.encoding import frame_of
from reward_model.models.scorer import SCORE_PAIRS, Scorer

NO_PAIRS = "its tokenizer makes no pairs that can be read (no separator between them, or segment ids of its own kind)"


def is_encoder(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether a model is one that is scored by a classification head of its own, by its configuration alone.

    As when it is loaded: its class has no ``score`` layer for the last token. The class is built on PyTorch's device
    ``meta``, which takes no memory. Of a model without such a class it says whether it predicts masked words.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        auto_map = getattr(config, "auto_map", None) or {}
        if "AutoModelForSequenceClassification" not in auto_map or not trust_remote_code:
            return type(config) in AutoModelForMaskedLM._model_mapping
    try:
        with never_asking(trust_remote_code), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # loading it says more
        return False
    return not isinstance(getattr(model, "score", None), nn.Linear)


def told(folder: Path, config: PretrainedConfig) -> bool | None:
    """What a saved model says of itself; None: nothing, as a model of others.

    A run of this trainer from before there were pairs has joined its texts, and left a ``run.json`` that knows none.
    """
    said = getattr(config, SCORE_PAIRS, None)
    if said is not None:
        return bool(said)
    run = read_run(folder / "run.json") if folder.is_dir() else {}
    return False if run and "pair_encoding" not in run else None


def for_training(
    wanted: bool | None,
    model: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    is_trained: bool,
    pooling: str | None = None,
    trust_remote_code: bool = False,
) -> bool:
    """Whether a run gives its model pairs; says how an encoder is given texts.

    Args:
        wanted: ``--pair_encoding``; None: as the model was trained or, of one that is no reward model yet, if it is an
            encoder.
        model: a folder or a name.
        chat: the chat template writes every row as one text.
        is_trained: it is a reward model already, and keeps its head.
        pooling: as ``--pooling``. With ``mean`` the texts are joined unless pairs are asked for: what loads such a
            model, SentenceTransformer and vLLM's ``embed``, takes one text.

    Raises:
        UserError: pairs are wanted, and the model is a decoder or its tokenizer makes none.
    """
    if not is_encoder(config, trust_remote_code):
        if wanted:
            raise UserError(
                "--pair_encoding: this model is a decoder, which reads prompt and response as one text; leave it out"
            )
        return False
    before = told(Path(model), config) if is_trained else None
    is_possible = frame_of(tokenizer) is not None
    if wanted and not is_possible:
        raise UserError(f"--pair_encoding: {model}: {NO_PAIRS}; leave it out")
    its_own = before if before is not None else pooling != "mean"
    pairs = wanted if wanted is not None else is_possible and not chat and its_own
    if before is not None and pairs != before:
        logger.warning(
            f"{model} was trained on {_described(before)}, and is trained on {_described(pairs)} from here on: its "
            "scores before the first step are of texts that it does not know"
        )
    why = "" if is_possible or wanted is not None else f": {NO_PAIRS}"
    why = ": --chat writes each row as one text" if chat and wanted is None and is_possible else why
    logger.info(f"the encoder reads {_described(pairs)}{why}")
    return pairs


def for_scoring(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, said: bool | None) -> bool:
    """Whether a saved model is given pairs.

    Args:
        said: what :func:`told` has found; None: pairs for an encoder with a classification head of its own.

    Raises:
        UserError: it was trained on pairs, and the tokenizer beside it makes none.
    """
    if said is None and scorer.pooling != "classifier":
        return False
    if said is not False and frame_of(tokenizer) is None:
        if said:
            raise UserError(f"config.json says {SCORE_PAIRS}, but {NO_PAIRS}")
        logger.warning(f"prompt and response are joined: {NO_PAIRS}")
        return False
    return said is not False


def _described(pairs: bool) -> str:
    return "pairs, tokenizer(prompt, response)" if pairs else "prompt and response joined as one text"
