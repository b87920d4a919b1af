# SPDX-License-Identifier: Apache-2.0
"""The page: numbers first, then charts, mistakes and settings, in one file of HTML that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import PurePath
from typing import Any

import numpy as np

from reward_model.common.words import counted
from reward_model.reporting import colors, html
from reward_model.reporting.charts import Table
from reward_model.reporting.html import text
from reward_model.reporting.of_assessments import MOST_MISTAKES, MOST_SUBSETS, Assessed, Assessment
from reward_model.reporting.of_comparisons import comparison
from reward_model.reporting.of_training import Training
from reward_model.reporting.pairs import MOST_IN_ALL, TEXT_BYTES, cut, pair
from reward_model.reporting.runs import Run, number, set_of
from reward_model.reporting.thinning import in_words
from reward_model.reporting.words import duration, edge, setting, share, shown, told_apart

SETTING_LENGTH = 1_000  # characters of a value: --data_path may name a thousand files
MOST_WARNINGS = 40
OWN_PLACE = ("output_dir", "tensorboard_path", "local_rank")  # differ from run to run and say nothing


def write_html(
    runs: Sequence[Run], assessments: Sequence[dict[str, Any]] = (), comparisons: Sequence[dict[str, Any]] = ()
) -> str:
    """The page of some runs, with the assessments that lie in their folders, and of assessments alone.

    Args:
        assessments: as in ``evaluation.json``, of models whose runs are not known.
        comparisons: of two of these models each.
    """
    return "".join(_document(Page(runs, assessments, comparisons)))


class Page:
    """What a page is about."""

    def __init__(
        self, runs: Sequence[Run], assessments: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]
    ):
        self.runs = runs
        self.comparisons = comparisons
        self.training = Training(runs)
        self.models = _names_of_models(assessments)
        self.assessments = _labeled(runs, assessments, self.models, self.training.palette)
        self.assessed = Assessed(self.assessments)

    @property
    def title(self) -> str:
        if self.runs:
            return self.runs[0].name if len(self.runs) == 1 else f"{counted(len(self.runs), 'run')} compared"
        names = list(self.models.values())
        return names[0] if len(names) == 1 else f"{counted(len(names), 'model')} compared"

    @property
    def is_of_several_models(self) -> bool:
        """Assessments alone, several of them."""
        return not self.runs and len(self.assessments) > 1


# --- the parts of the document ---


def _document(page: Page) -> Iterator[str]:
    yield from document(f"{page.title} – reward model report", _body(page))


def document(title: str, body: Iterable[str]) -> Iterator[str]:
    """A page of ours that allows its own scripts alone, and asks no other place for anything.

    Args:
        title: of the window, not yet escaped.
        body: HTML, with charts as :func:`reward_model.reporting.html.figure` writes them.
    """
    scripts = [_bokeh(), _own("page.js")]
    hashes = " ".join(f"'sha256-{_hash(each)}'" for each in scripts)
    # the browser itself refuses whatever is not one of our scripts, and every request
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{_own("page.css")}</style>\n</head>\n<body>\n'
    )
    yield from body
    yield (
        "<footer>Written by dschat-reward. The page holds all that it shows, and asks no other place for anything. "
        "Charts by Bokeh (BSD-3-Clause).</footer>\n"
    )
    yield f'<script type="application/json" id="dark-colors">{json.dumps(colors.DARK)}</script>\n'
    yield from (f"<script>{each}</script>\n" for each in scripts)
    yield "</body>\n</html>\n"


def _body(page: Page) -> Iterator[str]:
    yield from _header(page)
    yield "<main>"
    yield from _numbers(page)
    yield from _comparison(page)
    yield from _warnings(page)
    yield from _training(page)
    yield from _held_out(page)
    yield from _mistakes(page)
    yield from _settings(page)
    yield "</main>\n"


def _header(page: Page) -> Iterator[str]:
    yield f'<header><p class="over">Reward model report</p><h1>{text(page.title)}</h1>'
    if len(page.runs) == 1:
        run = page.runs[0]
        model, data = run.settings.get("model_name_or_path"), run.settings.get("data_path")
        said = [f"trained from {setting(model)}"] if model else []
        said += [f"on {cut(setting(data), 200)}"] if data else []
        said.append(run.end)
        yield f'<p class="under">{text("; ".join(said))}</p>'
    elif not page.runs:
        data = dict.fromkeys(cut(setting(each.values.get("data")), 200) for each in page.assessments)
        yield f'<p class="under">judged on {text("; ".join(data))}</p>'
    links = [("comparison", "Comparison")] if page.comparisons else []
    links += [("training", "Training")] if any(len(r.steps) or r.evaluations for r in page.runs) else []
    links += [("held-out", "Held-out answers")] if page.assessments else []
    links += [("mistakes", "Mistakes")] if any(each.rows("mistakes") for each in page.assessments) else []
    links += [("settings", "Settings")] if page.runs else []
    items = "".join(f'<a href="#{place}">{name}</a>' for place, name in links)
    yield f'<nav aria-label="Parts of the page">{items}</nav></header>\n'


def _numbers(page: Page) -> Iterator[str]:
    """The first numbers: in large figures for one run, in a table for several."""
    if len(page.runs) > 1:
        yield html.table(_table_of_runs(page), "wide first", "the runs")
        return
    if page.is_of_several_models:
        yield from (html.table(of, "wide first", title) for title, of in page.assessed.numbers() if title == "Accuracy")
        return
    found = _first_numbers(page)
    cells = "".join(
        f'<div><dt>{text(name)}</dt><dd class="value{" bad" if is_bad else ""}">{text(value)}</dd>'
        f'<dd class="aside">{text(aside)}</dd></div>'
        for name, value, aside, is_bad in found
    )
    yield f'<dl class="numbers">{cells}</dl>\n'


def _comparison(page: Page) -> Iterator[str]:
    if page.comparisons:
        yield '<section><h2 id="comparison">Comparison</h2>'
        yield from comparison(page.comparisons, page.models)
        yield "</section>\n"


def _first_numbers(page: Page) -> Iterator[tuple[str, str, str, bool]]:
    """Name, value and what stands below it; whether it is bad."""
    run = page.runs[0] if page.runs else None
    judged = page.assessments[0] if page.assessments else Assessment("", "", {})
    last, when = _last_evaluation(run), _when(run)
    value, low, high = judged.interval("accuracy")
    of_end = "" if math.isfinite(value) else when  # an assessment is of the model as it was left
    value = value if math.isfinite(value) else number(last.get("accuracy"))
    if math.isfinite(value):
        longer = _baseline(judged, last)
        aside = f"{low:.3f} to {high:.3f} (95 %)" if math.isfinite(low + high) else ""
        longer_said = f"longer answer {longer:.3f}" if math.isfinite(longer) else ""
        yield "Held-out accuracy", f"{value:.4f}", _joined(of_end, aside, longer_said), False
    elif math.isfinite(number(last.get("pearson"))):
        aside = f"of {number(last.get('rated')):,.0f} scores with their targets"
        yield "Correlation", f"{number(last.get('pearson')):.4f}", _joined(when, aside), False
    loss = _or(judged.number("loss"), number(last.get("loss")), number(last.get("point_loss")))
    if math.isfinite(loss):
        of_end = "" if math.isfinite(judged.number("loss")) else when
        equal = "equal scores: 0.693" if math.isfinite(value) else ""
        yield "Held-out loss", shown(loss), _joined(of_end, equal), False
    error = _or(judged.number("calibration", "raw", "ece"), number(last.get("calibration_error")))
    if math.isfinite(error):
        after, temperature = (
            judged.number("calibration", "tempered", "ece"),
            judged.number("calibration", "temperature"),
        )
        aside = (
            f"{after:.3f} at temperature {temperature:.3g}" if math.isfinite(after + temperature) else "expected error"
        )
        of_end = "" if math.isfinite(judged.number("calibration", "raw", "ece")) else when
        yield "Calibration error", f"{error:.3f}", _joined(of_end, aside), False
    if run is None:
        pairs = judged.number("pairs")
        if math.isfinite(pairs):
            prompts = judged.number("prompts")
            yield "Pairs", f"{pairs:,.0f}", f"of {prompts:,.0f} prompts" if math.isfinite(prompts) else "", False
        return
    epochs = run.column("epoch")
    aside = (
        f"{epochs[-1]:.4g} epoch{'' if epochs[-1] == 1 else 's'}" if len(epochs) and math.isfinite(epochs[-1]) else ""
    )
    yield "Steps", f"{run.last_step:,}", aside if run.is_whole else f"{aside}{', ' if aside else ''}not finished", False
    if math.isfinite(run.seconds):
        speed = run.column("tokens_per_second")
        aside = f"in steps; {np.nanmedian(speed):,.0f} tokens/s" if np.isfinite(speed).any() else "in steps"
        yield "Time", duration(run.seconds), aside, False
    count = len(run.alarms)
    aside = f"{counted(len(run.skipped), 'step')} skipped" if run.skipped else "no step skipped"
    yield "Warnings", f"{count}", aside, bool(count or run.skipped)


def _table_of_runs(page: Page) -> Table:
    """A row for each set of each run; what is of the run stands in the first of its rows."""
    rows = []
    for run in page.runs:
        of_run = [
            f"{run.last_step:,}{'' if run.is_whole else ' (not finished)'}",
            duration(run.seconds),
            f"{len(run.alarms)}",
            f"{len(run.skipped)}",
        ]
        for place, name in enumerate(run.sets or [""]):
            rows.append([run.name, name, *_of_set(run, name), *(of_run if place == 0 else [""] * len(of_run))])
    of_sets = ("held-out accuracy", "loss", "calibration error", "temperature", "error with it")
    columns = ("run", "set", *of_sets, "steps", "time", "warnings", "skipped")
    kept = [p for p in range(len(columns)) if p == 0 or any(row[p] not in ("–", "") for row in rows)]
    return Table([columns[p] for p in kept], [[row[p] for p in kept] for row in rows])


def _of_set(run: Run, name: str) -> list[str]:
    """The numbers of a run on one set, in the last evaluation or in an assessment."""
    last = _last_evaluation(run, name)
    judged = next((Assessment("", "", each) for each in run.assessments if set_of(each) == name), None)
    judged = judged or Assessment("", "", {})
    value, low, high = judged.interval("accuracy")
    after = f" ({low:.3f} to {high:.3f})" if math.isfinite(low + high) else ""
    if not math.isfinite(value):
        value, when = number(last.get("accuracy")), _when(run, name)
        after = f" ({when})" if when else ""
    return [
        f"{value:.4f}{after}" if math.isfinite(value) else "–",
        shown(_or(judged.number("loss"), number(last.get("loss")), number(last.get("point_loss")))),
        shown(_or(judged.number("calibration", "raw", "ece"), number(last.get("calibration_error")))),
        shown(judged.number("calibration", "temperature"), 2),
        shown(judged.number("calibration", "tempered", "ece")),
    ]


def _warnings(page: Page) -> Iterator[str]:
    lines, notes = [], []
    for run in page.runs:
        of_it = "" if len(page.runs) == 1 else f"{run.name}: "
        lines += [f"{of_it}{alarm['message']}" for alarm in run.alarms]
        if run.skipped:
            lines.append(
                f"{of_it}{counted(len(run.skipped), 'step')} skipped for a loss or gradient that was not finite: "
                f"{in_words(run.skipped)}. The rows are in metrics.jsonl."
            )
        notes += [f"{of_it}{problem}" for problem in run.problems]
        if len(page.runs) > 1 and not run.is_whole:
            notes.append(f"{of_it}{run.end}.")
        elif not run.is_whole:
            notes.append(f"The run has not finished ({run.end}); what is here ends at step {run.last_step:,}.")
    if page.training.thinning:
        notes.append(page.training.thinning)
    if lines:
        more = f"<li>and {len(lines) - MOST_WARNINGS} more</li>" if len(lines) > MOST_WARNINGS else ""
        items = "".join(f"<li>{text(line)}</li>" for line in lines[:MOST_WARNINGS])
        yield f'<section class="warnings"><h2>Warnings</h2><ul>{items}{more}</ul></section>\n'
    if notes:
        yield f'<ul class="notes">{"".join(f"<li>{text(note)}</li>" for note in notes)}</ul>\n'


def _training(page: Page) -> Iterator[str]:
    charts = list(page.training.charts())
    if not charts:
        return
    yield '<section><h2 id="training">Training</h2>'
    yield f'<div class="charts">{"".join(map(html.figure, charts))}</div></section>\n'


def _held_out(page: Page) -> Iterator[str]:
    if not page.assessments:
        return
    yield '<section><h2 id="held-out">Held-out answers</h2>'
    if charts := list(page.assessed.charts()):
        yield f'<div class="charts">{"".join(map(html.figure, charts))}</div>'
    parts = [f"<h3>Accuracy by {what}</h3>{found}" for what, found in _by_part(page)]
    above = ("Accuracy",) if page.is_of_several_models else ()
    numbers = [(title, of) for title, of in page.assessed.numbers() if title not in above]
    parts += [f"<h3>{title}</h3>{html.table(of, 'wide', title)}" for title, of in numbers]
    kind = "columns" if len(page.assessments) == 1 else "stack"
    yield f'<div class="{kind}">{"".join(f"<div>{part}</div>" for part in parts)}</div></section>\n'


SPREAD = "standard deviation of the gap over the heads"
OF_PARTS = {("by_subset",): "subset", ("by_margin",): "margin", ("bounds", "by_spread"): SPREAD}


def _by_part(page: Page) -> Iterator[tuple[str, str]]:
    """What the accuracy is by, and the table."""
    for key, what in OF_PARTS.items():
        parts: dict[str, dict[int, dict[str, Any]]] = {}  # name of a part → place of an assessment → its row
        for place, each in enumerate(page.assessments):
            for fifth, row in enumerate(each.rows(*key), 1):
                name = str(row.get("subset") or "none")
                if what == SPREAD and len(page.assessments) > 1:  # each model has its own
                    name = f"fifth {fifth}"
                elif what != "subset":
                    name = f"{edge(number(row.get('low')))} to {edge(number(row.get('high')))}".replace(
                        " ", "\N{NO-BREAK SPACE}"
                    )
                parts.setdefault(name, {})[place] = row
        if parts:
            yield what, _table_of_parts(page.assessments, what, parts)


def _table_of_parts(assessments: Sequence[Assessment], what: str, parts: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A row for each part, with a point for each assessment, and its interval where the ends of one are given."""
    ends = ("value", "low", "high") if what == "subset" else ("value",)  # a margin's low and high are its own
    values = [number(row.get(end)) for part in parts.values() for row in part.values() for end in ends]
    lowest = min((value for value in values if math.isfinite(value)), default=0.0)
    first = min(max(math.floor(lowest * 10) / 10, 0.0), 0.9)
    rows = []
    for name, part in list(parts.items())[:MOST_SUBSETS]:
        counts = [shown(number(row.get("pairs"))) for row in part.values()]
        found = {place: [number(row.get(end)) for end in ends] for place, row in part.items()}
        cells = [share(found[place][0]) if place in found else "–" for place in range(len(assessments))]
        points = [html.Point(assessments[place].color, *each) for place, each in found.items()]
        rows.append(([name, counts[0] if len(set(counts)) == 1 else ", ".join(counts), *cells], points))
    note = f" The first {MOST_SUBSETS} of {len(parts)}." if len(parts) > MOST_SUBSETS else ""
    scale = f"Lines go from {first:g} to 1{', with a mark at 0.5' if first < 0.5 else ''}.{note}"
    names = ["accuracy"] if len(assessments) == 1 else [each.label for each in assessments]
    return html.table_of_points((what, "pairs", *names), rows, first, scale)


def _mistakes(page: Page) -> Iterator[str]:
    most_of_one = min(MOST_MISTAKES, MOST_IN_ALL // max(1, len(page.assessments)))
    all_of_them = [(each, each.rows("mistakes")[:most_of_one]) for each in page.assessments]
    count = sum(len(rows) for _, rows in all_of_them)
    if not count:
        return
    most = TEXT_BYTES // (3 * count)  # of the three texts of each
    yield '<section><h2 id="mistakes">Mistakes, the most confident first</h2>'
    yield '<p class="note">Pairs whose worse answer has the higher score, the largest gap first.</p>'
    for each, rows in all_of_them:
        if rows and len(page.assessments) > 1:
            yield f'<h3 style="margin-top:22px">{text(each.label)}</h3>'
        for place, row in enumerate(rows):
            yield pair(row, most, is_open=place == 0 and len(page.assessments) == 1)
    yield "</section>\n"


def _settings(page: Page) -> Iterator[str]:
    known = [run for run in page.runs if run.settings or run.versions]
    if not known:
        return
    yield '<section><h2 id="settings">Settings</h2>'
    if len(page.runs) > 1:
        yield "<h3>What differs</h3>"
        yield html.table(_differences(page.runs), "words")
        yield "</section>\n"
        return
    run = page.runs[0]
    given = [[f"--{name}", _value(run.settings[name])] for name in run.given if name in run.settings]
    rest = [[f"--{name}", _value(value)] for name, value in run.settings.items() if name not in run.given]
    versions = [[name, _value(value)] for name, value in run.versions.items()]
    parts = [("What was given", Table(("flag", "value"), given)), ("Versions", Table(("package", "version"), versions))]
    shown_parts = "".join(f"<div><h3>{name}</h3>{html.table(of, 'words')}</div>" for name, of in parts if of.rows)
    yield f'<div class="columns">{shown_parts}</div>'
    if rest:
        yield (
            f'<details class="table" style="margin-top:18px"><summary>{counted(len(rest), "other setting")}</summary>'
            f"{html.table(Table(('setting', 'value'), rest), 'words')}</details>"
        )
    yield "</section>\n"


# --- what they are made of ---


def _labeled(
    runs: Sequence[Run], alone: Sequence[dict[str, Any]], models: dict[str, str], palette: colors.Palette
) -> list[Assessment]:
    """All assessments of a page, each with a name of its own and the color of its run and set."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for place, run in enumerate(runs):
        times: dict[str, int] = {}
        for each in run.assessments:
            name = set_of(each)
            label = ": ".join(filter(None, (run.name if len(runs) > 1 else "", name)))
            again = [times[name]] if name in times else []  # of another model, where it is none of the training's
            times[name] = times.get(name, 0) + 1
            found.append((label, palette.of(place, name, *again), each))
    for each in alone:
        label = ": ".join(filter(None, (models[_model_of(each)], set_of(each))))
        found.append((label, palette.of(len(found)), each))
    labels: list[str] = []
    for label, _, _ in found:
        known_times = sum(known == label or known.startswith(f"{label} (") for known in labels)
        labels.append(f"{label} ({known_times + 1})" if known_times else label)
    if len(found) == 1:
        labels = [""]
    return [Assessment(label, color, values) for label, (_, color, values) in zip(labels, found)]


def _model_of(assessment: dict[str, Any]) -> str:
    """The path or name of a model."""
    name = assessment.get("model")
    return name if isinstance(name, str) and name else "model"


def _names_of_models(assessments: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each model as many last parts of its path or name as tell it from the others."""
    models = list(dict.fromkeys(map(_model_of, assessments)))
    return dict(zip(models, told_apart([PurePath(name).parts or (name,) for name in models])))


def _last_evaluation(run: Run | None, name: str | None = None) -> dict[str, Any]:
    """Of a set; None: of the first one."""
    if run is None:
        return {}
    lines = next(iter(run.evaluations.values()), []) if name is None else run.evaluations.get(name, [])
    return lines[-1] if lines else {}


def _when(run: Run | None, name: str | None = None) -> str:
    """At which step the last evaluation was, in words; empty: at the last one."""
    step = _last_evaluation(run, name).get("step")
    if run is None or step is None:
        return ""
    if step == 0:
        return "at step 0, before training"
    return f"at step {step:,}" if step != run.last_step else ""


def _joined(*said: str) -> str:
    return "; ".join(filter(None, said))


def _baseline(judged: Assessment, last: dict[str, Any]) -> float:
    """The accuracy of preferring the longer answer."""
    for row in judged.rows("baselines"):
        if row.get("name") == "the longer answer":
            return number(row.get("value"))
    return number(last.get("longer_wins_accuracy"))


def _differences(runs: Sequence[Run]) -> Table:
    """The settings and versions that are not the same in all runs."""
    flat = [dict(_flat(run.settings | {"version of": run.versions})) for run in runs]
    names = [name for name in dict.fromkeys(key for each in flat for key in each) if name not in OWN_PLACE]
    rows = []
    for name in names:
        values = [_value(each[name]) if name in each else "–" for each in flat]
        if len(set(values)) > 1:
            is_hash = name.startswith("content.")
            rows.append([name, *(value[:12] if is_hash else value for value in values)])
    if not rows:
        return Table(("setting", *(run.name for run in runs)), [], "No setting differs.")
    return Table(("setting", *(run.name for run in runs)), rows)


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _value(value: Any) -> str:
    return cut(json.dumps(value) if isinstance(value, dict) else setting(value), SETTING_LENGTH)


def _or(*values: float) -> float:
    """The first that is a number."""
    return next((value for value in values if math.isfinite(value)), math.nan)


@lru_cache(maxsize=1)
def _bokeh() -> str:
    """BokehJS without the parts for widgets, tables, WebGL and formulas."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True, log_level="warn").js_raw)


def _own(name: str) -> str:
    return (resources.files("reward_model.reporting") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As a Content-Security-Policy has it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
