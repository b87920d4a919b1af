# SPDX-License-Identifier: Apache-2.0
"""What can be seen of an answer without understanding it: marks of style, its script, whether it refuses."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

REFUSAL = re.compile(
    r"as an ai\b|as a (?:large )?language model|i(?:['’]m| am) (?:just |only )?an ai\b|"
    r"i (?:cannot|can['’]?t|can not|won['’]t|will not) (?:\w+ ){0,2}?(?:help|assist|provide|answer|comply|fulfill|"
    r"do that|discuss|engage|support|condone|create|generate|write|give)|"
    r"i(?:['’]m| am) (?:not able|unable) to|"
    r"(?:i(?:['’]m| am) (?:very |really |so )?sorry|sorry|my apologies|i apologi[sz]e),? (?:but|i can|however)|"
    r"i (?:respectfully |must )?decline|against my (?:programming|guidelines|policy)",
    re.IGNORECASE,
)
HINTS = (
    "sorry",
    "apolog",
    "as an ai",
    "language model",
    "an ai",
    "cannot",
    "can not",
    "can't",
    "can’t",
    "unable",
    "not able",
    "decline",
    "won't",
    "won’t",
    "will not",
    "against my",
)
START_OF_A_REFUSAL = 250  # characters: who refuses says so at once


def _matches(pattern: str, needs: str = "") -> Callable[[str], int]:
    """How often a pattern is found. needs: characters without one of which there is none; they are faster to seek."""
    found = re.compile(pattern, re.MULTILINE)

    def count(text: str) -> int:
        if needs and not any(each in text for each in needs):
            return 0
        return sum(1 for _ in found.finditer(text))

    return count


STYLES: dict[str, Callable[[str], int]] = {  # what is counted in each answer
    "list items": _matches(r"^[ \t]*(?:[-*•–]|\d{1,3}[.)])[ \t]+\S"),
    "headings": _matches(r"^#{1,6}[ \t]+\S", "#"),
    "code blocks": _matches(r"^[ \t]*(?:```|~~~)", "`~"),
    "bold text": _matches(r"\*\*[^*\n]+\*\*|__[^_\n]+__", "*_"),
    "exclamation marks": lambda text: text.count("!") + text.count("！"),
    "refusing phrases": lambda text: _refusals(text),
    "links": _matches(r"https?://|www\.", ":w"),
    "numbers": _matches(r"\d+(?:[.,]\d+)*"),
}


def _refusals(text: str) -> int:
    lower = text.lower()
    return len(REFUSAL.findall(text)) if any(hint in lower for hint in HINTS) else 0


JOINED = {"HIRAGANA": "JAPANESE OR CHINESE", "KATAKANA": "JAPANESE OR CHINESE", "CJK": "JAPANESE OR CHINESE"}
ASCII_LETTER = re.compile("[A-Za-z]")


def styles_of(text: str) -> tuple[int, ...]:
    """How many of each of ``STYLES`` an answer has."""
    return tuple(count(text) for count in STYLES.values())


def refuses(text: str) -> bool:
    """Whether an answer begins with one of the phrases in which models decline."""
    return _refusals(text.lstrip()[:START_OF_A_REFUSAL]) > 0


def script_of(text: str) -> str:
    """The script in which most letters of a text are, by the names of Unicode; empty: it has no letters.

    A script is no language: English and Spanish are both Latin.

    >>> script_of("Hello"), script_of("Привет, world of ours"), script_of("12 + 3"), script_of("日本語です")
    ('LATIN', 'LATIN', '', 'JAPANESE OR CHINESE')
    """
    if text.isascii():
        return "LATIN" if ASCII_LETTER.search(text) else ""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if name := _script(character):
            found[name] += count
    return found.most_common(1)[0][0] if found else ""


@lru_cache(maxsize=50_000)
def _script(character: str) -> str:
    """Of a letter: the first word of its name."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return JOINED.get(first, first)
