# SPDX-License-Identifier: Apache-2.0
"""One finding: what was counted, how bad it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reward_model.common.words import counted
from reward_model.evaluation.intervals import Share

Level = Literal["hurts", "doubtful", "fine"]
EXAMPLES = 5  # rows that a finding or a reason names
REASONS_SHOWN = 10
LEVELS: tuple[Level, ...] = ("hurts", "doubtful", "fine")


@dataclass(frozen=True)
class Finding:
    """What was found of one kind.

    name: of the kind, for programs. level: ``hurts`` is reason enough for exit status 1, ``doubtful`` with --strict.
    line: what was counted, in words. advice: what to do; empty where nothing is wrong. count, of: how many of how many.
    share: of the pairs, with its interval, where the finding is a share. rows: the first of them.
    reasons: of rows that cannot be used, in place of rows, each with its count and its first rows.
    """

    name: str
    level: Level
    line: str
    advice: str = ""
    count: int = 0
    of: int = 0
    share: Share | None = None
    rows: list[str] = field(default_factory=list)
    reasons: list[dict] = field(default_factory=list)

    @property
    def examples(self) -> list[str]:
        """Lines that name rows: a reason each or, without reasons, all in one."""
        if not self.reasons:
            return [_first(self.rows, self.count)] if self.rows else []
        said = [
            f"{each['count']:,} × {each['reason']} ({_first(each['rows'], each['count'])})"
            for each in self.reasons[:REASONS_SHOWN]
        ]
        left = len(self.reasons) - REASONS_SHOWN
        return said + ([f"and {counted(left, 'more reason')}, which --json has"] if left > 0 else [])

    def to_json(self) -> dict:
        return dict(vars(self)) | {"share": self.share.to_json() if self.share else None}


def _first(rows: list[str], count: int) -> str:
    return f"{'; '.join(rows[:EXAMPLES])}{'; …' if count > EXAMPLES else ''}"


def level_of(share: float, doubtful: float, hurts: float) -> Level:
    """How bad a share is: above ``hurts``, above ``doubtful``, or neither.

    >>> level_of(0.02, 0.0, 0.01), level_of(0.005, 0.0, 0.01), level_of(0.0, 0.0, 0.01)
    ('hurts', 'doubtful', 'fine')
    """
    return "hurts" if share > hurts else "doubtful" if share > doubtful else "fine"


def part(count: int, of: int, noun: str) -> str:
    """So many of so many.

    >>> part(1, 2000, "pair"), part(0, 1, "row")
    ('1 of 2,000 pairs (0.05 %)', '0 of 1 row')
    """
    said = f"{count:,} of {of:,} {noun}{'' if of == 1 else 's'}"
    return f"{said} ({percent(count / of)})" if count and of else said


def percent(share: float) -> str:
    """A share in hundredths, in two digits at least.

    >>> percent(0.5), percent(0.0312), percent(0.0004)
    ('50 %', '3.1 %', '0.04 %')
    """
    hundredths = 100 * share
    if hundredths >= 10 or hundredths == 0:
        return f"{hundredths:.0f} %"
    return f"{hundredths:.1f} %" if hundredths >= 1 else f"{hundredths:.2g} %"


def interval(share: Share) -> str:
    """A share of pairs with its interval.

    >>> interval(Share(0.612, 0.58, 0.64, 900))
    '0.612 (0.580 to 0.640)'
    """
    if share.low is None or share.high is None:
        return f"{share.value:.3f} (too few prompts for an interval)"
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def leaves(share: Share, reach: float) -> bool:
    """Whether a share is further from ½ than ``reach``, and its interval, if it has one, leaves ½ out."""
    if abs(share.value - 0.5) <= reach:
        return False
    return share.low is None or share.high is None or share.low > 0.5 or share.high < 0.5
