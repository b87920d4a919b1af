# SPDX-License-Identifier: Apache-2.0
"""Numbers in sentences."""

from __future__ import annotations

import re

NUMBER = re.compile(r"\d+(?:[,.]\d+)*|…")


def at_step(step: int, name: str = "") -> str:
    """Where something was found: after a step and, if there are several evaluation sets, in one of them.

    >>> at_step(40), at_step(40, "chat")
    ('step 40', 'step 40, chat')
    """
    return f"step {step}, {name}" if name else f"step {step}"


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "pair"), counted(2, "pair")
    ('1 pair', '2 pairs')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def without_numbers(text: str) -> str:
    """A text by which reasons of one kind are known, whatever the numbers in them.

    >>> without_numbers("longer than 512: 1,385 tokens")
    'longer than #: # tokens'
    """
    return NUMBER.sub("#", text)


def in_common(one: str, other: str) -> str:
    """A text of one kind with another, with dots for the numbers in which they differ.

    >>> in_common("longer than 512: 1,385 tokens", "longer than 512: 600 tokens")
    'longer than 512: … tokens'
    """
    numbers = iter(NUMBER.findall(other))
    return NUMBER.sub(lambda found: found[0] if found[0] == next(numbers, "") else "…", one)


def in_bytes(size: float) -> str:
    """A number of bytes, in a unit that shows two digits at least.

    >>> in_bytes(2.5e9), in_bytes(5_200_000), in_bytes(65_536)
    ('2.50 GB', '5.2 MB', '65.5 kB')
    """
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
