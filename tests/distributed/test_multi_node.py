# SPDX-License-Identifier: Apache-2.0
"""multi_node.sh over three hosts, which are network namespaces of this machine, each with its own sshd."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import runs
from hosts import Hosts, why_not
from runs import SCRIPTS, Metrics

LAUNCHERS = [
    pytest.param("deepspeed", marks=pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh")),
    "torchrun",
]
GLOBAL_BATCH = 24  # 3 hosts × 8 pairs
WHOLE_RUN = 300.0  # seconds, on a machine that has other things to do

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=f"several hosts: {why_not()}")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made


@pytest.fixture
def launcher_of(hosts, demo, tmp_path):
    """Starts a launcher with the demo's model and data; its process, and what it says in a Said."""
    started = []

    def start(script, *flags, slots=(1, 1, 1), **environment):
        hostfile = hosts.folder / "hostfile"
        lines = [f"{host.name} slots={count}\n" for host, count in zip(hosts, slots)]
        hostfile.write_text("".join(lines) + "# three hosts\n")
        values = {
            "HOSTFILE": str(hostfile),
            "SSH_OPTIONS": hosts.ssh_options,
            "MODEL": str(demo / "model"),
            "DATA": str(demo / "data"),
            "OUTPUT": str(tmp_path / "an output"),
            "GLOBAL_BATCH": str(GLOBAL_BATCH),
            "OMP_NUM_THREADS": "1",
        }
        fixed = ["--max_seq_len", "256", "--learning_rate", "1e-3", "--data_output_path", str(demo / "cache")]
        process = subprocess.Popen(
            ["bash", str(SCRIPTS / script), *fixed, *flags],
            env=runs.environment(**values | environment),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # as a shell with job control makes one
        )
        started.append(process)
        return Said(process)

    yield start
    for process in started:
        process.kill()


class Said:
    """What a process prints, while it runs."""

    def __init__(self, process):
        self.process, self.text = process, ""
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        self.returncode, self.stdout, self.stderr = None, "", ""

    def read(self):
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, words, timeout=WHOLE_RUN):
        end = time.monotonic() + timeout
        while words not in self.text:
            assert time.monotonic() < end and self.process.poll() is None, self.text[-3000:]
            time.sleep(0.1)

    def end(self, timeout=WHOLE_RUN):
        self.returncode = self.process.wait(timeout)
        self.thread.join(10)
        self.stdout = self.text
        return self


def left_on(hosts, marks=("main.py", "supervise.py", "launcher", "torch.distributed"), seconds=0.0):
    """Processes of a run that are on hosts, after waiting up to some seconds for none."""
    end = time.monotonic() + seconds
    while True:
        found = [line for host in hosts for line in host.processes() if any(mark in line for mark in marks)]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.5)


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_three_hosts_train_as_one_process_does(launcher, stage, launcher_of, hosts, tmp_path):
    output = tmp_path / "an output"
    alone = launcher_of("single_node.sh", "--zero_stage", stage, NUM_GPUS="1", OUTPUT=str(tmp_path / "alone")).end()
    assert alone.returncode == 0, alone.text[-3000:]
    run = launcher_of("multi_node.sh", "--zero_stage", stage, LAUNCHER=launcher).end()
    assert run.returncode == 0, run.text[-3000:]
    one, three = Metrics(tmp_path / "alone" / "metrics.jsonl", alone), Metrics(output / "metrics.jsonl", run)
    assert len(one.losses) == len(three.losses) == 14
    assert three.losses == pytest.approx(one.losses, rel=1e-4)
    assert three.final["accuracy"] == one.final["accuracy"]
    assert f"global batch {GLOBAL_BATCH} = 8 pairs × 1 accumulated × 3 processes" in run.text
    assert (output / "model.safetensors").exists()
    assert "node1: held-out accuracy" in (output / "training.log").read_text()
    assert not left_on(hosts)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_lost_host_ends_the_run(launcher, launcher_of, hosts):
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", LAUNCHER=launcher)
    run.wait_for("step 14:")
    hosts[2].cut_off()
    start = time.monotonic()
    try:
        run.end(timeout=60)
        took = time.monotonic() - start
        assert run.returncode not in (0, None)
        assert "error: node3 cannot be reached any more" in run.text
        assert not left_on([hosts[0], hosts[1]])
    finally:
        hosts[2].plug_in()
    print(f"ended after {took:.0f} s")
    assert not left_on([hosts[2]], seconds=60)  # once the network is back, it notices


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_rank_ends_the_run_and_its_host_is_named(launcher, launcher_of, hosts):
    """With pdsh one of the host's two: its launcher takes a moment to end the other, while other hosts lose contact."""
    slots = {"deepspeed": (1, 2, 1), "torchrun": (1, 1, 1)}[launcher]
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", slots=slots, LAUNCHER=launcher)
    run.wait_for("step 14:")
    # the rank (a host's last), not what has it in its own words
    last = {"deepspeed": "--local_rank=1 ", "torchrun": ""}[launcher]
    hosts[1].run(f"pkill -9 -f '^[^ ]*python[^ ]* -u [^ ]*/main.py {last}'")
    run.end(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert f"error: node2 failed with exit status {run.returncode}" in run.text
    assert not left_on(hosts)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_saves_on_all_hosts_and_ends(number, launcher, launcher_of, hosts, tmp_path):
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", LAUNCHER=launcher)
    run.wait_for("step 14:")
    run.process.send_signal(number)
    run.end(timeout=90)
    assert run.returncode == 75, run.text[-3000:]
    assert "the same command goes on from there" in run.text and "error: " not in run.text
    assert len(list((tmp_path / "an output" / "checkpoints").glob("step-*"))) == 1
    assert not left_on(hosts)


def test_ctrl_c_from_a_terminal_saves_too(launcher_of, hosts, tmp_path):
    """It reaches the whole process group, and what carries the run must not hear it."""
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000")
    run.wait_for("step 14:")
    os.killpg(run.process.pid, signal.SIGINT)
    run.end(timeout=90)
    assert run.returncode == 75, run.text[-3000:]
    assert not left_on(hosts)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_request_ends_all_hosts_at_once(launcher, launcher_of, hosts):
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", LAUNCHER=launcher)
    run.wait_for("step 14:")
    hosts[1].run("pkill -STOP -f '^[^ ]*python[^ ]* -u [^ ]*/main.py '")  # no checkpoint comes of the first
    run.process.terminate()
    run.wait_for("a second signal ends them at once")
    time.sleep(5)
    run.process.terminate()
    assert run.process.wait(60) == 143
    assert not left_on(hosts)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killing_the_launcher_ends_the_run(launcher, launcher_of, hosts):
    run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", LAUNCHER=launcher)
    run.wait_for("step 14:")
    run.process.kill()
    assert run.process.wait(60) == -9
    assert not left_on(hosts, seconds=30)


def test_a_wrong_flag_is_said_once_and_quickly(launcher_of, hosts):
    assert refused(launcher_of("multi_node.sh", "--learning_rat", "1")) == [
        "error: unrecognized arguments: --learning_rat 1 (--help lists the flags)"
    ]


def test_what_only_the_run_can_find_is_said_by_the_first_host(launcher_of, hosts, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    run = launcher_of("multi_node.sh", "--data_path", "rows.jsonl", LAUNCHER="torchrun").end(timeout=120)
    assert run.returncode == 1
    assert "node1: error: rows.jsonl, row 1: chosen is missing" in run.text
    assert not left_on(hosts)


# Preflight: a host that lacks something is named before anything starts


def refused(run):
    run.end(timeout=120)
    assert run.returncode == 1
    assert "training" not in run.text and "launch.py" not in run.text
    return [line for line in run.text.splitlines() if line.startswith("error: ")]


def test_preflight_names_an_unreachable_host(launcher_of, hosts):
    hosts[2].cut_off()
    try:
        faults = refused(launcher_of("multi_node.sh"))
    finally:
        hosts[2].plug_in()
    assert len(faults) == 1
    assert re.match(r"error: node3: no connection by ssh: .* \[ssh\]", faults[0])


def test_preflight_names_a_host_with_other_code_model_and_data(launcher_of, hosts, demo, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "errors.py").write_text("# edited\n")
    shutil.copytree(demo / "model", other / "model")
    (other / "model" / "config.json").write_text("{}")
    (other / "data").mkdir()
    places = (SCRIPTS.parent / "reward_model" / "common" / "errors.py", demo / "model", demo / "data")
    for place in places:
        hosts[1].run(f"mount --bind '{other / place.name}' '{place}'")
    try:
        faults = refused(launcher_of("multi_node.sh"))
    finally:
        for place in places:
            hosts[1].run(f"umount '{place}'")
    assert faults == [
        "error: node2: this checkout's code differs from that of node1, node3 [alike]",
        "error: node2: the model differs from that of node1, node3 [alike]",
        f"error: node2: no {demo / 'data'} [path]",
    ]


def test_preflight_names_a_busy_port_and_other_topics_can_be_allowed(launcher_of, hosts, tmp_path):
    server = "import socket, time; s = socket.create_server(('', 29511)); time.sleep(60)"
    busy = subprocess.Popen([*hosts[0].inside(), sys.executable, "-c", server])
    try:
        time.sleep(1)
        faults = refused(launcher_of("multi_node.sh", MASTER_PORT="29511"))
    finally:
        busy.kill()
        hosts[0].run("pkill -f '[c]reate_server' || true")
    assert faults == ["error: node1: port 29511: Address already in use (MASTER_PORT=N takes another) [port]"]


def test_preflight_names_a_host_without_the_shared_folder(launcher_of, hosts, tmp_path):
    hosts[2].run(f"mount -t tmpfs tmpfs '{tmp_path}'")
    try:
        faults = refused(launcher_of("multi_node.sh"))
        run = launcher_of("multi_node.sh", "--num_train_epochs", "1000", PREFLIGHT_ALLOW="shared")
        run.wait_for("step 14:")
        assert "allowed: node3: does not see what the first host writes to" in run.text
        run.process.terminate()
        run.end(timeout=60)
    finally:
        hosts[2].run(f"umount -l '{tmp_path}'")
    assert faults == [f"error: node3: does not see what the first host writes to {tmp_path} [shared]"]


def test_preflight_names_hosts_that_do_not_come_to_the_address(launcher_of, hosts):
    faults = refused(launcher_of("multi_node.sh", MASTER_ADDR="10.77.0.99"))
    assert [fault[:40] for fault in faults] == [
        f"error: {name}: cannot reach 10.77.0.99, port 29500"[:40] for name in ("node2", "node3")
    ]
