# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to say of its held-out rows: the temperature of their gaps, and ``evaluation.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.evaluation.assessment import FILE, Responses, assess, mistakes
from reward_model.evaluation.calibration import NO_TEMPERATURE, doubt_temperature, is_known, tempered
from reward_model.evaluation.judged import Judged
from reward_model.training.trainer import Trainer

MOST_PAIRS = 5_000  # for the bag of words, which takes a minute for more


def keep_temperature(trainer: Trainer) -> None:
    """Write to the config by which temperature σ(gap / T) is a probability, if one makes it better on other rows.

    It is that of the first evaluation set, for scores as they are saved. It has no part in training, and what loads the
    model elsewhere gives the scores as they are.
    """
    judged, config = trainer.last.judged, trainer.forward.scorer.config
    if judged is None or not len(judged):
        return
    gaps = saved_scale(trainer, judged).gaps
    found = tempered(gaps, judged.pair_prompts, trainer.settings.training.seed)
    if found is None:
        logger.info(f"no temperature could be tried on {counted(len(gaps), 'held-out pair')}: {NO_TEMPERATURE}")
        return
    raw, fitted = found.raw, found.tempered
    if fitted.log_loss >= raw.log_loss:
        logger.info(f"calibration error {raw.ece:.4f}: no temperature is better on pairs that it was not fitted on")
        return
    doubt = doubt_temperature(found.temperature, found.interval, len(gaps))
    if not is_known(found.temperature, found.interval):
        logger.warning(f"no score_temperature is saved: {doubt}")
        return
    config.score_temperature = found.temperature
    low, high = found.interval or (None, None)
    config.score_temperature_fit = {"pairs": len(gaps), "low": low, "high": high}
    logger.info(
        f"calibration error {raw.ece:.4f}, and {fitted.ece:.4f} with σ(gap / {found.temperature:.3f}), on pairs that a "
        f"temperature was not fitted on; that of all {counted(len(gaps), 'pair')} is score_temperature in config.json"
    )
    if doubt:
        logger.warning(f"score_temperature: {doubt}")


def saved_scale(trainer: Trainer, judged: Judged) -> Judged:
    """The scores of the last evaluation as the saved model gives them, which may have been normalized since."""
    config = trainer.forward.scorer.config
    mean, std = getattr(config, "score_mean", 0.0), getattr(config, "score_std", 1.0)
    return judged.on_scale(std, mean)


def write_evaluation(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``evaluation.json`` of every evaluation set; the model is complete without it."""
    stored = getattr(trainer.forward.scorer.config, "score_temperature", 1.0)
    found = []
    for name, of_set in trainer.found.items():
        if of_set.judged is None:
            continue
        judged = saved_scale(trainer, of_set.judged)
        texts = Responses(judged) if len(judged) <= MOST_PAIRS else None
        each: dict[str, Any] = {"model": folder.resolve().name, "data": list(judged.origins.names)} | (
            {"set": name} if name else {}
        )
        each |= assess(judged, texts, trainer.settings.training.seed, stored)
        each["mistakes"] = mistakes(judged, tokenizer)
        found.append(each)
    values = {"assessments": found, "comparisons": [], "benchmarks": []}
    try:
        write_whole(folder / FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        logger.warning(f"{folder / FILE}: {error.strerror}; the model is complete without it")
