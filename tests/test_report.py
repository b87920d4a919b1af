# SPDX-License-Identifier: Apache-2.0
"""The page of a run: what is read, what is left out, what stands on it, and what a browser makes of it."""

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
from reports import TEXT, assessment, comparison, eval_record, point_record, records, train_record, write_run

import reward_model
from reward_model.__main__ import main
from reward_model.common.errors import UserError
from reward_model.judging.api import _write_page
from reward_model.judging.evaluations import Evaluations
from reward_model.reporting import colors, html
from reward_model.reporting.charts import Chart
from reward_model.reporting.of_assessments import Assessed, Assessment
from reward_model.reporting.page import write_html
from reward_model.reporting.report import MOST_RUNS, names_of, page_of_assessments, report
from reward_model.reporting.runs import read_run
from reward_model.reporting.thinning import evenly, in_words, ranges, running_mean, thinned

MOST = 3_000_000  # bytes of a page
HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=2</script>&amp; $$x$$ @y{safe} \''


class Tags(HTMLParser):
    """Elements of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.words, self.inside = [], [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(data)
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def titles(self):
        """Of the charts."""
        return [each["id"] for each in self.all("div") if "plot" in each.get("class", "")]


def page_of(folder, **options):
    return Tags(report(folder, **options).read_text(encoding="utf-8"))


# Long series


@pytest.mark.parametrize("count", [1, 50, 101, 5_000])
def test_thinning_keeps_every_highest_and_lowest(count):
    values = np.random.default_rng(count).normal(size=count)
    values[::7] = np.nan
    kept = thinned(values, 100)
    finite = np.flatnonzero(np.isfinite(values))
    assert set(kept) <= set(finite) and len(kept) <= 102 and (np.diff(kept) > 0).all()
    assert not count or {finite[0], finite[-1]} <= set(kept) if len(finite) else not len(kept)
    for part in np.array_split(finite, 49) if len(finite) > 100 else [finite]:  # slow, by hand
        if len(part):
            assert values[part].min() in values[kept] and values[part].max() in values[kept]


def test_nothing_is_left_of_a_series_of_nothing():
    assert len(thinned(np.full(9, np.nan), 4)) == len(thinned(np.zeros(0), 4)) == 0


def test_the_running_mean_is_that_of_the_last_twentieth():
    values = np.random.default_rng(1).normal(size=83)
    values[[0, 5, 6, 7, 8, 50]] = np.nan
    window = 83 // 20
    for place, mean in enumerate(running_mean(values)):
        part = [v for v in values[max(0, place - window + 1) : place + 1] if not math.isnan(v)]
        assert (math.isnan(mean) and not part) or mean == pytest.approx(sum(part) / len(part))


def test_steps_in_few_words_are_those_steps():
    steps = [1, 2, 3, 7, 9, 10, 100]
    assert [s for first, last in ranges(steps) for s in range(first, last + 1)] == steps
    assert in_words(steps) == "1-3, 7, 9-10, 100"
    assert in_words(list(range(0, 100, 2)), most=2) == "0, 2 and 48 more stretches"
    assert evenly(3, 10).tolist() == [0, 1, 2] and evenly(101, 3).tolist() == [0, 50, 100]


# What is read


def test_a_whole_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.name == "run" and run.is_whole and run.last_step == 30
    assert run.steps.tolist() == list(range(1, 31))
    assert [line["step"] for line in run.evaluations[""]] == [0, 10, 20, 30]
    assert run.seconds == pytest.approx(30 * 32 / 64)
    assert run.given == ["learning_rate", "data_path"] and "given" not in run.settings
    assert run.problems == ["There is no evaluation.json, so that figures of single answers are missing."]


def test_a_line_that_a_crash_cut_is_left_out_and_told(tmp_path):
    run = read_run(write_run(tmp_path, is_finished=False, tail='{"split": "train", "step": 31, "lo'))
    assert run.last_step == 30
    assert "The last line of metrics.jsonl is half written; it was left out." in run.problems
    assert not run.is_whole and "was killed" in run.end
    text = page_of(tmp_path).text
    assert "half written" in text and "The run has not finished" in text and "ends at step 30" in text


def test_lines_that_are_none_are_counted(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("[]\n" + path.read_text() + '{"split": "train", "step": "x"}\n\x00\n')
    run = read_run(tmp_path)
    assert len(run.steps) == 30
    assert any(problem == "3 lines of metrics.jsonl could not be read: 1, 36, 37." for problem in run.problems)


def test_a_number_that_is_none_is_a_gap(tmp_path):
    lines = records()
    lines[3] |= {"loss": math.nan, "grad_norm": math.inf}
    lines[4] |= {"loss": None, "accuracy": "0.5", "chosen_mean": 10**400}
    run = read_run(write_run(tmp_path, lines))
    assert np.isnan(run.column("loss")).sum() == 2 and np.isinf(run.column("grad_norm")).sum() == 1
    assert np.isnan(run.column("accuracy")).sum() == np.isnan(run.column("chosen_mean")).sum() == 1
    assert "loss" in page_of(tmp_path).titles()


def test_of_two_lines_of_a_step_the_last_counts(tmp_path):
    run = read_run(write_run(tmp_path, [train_record(1, loss=9.0), train_record(2), train_record(1, loss=0.5)]))
    assert run.steps.tolist() == [1, 2] and run.column("loss")[0] == 0.5


@pytest.mark.parametrize("missing", ["metrics.jsonl", "run.json"])
def test_a_file_that_is_missing_is_told(tmp_path, missing):
    write_run(tmp_path)
    (tmp_path / missing).unlink()
    page = page_of(tmp_path)
    assert f"There is no {missing}" in page.text
    assert ("loss" in page.titles()) == (missing == "run.json")


def test_a_file_that_is_no_json_is_told(tmp_path):
    write_run(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"accuracy": {"val')
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    text = page_of(tmp_path).text
    assert "evaluation.json is no JSON" in text and "run.json is no JSON" in text


def test_an_interrupted_run_says_so(tmp_path):
    write_run(tmp_path, is_finished=False)
    (tmp_path / "interrupted.json").write_text('{"step": 30, "signal": "SIGTERM"}')
    assert "interrupted by SIGTERM" in page_of(tmp_path).text
    assert (
        "not finished" not in page_of(tmp_path, has_ended=True).text
    )  # the end of a run writes the page, then its mark


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "none")
    with pytest.raises(UserError, match="no run's folder"):
        report(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="--out is missing"):
        report([run, run])
    with pytest.raises(UserError, match="17 runs"):
        report([run] * (MOST_RUNS + 1), tmp_path / "x.html")
    with pytest.raises(UserError, match="0 assessments"):
        page_of_assessments([], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists() and not (run / "report.html").exists()


def test_runs_are_told_apart_by_their_paths():
    assert names_of([Path("/a/x/out"), Path("/a/y/out"), Path("/b/y/out")]) == ["a/x/out", "a/y/out", "b/y/out"]
    assert names_of([Path("/a"), Path("/a")]) == ["a (1)", "a (2)"] or len(set(names_of([Path("/a"), Path("/a")]))) == 2


# What stands on the page


def test_a_run_has_its_numbers_and_charts(tmp_path):
    page = page_of(write_run(tmp_path / "my run", assessment=assessment()))
    for said in ("my run", "0.8533", "0.810 to 0.890", "longer answer 0.470", "0.020 at temperature 1.37", "15 s"):
        assert said in page.text, said
    assert page.titles() == [
        *("loss", "accuracy", "scale-of-the-scores", "calibration-over-training", "learning-rate", "gradient-norm"),
        *("throughput", "share-of-pads", "gaps", "scores", "calibration", "score-against-length"),
    ]
    assert page.text.count(TEXT) == 80  # forty mistakes, each with its beginning and its prompt
    assert "eval.jsonl, row 39" in page.text and "subset 5" in page.text and "--learning_rate" in page.text
    assert "2.13.0" in page.text


def test_every_chart_has_its_numbers_as_a_table(tmp_path):
    text = report(write_run(tmp_path, assessment=assessment())).read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 12
    for each in figures:
        assert each.count("<summary>") == 1 and each.count("<tbody><tr>") >= 1, each[:200]
    loss = Tags(figures[0]).text
    assert "0.6739" in loss  # of step 1: 0.2 + 0.49 exp(−1/30)


def test_what_has_no_data_is_left_out(tmp_path):
    lines = [point_record(0), *({"split": "train", "step": s, "loss": 0.7} for s in (1, 2)), point_record(2)]
    page = page_of(write_run(tmp_path / "points", lines))
    assert page.titles() == ["loss", "scale-of-the-scores", "correlation-with-the-targets"]
    assert "Correlation" in page.text and "accuracy" not in page.text
    lines = [train_record(1, padding=0.0), eval_record(1)]
    page = page_of(write_run(tmp_path / "no pads", lines))
    assert "share-of-pads" not in page.titles() and "There was no pad." in page.text


def test_the_alarms_limit_is_drawn_where_scores_come_near_it(tmp_path):
    far = page_of(write_run(tmp_path / "far"))
    assert "±32 (--score_limit), is beyond the picture" in far.text
    near = page_of(write_run(tmp_path / "near", settings={"score_limit": 3.0}))
    assert "the alarm's limit, ±3" in near.text and "beyond the picture" not in near.text
    off = page_of(write_run(tmp_path / "off", settings={"score_limit": 0.0}))
    assert "limit, ±" not in off.text


def test_warnings_and_skipped_steps_are_told(tmp_path):
    alarm = {"split": "alarm", "step": 5, "kind": "ties", "message": "step 5: many equal scores"}
    bad = [{"split": "bad_step", "step": step, "in_a_row": 1, "rows": {}} for step in (3, 4, 5, 9)]
    lines = [line for line in records() if line["step"] not in (3, 4, 5, 9)] + [alarm, *bad]
    page = page_of(write_run(tmp_path, lines))
    assert "step 5: many equal scores" in page.text
    assert "4 steps skipped for a loss or gradient that was not finite: 3-5, 9." in page.text
    assert "skipped: 3-5, 9" in page.text  # in the chart's legend


def test_a_spike_does_not_press_the_curve_flat_and_is_told(tmp_path):
    lines = [train_record(step, loss=900.0 if step == 77 else 0.5) for step in range(1, 200)]
    text = report(write_run(tmp_path, lines)).read_text(encoding="utf-8")
    assert "Highest: 900 at step 77, beyond the picture." in text
    data = re.search(r'id="data-loss">(.*?)</script>', text).group(1)
    ends = [float(end) for end in re.findall(r'"end":([\d.]+)', data)]
    assert ends and max(ends) < 2


OF_HEADS = {
    "heads": 4,
    "beta": 1.0,
    "score_std": 0.312,
    "gap_std": 0.217,
    "lower_bound_error": 0.0123,
    "largest": 0.0456,
    "sure": 0.789,
    "accuracy_sure": 0.9012,
    "accuracy_unsure": None,
    "by_spread": [{"low": i / 7, "high": (i + 1) / 7, "pairs": 60, "value": 0.6 + i / 20} for i in range(5)],
}


def run_with_heads(folder):
    """A run whose heads come together."""
    lines = [
        line | {"gap_heads_std": 0.2 + 3 / (10 + line["step"]), "score_heads_std": 0.3 + 2 / (10 + line["step"])}
        if line["split"] == "eval"
        else line
        for line in records()
    ]
    return write_run(folder, lines, assessment=assessment(bounds=OF_HEADS))


def test_a_run_with_heads_shows_how_far_they_are_apart(tmp_path):
    plain = page_of(write_run(tmp_path / "plain", assessment=assessment()))
    assert "heads" not in plain.text
    page = page_of(run_with_heads(tmp_path / "heads"))
    assert [title for title in page.titles() if title not in plain.titles()] == ["spread-of-the-heads"]
    assert "held out, gaps" in page.text and "held out, scores" in page.text
    table = page.text[page.text.index("Several heads") :]
    for said in ("0.312", "0.217", "0.0123", "0.0456", "0.789", "0.9012"):
        assert said in table, said
    assert "Accuracy by standard deviation of the gap over the heads" in page.text
    both = report([tmp_path / "plain", tmp_path / "heads"], tmp_path / "both.html").read_text(encoding="utf-8")
    assert Tags(both).titles().count("spread-of-the-heads") == 1


def test_named_sets_are_lines_of_their_own(tmp_path):
    lines = records()
    lines = [line for line in lines if line["split"] == "train"]
    lines += [eval_record(step, set=name) for name in ("chat", "safety") for step in (0, 30)]
    both = [assessment(set=name) for name in ("chat", "safety")]
    text = report(write_run(tmp_path, lines, assessment=both)).read_text(encoding="utf-8")
    loss = re.search(r"<figure><figcaption><h3>Loss</h3>.*?</figure>", text, re.DOTALL).group(0)
    buttons = re.findall(r"</span>([^<]*)</button>", loss)
    assert buttons == ["each step", "running mean", "chat", "safety", "log 2: no preference"]


def test_several_runs_are_in_one_page_with_what_differs(tmp_path):
    one = write_run(tmp_path / "one", assessment=assessment())
    two = write_run(tmp_path / "two", settings={"learning_rate": 3e-4, "seed": 1}, is_finished=False)
    out = tmp_path / "both.html"
    assert report([one, two], out) == out
    page = Tags(out.read_text(encoding="utf-8"))
    assert "2 runs compared" in page.text and "two: no mark of an end" in page.text
    differing = page.text[page.text.index("What differs") :]
    assert "learning_rate" in differing and "0.001" in differing and "0.0003" in differing
    assert "seed" not in differing and "max_grad_norm" not in differing
    assert page.titles()[:2] == ["loss", "accuracy"] and "gaps" in page.titles()
    assert not (one / "report.html").exists()


def test_assessments_alone_have_a_page(tmp_path):
    two = [assessment(), assessment(model="other/model-2", accuracy={"value": 0.5})]
    text = page_of_assessments(two, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert page.titles() == ["gaps", "scores", "calibration", "score-against-length"]
    assert "2 models compared" in page.text and "model-2" in page.text and "0.5000" in page.text
    assert "Training" not in page.text
    assert text.index("0.8533 (0.810 to 0.890)") < text.index("<figure>") and "Comparison" not in page.text


def test_a_comparison_of_models_comes_first(tmp_path):
    two = [assessment(model=f"{name}/output") for name in ("one", "two")]
    of_both = comparison(one="one/output", other="two/output")
    text = page_of_assessments(two, tmp_path / "page.html", [of_both]).read_text(encoding="utf-8")
    first = text[: text.index("<figure>")]
    assert "−0.0200 (−0.041 to +0.003)" in first and "<td>0.2632</td><td>7</td><td>13</td><td>300</td>" in first
    assert '<th scope="row">one/output</th><td>two/output</td>' in first  # told apart
    folded = first[first.index("<details") :]
    assert "Where one/output and two/output disagree most: 1 pair</summary>" in folded
    assert "1.25 | −0.50" in folded and f"{TEXT} 7" in folded and "e.jsonl, row 3" in folded
    assert "<details open" not in folded and text.count('<th scope="row">accuracy</th>') == 1


def test_an_evaluation_writes_its_comparisons_on_its_page(tmp_path):
    found = Evaluations([assessment(), assessment(model="other/model-2")], [comparison()])
    _write_page(found, tmp_path / "new" / "page.html")
    assert "−0.0200 (−0.041 to +0.003)" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_the_folder_of_an_evaluation_has_the_page_that_evaluate_writes(tmp_path):
    found = Evaluations([assessment(), assessment(model="other/model-2")], [comparison()])
    (tmp_path / "evaluation.json").write_text(json.dumps(found.to_json()), encoding="utf-8")
    page = Tags(report(tmp_path).read_text(encoding="utf-8"))
    assert "2 models compared" in page.text and "−0.0200 (−0.041 to +0.003)" in page.text
    assert "Training" not in page.text


def test_a_comparison_may_hold_anything():
    two = [assessment(), assessment(model="other/model-2")]
    whole = comparison()
    for junk in JUNK:
        require_inert(Tags(write_html([], two, [dict.fromkeys(whole, junk), {}, comparison(set=HOSTILE)])))
    row = whole["disagreements"][0]
    write_html([], two, [comparison(disagreements=[dict.fromkeys(row, junk)]) for junk in JUNK])


def marks_of(page, label):
    """Colors of the buttons of a label."""
    return set(re.findall(rf'class="mark \w+" style="--of-light:(#\w+);[^"]*"></span>{label}</button>', page))


def test_each_set_of_each_run_has_a_color_of_its_own_on_the_whole_page(tmp_path):
    runs = []
    for name in ("A", "B"):
        lines = [line for line in records() if line["split"] == "train"]
        lines += [eval_record(step, set=of_set) for of_set in ("x", "y") for step in (0, 30)]
        of_sets = [assessment(set=of_set, accuracy={"value": value}) for of_set, value in (("x", 0.61), ("y", 0.72))]
        runs.append(write_run(tmp_path / name, lines, assessment=of_sets))
    page = report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    found = [marks_of(page, f"{run}: {of_set}(?:, [a-z]+)?") for run in "AB" for of_set in "xy"]
    assert [len(each) for each in found] == [1] * 4 and len(set.union(*found)) == 4
    assert marks_of(page, "A") == found[0] and marks_of(page, "B") == found[2]  # training
    table = page[page.index("<main>") : page.index("</table>")]
    assert re.findall(r'<th scope="row">(\w)</th><td>(\w)</td><td>([\d.]+)', table) == [
        *(("A", "x", "0.6100"), ("A", "y", "0.7200"), ("B", "x", "0.6100"), ("B", "y", "0.7200"))
    ]


def test_a_number_of_an_earlier_step_says_so(tmp_path):
    start = write_run(tmp_path / "start", [eval_record(0), train_record(1), train_record(2)], is_finished=False)
    between = write_run(tmp_path / "between", [*records(20, 10), train_record(21)])
    assert page_of(start).text.count("at step 0, before training") == 3  # accuracy, loss and calibration
    assert "at step 20; longer answer" in page_of(between).text
    assert "at step" not in page_of(write_run(tmp_path / "end")).text
    both = report([start, between], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "0.5000 (at step 0, before training)" in both and "(at step 20)" in both


def test_a_chart_of_one_evaluation_has_one_tick():
    chart = Chart("Accuracy", "step", "share")
    chart.line(np.array([0.0]), np.array([0.5]), "held out", colors.BLUE)
    chart.fit()
    x = chart.figure.x_range
    assert (x.start, x.end) == (-0.5, 0.5) and chart.figure.xaxis[0].ticker.min_interval == 1


def test_an_assessment_may_lack_anything(tmp_path):
    assert Tags(page_of_assessments([{}], tmp_path / "page.html").read_text(encoding="utf-8")).titles() == []
    whole = assessment()
    for key in whole:
        rest = {name: value for name, value in whole.items() if name != key}
        of_it = Assessed([Assessment("", colors.BLUE, rest)])
        left = [chart.name for chart in of_it.charts()]
        assert len(left) == 4 - (key in ("gaps", "histogram", "calibration", "scatter")), key


JUNK = (None, "x", [], {}, -1, math.nan, math.inf, 10**400, [None], {"a": 1}, True)


def places(value, before=()):
    """Paths to all that lies in a JSON value, of lists the first item alone."""
    found = [before] if before else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return found + [path for key, inner in items for path in places(inner, (*before, key))]


@pytest.mark.parametrize("shift", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(JUNK)))])
def test_an_assessment_may_hold_anything(shift):
    whole = assessment()
    for number, path in enumerate(places(whole)):
        broken = copy.deepcopy({path[0]: whole[path[0]]})
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = JUNK[(number + shift) % len(JUNK)]
        of_it = Assessed([Assessment("", colors.BLUE, broken)])
        for chart in of_it.charts():
            html.figure(chart)
        list(of_it.numbers())
    broken = {key: JUNK[(number + shift) % len(JUNK)] for number, key in enumerate(whole)}
    assert Tags(write_html([], [broken, broken])).titles() == []


@pytest.mark.parametrize("junk", [*JUNK[:2], *(pytest.param(junk, marks=pytest.mark.slow) for junk in JUNK[2:])])
def test_a_run_may_hold_anything(tmp_path, junk):
    names = [*train_record(1), *eval_record(1)]
    lines = records(4, 2) + [line | {name: junk} for name in names for line in (train_record(9), eval_record(9))]
    settings = dict.fromkeys(("score_limit", "given", "versions", "data_path", "max_grad_norm"), junk)
    assert "loss" in page_of(write_run(tmp_path, lines, settings)).titles()


# Hostile texts


def hostile_run(folder):
    lines = [line for line in records() if line["split"] == "train"]
    lines += [eval_record(step, set=HOSTILE) for step in (0, 15, 30)]
    lines += [{"split": "alarm", "step": 1, "kind": HOSTILE, "message": HOSTILE}]
    mistake = {"prompt": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE, "chosen_score": 0, "rejected_score": 1}
    of_it = assessment(
        set=HOSTILE,
        model=HOSTILE,
        mistakes=[mistake | {"file": HOSTILE, "row": HOSTILE}],
        by_subset=[{"subset": HOSTILE, "pairs": 1, "value": 1.0}],
        baselines=[{"name": HOSTILE, "value": 0.5}],
    )
    settings = {"model_name_or_path": HOSTILE, "given": ["model_name_or_path"], "versions": {HOSTILE: HOSTILE}}
    return write_run(folder, lines, settings | {HOSTILE: HOSTILE}, [of_it, of_it])


def require_inert(page):
    assert page.all("img") == [] and page.all("iframe") == []
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    kinds = [each.get("type") for each in page.all("script")]
    assert kinds.count(None) == 2 and set(kinds) == {None, "application/json"}
    assert len(kinds) == 3 + len(page.titles())
    links = [each["href"] for each in page.all("a") + page.all("link")]
    assert all(link.startswith("#") or link == "data:," for link in links)


def test_hostile_texts_are_texts(tmp_path):
    page = page_of(hostile_run(tmp_path))
    require_inert(page)
    assert page.text.count("window.hacked=1") >= 10
    assert "&lt;/script" not in page.text  # escaped once


def test_hostile_names_of_runs_and_models_are_texts(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    runs = [write_run(tmp_path / f"{name}{place}", assessment=assessment()) for place in range(2)]
    page = Tags(report(runs, tmp_path / "page.html").read_text(encoding="utf-8"))
    require_inert(page)
    assert f"{name}1" in page.text
    two = [assessment(model=HOSTILE), assessment(model=name)]
    require_inert(Tags(page_of_assessments(two, tmp_path / "two.html").read_text(encoding="utf-8")))


def test_tokens_are_masked_and_controls_written_out():
    assert html.text("https://me:secret@host/x hf_abcdefghijklmnop") == "https://***@host/x hf_***"
    assert html.text("a\x00b\u202ec\ud800") == "a\\x00b\\x202ec\\xd800"
    assert html.text("a\tb\nc") == "a\tb\nc"


def test_the_page_allows_its_own_scripts_alone(tmp_path):
    text = report(write_run(tmp_path)).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    own = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in own]
    assert re.findall(r"sha256-([^']*)", policy) == hashes


# Size


def long_lines(steps):
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        yield train_record(step, loss=float(generator.normal(0.5, 0.1)), grad_norm=float(generator.normal(2, 0.3)))
        if step % (steps // 100) == 0:
            yield eval_record(step)


@pytest.mark.parametrize("steps", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_run_is_thinned_and_says_so(tmp_path, steps):
    path = report(write_run(tmp_path, long_lines(steps), assessment=assessment()))
    assert path.stat().st_size < 2_000_000
    assert f"Of up to {steps:,} steps a line shows about 2,400" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_most_runs_with_the_longest_texts_stay_small(tmp_path):
    texts = [row | {"prompt": "漢字 " * 9_000, "chosen": "<" * 40_000} for row in assessment()["mistakes"]]
    runs = [
        write_run(tmp_path / str(place), long_lines(3_000), assessment=assessment(mistakes=texts))
        for place in range(MOST_RUNS)
    ]
    assert report(runs, tmp_path / "page.html").stat().st_size < MOST


def test_long_texts_are_cut(tmp_path):
    texts = [row | {"prompt": "漢字 " * 30_000} for row in assessment()["mistakes"]]
    path = report(write_run(tmp_path, assessment=assessment(mistakes=texts)))
    assert path.stat().st_size < MOST
    assert re.search("<p>(漢字 ){400,}[漢字]*…</p>", path.read_text(encoding="utf-8"))


# The command and the function


def test_the_command_writes_the_page(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"report: {run / 'report.html'}")
    assert main(["report", str(run), str(write_run(tmp_path / "two"))]) == 1
    assert "error: --out is missing" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no/such/folder.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["finished.json", "metrics.jsonl", "report.html", "run.json"]


def test_a_page_that_cannot_be_written_fails_no_run(tmp_path, capsys):
    from reward_model.training.run import write_report

    write_run(tmp_path)
    (tmp_path / "report.html").mkdir()
    write_report(tmp_path)
    assert "report.html: Is a directory; the model is complete without the page" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_the_function_is_in_the_package(tmp_path):
    assert reward_model.report(str(write_run(tmp_path))) == tmp_path / "report.html"


def test_colors_can_be_told_from_either_page():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for light, dark in colors.DARK.items():
        least = 0 if light in (colors.AXIS, colors.GRID) else 4.5 if light == colors.TEXT else 3
        assert contrast(light, "#ffffff") >= least and contrast(dark, "#12161b") >= least, light
    assert len(set(colors.DARK)) == len(set(colors.DARK.values()))


# In a browser

pytest_browser = pytest.mark.skipif(chromium.path() is None, reason="no Chromium on PATH (apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="no Playwright (pip install playwright)")
    with chromium.started() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name → file: of one run, of a hostile one, of several, of assessments."""
    top = tmp_path_factory.mktemp("pages")
    one = write_run(top / "one", assessment=assessment())
    two = write_run(top / "two", settings={"learning_rate": 3e-4}, assessment=assessment(accuracy={"value": 0.7}))
    return {
        "one": report(one),
        "hostile": report(hostile_run(top / "hostile")),
        "several": report([one, two], top / "several.html"),
        "assessments": page_of_assessments([assessment(), assessment(model="b")], top / "assessments.html"),
    }


@pytest_browser
@pytest.mark.parametrize(
    "name", ["hostile", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "several", "assessments"))]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"color_scheme": "dark"}, {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}],
    ids=["light", "dark", "phone"],
)
def test_a_browser_shows_it_and_asks_for_nothing(browser, pages, name, options):
    with chromium.shown(browser, pages[name], **options) as seen:
        assert seen.errors == [] and seen.requests == [pages[name].as_uri()]
        assert seen.overflow == 0
        charts = seen.page.locator(".plot").count()
        drawn = seen.page.evaluate(DRAWN)
        assert charts > 3 and len(drawn) == charts and all(drawn), drawn
        background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(18, 22, 27)" if options.get("color_scheme") else "rgb(255, 255, 255)")
        said = {"one": "0.8533", "hostile": "window.hacked", "several": "2 runs compared", "assessments": "Gaps"}
        assert said[name] in seen.text()
        assert seen.page.evaluate("window.hacked") is None


# for each chart whether its canvas has something on it
DRAWN = """() => [...document.querySelectorAll('.plot')].map((plot) => {
  const canvas = plot.firstElementChild.shadowRoot.querySelector('.bk-Canvas').shadowRoot.querySelector('canvas');
  return canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0);
})"""


# where the points of a chart are that have dots, as x and y on its canvas
DOTS = """(name) => {
  const place = [...document.querySelectorAll('.plot')].findIndex((plot) => plot.id === name);
  const figure = Bokeh.documents[place].roots()[0], frame = Bokeh.index.get_one(figure).frame, found = [];
  for (const each of figure.renderers.filter((each) => each.glyph.type === 'Scatter')) {
    const x = Array.from(each.data_source.get_column('x')), y = Array.from(each.data_source.get_column('y'));
    x.forEach((_, i) => found.push([frame.x_scale.compute(x[i]), frame.y_scale.compute(y[i])]));
  }
  return found;
}"""


@pytest_browser
def test_requests_and_errors_would_be_seen(browser, tmp_path):
    path = tmp_path / "control.html"
    path.write_text("<img src='missing.png'><script>throw new Error('planted')</script>")
    with chromium.shown(browser, path, wait_for=None) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert any("planted" in error for error in seen.errors)
        assert any(url.endswith("missing.png") for url in seen.requests)


@pytest_browser
def test_a_script_that_gets_in_is_refused(browser, pages, tmp_path):
    """The page's own policy, should the escaping ever fail."""
    text = pages["one"].read_text(encoding="utf-8")
    planted = "<img src='http://127.0.0.1:9/x' onerror='window.hacked=1'><script>window.hacked=2</script></main>"
    path = tmp_path / "planted.html"
    path.write_text(text.replace("</main>", planted), encoding="utf-8")
    with chromium.shown(browser, path) as seen:
        assert seen.page.evaluate("window.hacked") is None
        assert len([error for error in seen.errors if "Content Security Policy" in error]) >= 2


@pytest_browser
def test_what_follows_the_pointer_is_text(browser, pages):
    with chromium.shown(browser, pages["hostile"]) as seen:
        found = ""
        for chart in ("accuracy", "calibration"):
            seen.page.locator(f"#{chart}").scroll_into_view_if_needed()
            box = seen.page.locator(f"#{chart}").bounding_box()
            for x, y in seen.page.evaluate(DOTS, chart):
                seen.page.mouse.move(box["x"] + x, box["y"] + y)
                seen.page.wait_for_selector(".bk-Tooltip", state="attached")
                found += seen.page.evaluate(
                    "[...document.querySelectorAll('.bk-Tooltip')].map((t) => t.shadowRoot.textContent).join(' ')"
                )
        assert "running mean" in found and "window.hacked=1" in found
        assert seen.page.evaluate("window.hacked") is None and seen.errors == []
        assert seen.requests == [pages["hostile"].as_uri()]


@pytest_browser
def test_the_keyboard_hides_a_line_and_opens_a_table(browser, pages):
    visible = (
        "Bokeh.documents.map((d) => d.roots()[0])[0].renderers"
        ".filter((r) => r.name === 'series-2').map((r) => r.visible)"
    )
    with chromium.shown(browser, pages["one"]) as seen:
        page = seen.page
        stops = []
        for _ in range(12):
            page.keyboard.press("Tab")
            stops.append(page.evaluate("document.activeElement.textContent"))
            if stops[-1] == "held out":
                break
        assert stops[:4] == ["Training", "Held-out answers", "Mistakes", "Settings"]
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert stops[-1] == "held out" and outline == "solid"
        assert page.evaluate(visible) == [True, True]
        page.keyboard.press("Enter")
        assert page.evaluate(visible) == [False, False]
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "false"
        page.keyboard.press("Enter")
        assert page.evaluate(visible) == [True, True]
        while page.evaluate("document.activeElement.tagName") != "SUMMARY":
            page.keyboard.press("Tab")
        table = page.locator("figure", has=page.locator("#loss")).locator("table").first
        assert not table.is_visible()
        page.keyboard.press("Enter")
        assert table.is_visible() and "0.6739" in table.inner_text()


@pytest_browser
def test_colors_follow_the_reader(browser, pages):
    color = "Bokeh.documents[0].roots()[0].below[0].axis_label_text_color"
    with chromium.shown(browser, pages["one"]) as seen:
        assert seen.page.evaluate(color) == colors.TEXT
        seen.page.emulate_media(color_scheme="dark")
        seen.page.wait_for_selector("html.dark.drawn", state="attached")
        assert seen.page.evaluate(color) == colors.DARK[colors.TEXT]
        assert seen.page.evaluate("Bokeh.documents.length") == seen.page.locator(".plot").count()
        assert seen.errors == []


@pytest_browser
def test_numbers_are_there_without_scripts(browser, pages):
    with chromium.shown(browser, pages["one"], java_script_enabled=False, wait_for=None) as seen:
        assert "0.8533" in seen.page.locator("dl.numbers").inner_text()
        summary = seen.page.get_by_text("Loss as a table", exact=True)
        summary.click()
        assert "0.6739" in seen.page.locator("figure").first.inner_text()


def test_write_html_needs_no_file():
    assert "0.8533" in write_html([], [assessment()])


def test_the_page_is_whole_json_inside(tmp_path):
    """What BokehJS reads is JSON by the standard: no NaN."""
    page = page_of(write_run(tmp_path, records() + [train_record(99, loss=math.nan)], assessment=assessment()))

    def refuse(name):
        raise AssertionError(name)

    data = [text for text in page.inside["script"] if text.startswith("{")]
    assert len(data) == 1 + len(page.titles())
    for text in data:
        json.loads(text, parse_constant=refuse)
