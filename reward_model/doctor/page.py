# SPDX-License-Identifier: Apache-2.0
"""What a doctor found as a page, in the clothes of the report of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from reward_model.common.words import counted
from reward_model.doctor.examination import Examination
from reward_model.doctor.findings import LEVELS
from reward_model.doctor.strengths import MOST_SUSPICIOUS
from reward_model.reporting import colors, html
from reward_model.reporting.charts import Chart, Table
from reward_model.reporting.html import Point, text
from reward_model.reporting.page import document
from reward_model.reporting.pairs import TEXT_BYTES, cut, pair
from reward_model.reporting.words import shown

TITLES = {"hurts": "What hurts", "doubtful": "What is doubtful", "fine": "What was looked at and is fine"}


def write_html(found: Examination) -> str:
    """The page; it needs nothing but a browser."""
    name = ", ".join(cut(each.rstrip("/").rpartition("/")[2] or each, 80) for each in found.data[:4])
    return "".join(document(f"{name} – doctor's report", _body(found, name)))


def _body(found: Examination, name: str) -> Iterator[str]:
    yield f'<header><p class="over">Doctor\'s report on data</p><h1>{text(name)}</h1>'
    sets = "; ".join(f"{of}: {', '.join(f'{n:,} {what}' for what, n in c.items())}" for of, c in found.counts.items())
    yield f'<p class="under">{text(sets)}</p>'
    links: list[tuple[str, str]] = [(level, TITLES[level]) for level in LEVELS if found.of_level(level)]
    links += [("biases", "Biases")] if found.biases.rows else []
    links += [("strengths", "Strengths")] if found.strengths else []
    links += [("suspicious", "Suspicious pairs")] if found.suspicious else []
    items = "".join(f'<a href="#{place}">{text(said)}</a>' for place, said in links)
    yield f'<nav aria-label="Parts of the page">{items}</nav></header>\n<main>'
    yield from _numbers(found)
    yield from _findings(found)
    yield from _biases(found)
    yield from _strengths(found)
    yield from _suspicious(found)
    yield "</main>\n"


def _numbers(found: Examination) -> Iterator[str]:
    training = found.counts.get("training", {})
    bad, doubtful = len(found.of_level("hurts")), len(found.of_level("doubtful"))
    cells = [
        ("Findings that hurt", f"{bad}", f"{doubtful} more are doubtful", bad > 0),
        ("Training pairs", f"{training.get('pairs', 0):,}", f"of {training.get('prompts', 0):,} prompts", False),
    ]
    for each in found.biases.rows[:1]:
        if each.name == "characters":
            ends = each.share
            aside = "too few prompts for an interval"
            if ends.low is not None and ends.high is not None:
                aside = f"{ends.low:.3f} to {ends.high:.3f} (95 %)"
            cells.append(("The longer answer wins", f"{ends.value:.3f}", aside, False))
    if found.strengths:
        below = found.strengths["below_zero"]["value"]
        cells.append(("Strength below 0", f"{below:.3f}", f"of {found.strengths['pairs']:,} pairs", below > 0.2))
    said = "".join(
        f'<div><dt>{text(name)}</dt><dd class="value{" bad" if is_bad else ""}">{text(value)}</dd>'
        f'<dd class="aside">{text(aside)}</dd></div>'
        for name, value, aside, is_bad in cells
    )
    yield f'<dl class="numbers">{said}</dl>\n'


def _findings(found: Examination) -> Iterator[str]:
    for level in LEVELS:
        of_level = found.of_level(level)
        if not of_level:
            continue
        items = []
        for each in of_level:
            advice = f'<br><span class="note">{text(each.advice)}</span>' if each.advice and level != "fine" else ""
            rows = "".join(f'<br><span class="note">{text(line)}</span>' for line in each.examples)
            items.append(f"<li>{text(each.line)}{advice}{rows if level != 'fine' else ''}</li>")
        body = f"<ul>{''.join(items)}</ul>"
        if level == "hurts":
            yield f'<section class="warnings" id="{level}"><h2>{TITLES[level]}</h2>{body}</section>\n'
        else:
            yield f'<section><h2 id="{level}">{TITLES[level]}</h2>{body}</section>\n'
    if found.not_looked_at:
        said = "".join(f"<li>Not looked at: {text(line)}</li>" for line in found.not_looked_at)
        yield f'<ul class="notes">{said}</ul>\n'
    if found.cleaned:
        said = "".join(f"<li>{text(line.strip())}</li>" for line in found.cleaned.lines())
        yield f'<section><h2 id="cleaned">The cleaned set</h2><ul>{said}</ul></section>\n'


def _biases(found: Examination) -> Iterator[str]:
    if not found.biases.rows:
        return
    yield '<section><h2 id="biases">Biases</h2>'
    rows = []
    for each in found.biases.rows:
        share, equal = each.share, each.at_equal_length
        at_equal = f"{equal.value:.3f} of {equal.pairs:,}" if equal.pairs else "–"
        low, high = (math.nan if end is None else end for end in (share.low, share.high))
        point = Point(colors.BLUE, share.value, low, high)
        rows.append(([each.name, f"{share.pairs:,}", f"{share.value:.3f}", at_equal], [point]))
    note = (
        "How often the answer wins that has more of it, of the training pairs whose answers differ in it, and of those "
        "that are about equally long. Lines go from 0 to 1, with a mark at 0.5."
    )
    yield html.table_of_points(("more of", "pairs", "wins", "at equal length"), rows, 0.0, note)
    chart = _lengths(found)
    if not chart.is_empty:
        yield f'<div class="charts" style="margin-top:22px">{html.figure(chart)}</div>'
    yield "</section>\n"


def _lengths(found: Examination) -> Chart:
    chart = Chart("Length of answers", "share of the answers", "characters", "Deciles of the training pairs' answers.")
    places = np.linspace(0, 1, 11)
    rows = []
    for side, color in (("better", colors.CHOSEN), ("worse", colors.REJECTED)):
        values = found.biases.lengths.get(side)
        if values:
            chart.line(places, np.array(values), side, color)
            rows.append([side, *(shown(value, 0) for value in values)])
    chart.tables.append(Table(("answers", *(f"{place:.1f}" for place in places)), rows))
    return chart


def _strengths(found: Examination) -> Iterator[str]:
    if not found.strengths:
        return
    of = found.strengths
    yield '<section><h2 id="strengths">Strength of the preferences</h2>'
    chart = Chart(
        "Distribution of the strengths",
        "mean over models of score(chosen) − score(rejected)",
        "pairs",
        "Left of 0 the models doubt it.",
    )
    edges, counts = (np.array(of["histogram"][name], np.float64) for name in ("edges", "counts"))
    chart.bars(edges, counts, "pairs", colors.BLUE)
    chart.rule(0.0, "no preference", vertical=True)
    deciles = [[f"{place * 10} %", shown(value, 3)] for place, value in enumerate(of["deciles"])]
    chart.tables.append(Table(("share of the pairs", "strength up to"), deciles))
    table = html.table(chart.tables[0], name="deciles of the strengths")
    yield f'<div class="charts">{html.figure(chart)}</div><h3>Deciles</h3>{table}</section>\n'


def _suspicious(found: Examination) -> Iterator[str]:
    if not found.suspicious:
        return
    yield f'<section><h2 id="suspicious">{counted(len(found.suspicious), "suspicious pair")}</h2>'
    yield (
        '<p class="note">Their strength is below 0: the models together prefer the rejected answer. The lowest first, '
        f"{MOST_SUSPICIOUS} at most.</p>"
    )
    most = TEXT_BYTES // (3 * len(found.suspicious))
    for place, row in enumerate(found.suspicious):
        yield pair(row | {"chosen_score": None, "rejected_score": None}, most, is_open=place == 0, gap=row["strength"])
    yield "</section>\n"
