# SPDX-License-Identifier: Apache-2.0
"""slurm.sbatch: over two nodes of a real SLURM, which are network namespaces of this machine; and what it prints."""

import os
import re
import subprocess
import sys
import time

import pytest
import runs
from runs import SCRIPTS, Metrics, train
from slurm import LOST, PREFIX, Slurm, why_not

SBATCH = SCRIPTS / "slurm.sbatch"
GLOBAL_BATCH = 16
WHOLE_RUN = 300.0  # seconds, on a machine that has other things to do
SOON = 60.0  # seconds in which everything is over once something went wrong

needs_slurm = pytest.mark.skipif(bool(why_not()), reason=f"SLURM: {why_not()}")


@pytest.fixture
def slurm():
    with Slurm() as made:
        yield made


class Job:
    """A job of slurm.sbatch with the demo's model and data on CPUs, in folders whose names have spaces."""

    def __init__(self, slurm, demo, folder, *flags, script=SBATCH, options=(), **environment):
        self.slurm, self.output, self.screen = slurm, folder / "an output", folder / "the job.out"
        values = {
            "PYTHON": sys.executable,
            "MODEL": str(demo / "model"),
            "DATA": str(demo / "data"),
            "OUTPUT": str(self.output),
            "GLOBAL_BATCH": str(GLOBAL_BATCH),
            "NUM_GPUS": "1",
            "OMP_NUM_THREADS": "1",
        }
        fixed = ["--max_seq_len", 256, "--learning_rate", "1e-3", "--data_output_path", demo / "cache"]
        options = ["--gpus-per-node=0", "--output", self.screen, *options]
        self.number = slurm.submit(*options, script, *fixed, *flags, environment=values | environment, cwd=folder)

    @property
    def said(self):
        return self.screen.read_text() if self.screen.exists() else ""

    def end(self, seconds):
        """Wait for its end; its state."""
        try:
            return self.slurm.wait(self.number, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.said[-3000:]}") from error

    def wait_for(self, happened):
        """Until something has happened in it, while it runs."""
        end = time.monotonic() + WHOLE_RUN
        while not happened():
            assert time.monotonic() < end and self.slurm.job(self.number)["JobState"] in ("PENDING", "RUNNING"), (
                self.said
            )
            time.sleep(0.5)

    def trains(self):
        metrics = self.output / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count('"train"') > 2

    def wait_until_gone(self, hosts, seconds):
        """Until no process of it is left on some nodes; how long that took."""
        start = time.monotonic()
        while left := [line for host in hosts for line in self.slurm.processes(host)]:
            assert time.monotonic() - start < seconds, "\n".join(left)
            time.sleep(0.5)
        return time.monotonic() - start


@pytest.mark.slow
@needs_slurm
def test_a_run_over_two_nodes_equals_one_process(slurm, demo, tmp_path):
    flags = ["--zero_stage", 2]
    job = Job(slurm, demo, tmp_path, *flags)
    assert job.end(WHOLE_RUN) == "COMPLETED", job.said[-3000:]
    assert slurm.job(job.number)["ExitCode"] == "0:0"
    assert {path.name for path in job.output.iterdir()} >= {"config.json", "metrics.jsonl", "training.log"}
    log = (job.output / "training.log").read_text()
    assert re.search(r"^0: ", log, re.MULTILINE) and re.search(r"^1: ", log, re.MULTILINE), log[-3000:]
    losses = Metrics(job.output / "metrics.jsonl", subprocess.CompletedProcess([], 0, log, "")).losses
    alone = train(demo, tmp_path / "alone", "--per_device_train_batch_size", GLOBAL_BATCH, *flags)
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    assert job.wait_until_gone(slurm.hosts, SOON) < SOON


@pytest.mark.slow
@needs_slurm
def test_a_copy_with_edited_lines_runs_elsewhere(slurm, demo, tmp_path):
    text = SBATCH.read_text().replace("--gpus-per-node=8", "--gres=gpu:a100:1").replace("--nodes=2", "--nodes=1")
    copy = tmp_path / "my own.sh"
    copy.write_text(
        text.replace("facebook/opt-350m", str(demo / "model")).replace("Dahoas/rm-static", str(demo / "data"))
    )
    settings = {"PYTHON": sys.executable, "DRY_RUN": "1"}
    words = []
    for more in ({}, {"SCRIPTS": str(SCRIPTS)}):
        number = slurm.submit("--output", tmp_path / "said", copy, environment=settings | more, cwd=tmp_path)
        words.append((slurm.wait(number, SOON), (tmp_path / "said").read_text()))
    (failed, why), (completed, said) = words
    assert failed == "FAILED" and "set SCRIPTS" in why
    assert completed == "COMPLETED", said
    assert f"# on {PREFIX}1:" in said and str(demo / "model") in said and f"{SCRIPTS}/main.py" in said


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize(
    "options, processes",
    [(["--gpus-per-node=a100:1"], 1), (["--gpus-per-node=2"], 2)],
    ids=["fewer than the node has", "all"],
)
def test_a_process_for_each_gpu_of_the_job(slurm, tmp_path, options, processes):
    settings = {"PYTHON": sys.executable, "DRY_RUN": "1"}
    number = slurm.submit("--output", tmp_path / "said", *options, SBATCH, environment=settings, cwd=tmp_path)
    assert slurm.wait(number, SOON) == "COMPLETED"
    said = (tmp_path / "said").read_text()
    assert f"--nproc_per_node {processes} " in said
    assert f"--master_addr {slurm.hosts[0].address} " in said


@pytest.mark.slow
@needs_slurm
def test_a_run_that_fails_fails_the_job(slurm, demo, tmp_path):
    job = Job(slurm, demo, tmp_path, DATA=str(tmp_path / "no such data"))
    job.wait_for(lambda: "no such data: no such file" in job.said)
    seconds = job.wait_until_gone(slurm.hosts, SOON)
    assert job.end(SOON) == "FAILED"
    print(f"a wrong path: over {seconds:.0f} s after it was reported")
    assert slurm.job(job.number)["ExitCode"] != "0:0"
    assert "no such data: no such file" in (job.output / "training.log").read_text()


@pytest.mark.slow
@needs_slurm
def test_scancel_leaves_no_process(slurm, demo, tmp_path):
    job = Job(slurm, demo, tmp_path, "--num_train_epochs", 100)
    job.wait_for(job.trains)
    assert all(slurm.processes(host) for host in slurm.hosts)
    slurm.run("scancel", job.number)
    seconds = job.wait_until_gone(slurm.hosts, SOON)
    assert job.end(SOON) == "CANCELLED"
    print(f"scancel: nothing left after {seconds:.0f} s")


@pytest.mark.slow
@needs_slurm
def test_before_its_time_is_over_a_job_saves_and_is_queued_again(slurm, demo, tmp_path):
    job = Job(slurm, demo, tmp_path, "--num_train_epochs", 100, "--max_steps", 30)
    job.wait_for(job.trains)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does 5 minutes before
    end = time.monotonic() + WHOLE_RUN
    while slurm.job(job.number)["Restarts"] != "1":
        assert time.monotonic() < end, job.said[-3000:]
        time.sleep(0.5)
    assert "the run has saved a checkpoint and goes on when the job starts again" in job.said
    while slurm.job(job.number)["JobState"] != "PENDING":
        assert time.monotonic() < end, slurm.job(job.number)
        time.sleep(0.5)
    slurm.run("scontrol", "update", f"jobid={job.number}", "starttime=now")  # it would wait two minutes
    assert job.end(WHOLE_RUN) == "COMPLETED", job.said[-3000:]
    steps = [record["step"] for record in Metrics(job.output / "metrics.jsonl", done(job)).train]
    assert steps == list(range(1, 31))


def done(job):
    return subprocess.CompletedProcess([], 0, job.said, "")


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("how, lost", [("end", 0), ("cut_off", 1)], ids=["the first dies", "the second is cut off"])
def test_a_lost_node_ends_the_job(slurm, demo, tmp_path, how, lost):
    job = Job(slurm, demo, tmp_path, "--num_train_epochs", 100)
    job.wait_for(job.trains)
    getattr(slurm.hosts[lost], how)()
    seconds = job.wait_until_gone([slurm.hosts[1 - lost]], LOST + SOON)
    # --requeue: it starts again where it was when there are nodes for it
    assert slurm.job(job.number)["JobState"] in ("PENDING", "NODE_FAIL", "RUNNING")
    assert slurm.job(job.number)["Restarts"] == "1"
    slurm.run("scancel", job.number)
    print(f"a node lost ({how}): nothing left on the other after {seconds:.0f} s")
    if how == "cut_off":  # what goes on there ends when SLURM sees the node again
        slurm.hosts[lost].plug_in()
        print(f"nothing left on it {job.wait_until_gone(slurm.hosts, LOST + SOON):.0f} s after it came back")


def dry_run(*flags, script=SBATCH, **environment):
    values = runs.environment(**{"DRY_RUN": "1"} | environment)
    return subprocess.run(["bash", str(script), *flags], env=values, capture_output=True, text=True)


def test_a_dry_run_prints_the_command_of_every_node(tmp_path):
    result = dry_run("--zero_stage", "2", OUTPUT=str(tmp_path / "an output"), GLOBAL_BATCH="64")
    assert result.returncode == 0, result.stderr
    where, line = result.stdout.splitlines()
    assert where == "# on node-1 node-2:"
    assert line.startswith("srun ")
    assert "--nnodes 2 --nproc_per_node 8 --master_addr node-1 " in line
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --zero_stage 2" in line
    assert not (tmp_path / "an output").exists()


def test_a_dry_run_of_a_copy_reads_its_lines(tmp_path):
    copy = tmp_path / "a copy"
    copy.write_text(
        SBATCH.read_text().replace("--gpus-per-node=8", "--gres=gpu:a100:4").replace("--nodes=2", "--nodes=3")
    )
    result = dry_run(script=copy, SCRIPTS=str(SCRIPTS))
    assert "--nnodes 3 --nproc_per_node 4 " in result.stdout, result.stderr


@pytest.mark.parametrize("known", ["10.1.2.3", "localhost"])
def test_the_first_node_is_known_by_an_address_that_is_not_its_loopback(tmp_path, known):
    nodes = f'case $2 in hostnames) echo localhost; echo other ;; node) echo "   NodeAddr={known} Version=1" ;; esac'
    commands = {
        "scontrol": nodes,
        "hostname": "echo 127.0.0.1 fe80::1 10.9.8.7 172.17.0.1",
        "srun": "echo SLURM_GPUS_ON_NODE=4",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = dry_run(PATH=path, SLURM_JOB_ID="40007", SLURM_JOB_NODELIST="localhost,other")
    address = {"10.1.2.3": "10.1.2.3", "localhost": "10.9.8.7"}[known]
    assert f"--nproc_per_node 4 --master_addr {address} --master_port 10007 " in result.stdout, result.stderr
