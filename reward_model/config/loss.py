# SPDX-License-Identifier: Apache-2.0
"""The loss that the flags name, with every default filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reward_model.common.errors import UserError
from reward_model.config.groups import LossConfig
from reward_model.config.objectives import ALIASES, LOSSES, PRIOR_SMALLEST, kind_of

TAKES_MARGIN = ("logistic", "scaled", "hinge")
MARGINS = ("column", "small", "large", "strength")


@dataclass(frozen=True)
class Loss:
    """The objectives of a run and their weights, and the penalties that are added.

    weights: name of an objective → its weight, in the order given.
    level: ``sequence`` or ``token``.
    margin: a number, or ``column``, ``small``, ``large`` or ``strength`` for what the data say of each pair.
    label_smoothing: a number, or ``column`` or ``strength``.
    prior_beta: B1 and B3 of ``prior_length`` and ``prior_cosine``.
    score_penalty: a name of :data:`reward_model.reward_model.SCORE_PENALTIES`; None: none.
    """

    weights: dict[str, float]
    level: str
    margin: float | str
    label_smoothing: float | str
    focal_gamma: float
    huber_delta: float
    prior_beta: tuple[float, float]
    prior_model: str | None
    length_penalty: float
    score_penalty: str | None
    score_penalty_weight: float


def resolve_loss(config: LossConfig, given: frozenset[str] = frozenset()) -> Loss:
    """Fill in names, weights and numbers.

    Args:
        given: the names of the fields that somebody set. A flag of an objective that is not there is refused.

    Raises:
        UserError: an unknown objective, two of one kind, or a flag that does not go with them.
    """
    names = [ALIASES.get(name, name) for name in config.loss]
    for name in names:
        if name not in LOSSES:
            raise UserError(f"--loss {name}: choose from {', '.join((*LOSSES, *ALIASES))}")
    kinds = [kind_of(name) for name in names]
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--loss {' '.join(names)}: name one loss at most for each of pairs, lists and scores")
    weights = config.loss_weight or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"--loss_weight: {len(weights)} numbers for {len(names)} losses")
    _refuse_foreign_flags(config, names, given)
    if config.loss_level == "token" and set(kinds) != {"pairs"}:
        raise UserError(f"--loss_level token and --loss {' '.join(names)}: only pairs have a loss per token")
    return Loss(
        weights=dict(zip(names, weights)),
        level=config.loss_level,
        margin=_margin(config.margin, names),
        label_smoothing=_label_smoothing(config.label_smoothing, names, given),
        focal_gamma=config.focal_gamma,
        huber_delta=config.huber_delta,
        prior_beta=(config.prior_beta[0], config.prior_beta[1]),
        prior_model=config.prior_model,
        length_penalty=config.length_penalty,
        score_penalty=config.score_penalty,
        score_penalty_weight=config.score_penalty_weight,
    )


def _margin(margin: str | None, names: list[str]) -> float | str:
    takers = [name for name in names if name in TAKES_MARGIN]
    if margin is not None and not takers:
        raise UserError(f"--margin goes with --loss {', '.join(TAKES_MARGIN)}, not {' '.join(names)}")
    if "scaled" in names and margin == "strength":
        raise UserError("--loss scaled and --margin strength: a weight cannot be negative, as strengths may be")
    if "scaled" in names and margin not in MARGINS:
        raise UserError("--loss scaled weighs pairs by their own margins: add --margin column, small or large")
    if margin in MARGINS:
        return margin
    if margin is None:
        return 1.0 if takers == ["hinge"] else 0.0
    number = _number(margin)
    if not math.isfinite(number):
        raise UserError(f"--margin {margin}: give a number, {', '.join(MARGINS[:-1])} or {MARGINS[-1]}")
    return number


def _label_smoothing(smoothing: str, names: list[str], given: frozenset[str]) -> float | str:
    if "label_smoothing" in given and "logistic" not in names:
        raise UserError(f"--label_smoothing goes with --loss logistic, not {' '.join(names)}")
    if smoothing in ("column", "strength"):
        return smoothing
    share = _number(smoothing)
    if not 0.0 <= share <= 0.5:
        raise UserError(f"--label_smoothing {smoothing}: give a number from 0 to 0.5, column or strength")
    return share


def _number(text: str) -> float:
    """A number, NaN for what is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _refuse_foreign_flags(config: LossConfig, names: list[str], given: frozenset[str]) -> None:
    """Refuse a flag of one objective where that objective is not."""
    for flag, owners in (
        ("focal_gamma", ("focal",)),
        ("huber_delta", ("huber",)),
        ("prior_beta", ("prior_length", "prior_cosine")),
        ("prior_model", ("prior_cosine",)),
    ):
        if flag in given and not set(owners) & set(names):
            raise UserError(f"--{flag} goes with --loss {' or '.join(owners)}, not {' '.join(names)}")
    if config.score_penalty is None and "score_penalty_weight" in given:
        raise UserError("--score_penalty_weight without --score_penalty: name the penalty")
    if "prior_cosine" in names and not config.prior_model:
        raise UserError("--loss prior_cosine compares embeddings of responses: name their encoder with --prior_model")
    slope, shift = config.prior_beta
    if slope <= 0 or slope / (1 + PRIOR_SMALLEST) + shift <= 0:
        raise UserError(
            f"--prior_beta {slope:g} {shift:g}: B1 / 1.001 + B3 bounds the gap of like responses; more than 0"
        )
