# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML. Whatever comes from outside is escaped here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from reward_model.common.errors import masked
from reward_model.reporting.charts import Chart, Table
from reward_model.reporting.colors import DARK

MIN_COLUMN = 110  # pixels; a table that has not so many scrolls in its box


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
    width = f' style="min-width:{MIN_COLUMN * len(of.columns)}px"' if len(of.columns) > 3 and kind == "wide" else ""
    name = text(name or ", ".join(filter(None, of.columns)))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {name}"><table class="{kind}"{width}>{note}'
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


class Point(NamedTuple):
    """A value and the ends of its interval, which may be NaN."""

    color: str
    value: float
    low: float = math.nan
    high: float = math.nan


def table_of_points(
    columns: Sequence[str], rows: Iterable[tuple[list[str], list[Point]]], first: float, note: str
) -> str:
    """A table whose rows end in points on a line from ``first`` to 1.

    Args:
        rows: cells and points.
        note: what is said of the table.
    """
    narrow = " narrow" if columns[0] == "margin" else ""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{text(cells[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells[1:])}'
        f'<td class="graph">{_points(points, first)}</td></tr>'
        for cells, points in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {text(", ".join(columns))}">'
        f'<table class="wide{narrow}"><caption>{text(note)}</caption><thead><tr>{head}<td></td></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _points(points: list[Point], first: float) -> str:
    """An SVG of points, one below the other, on a line from ``first`` to 1; what is beyond stands at the end."""

    def at(value: float) -> str:
        return f"{100 * (min(max(value, first), 1.0) - first) / (1.0 - first):.2f}%"

    parts = ['<line class="track" x1="0" x2="100%" y1="9" y2="9"/>']
    if first < 0.5:
        parts.append(f'<line class="half" x1="{at(0.5)}" x2="{at(0.5)}" y1="1" y2="17"/>')
    for place, (color, value, low, high) in enumerate(points):
        y = 9 + (place - (len(points) - 1) / 2) * min(5.0, 14 / len(points))
        style = f'style="--of-light:{color};--of-dark:{DARK[color]}"'
        if math.isfinite(low + high):
            parts.append(f'<line class="reach" {style} x1="{at(low)}" x2="{at(high)}" y1="{y:g}" y2="{y:g}"/>')
        if math.isfinite(value):
            radius = 4 if len(points) == 1 else 3
            parts.append(f'<circle class="point" {style} cx="{at(value)}" cy="{y:g}" r="{radius}"/>')
    return f'<svg class="interval" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
