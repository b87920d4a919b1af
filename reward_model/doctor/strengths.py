# SPDX-License-Identifier: Apache-2.0
"""How strongly an ensemble prefers the chosen answers, and which pairs it doubts most.

Notation: p training pairs, n of them with a strength.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reward_model.common.errors import UserError
from reward_model.doctor.findings import Finding, interval, level_of
from reward_model.doctor.ledger import Ledger
from reward_model.doctor.reading import TRAINING, Row
from reward_model.evaluation.intervals import share

MOST_SUSPICIOUS = 100
HISTOGRAM = 40  # bins
TEXT_LENGTH = 20_000  # characters of a text that is kept
NO_STRENGTHS = "the training pairs have no strengths: reward-model ensemble MODEL… --data DATA writes them"


class Strengths:
    """Of the training pairs.

    places: of those that have one, (n,), by strength, the lowest first; among equals in the order of the rows.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        means = ledger.pair_array("mean")
        train = ledger.pair_sets() == TRAINING
        known = np.flatnonzero(train & np.isfinite(means))
        self.places = known[np.argsort(means[known], kind="stable")]
        self.means = means[self.places]
        self.without = int(train.sum()) - len(known)

    def __len__(self) -> int:
        return len(self.places)

    def summary(self, seed: int) -> dict:
        """What is known of them, for JSON; empty without strengths."""
        if not len(self):
            return {}
        below = share((self.means < 0).astype(np.float64), self.ledger.pair_prompts()[self.places], seed)
        stds, agrees = (self.ledger.pair_array(name)[self.places] for name in ("std", "agree"))
        counts, edges = np.histogram(self.means, HISTOGRAM)
        return {
            "pairs": len(self),
            "without": self.without,
            "mean": float(self.means.mean()),
            "std": float(self.means.std()),
            "below_zero": below.to_json(),
            "deciles": np.quantile(self.means, np.linspace(0, 1, 11)).tolist(),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "mean_std_over_models": _mean(stds),
            "mean_agreement": _mean(agrees),
        }

    def findings(self, seed: int) -> Iterator[Finding]:
        if not len(self):
            return
        rows = self.ledger.pair_array("row")[self.places]
        prompts = self.ledger.pair_prompts()[self.places]
        below = share((self.means < 0).astype(np.float64), prompts, seed)
        count = int((self.means < 0).sum())
        yield Finding(
            "strength_below_zero",
            level_of(below.value, 0.05, 0.2),
            f"the models together prefer the rejected answer in {interval(below)} of {len(self):,} pairs "
            f"(mean {self.means.mean():.3g}, std {self.means.std():.3g}; {self.without:,} pairs have none)",
            "read the most suspicious pairs; then --remove or --flip the lowest, or --soften" if count else "",
            count,
            len(self),
            below,
            [self.ledger.origin(int(row)) for row in rows[:5]] if count else [],
        )

    def suspicious(self) -> list[dict]:
        """The pairs whose strength is below 0, the lowest of them, with their texts, as the pages of reports have them.

        Above 0 the models together agree with the label, so that such a pair is the lowest and not suspicious.
        """
        found = []
        places = self.places[self.means < 0][:MOST_SUSPICIOUS]
        for place, mean in zip(places.tolist(), self.means.tolist()):
            of_row = self.ledger.of_row
            number = self.ledger.of_pair["row"][place]
            source, index = of_row["source"][number], of_row["index"][number]
            row = self.ledger.data.row(source, index)
            assert isinstance(row, Row)
            better, worse = row.texts.judged["better"][0], row.texts.judged["worse"][0]
            std, agree = (float(self.ledger.of_pair[name][place]) for name in ("std", "agree"))
            found.append(
                {
                    "strength": mean,
                    "std": None if np.isnan(std) else std,
                    "agree": None if np.isnan(agree) else agree,
                    "file": self.ledger.data.name(source),
                    "row": row.number,
                    "prompt": row.texts.prompt[:TEXT_LENGTH],
                    "chosen": row.answers[better][:TEXT_LENGTH],
                    "rejected": row.answers[worse][:TEXT_LENGTH],
                }
            )
        return found

    def lowest(self, flip: float, remove: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose answers are swapped, and, next above them, rows that are left out; shares of those with one.

        Raises:
            UserError: there are no strengths.
        """
        if not len(self):
            raise UserError(NO_STRENGTHS)
        first, second = round(flip * len(self)), round(remove * len(self))
        rows = self.ledger.pair_array("row")[self.places]
        return rows[:first], rows[first : first + second]


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
