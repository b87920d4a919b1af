# SPDX-License-Identifier: Apache-2.0
"""common/compile_lock.py: who may compile an op, and what a killed process leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from reward_model.common import compile_lock
from reward_model.common.compile_lock import CompileLock
from reward_model.common.errors import UserError

HOLDS = "import fcntl, os, sys, time; {how}; print('holds', flush=True); time.sleep(60)"
OURS = "f = os.open(sys.argv[1] + '.held', os.O_CREAT | os.O_RDWR); fcntl.flock(f, fcntl.LOCK_EX)"
THEIRS = "f = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)"


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock."""
    started = []

    def start(how):
        words = [sys.executable, "-c", HOLDS.format(how=how), str(tmp_path / "lock")]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_it_is_held_and_released(tmp_path):
    lock = CompileLock(str(tmp_path / "lock"))
    assert lock.try_acquire() and (tmp_path / "lock").exists()
    lock.release()
    assert not (tmp_path / "lock").exists()
    assert CompileLock(str(tmp_path / "lock")).try_acquire()


def test_a_lock_of_a_killed_process_is_removed_and_said(tmp_path, holder, capfd):
    process = holder(f"{OURS}; {THEIRS}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").exists()
    assert CompileLock(str(tmp_path / "lock")).try_acquire()
    assert capfd.readouterr().err == f"{tmp_path / 'lock'}: left by a process that was killed, removed\n"


def test_who_waited_for_another_of_ours_compiles_nothing(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(compile_lock, "QUIET", 0.05)
    process = holder(OURS)
    child = os.fork()
    if not child:
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        os._exit(0)
    assert not CompileLock(str(tmp_path / "lock")).try_acquire()
    assert f"waiting for a process that compiles an op in {tmp_path}" in capsys.readouterr().out
    os.waitpid(child, 0)


@pytest.mark.parametrize("how", [OURS, THEIRS, "os.chdir(os.path.dirname(sys.argv[1])); open('lock', 'w').close()"])
def test_a_process_that_compiles_is_waited_for_but_not_for_ever(tmp_path, holder, monkeypatch, how):
    monkeypatch.setattr(compile_lock, "PATIENCE", 0.3)
    holder(how)
    with pytest.raises(UserError, match=f"another process has been compiling an op in {tmp_path} for 0 minutes"):
        CompileLock(str(tmp_path / "lock")).try_acquire()
