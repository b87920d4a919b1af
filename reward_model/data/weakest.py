# SPDX-License-Identifier: Apache-2.0
"""Training pairs in which an ensemble of models trusts least: swapped, or left out.

Secrets of RLHF II (arXiv 2401.06080) ranks the training pairs by their strength (:mod:`.strengths`): most of the lowest
tenth it holds to be labelled wrongly, and swaps them (appendix C.2; figure 26, "flip 10%"), what follows is ambiguous.
Hence, with both shares given, the lowest pairs are swapped, and the ones next above them are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from reward_model.common.words import counted
from reward_model.data.comparisons import Comparisons


@dataclass(frozen=True)
class Weakest:
    """Which pairs were swapped and left out of so many that judge.

    flipped, dropped: how many. flipped_to, dropped_to: the highest strength among them. agreed: of the swapped, how
    many have a strength above 0, so that the models agreed with the label that was swapped.
    """

    pairs: int = 0
    flipped: int = 0
    dropped: int = 0
    flipped_to: float = math.nan
    dropped_to: float = math.nan
    agreed: int = 0

    def lines(self) -> Iterator[str]:
        """What was done, in a line each."""
        of = f"of {counted(self.pairs, 'training pair')}, those with a strength_mean"
        if self.flipped:
            yield f"--flip_share: chosen and rejected swapped in {self.flipped} {of} up to {self.flipped_to:.4g}"
        if self.dropped:
            above = "above these and " if self.flipped else ""
            yield f"--drop_share: left out {self.dropped} {of} {above}up to {self.dropped_to:.4g}"

    def doubt(self) -> str:
        """What speaks against the swaps; empty: nothing."""
        if not self.agreed:
            return ""
        return f"--flip_share: {self.agreed} of the {self.flipped} swapped pairs have a strength_mean above 0: " + (
            "the models agreed with their labels; take a smaller share"
        )

    def to_json(self) -> dict[str, float]:
        """Of what is not NaN."""
        return {name: value for name, value in asdict(self).items() if not math.isnan(value)}


NONE = Weakest()


def rearrange(rows: Comparisons, flip_share: float = 0.0, drop_share: float = 0.0) -> tuple[Comparisons, Weakest]:
    """Swap the pairs of the lowest strengths and leave out those of the next ones. Rows that judge nothing stay.

    Which pairs these are follows from strengths and texts alone, not from the order of the rows: equal strengths are
    ordered by the hashes of the texts. Shares are of all pairs, rounded to whole pairs.

    Args:
        rows: each with one judged pair and its strength, or none.
    """
    if not flip_share and not drop_share:
        return rows, NONE
    judged = np.flatnonzero(rows.pairs)
    strengths = rows.floats("strength")
    assert (rows.pairs[judged] == 1).all() and len(strengths) == len(judged)  # others were refused
    hashes, _, counts = rows.texts()
    first = (np.cumsum(counts) - counts)[judged]
    order = np.lexsort((hashes[first + 1], hashes[first], strengths))  # the last key is the first to go by
    flips, drops = (round(share * len(judged)) for share in (flip_share, drop_share))
    flipped, dropped = order[:flips], order[flips : flips + drops]
    found = Weakest(
        pairs=len(judged),
        flipped=len(flipped),
        dropped=len(dropped),
        flipped_to=float(strengths[flipped].max(initial=-math.inf)) if flips else math.nan,
        dropped_to=float(strengths[dropped].max(initial=-math.inf)) if drops else math.nan,
        agreed=int((strengths[flipped] > 0).sum()),
    )
    if flips:
        rows = rows.with_swapped(judged[flipped])
    if drops:
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), judged[dropped]))
    return rows, found
