# SPDX-License-Identifier: Apache-2.0
"""gpu/first_hour.py rehearsed on a CPU with tiny shapes: every part gives its results, once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "gpu" / "first_hour.py"
PARTS = ["right", "step", "mends", "profile", "kernels", "larger", "plan"]
if importlib.util.find_spec("trl"):
    PARTS.append("peers")


def rehearse(results, *words):
    words = [sys.executable, str(PROGRAM), *words, "--device", "cpu", "--small", "--results", str(results)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a second costs more than it brings to tiny shapes
    return subprocess.run(words, env=one_thread, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """All parts but the whole run, in one process: the file of results, and what was printed."""
    results = tmp_path_factory.mktemp("first_hour") / "results.jsonl"
    done = rehearse(results, *PARTS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return results, done.stdout


def of_part(results, part):
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {line["case"]: line for line in lines if line["part"] == part}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_gives_its_results(part, rehearsed):
    results, printed = rehearsed
    found = of_part(results, part)
    assert found and all(line["device"] == "CPU" and "error" not in line for line in found.values())
    assert printed.count(f"\n{part}: ") + printed.startswith(f"{part}: ") == len(found)


def test_ways_and_sizes_are_tried(rehearsed):
    right, step = (of_part(rehearsed[0], part) for part in ("right", "step"))
    assert all(line["right"] for line in right.values())
    for way in ("flex", "varlen", "dense"):
        assert {name for name in right if name.startswith(way)} == {
            f"{way}, {dtype}, head 16{more}" for dtype in ("bf16", "fp32") for more in ("", ", recomputed")
        }
        # the same work in the same time, counted by hand: useful tokens a second × seconds = tokens of a step
        line, apart = step[f"4 pairs, {way}"], step["4 pairs, separate"]
        useful = [one["tokens_per_second"] * one["seconds_a_step"] for one in (line, apart)]
        assert useful[0] == pytest.approx(useful[1])
        assert line["computed_tokens_of_a_step"] >= useful[0] * 0.5
    assert apart["computed_tokens_of_a_step"] > step["4 pairs, dense"]["computed_tokens_of_a_step"]


def test_the_plan_counts_what_was_measured(rehearsed):
    step, larger, plan = (of_part(rehearsed[0], part) for part in ("step", "larger", "plan"))
    assert set(plan) == {f"step: {case}" for case in step} | {f"larger: {case}" for case in larger}
    assert all(line["planned"] > 0 for line in plan.values())


def test_what_has_a_result_is_not_measured_again(rehearsed):
    results = rehearsed[0]
    before = results.read_text()
    lines = before.splitlines(keepends=True)
    first = json.loads(lines[0])
    assert rehearse(results, "plan", "--show").stdout.count("plan: ") == len(of_part(results, "plan"))
    results.write_text("".join(lines[1:]))  # as if it had been cut off there
    assert rehearse(results, "plan", "right").returncode == 0
    added = results.read_text().removeprefix("".join(lines[1:])).splitlines()
    results.write_text(before)
    assert [json.loads(line)["case"] for line in added] == [first["case"]]


def test_an_unknown_part_is_refused(tmp_path):
    done = rehearse(tmp_path / "results.jsonl", "write")
    assert done.returncode == 2
    assert "no part write: there are right, run, step" in done.stderr


@pytest.mark.slow
def test_the_whole_run(tmp_path):
    done = rehearse(tmp_path / "results.jsonl", "run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (line,) = of_part(tmp_path / "results.jsonl", "run").values()
    assert line["attention"].startswith("prompts are shared")
    assert line["last_loss"] < line["first_loss"]
