# SPDX-License-Identifier: Apache-2.0
"""What a doctor found: for people, for programs, and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import wrap

from reward_model.common.errors import printable
from reward_model.doctor.biases import Biases
from reward_model.doctor.cleaning import Cleaned
from reward_model.doctor.findings import LEVELS, Finding

MOST_PRINTED = 3  # of the most suspicious pairs
START = 160  # characters of a text that is printed


@dataclass
class Examination:
    """Of training data, and of what is evaluated on.

    counts: rows, pairs and prompts of each set. not_looked_at: what would need more than was given. strengths: as in
    :meth:`reward_model.doctor.strengths.Strengths.summary`. suspicious: pairs whose
    strength is below 0, the lowest first.
    """

    data: list[str]
    counts: dict[str, dict[str, int]]
    findings: list[Finding]
    biases: Biases
    not_looked_at: list[str] = field(default_factory=list)
    strengths: dict = field(default_factory=dict)
    suspicious: list[dict] = field(default_factory=list)
    cleaned: Cleaned | None = None

    def of_level(self, level: str) -> list[Finding]:
        return [each for each in self.findings if each.level == level]

    def is_healthy(self, strict: bool = False) -> bool:
        """Whether nothing hurts and, if ``strict``, nothing is doubtful either."""
        return not self.of_level("hurts") and not (strict and self.of_level("doubtful"))

    def named(self, name: str) -> Finding | None:
        """The finding of a name; None: it was not looked at."""
        return next((each for each in self.findings if each.name == name), None)

    def to_json(self) -> dict:
        return {
            "data": self.data,
            "healthy": self.is_healthy(),
            "healthy_strict": self.is_healthy(strict=True),
            "counts": self.counts,
            "findings": [each.to_json() for each in self.findings],
            "not_looked_at": self.not_looked_at,
            "biases": self.biases.to_json(),
            "strengths": self.strengths,
            "suspicious": self.suspicious,
            "cleaned": self.cleaned.to_json() if self.cleaned else None,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for name, counts in self.counts.items():
            said = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            yield f"{name}: {said}"
        for level in LEVELS:
            found = self.of_level(level)
            if not found:
                continue
            yield f"\n{level}:"
            none = [each.name.replace("_", " ") for each in found if level == "fine" and not each.count]
            if none:
                said = f"nothing of: {', '.join(dict.fromkeys(none))}"
                yield from wrap(said, 118, initial_indent="  ", subsequent_indent="    ")
            for each in (each for each in found if level != "fine" or each.count):
                yield printable(f"  {each.line}")
                if each.advice and level != "fine":
                    yield f"      → {each.advice}"
                if level != "fine":
                    yield from (printable(f"      {line}") for line in each.examples)
        if self.not_looked_at:
            yield "\nnot looked at:"
            yield from (f"  {line}" for line in self.not_looked_at)
        if self.strengths:
            deciles = " ".join(f"{value:.3g}" for value in self.strengths["deciles"])
            yield f"\ndeciles of the strength: {deciles}"
        if self.suspicious:
            count = len(self.suspicious)
            yield f"the lowest of the {count} pairs below 0 that --report and --json have with their texts:"
            for pair in self.suspicious[:MOST_PRINTED]:
                yield printable(
                    f"  {pair['strength']:.3g}  {pair['file']}, row {pair['row']}: {pair['chosen'].strip()[:START]}"
                )
                yield printable(f"      is said to be better than: {pair['rejected'].strip()[:START]}")
        if self.cleaned:
            yield ""
            yield from map(printable, self.cleaned.lines())
        bad, doubtful = len(self.of_level("hurts")), len(self.of_level("doubtful"))
        hurt = "finding hurts" if bad == 1 else "findings hurt"
        of = ", in the data as they were read" if self.cleaned else ""
        yield f"\n{bad} {hurt}, {doubtful} {'is' if doubtful == 1 else 'are'} doubtful{of}"
