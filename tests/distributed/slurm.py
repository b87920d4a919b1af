# SPDX-License-Identifier: Apache-2.0
"""A SLURM on this machine: a controller and hosts (hosts.py) as its nodes, with munge, and no accounting or cgroups.

Nothing of a SLURM or munge that the machine may have is touched: keys, sockets, ports and files are others.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import hosts as several
import runs

PACKAGES = {
    "munged": "munge",
    "setpriv": "util-linux",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
    "scancel": "slurm-client",
    "scontrol": "slurm-client",
}
NETWORK, BRIDGE, PREFIX = "10.78.0", "rmbr1", "slurm"
GPUS = 2  # of a node; they are counted, and not there
LOST = 10  # seconds after which a silent node is down
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")

# what a run depends on is as SLURM has it by default, KillWait among it; but SlurmdTimeout, 300 there
CONFIGURATION = """\
ClusterName=rm
SlurmctldHost={controller}({network}.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout={lost}
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName={names} NodeAddr={addresses} CPUs=2 Gres=gpu:a100:{gpus}
PartitionName=all Nodes=ALL Default=YES
"""


def why_not() -> str:
    """What this machine lacks to run SLURM; empty: nothing."""
    missing = [tool for tool in PACKAGES if not find(tool)]
    if missing:
        packages = " ".join(sorted({PACKAGES[tool] for tool in missing}))
        return f"needs {', '.join(missing)} (Debian: {packages})"
    return several.why_not()


def find(tool: str) -> str | None:
    return shutil.which(tool, path=several.TOOLS_FOLDERS)


def _end(process: subprocess.Popen) -> None:
    process.terminate()  # the controller ends its own child only if asked
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Slurm:
    """A controller and ``count`` nodes slurm1, slurm2, …; a context manager."""

    def __init__(self, count: int = 2):
        self.count = count

    def __enter__(self) -> Slurm:
        with contextlib.ExitStack() as stack:
            # not in pytest's folders: munge's user may not enter them
            self.folder = Path(tempfile.mkdtemp(prefix="rm-slurm-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o711)
            (self.folder / "state").mkdir()
            self.stack = stack
            self._start_munge()
            self.hosts = stack.enter_context(
                several.Hosts(self.folder / "ssh", self.count, bridge=BRIDGE, network=NETWORK, prefix=PREFIX)
            )
            self._configure()
            self._start("slurmctld", "-D", "-f", str(self.configuration))
            for host in self.hosts:
                self._start_node(host)
            self._wait("its nodes", lambda: len(self._idle()) == self.count)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """In which the commands of SLURM talk to this one, and know of no job that may run these tests."""
        return runs.environment(SLURM_CONF=str(self.configuration))

    def run(self, *words: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command, sbatch or another, prints; it has to succeed."""
        values = self.environment | (environment or {})
        result = subprocess.run([str(word) for word in words], env=values, cwd=cwd, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{words[0]}: {result.stdout}{result.stderr}")
        return result.stdout

    def submit(self, *words: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Hand in a job; its number."""
        return self.run("sbatch", "--parsable", *words, environment=environment, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, …"""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> str:
        """Wait for the end of a job; its state. It is canceled if it does not end."""
        try:
            self._wait(f"job {number}", lambda: self.job(number)["JobState"] in ENDED, seconds)
        except TimeoutError:
            self.run("scancel", number)
            raise
        return self.job(number)["JobState"]

    def processes(self, host: several.Host) -> list[str]:
        """What runs on a node, SLURM's daemons left out."""
        return [line for line in host.processes() if "slurmd" not in line.split()[0]]

    def _start(self, *words: str, **options) -> subprocess.Popen:
        """A process that ends with this."""
        with (self.folder / f"{len(list(self.folder.glob('*.log')))}.{words[0]}.log").open("w") as log:
            tied = [find("setpriv"), "--pdeathsig", "KILL", *options.pop("prefix", ())]
            process = subprocess.Popen(
                [*tied, find(words[0]), *words[1:]], stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options
            )
        self.stack.callback(_end, process)
        return process

    def _start_munge(self) -> None:
        user, folder = pwd.getpwnam("munge"), self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (folder, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
        own = ["--reuid", "munge", "--regid", "munge", "--clear-groups"]
        words = [f"--{option}={folder / name}" for option, name in files.items()]
        self._start("munged", "--foreground", *words, prefix=own)
        self._wait("munged", (folder / "socket").exists)

    def _configure(self) -> None:
        self.configuration = self.folder / "slurm.conf"
        text = CONFIGURATION.format(
            controller=socket.gethostname(), network=NETWORK, folder=self.folder, lost=LOST, gpus=GPUS,
            names=",".join(host.name for host in self.hosts), addresses=",".join(host.address for host in self.hosts),
        )  # fmt: skip
        self.configuration.write_text(text)
        # the plugin that does nothing until it is asked
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            device.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu Type=a100 File={d}\n" for d in devices))

    def _start_node(self, host: several.Host) -> None:
        inside = ["-t", str(host.init()), "--net", "--uts", "--pid", "--mount"]
        self._start("nsenter", *inside, find("slurmd"), "-D", "-f", str(self.configuration))

    def _idle(self) -> list[str]:
        try:
            return [
                line for line in self.run("sinfo", "--noheader", "-N", "-o", "%N %T").splitlines() if "idle" in line
            ]
        except RuntimeError:  # the controller does not listen yet
            return []

    def _wait(self, what: str, done, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = "".join(f"\n{log.name}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"{what}: not after {seconds:.0f} seconds{logs}")
            time.sleep(0.2)
