# SPDX-License-Identifier: Apache-2.0
"""How the texts of a batch are arranged in rows of token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reward_model.data.comparisons import Comparison

ONE_ROW = ("packed", "unpadded")  # the kinds that need no pads


@dataclass(frozen=True)
class Layout:
    """How Comparisons become rows of token ids.

    kind: ``packed`` writes all of them into one row without pads, ``shared`` writes each into a row of its own,
        ``separate`` writes each response into a row of its own, after a copy of the prompt, and ``unpadded`` writes
        what these rows hold into one row.
    pad: The id that fills the rows. The attention mask, not this id, says where a text ends.
    most_responses: The largest number of responses that merging brings together under one prompt.
    multiple: The length of the rows is a multiple of this number.
    block: The length of the rows is a multiple of this number; beyond 1, the batch says which blocks see which.
    """

    kind: str
    pad: int
    most_responses: int = 16
    block: int = 1
    multiple: int = 1

    def rows(self, comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
        """Distribute merged comparisons over rows of token ids.

        Where prompts are not shared, the whole text is the response, and the prompt is empty.
        """
        if self.kind == "packed":
            return [list(comparisons)]
        if self.kind in ("separate", "unpadded"):
            texts = [Comparison([], [c.prompt + response]) for c in comparisons for response in c.responses]
            return [texts] if self.kind == "unpadded" else [[text] for text in texts]
        return [[c] for c in comparisons]

    def width(self, rows: Sequence[Sequence[Comparison]]) -> int:
        """Number of tokens that every row is padded to."""
        longest = max(sum(c.tokens for c in row) for row in rows)
        step = math.lcm(self.block, self.multiple)
        return step * -(-longest // step)
