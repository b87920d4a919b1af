# SPDX-License-Identifier: Apache-2.0
"""A run that is ended at any file that it makes, renames or removes, also cut to half or not flushed: it goes on."""

import chaos
import pytest

pytest.importorskip("ckpt_chaos", reason="ckpt-chaos is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "ranks", "more"),
    [(4, 1, "--zero_stage 2"), (40, 2, "--zero_stage 3")],
)
def test_every_end_of_a_run_is_survived(points, ranks, more, demo, tmp_path):
    flags = [*chaos.flags_for(demo / "model", demo / "data", demo / "cache", ranks), *more.split()]
    with chaos.Served() as command:
        counts, wrong = chaos.verdicts(command, flags, tmp_path / "work", points, ranks)
    assert wrong == []
    assert counts["PASS"] == points + 1  # and one without an end


@pytest.mark.slow
def test_the_judge_finds_a_run_that_does_not_resume(demo, tmp_path):
    """A folder that must be new, as everywhere before checkpoints: no end after the first file is survived."""
    flags = [*chaos.flags_for(demo / "model", demo / "data", demo / "cache"), "--resume", "none"]
    with chaos.Served() as command:
        counts, wrong = chaos.verdicts(command, flags, tmp_path / "work", 2, modes=("before",))
    assert counts["HARD_FAIL"] == 1, wrong
