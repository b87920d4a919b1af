# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of several models on several sets came to, and how two models compare on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.evaluation.assessment import disagreements
from reward_model.evaluation.intervals import difference
from reward_model.evaluation.judged import Judged


@dataclass(frozen=True)
class Evaluations:
    """What an evaluation came to.

    assessments: of each model on each set, as :func:`reward_model.evaluation.assessment.assess` has them.
    comparisons: of each two models on each set. benchmarks: of each model, the numbers of each benchmark in the data.
    """

    assessments: list[dict] = field(default_factory=list)
    comparisons: list[dict] = field(default_factory=list)
    benchmarks: list[dict] = field(default_factory=list)

    def to_json(self) -> dict:
        return dict(vars(self))


@dataclass(frozen=True)
class Scored:
    """A set as one model scored it, and the tokenizer to read its rows back."""

    judged: Judged
    tokenizer: PreTrainedTokenizerBase


def compare(one: Scored, other: Scored, seed: int) -> dict:
    """Two models on the same rows: the difference of their accuracies, and the pairs on which they disagree most.

    Raises:
        UserError: they did not read the same rows, as where one of them skipped some; or there are no pairs.
    """
    first, second = one.judged, other.judged
    if keys_of(first) != keys_of(second) or len(first) != len(second):
        raise UserError(
            "the models did not read the same rows: one tokenizer made rows unusable that the other did not; "
            "give the same --max_seq_len, long enough for all"
        )
    if not len(first):
        raise UserError("the data have no pairs to compare models on")
    found = difference(first.right, second.right, first.pair_prompts, seed).to_json()
    return found | {"pairs": len(first), "disagreements": disagreements(first, second, one.tokenizer)}


def keys_of(judged: Judged) -> Sequence:
    """The names of the files, and of every row its file and number."""
    places = (judged.origins.sources, judged.origins.numbers)
    return judged.origins.names, *(np.asarray(each).tolist() for each in places)
