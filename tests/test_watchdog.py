# SPDX-License-Identifier: Apache-2.0
"""training/watchdog.py: which rank is named. What then happens to the processes is in test_faults.py."""

import json
import threading
import time

import pytest

from reward_model.common.pulse import beat, pulse
from reward_model.training.watchdog import LOST, Seen, Watchdog, described, where


def told(rank, beats=5, word=1, waits=True, **more):
    common = {"host": "a", "place": "p", "process": 100 + rank, "started": 1, "did": "a micro-batch of step 3"}
    return common | {"rank": rank, "beats": beats, "word": word, "stands": "x.py:1 (f)", "waits": waits} | more


@pytest.fixture
def judge():
    watchdog = Watchdog(timeout=10, rank=0, world_size=3, key="test")

    def decide(*seen):
        line = watchdog._judge(list(seen))
        return (json.loads(line)["told"]["rank"], json.loads(line)["runs"]) if line else None

    return decide


def test_nobody_is_named_while_all_give_signs(judge):
    assert judge(Seen(told(0), 0, 9.9), Seen(told(1), LOST, 1.0), Seen(told(2), 0, 3.0)) is None


def test_a_stopped_process_comes_before_one_that_is_late(judge):
    assert judge(Seen(told(0), 0, 10), Seen(told(1, waits=False), 0, 10), Seen(told(2), LOST, 10)) == (2, False)


def test_who_does_not_wait_for_others_is_late_then_who_did_least(judge):
    assert judge(Seen(told(0, 4), 0, 10), Seen(told(1, 5, waits=False), 0, 11), Seen(told(2), 0, 10)) == (1, True)
    assert judge(Seen(told(0, 5), 0, 10), Seen(told(1, 5), 0, 11), Seen(told(2, 4), 0, 12)) == (2, True)


def test_who_has_come_to_its_end_is_not_asked(judge):
    assert judge(Seen(told(0), 0, 3), Seen(told(1, ended=True), 99, 99), Seen(told(2), 0, 3)) is None


def test_what_is_heard_counts_rounds_and_seconds():
    seen = Seen(told(1))
    seen.hear(told(1, word=2), 1.0)
    seen.hear(told(1, word=2), 1.5)
    assert (seen.wordless, seen.silent) == (1, 2.5)
    seen.hear(told(1, beats=6, word=3), 1.0)
    assert (seen.wordless, seen.silent) == (0, 0.0)


def test_a_process_alone_is_ended_when_its_main_thread_stands_still():
    watchdog, ends = Watchdog(timeout=1, rank=0, world_size=1, key="test"), []

    def end(told, runs, silent, by):
        ends.append(described(told, runs, silent))
        watchdog.stop()

    watchdog._end = end
    watchdog.start()
    for _ in range(6):
        beat("a micro-batch of step 1")
        time.sleep(0.25)
    assert not ends
    time.sleep(1.8)
    assert len(ends) == 1 and "last began a micro-batch of step 1 and stands in test_watchdog.py:" in ends[0]


def test_where_a_thread_stands():
    at, waits = where(threading.main_thread().ident)
    assert at.startswith("watchdog.py:") and at.endswith("(where)") and not waits
    assert where(None) == ("no Python code", False)
    assert pulse.is_main is False
