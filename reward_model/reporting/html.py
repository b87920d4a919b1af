# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML. Whatever comes from outside is escaped here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from reward_model.common.errors import masked
from reward_model.reporting.charts import Chart, Table
from reward_model.reporting.colors import DARK


def text(value: object) -> str:
    """A text as HTML, with access tokens masked; what no page can show is written out.

    >>> text("</script><img src=x onerror=alert(1)>")
    '&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;'
    """
    # what the standard forbids in a page, and what would turn the direction of what follows around
    shown = "".join(f"\\x{ord(c):02x}" if _is_hidden(c) else c for c in masked(str(value)))
    return escape(shown, quote=True)


def _is_hidden(character: str) -> bool:
    code = ord(character)
    if code < 32 or 0x7F <= code < 0xA0:
        return character not in "\t\n"
    return 0xD800 <= code < 0xE000 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0xFFFE, 0xFFFF)


def table(of: Table, kind: str = "", name: str = "") -> str:
    """A table, in a box that scrolls by itself where the page is too narrow, which the keyboard reaches.

    Args:
        kind: classes of the style sheet.
        name: for those who hear the page; empty: its columns.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in of.columns)
    head = f"<thead><tr>{head}</tr></thead>" if any(of.columns) else ""
    rows = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in of.rows
    )
    note = f"<caption>{text(of.note)}</caption>" if of.note else ""
    name = text(name or ", ".join(filter(None, of.columns)))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {name}"><table class="{kind}">{note}'
        f"{head}<tbody>{rows}</tbody></table></div>"
    )


def figure(chart: Chart) -> str:
    """A chart: its title, its legend, the place where it is drawn, and its tables."""
    name = chart.name
    caption = f"<p>{text(chart.caption)}</p>" if chart.caption else ""
    tables = "".join(table(each) for each in chart.tables)
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-chart="{name}" data-series="series-{place}">'
        f'<span class="mark {entry.kind}" style="--of-light:{entry.color};--of-dark:{DARK[entry.color]}"></span>'
        f"{text(entry.label)}</button>"
        for place, entry in enumerate(chart.entries.values())
    )
    said = f"Chart: {chart.title}, {chart.y}. The table below has its numbers."
    return (
        f"<figure><figcaption><h3>{text(chart.title)}</h3>{caption}</figcaption>"
        f'<div class="legend" role="group" aria-label="Lines of the chart {text(chart.title)}">{buttons}</div>'
        f'<div class="plot" id="{name}" role="img" aria-label="{text(said)}"></div>'
        f'<details class="table"><summary>{text(chart.title)} as a table</summary>{tables}</details>'
        f'<script type="application/json" id="data-{name}">{chart.as_json()}</script></figure>'
    )


def interval(value: float, low: float, high: float, first: float, last: float, half: float = math.nan) -> str:
    """A point and its interval on a line from ``first`` to ``last``; half: where a mark stands."""

    def at(number: float) -> str:
        return f"{100 * (min(max(number, first), last) - first) / (last - first):.2f}%"

    parts = ['<line class="track" x1="0" x2="100%" y1="9" y2="9"/>']
    if math.isfinite(half) and first < half < last:
        parts.append(f'<line class="half" x1="{at(half)}" x2="{at(half)}" y1="1" y2="17"/>')
    if math.isfinite(low + high):
        parts.append(f'<line class="reach" x1="{at(low)}" x2="{at(high)}" y1="9" y2="9"/>')
    if math.isfinite(value):
        parts.append(f'<circle class="point" cx="{at(value)}" cy="9" r="4"/>')
    return f'<svg class="interval" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'


def graph_table(columns: Iterable[str], rows: Iterable[tuple[list[str], str]], note: str = "") -> str:
    """A table whose rows end in a small picture.

    Args:
        rows: cells, and the HTML of the picture.
    """
    names = list(columns)
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{text(cells[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells[1:])}'
        f'<td class="graph">{graph}</td></tr>'
        for cells, graph in rows
    )
    caption = f"<caption>{text(note)}</caption>" if note else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {text(", ".join(names))}">'
        f'<table class="wide">{caption}<thead><tr>{head}<th><span aria-hidden="true"></span></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
