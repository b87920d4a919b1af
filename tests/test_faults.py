# SPDX-License-Identifier: Apache-2.0
"""What is done to the processes of a run, and what has to follow: nothing runs on, /dev/shm is empty, the run goes on.

The table in tests/README.md lists these. What they leave on the disk is tests/test_checkpoints.py.
"""

import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
import runs
from runs import SCRIPTS, free_port

SOON = 120.0  # seconds, on a machine that has other things to do


class Run:
    """A run of main.py that trains until it is ended.

    launcher: ``single_node.sh`` with deepspeed or torchrun, or one of these two alone, or plain ``python``.
    """

    def __init__(self, demo, folder, launcher, *flags, processes=2, **options):
        self.output, self.port, self.log = folder / "output", str(free_port()), folder / "log"
        start = {
            "single_node.sh": ["bash", str(SCRIPTS / "single_node.sh")],
            "single_node.sh, torchrun": ["bash", str(SCRIPTS / "single_node.sh")],
            "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)],
            "python": [sys.executable],
        }[launcher]
        if launcher in ("deepspeed", "torchrun"):
            start += ["--master_port", self.port]
        if not launcher.startswith("single_node"):
            start.append(str(SCRIPTS / "main.py"))
        named = {"model_name_or_path": demo / "model", "data_path": demo / "data", "output_dir": self.output}
        named |= {"data_output_path": demo / "cache", "max_seq_len": 128, "per_device_train_batch_size": 4}
        named |= {"num_train_epochs": 100}
        words = [word for name, each in named.items() for word in (f"--{name}", str(each))]
        self.flags = [*words, *map(str, flags)]
        values = runs.environment(
            NUM_GPUS=str(processes), MASTER_PORT=self.port if launcher.startswith("single") else None,
            LAUNCHER="torchrun" if "torchrun" in launcher else "deepspeed", OMP_NUM_THREADS="1",
        )  # fmt: skip
        self.process = subprocess.Popen(
            [*start, *self.flags],
            env=values,
            **({"stdout": self.log.open("ab"), "stderr": subprocess.STDOUT} | options),
        )

    @property
    def said(self):
        logs = [self.log, self.output / "training.log"]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def wait_for_steps(self, count=2):
        """Until it has trained a few steps."""
        return self.wait_for(lambda: self.steps >= count)

    def wait_for(self, what):
        """Until something holds, which must be while it runs."""
        end = time.monotonic() + 2 * SOON
        while not what():
            assert time.monotonic() < end and self.process.poll() is None, self.said[-3000:]
            time.sleep(0.1)
        return self

    @property
    def steps(self):
        metrics = self.output / "metrics.jsonl"
        return metrics.read_text().count('"train"') if metrics.exists() else 0

    def processes(self, *parts):
        """Those of this run whose command line has these parts."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if str(self.output) in line and all(part in line for part in parts):
                found.append(process)
        return found

    def ranks(self):
        """The processes of main.py, in the order of their ranks."""
        found = {}
        for process in self.processes("main.py"):
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None and "launcher" not in " ".join(process.cmdline()):
                found.setdefault(int(rank), process)
        return [found[rank] for rank in sorted(found)]

    def end(self, seconds=SOON):
        """Its exit status; afterwards no process and no shared memory of it are there."""
        try:
            status = self.process.wait(seconds)
            end = time.monotonic() + seconds
            while self.processes() and time.monotonic() < end:
                time.sleep(0.2)
            left = [" ".join(process.cmdline()) for process in self.processes()]
            assert not left, (left, self.said[-3000:])
            assert not list(Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*"))
            return status
        finally:
            for process in self.processes():
                process.kill()

    @property
    def checkpoints(self):
        return sorted(path.name for path in (self.output / "checkpoints").glob("step-*"))


LAUNCHERS = ["single_node.sh", "single_node.sh, torchrun"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_saves_and_ends(demo, tmp_path, launcher, number):
    run = Run(demo, tmp_path, launcher).wait_for_steps()
    run.process.send_signal(number)
    assert run.end() == 75, run.said[-3000:]
    assert len(run.checkpoints) == 1
    assert "the same command goes on from here" in run.said


@pytest.mark.slow
def test_a_second_request_ends_at_once(demo, tmp_path):
    run = Run(demo, tmp_path, "single_node.sh").wait_for_steps()
    run.ranks()[1].suspend()  # no checkpoint comes of the first
    run.process.terminate()
    time.sleep(4)
    assert run.process.poll() is None
    run.process.terminate()
    assert run.end(30) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_is_no_end_with_status_0(demo, tmp_path, launcher):
    run = Run(demo, tmp_path, launcher).wait_for_steps()
    module = "torch.distributed.run" if "torchrun" in launcher else "deepspeed.launcher.launch"
    nearest = [process for process in run.processes(module) if "supervise.py" not in " ".join(process.cmdline())]
    nearest[-1].kill()
    assert run.end() == 75, run.said[-3000:]
    assert run.checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, number", [("deepspeed", signal.SIGTERM), ("deepspeed", signal.SIGKILL), ("torchrun", signal.SIGKILL)]
)
def test_ranks_save_and_end_with_their_launcher(demo, tmp_path, launcher, number):
    run = Run(demo, tmp_path, launcher).wait_for_steps()
    run.process.send_signal(number)
    assert run.end() == -number
    assert run.checkpoints, run.said[-3000:]


@pytest.mark.slow
def test_a_killed_guard_ends_the_run(demo, tmp_path):
    run = Run(demo, tmp_path, "single_node.sh").wait_for_steps()
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    assert run.checkpoints, run.said[-3000:]


@pytest.mark.slow
def test_a_process_without_a_launcher_outlives_who_started_it(demo, tmp_path):
    words = [sys.executable, SCRIPTS / "main.py", "--model_name_or_path", demo / "model", "--data_path", demo / "data"]
    words += ["--output_dir", tmp_path / "output", "--max_seq_len", 128, "--data_output_path", demo / "cache"]
    line = " ".join(f"'{word}'" for word in words)
    subprocess.run(["bash", "-c", f"nohup {line} >'{tmp_path}/log' 2>&1 &"], env=runs.environment(), check=True)
    end = time.monotonic() + 2 * SOON
    while not (tmp_path / "output" / "finished.json").exists():
        assert time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.5)


@pytest.mark.slow
def test_ctrl_c_under_deepspeed(demo, tmp_path):
    """From a terminal it reaches every process of the group, and deepspeed's launcher sends SIGTERM besides."""
    outside, inside = pty.openpty()
    terminal = {"stdin": inside, "stdout": inside, "stderr": inside, "preexec_fn": lambda: take_terminal(inside)}
    run = Run(demo, tmp_path, "deepspeed", **terminal)
    os.close(inside)
    os.set_blocking(outside, False)

    def drain():
        try:
            while os.read(outside, 65536):
                pass
        except OSError:
            pass

    end = time.monotonic() + 2 * SOON
    metrics = run.output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 2:
        drain()
        assert time.monotonic() < end
        time.sleep(0.1)
    os.write(outside, b"\x03")
    end = time.monotonic() + SOON
    while run.processes() and time.monotonic() < end:
        drain()
        time.sleep(0.1)
    assert run.end() != 0
    assert run.checkpoints


def take_terminal(terminal):
    """In a new process: what is typed there, Ctrl-C among it, is for its group."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [*LAUNCHERS, "deepspeed", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_ends_with_the_others(demo, tmp_path, launcher, rank):
    run = Run(demo, tmp_path, launcher, "--hang_timeout", 10).wait_for_steps()
    stopped = run.ranks()[rank]
    stopped.suspend()
    assert run.end() not in (0, 75), run.said[-3000:]
    assert f"error: rank {rank} (host " in run.said and f"process {stopped.pid}) does not run" in run.said
    assert "what its threads are doing" in run.said
    assert "most recent call first" in run.said


KILLED_AT_LAST = ("--save_interval", 3, "--eval_interval", 4, "--max_steps", 30)


@pytest.fixture(scope="module")
def without_a_fault(demo, tmp_path_factory):
    """The weights that a run ends with."""
    run = Run(demo, tmp_path_factory.mktemp("whole"), LAUNCHERS[0], *KILLED_AT_LAST)
    assert run.end(2 * SOON) == 0, run.said[-3000:]
    return (run.output / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(int(os.environ.get("KILLS", 6))))
def test_a_rank_that_is_killed_at_any_moment_ends_all_and_is_no_loss(demo, tmp_path, without_a_fault, attempt):
    """And the same command then ends with the weights of a run without a fault.

    ``KILLS=50`` tries more of them; each is of another moment: start-up, step, evaluation, checkpoint, the end.
    """
    chance = random.Random(attempt)
    launcher, in_the_start, rank = chance.choice(LAUNCHERS), chance.random() < 0.2, chance.randrange(2)
    run = Run(demo, tmp_path, launcher, *KILLED_AT_LAST)
    if in_the_start:
        run.wait_for(lambda: len(run.ranks()) == 2)
    else:
        run.wait_for_steps(1)
    time.sleep(chance.uniform(0, 12))
    ranks, steps = run.ranks(), run.steps
    if len(ranks) < 2:
        pytest.skip("it had ended by then")
    victim = ranks[rank]
    victim.kill()
    assert run.end() == 128 + signal.SIGKILL, run.said[-3000:]
    assert f"rank {rank} (process {victim.pid}) was ended by SIGKILL" in run.said
    print(f"{launcher}: rank {rank} killed after {steps} steps; checkpoints {run.checkpoints}")
    again = Run(demo, tmp_path, launcher, *KILLED_AT_LAST)
    assert again.end(2 * SOON) == 0, again.said[-3000:]
    assert (again.output / "model.safetensors").read_bytes() == without_a_fault


@pytest.mark.slow
def test_a_rank_that_is_killed_is_no_loss(demo, tmp_path):
    """The same command goes on from the last checkpoint."""
    run = Run(demo, tmp_path, "single_node.sh", "--save_interval", 2).wait_for_steps(4)
    run.ranks()[1].kill()
    assert run.end() == 137
    kept = run.checkpoints
    assert kept
    again = Run(demo, tmp_path, "single_node.sh", "--save_interval", 2, "--max_steps", 8)
    assert again.end(2 * SOON) == 0, again.said[-3000:]
    assert (again.output / "finished.json").exists()


@pytest.mark.slow
def test_a_lock_that_a_killed_compilation_left_is_removed(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    first = Run(demo, tmp_path, "python", processes=1)
    end = time.monotonic() + SOON
    while not list((tmp_path / "extensions").rglob("lock")):
        assert time.monotonic() < end
        time.sleep(0.1)
    first.process.kill()
    first.end()
    assert list((tmp_path / "extensions").rglob("lock"))
    second = Run(demo, tmp_path, "deepspeed", "--max_steps", 2)
    assert second.end(5 * SOON) == 0, second.said[-3000:]
    assert second.said.count("left by a process that was killed, removed") == 1
    assert not list((tmp_path / "extensions").rglob("lock"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_ports_of_one_machine_are_open_to_it_alone(demo, tmp_path, launcher):
    run = Run(demo, tmp_path, launcher).wait_for_steps()
    places = {
        connection.laddr.ip
        for rank in run.ranks() or run.processes("main.py")
        for connection in rank.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    run.process.terminate()
    run.end()
    assert places <= {"127.0.0.1"}


@pytest.mark.parametrize(
    "kind, what",
    [
        ("host", "the host ("),
        pytest.param("python", "the host: lower", marks=pytest.mark.slow),
        pytest.param("map", "the host: lower", marks=pytest.mark.slow),
        pytest.param("device", "the device: lower --per_device_train_batch_size", marks=pytest.mark.slow),
    ],
)
def test_a_run_without_memory_ends_in_a_line_that_says_what_to_lower(demo, tmp_path, kind, what):
    words = [kind, "--model_name_or_path", demo / "model", "--data_path", demo / "data", "--data_output_path"]
    words += [demo / "cache", "--output_dir", tmp_path / "output", "--max_seq_len", 128]
    done = runs.launch(*words, script=runs.TOP / "tests" / "helpers" / "no_memory.py")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr[-2000:]
    assert said[0].startswith(f"error: out of memory on {what}"), said
    assert "--max_seq_len" in said[0] and "Traceback" not in done.stderr
