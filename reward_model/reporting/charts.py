# SPDX-License-Identifier: Apache-2.0
"""One chart: Bokeh's figure of it, its legend, and the same numbers as tables.

Notation: k points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from reward_model.reporting.colors import AXIS, GRID, TEXT

HEIGHT = 250  # pixels
FONT = "system-ui, sans-serif"
WHOLE = ("step", "tokens of the answer")  # what an x axis shows in whole numbers


@dataclass(frozen=True)
class Table:
    """Rows of what is shown, the first column being what a row is of. note: says what was left out."""

    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A line of a legend. kind: line, faint, dashed, dots or area."""

    label: str
    color: str
    kind: str


class Chart:
    """A figure that is drawn in the browser. Whatever has the same label is shown and hidden together."""

    def __init__(self, title: str, x: str, y: str, caption: str = ""):
        """
        Args:
            title: unique on a page.
            x, y: what the axes show.
            caption: a sentence.
        """
        self.title, self.caption, self.x, self.y = title, caption, x, y
        self.entries: dict[str, Entry] = {}
        self.ends: list[float] = []  # of what the y axis has to show
        self.places: list[float] = []  # and the x axis
        self.tables: list[Table] = []
        self.formats = {"x": "", "y": ""}

    @cached_property
    def figure(self) -> Any:
        """Bokeh's, which is made when something is drawn into it."""
        from bokeh.models import BasicTickFormatter, BoxZoomTool, NumeralTickFormatter, ResetTool
        from bokeh.plotting import figure

        made = figure(
            height=HEIGHT,
            sizing_mode="stretch_width",
            tools=[BoxZoomTool(dimensions="both"), ResetTool()],
            active_drag=None,  # page.js takes the zoom for a mouse; a finger scrolls the page
            toolbar_location=None,
            x_axis_label=self.x,
            y_axis_label=self.y,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
            min_border_right=12,
            min_border_top=6,
        )
        for axis in made.axis:
            axis.update(
                axis_line_color=AXIS,
                major_tick_line_color=None,
                minor_tick_line_color=None,
                major_label_text_color=TEXT,
                major_label_text_font=FONT,
                major_label_text_font_size="12px",
                axis_label_text_color=TEXT,
                axis_label_text_font=FONT,
                axis_label_text_font_size="12px",
                axis_label_text_font_style="normal",
                axis_label_standoff=6,
            )
        made.yaxis.axis_line_color = None
        made.yaxis.formatter = BasicTickFormatter(precision=1)
        made.xgrid.grid_line_color = None
        made.ygrid.grid_line_color = GRID
        made.xaxis.ticker.desired_num_ticks = 5
        made.yaxis.ticker.desired_num_ticks = 5
        if self.x in WHOLE:
            made.xaxis.ticker.min_interval = 1
            made.xaxis.formatter = NumeralTickFormatter(format="0,0")
        return made

    @property
    def name(self) -> str:
        """For HTML.

        >>> Chart("Pairs in the right order", "step", "accuracy").name
        'pairs-in-the-right-order'
        """
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    @property
    def is_empty(self) -> bool:
        return not self.entries

    def line(
        self,
        x: np.ndarray,
        y: np.ndarray,
        label: str,
        color: str,
        *,
        width: float = 1.8,
        alpha: float = 1.0,
        dash: str = "solid",
        seen: np.ndarray | None = None,
        tooltips: Sequence[tuple[str, str]] = (),
        is_alone: bool = True,
        columns: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Points (k,) joined by a line.

        Args:
            seen: values that the y axis has to show; None: all of ``y``.
            is_alone: no line beside it has tooltips, and a pointer that is above or below it shows them, too.
            tooltips: names and Bokeh's formats of ``@x``, ``@y`` and of ``columns``, shown beside the pointer.
        """
        glyph = self.figure.line(
            "x", "y", source=_source(x, y, columns), color=color, line_width=width, alpha=alpha, line_dash=dash
        )
        self.places += _ends(x)
        self._enter(glyph, label, color, "dashed" if dash != "solid" else "line" if width > 1 else "faint")
        self.see(y if seen is None else seen)
        if tooltips:
            self._hover(glyph, tooltips, mode="vline" if is_alone else "mouse")

    def dots(
        self,
        x: np.ndarray,
        y: np.ndarray,
        label: str,
        color: str,
        *,
        size: float | str = 6,
        alpha: float = 1.0,
        hollow: bool = False,
        tooltips: Sequence[tuple[str, str]] = (),
        columns: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Points (k,) alone; ``tooltips`` as for :meth:`line`. size: in pixels, or the name of one of ``columns``."""
        glyph = self.figure.scatter(
            "x",
            "y",
            source=_source(x, y, columns),
            size=size,
            line_color=color,
            fill_color=None if hollow else color,
            alpha=alpha,
        )
        self.places += _ends(x)
        self._enter(glyph, label, color, "dots")
        self.see(y)
        if tooltips:
            self._hover(glyph, tooltips, mode="mouse")

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, label: str, color: str, alpha: float) -> None:
        """What lies between two lines (k,)."""
        glyph = self.figure.varea(x=_small(x), y1=_small(low), y2=_small(high), fill_color=color, fill_alpha=alpha)
        self._enter(glyph, label, color, "area")
        self.see(low)
        self.see(high)

    def bars(self, edges: np.ndarray, counts: np.ndarray, label: str, color: str, *, filled: bool = True) -> None:
        """A histogram: ``counts`` (k,) between ``edges`` (k + 1,), as an area or, for several, as its outline."""
        from bokeh.models import ColumnDataSource

        if filled:
            data = {"low": edges[:-1], "high": edges[1:], "top": counts, "zero": np.zeros(len(counts))}
            glyph = self.figure.quad(
                left="low",
                right="high",
                bottom="zero",
                top="top",
                source=ColumnDataSource({key: _small(value) for key, value in data.items()}),
                fill_color=color,
                fill_alpha=0.45,
                line_color=color,
                line_width=0.5,
                line_alpha=0.6,
            )
            self._enter(glyph, label, color, "area")
            self.see(np.append(counts, 0.0))
            self._hover(glyph, [(label, "@top{0,0}"), ("from", "@low{0.00}"), ("to", "@high{0.00}")], mode="mouse")
            return
        x, y = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(counts, 2), [0.0]])
        self.line(x, y, label, color)

    def rule(self, value: float, label: str, color: str = TEXT, *, vertical: bool = False) -> None:
        """A dashed line across the figure."""
        from bokeh.models import Span

        span = Span(
            location=value,
            dimension="height" if vertical else "width",
            line_color=color,
            line_dash=[4, 4],
            line_width=1.2,
            name=self._label(label, color, "dashed"),
        )
        self.figure.add_layout(span)
        if not vertical:
            self.see(np.array([value]))

    def shade(self, first: float, last: float, label: str, color: str) -> None:
        """A stretch of the x axis, as high as the figure."""
        from bokeh.models import BoxAnnotation

        name = self._label(label, color, "area")
        self.figure.add_layout(
            BoxAnnotation(
                left=first - 0.5,
                right=last + 0.5,
                fill_color=color,
                fill_alpha=0.18,
                line_color=color,
                line_alpha=0.5,
                line_width=1,
                name=name,
            )
        )

    def ticks(self, y: str = "", x: str = "") -> None:
        """Bokeh's formats of the numbers at the axes."""
        self.formats = {"x": x, "y": y}

    def see(self, values: np.ndarray) -> None:
        """Have the y axis reach these values."""
        self.ends += _ends(values)

    def fit(self) -> None:
        """Let the y axis end a little beyond what it has to show, and write the numbers of both as was asked."""
        from bokeh.models import NumeralTickFormatter

        low, high = min(self.ends, default=0.0), max(self.ends, default=1.0)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.figure.y_range.update(start=0.0 if low == 0 else low - room, end=high + room)
        if self.x in WHOLE and self.places and min(self.places) == max(self.places):
            place = self.places[0]  # the one number at the axis; by itself Bokeh shows one more on either side, also −1
            self.figure.x_range.update(start=place - 0.5, end=place + 0.5)
        for axis, format_of_it in ((self.figure.xaxis, self.formats["x"]), (self.figure.yaxis, self.formats["y"])):
            if format_of_it:
                axis.formatter = NumeralTickFormatter(format=format_of_it)

    def as_json(self) -> str:
        """What BokehJS draws it from; safe inside a ``script`` of HTML."""
        from bokeh.embed import json_item

        self.fit()
        text = json.dumps(json_item(self.figure), separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def _label(self, label: str, color: str, kind: str) -> str:
        """The name of what has a label, by which a button of the legend finds it."""
        known = self.entries.get(label)
        if known is None or (known.kind == "area" and kind != "area"):
            self.entries[label] = Entry(label, color, kind)
        return f"series-{list(self.entries).index(label)}"

    def _enter(self, glyph: Any, label: str, color: str, kind: str) -> None:
        glyph.name = self._label(label, color, kind)
        glyph.nonselection_glyph = glyph.muted_glyph = None  # never used, and a third of the JSON

    def _hover(self, glyph: Any, tooltips: Sequence[tuple[str, str]], mode: str) -> None:
        from bokeh.models import HoverTool

        point = "snap_to_data" if mode == "vline" else "follow_mouse"
        self.figure.add_tools(
            HoverTool(renderers=[glyph], tooltips=list(tooltips), mode=mode, line_policy="nearest", point_policy=point)
        )


def _source(x: np.ndarray, y: np.ndarray, columns: dict[str, np.ndarray] | None) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({name: _small(values) for name, values in {"x": x, "y": y, **(columns or {})}.items()})


def _ends(values: np.ndarray) -> list[float]:
    """The lowest and the highest of those that are finite, if there are any."""
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if len(finite) else []


def _small(values: np.ndarray) -> np.ndarray:
    """In half the bytes, where seven digits are enough; steps beyond 2²⁴ keep all of theirs."""
    values = np.asarray(values, dtype=np.float64)
    sizes = np.abs(values[np.isfinite(values)])
    return values if len(sizes) and sizes.max() > 2**24 else values.astype(np.float32)
