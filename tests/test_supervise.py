# SPDX-License-Identifier: Apache-2.0
"""supervise.py: what ends with it, what it passes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from runs import SCRIPTS

SUPERVISE = [sys.executable, str(SCRIPTS / "supervise.py")]
# starts a process in a session of its own, says its id, and waits
PARENT = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen(['sleep', '60'], start_new_session=True); print(child.pid, flush=True); {then}"
)


def supervised(then, *flags, **options):
    """A supervisor of a parent and its child; the supervisor's process and the child's id."""
    words = [*SUPERVISE, *flags, sys.executable, "-c", PARENT.format(then=then)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options)
    return process, int(process.stdout.readline())


def is_gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("then", "status"), [("sys.exit(3)", 3), ("sys.exit(0)", 0), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_command_s_end_is_the_end_of_what_it_started(then, status):
    process, child = supervised(then)
    assert process.wait(30) == status
    assert is_gone(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything(number):
    process, child = supervised("time.sleep(60)")
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert is_gone(child)


def test_the_end_of_the_lifeline_ends_everything():
    process, child = supervised("time.sleep(60)", "--lifeline", stdin=subprocess.PIPE)
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert is_gone(child)


def test_without_a_lifeline_standard_input_means_nothing():
    process = subprocess.run([*SUPERVISE, "sh", "-c", "sleep 0.5; cat; exit 4"], stdin=subprocess.DEVNULL, timeout=30)
    assert process.returncode == 4


def test_a_command_that_ignores_the_request_is_killed():
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    code = f"import supervise, sys; supervise.GRACE = 0.5; sys.argv[1:] = [sys.executable, '-c', {stubborn!r}]; "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "sys.exit(supervise.main())"], cwd=SCRIPTS, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10


def test_the_log_holds_what_the_screen_shows(tmp_path):
    log = tmp_path / "a log"
    log.write_text("before\n")
    words = [*SUPERVISE, "--log", str(log), "sh", "-c", "echo out; echo err >&2; printf end; exit 5"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stdout) == (5, "out\nerr\nend")
    assert log.read_text() == "before\nout\nerr\nend"


def test_a_command_that_is_not_there():
    process = subprocess.run([*SUPERVISE, "no-such-command"], capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stderr) == (127, "error: no-such-command: No such file or directory\n")


def interfaces(*flags, **environment):
    words = [*SUPERVISE, *flags, "sh", "-c", "echo ${GLOO_SOCKET_IFNAME-none} ${NCCL_SOCKET_IFNAME-none}"]
    values = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    return subprocess.run(words, env=values | environment, capture_output=True, text=True, timeout=30)


def test_the_interface_that_leads_to_the_first_host():
    assert interfaces().stdout.split() == ["none", "none"]
    assert interfaces("--reach", "127.0.0.1").stdout.split() == ["lo", "lo"]
    assert interfaces("--reach", "127.0.0.1", NCCL_SOCKET_IFNAME="eth7").stdout.split() == ["lo", "eth7"]
    lost = interfaces("--reach", "no-such-host.invalid")
    assert lost.returncode == 1
    assert lost.stderr.startswith("error: no way to no-such-host.invalid from ")


# Ranks: a stand-in for main.py, which says when it listens

RANK = """
import os, signal, sys, time
def asked(number, frame):
    print("asked", flush=True)
    time.sleep({saving})
    open(os.path.join(os.path.dirname(__file__), "interrupted.json"), "w").close()
    os._exit(75)
signal.signal(signal.SIGTERM, asked)
print("trains", os.getpid(), flush=True)
time.sleep(60)
"""
# a launcher of one rank: its own exit status is another, it looks now and then, and SIGTERM ends its rank
LAUNCHER = """
import os, signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, sys.argv[1]], env=dict(os.environ, RANK="0", MASTER_PORT="1"))
signal.signal(signal.SIGTERM, lambda *_: rank.kill())
print(os.getpid(), flush=True)
while rank.poll() is None:
    time.sleep(0.2)
sys.exit(1 if rank.returncode else 0)
"""


@pytest.fixture
def supervised_rank(tmp_path):
    """A supervisor of a launcher of a rank that takes a while to save; the processes of all three, with the rank's."""

    def start(*flags, saving=1.0):
        main = tmp_path / "main.py"
        main.write_text(RANK.format(saving=saving))
        words = [*SUPERVISE, "--finished", str(tmp_path / "finished.json"), *flags]
        process = subprocess.Popen(
            [*words, sys.executable, "-c", LAUNCHER, str(main)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        launcher = int(process.stdout.readline())
        rank = int(process.stdout.readline().split()[1])
        time.sleep(0.2)
        return process, launcher, rank

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_first_request_is_for_the_ranks_and_75_comes_through(supervised_rank, number):
    process, launcher, rank = supervised_rank()
    process.send_signal(number)
    said, errors = process.communicate(timeout=30)
    assert (process.returncode, said) == (75, "asked\n")
    assert errors.startswith("asked the run to save a checkpoint and to end")
    assert is_gone(launcher) and is_gone(rank)


def test_a_second_request_ends_at_once_and_so_does_the_end_of_the_grace(supervised_rank):
    process, _, rank = supervised_rank(saving=50)
    process.terminate()
    assert process.stdout.readline() == "asked\n"
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert is_gone(rank)
    process, _, rank = supervised_rank("--grace", "0.5", saving=50)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert is_gone(rank)


def test_a_rank_whose_launcher_is_killed_may_save(supervised_rank):
    process, launcher, rank = supervised_rank()
    os.kill(launcher, signal.SIGKILL)
    assert process.wait(30) == 75
    assert is_gone(rank)


def test_a_rank_that_a_signal_ended_is_named(supervised_rank):
    process, _, rank = supervised_rank()
    time.sleep(1.2)  # it is looked for every second
    os.kill(rank, signal.SIGKILL)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.startswith(f"error: rank 0 (process {rank}) was ended by SIGKILL; the watchdog does that to")


def test_status_0_is_not_believed_without_the_mark_of_a_finished_run(tmp_path):
    words = [*SUPERVISE, "--finished", str(tmp_path / "finished.json"), "--log", str(tmp_path / "log")]
    result = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=30)
    line = f"error: the run ended with status 0 before its end: there is no {tmp_path}/finished.json\n"
    assert (result.returncode, result.stderr, (tmp_path / "log").read_text()) == (1, line, line)
    other_host = subprocess.run([*words, "--host", "1", "true"], timeout=30)
    assert other_host.returncode == 0
    (tmp_path / "finished.json").touch()
    assert subprocess.run([*words, "true"], timeout=30).returncode == 0
