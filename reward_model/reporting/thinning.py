# SPDX-License-Identifier: Apache-2.0
"""Long series made short without losing what stands out.

Notation: s steps, k of them that are kept.
"""

from __future__ import annotations

import numpy as np

SHARE = 20  # the running mean is over the last twentieth of the run


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Which places of a series to draw: the lowest and the highest of each of ``most / 2`` equal parts, and both ends.

    Args:
        values: (s,), NaN where there is nothing, which is never kept.
        most: places, about; at least 4.

    Returns:
        Places (k,), increasing. All that are finite, if these are no more than ``most``.
    """
    places = np.flatnonzero(np.isfinite(values))
    if len(places) <= most:
        return places
    parts = np.array_split(places, max(1, most // 2 - 1))
    kept = [part[[int(np.argmin(values[part])), int(np.argmax(values[part]))]] for part in parts]
    return np.unique(np.concatenate([places[[0, -1]], *kept]))


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window that ends at each place and is a twentieth of the run (s,); NaN is left out of it."""
    if not len(values):
        return values
    window = max(1, len(values) // SHARE)
    is_there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_there)])
    begins = np.maximum(0, np.arange(len(values)) - window + 1)
    ends = np.arange(len(values)) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])


def evenly(count: int, most: int) -> np.ndarray:
    """Places of a table that has ``most`` rows at the most, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.zeros(0, int)


def ranges(steps: list[int]) -> list[tuple[int, int]]:
    """Increasing numbers as first and last of each stretch without a gap.

    >>> ranges([3, 4, 5, 9])
    [(3, 5), (9, 9)]
    """
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1] = found[-1][0], step
        else:
            found.append((step, step))
    return found


def in_words(steps: list[int], most: int = 12) -> str:
    """Increasing numbers in few words.

    >>> in_words([3, 4, 5, 9])
    '3-5, 9'
    """
    found = ranges(steps)
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in found[:most]]
    return ", ".join(shown) + (f" and {len(found) - most} more stretches" if len(found) > most else "")
