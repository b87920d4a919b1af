# SPDX-License-Identifier: Apache-2.0
"""Which texts are fitted to, and which are held out: by what they are, and not by where they stand in the data."""

from __future__ import annotations

import numpy as np

HELD_OUT = 0.2  # of the prompts, or of the texts where there are few prompts
LEAST_PROMPTS = 20  # with fewer, a fifth of them would be hardly any kind of prompt


def keys(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number of 64 bits for each hash (n,), uint64: equal for equal hashes and seeds, else as if drawn.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = hashes.astype(np.int64).view(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def drawn(hashes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """A place of each different text, or of so many of them, in rising order, (m,).

    Those with the lowest keys: a sample without replacement in which each different text is as likely, however often it
    comes, and which does not depend on the order of the data.
    """
    _, first = np.unique(hashes, return_index=True)
    if len(first) > most:
        order = np.argsort(keys(hashes[first], seed), kind="stable")
        first = first[order[:most]]
    return np.sort(first)


def held_out(texts: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
    """Whether each text is held out, (n,) bool: a fifth of the prompts with all of their texts; and whether it is so.

    Where there are fewer than 20 prompts, it is a fifth of the texts, so that the held-out ones answer known prompts.

    Args:
        texts, prompts: hashes, (n,).
    """
    by_prompt = len(np.unique(prompts)) >= LEAST_PROMPTS
    groups = prompts if by_prompt else texts
    different = np.unique(groups)
    order = np.argsort(keys(different, seed + 1), kind="stable")  # not the order that the texts were drawn by
    chosen = different[order[: max(1, round(HELD_OUT * len(different)))]]
    return np.isin(groups, chosen), by_prompt
