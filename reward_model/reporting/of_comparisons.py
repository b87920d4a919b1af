# SPDX-License-Identifier: Apache-2.0
"""How two models compare on the same pairs, as HTML: the difference of their accuracies, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reward_model.common.words import counted
from reward_model.reporting import html
from reward_model.reporting.charts import Table
from reward_model.reporting.of_assessments import MOST_MISTAKES
from reward_model.reporting.pairs import MOST_IN_ALL, TEXT_BYTES, pair
from reward_model.reporting.runs import number
from reward_model.reporting.words import shown

NOTE = (
    "Difference: accuracy of the first model minus that of the second, with its interval of 95 %, which knows that "
    "pairs share prompts. McNemar's exact test takes pairs for independent."
)


def comparison(found: Sequence[dict[str, Any]], names: Mapping[str, str]) -> Iterator[str]:
    """A table of all comparisons, and for each the pairs on which its models disagree most, folded.

    Args:
        found: as ``comparisons`` of ``evaluation.json``; every key may be absent.
        names: of models, as they are shown.
    """
    models = [tuple(names.get(str(each.get(key)), str(each.get(key))) for key in ("one", "other")) for each in found]
    sets = [each["set"] if isinstance(each.get("set"), str) else "" for each in found]
    yield html.table(_table(found, models, sets), "wide", "comparison of the models")
    most_of_one = min(MOST_MISTAKES, MOST_IN_ALL // max(1, len(found)))
    rows_of_all = [_rows(each)[:most_of_one] for each in found]
    most = TEXT_BYTES // (3 * max(1, sum(map(len, rows_of_all))))  # of the three texts of each
    for (one, other), of_set, rows in zip(models, sets, rows_of_all):
        if rows:
            where = f" on {of_set}" if of_set else ""
            title = f"Where {one} and {other} disagree most{where}: {counted(len(rows), 'pair')}"
            said = (
                f"Gaps, score of the better answer − score of the worse: of {one} | of {other}. "
                f"The scores beside the answers are those of {one}."
            )
            yield f'<details class="pairs"><summary>{html.text(title)}</summary><p class="note">{html.text(said)}</p>'
            yield from (pair(row, most, of_both=True) for row in rows)
            yield "</details>\n"


def _rows(of: dict[str, Any]) -> list[dict[str, Any]]:
    found = of.get("disagreements")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _table(found: Sequence[dict[str, Any]], models: Sequence[tuple[str, ...]], sets: Sequence[str]) -> Table:
    has_sets = any(sets)
    rows = []
    for each, (one, other), of_set in zip(found, models, sets):
        value, low, high, p = (number(each.get(key)) for key in ("value", "low", "high", "p_value"))
        between = f" ({_signed(low, 3)} to {_signed(high, 3)})" if math.isfinite(low + high) else ""
        alone = [shown(number(each.get(key))) for key in ("only_one", "only_other", "pairs")]
        where = [of_set] if has_sets else []
        rows.append([one, other, *where, f"{_signed(value, 4)}{between}", shown(p), *alone])
    names = ("first", "second", *(["set"] if has_sets else []), "difference of accuracy", "McNemar's p")
    return Table((*names, "right by the first alone", "right by the second alone", "pairs"), rows, NOTE)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else shown(value)
