# SPDX-License-Identifier: Apache-2.0
"""Single pairs on a page, as HTML: what was asked, both answers, and their scores."""

from __future__ import annotations

from typing import Any

from reward_model.reporting.html import text
from reward_model.reporting.runs import number
from reward_model.reporting.words import shown

TEXT_BYTES = 400_000  # of the texts of all pairs of a section together, of the 3 MB of a page; BokehJS has 1.3
MOST_IN_ALL = 240  # pairs of a section
MOST_OF_A_START = 160  # bytes of a prompt that stand beside its gap


def pair(
    row: dict[str, Any], most: int, *, is_open: bool = False, of_both: bool = False, gap: float | None = None
) -> str:
    """A pair that unfolds.

    Args:
        row: its texts, scores and origin, as ``mistakes`` of ``evaluation.json`` have them.
        most: bytes of each of the three texts.
        gap: what stands beside it in place of the gap of its scores, which are then not known.
        of_both: show ``gap`` and ``other_gap``, of two models, in place of the gap of the scores.
    """
    better, worse = number(row.get("chosen_score")), number(row.get("rejected_score"))
    beside = shown(better - worse if gap is None else gap, 2)
    if of_both:
        beside = f"{shown(number(row.get('gap')), 2)} | {shown(number(row.get('other_gap')), 2)}"
    prompt = str(row.get("prompt") or "")
    place = row.get("row")
    known = row.get("file") and place is not None
    origin = f'<p class="note">{text(row["file"])}, row {text(place)}</p>' if known else ""
    start = cut_text(" ".join(prompt[:MOST_OF_A_START].split()), MOST_OF_A_START) or "(no prompt)"
    scores = ["" if gap is not None else f", {shown(score, 3)}" for score in (better, worse)]
    sides = "".join(
        f'<div class="{side}"><h4>{side}{score}</h4><p>{cut_text(answer.strip(), most)}</p></div>'
        for side, score, answer in (
            ("chosen", scores[0], str(row.get("chosen") or "")),
            ("rejected", scores[1], str(row.get("rejected") or "")),
        )
    )
    return (
        f'<details class="mistake{" of-both" if of_both else ""}"{" open" if is_open else ""}><summary>'
        f'<span class="gap">{beside}</span><span class="start">{start}</span></summary><div class="texts">'
        f'<div class="prompt"><h4>prompt</h4><p>{cut_text(prompt.strip(), most)}</p></div>{sides}</div>'
        f"{origin}</details>"
    )


def cut(words: str, most: int) -> str:
    """At most so many bytes of a text; a cut one ends with …"""
    if len(words.encode("utf-8", "replace")) <= most:
        return words
    return words.encode("utf-8", "replace")[: most - 3].decode("utf-8", "ignore") + "…"


def cut_text(words: str, most: int) -> str:
    """A text as HTML of at most so many bytes; a cut one ends with …"""
    kept = cut(words, most)
    while len(text(kept).encode("utf-8", "replace")) > most:
        kept = kept[: len(kept) * 3 // 4] + "…"
    return text(kept)
