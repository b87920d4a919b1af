# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def shown(value: float, digits: int = 4) -> str:
    """A number with some digits after the first; "–" where there is none.

    >>> shown(0.97667), shown(12345.6), shown(0.0000123), shown(3.0), shown(float("nan"))
    ('0.9767', '12,346', '1.23e-05', '3', '–')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        return _minus(f"{value:.3g}")
    if size >= 1e4:
        return _minus(f"{value:,.0f}")
    text = f"{value:.{digits}f}" if size < 10 else f"{value:.{max(1, digits - 2)}f}"
    return _minus(text.rstrip("0").rstrip(".") if value == round(value) else text)


def share(value: float) -> str:
    """A share of pairs, as the log has it.

    >>> share(1.0), share(float("nan"))
    ('1.0000', '–')
    """
    return f"{value:.4f}" if math.isfinite(value) else shown(value)


def edge(value: float) -> str:
    """An end of a stretch.

    >>> edge(1.0), edge(1.5), edge(-3.88123)
    ('1', '1.5', '−3.881')
    """
    return _minus(f"{value:.4g}") if math.isfinite(value) else shown(value)


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(0.8), duration(72), duration(7384), duration(200_000), duration(float("nan"))
    ('0.8 s', '1 min 12 s', '2 h 3 min', '2 d 7 h', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for size, unit, smaller, small_unit in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {small_unit}"
    raise AssertionError(seconds)


def told_apart(paths: Sequence[Sequence[str]]) -> list[str]:
    """As many last parts of the paths as tell them apart; the same path twice has a number.

    >>> told_apart([("one", "output"), ("two", "output")])
    ['one/output', 'two/output']
    """
    names: list[str] = []
    for count in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(each[-count:]) for each in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({place})" for place, name in enumerate(names, 1)]


def setting(value: Any) -> str:
    """A value of a flag.

    >>> setting(["a", "b"]), setting(None), setting(0.001), setting(True)
    ('a b', 'none', '0.001', 'true')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(map(setting, value)) if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
