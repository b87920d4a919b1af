# SPDX-License-Identifier: Apache-2.0
"""The colors of charts, on a light page and on a dark one.

A chart is written with the light ones; ``page.js`` exchanges each for its dark one where the reader asks for a dark
page. So no two of the light colors are the same. All lines have a contrast of 3 to 1 at least to either page, and text
4.5 to 1 (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

from collections.abc import Hashable

BLUE, VERMILION, GREEN, PURPLE = "#1d6fb8", "#c4502a", "#1b8a5f", "#8450b5"
OCHRE, TEAL, PINK, SLATE = "#9a6b00", "#0b7f8a", "#b83a7d", "#5b6675"
TEXT, AXIS, GRID, INK, WARNING = "#566273", "#c3cad4", "#e8ebf0", "#2b3443", "#b42318"

DARK = {
    BLUE: "#6cb2f5",
    VERMILION: "#f2956b",
    GREEN: "#4fcf9a",
    PURPLE: "#c39af0",
    OCHRE: "#e0b447",
    TEAL: "#4cc9d6",
    PINK: "#f08abf",
    SLATE: "#a4afbd",
    TEXT: "#a3afbe",
    AXIS: "#465160",
    GRID: "#262e38",
    INK: "#e3e8ee",
    WARNING: "#ff8a7a",
}
CHOSEN, REJECTED = BLUE, VERMILION
SERIES = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, TEAL, PINK, SLATE)


def of(place: int) -> str:
    """The color of a run or of an evaluation set; the ninth has the first one's again."""
    return SERIES[place % len(SERIES)]


class Palette:
    """A color for each key, the same in all charts of a page.

    >>> palette = Palette()
    >>> palette.of("a") == palette.of("a") == BLUE, palette.of("b") == VERMILION
    (True, True)
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, str] = {}

    def of(self, *key: Hashable) -> str:
        return self.known.setdefault(key, of(len(self.known)))
