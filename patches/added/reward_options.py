# SPDX-License-Identifier: Apache-2.0
"""Step 2's flags for the loss, and what of them the reward model takes."""

import argparse
import math

from .model.reward_model import LOSS_LEVELS, SCORE_PENALTIES


def add_reward_options(parser):
    """Add the flags; with none of them given the loss is upstream's."""
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--margin",
        type=_margin,
        default=0.0,
        metavar="NUMBER|column",
        help="how much chosen must score above rejected: a number, or the rows' margin column",
    )
    group.add_argument("--label_smoothing", type=_smoothing, default=0.0, help="share of flipped labels, up to 0.5")
    group.add_argument("--score_penalty", choices=SCORE_PENALTIES, help="a term that keeps scores near zero")
    group.add_argument("--score_penalty_weight", type=_weight, default=0.01, help="weight of --score_penalty")
    group.add_argument(
        "--loss_level",
        choices=LOSS_LEVELS,
        default="token",
        help="token: mean over the tokens from the first difference on; sequence: the end scores only",
    )
    group.add_argument("--exclude_pads", action="store_true", help="token level: end at the shorter answer's end")
    return parser


def reward_options(args):
    """The keyword arguments of ``RewardModel`` that the flags stand for."""
    return {
        "margin": 0.0 if args.margin == "column" else args.margin,
        "label_smoothing": args.label_smoothing,
        "score_penalty": args.score_penalty,
        "score_penalty_weight": args.score_penalty_weight,
        "loss_level": args.loss_level,
        "exclude_pads": args.exclude_pads,
    }


def _number(text, lowest=-math.inf, highest=math.inf):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and lowest <= value <= highest):
        limits = "" if math.isinf(lowest) else f" from {lowest:g}" + ("" if math.isinf(highest) else f" to {highest:g}")
        raise argparse.ArgumentTypeError(f"{text} is not a finite number{limits}")
    return value


def _margin(text):
    if text == "column":
        return text
    try:
        return _number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor the word column") from None


def _smoothing(text):
    return _number(text, 0.0, 0.5)


def _weight(text):
    if not _number(text, 0.0):
        raise argparse.ArgumentTypeError("0 switches the penalty off: leave --score_penalty out instead")
    return float(text)
