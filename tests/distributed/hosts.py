# SPDX-License-Identifier: Apache-2.0
"""Hosts on this machine: network namespaces on a bridge, each with its address, hostname, processes, /dev/shm and sshd.

They share the disk, as nodes of a cluster share /home. Needs root, iproute2, util-linux and openssh-server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pgrep", "setpriv")
TOOLS_FOLDERS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NETWORK = "10.77.0"
BRIDGE = "rmbr0"

SSHD = """\
ListenAddress {address}
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/{name}.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 100
"""

SSH = """\
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""


def why_not() -> str:
    """What this machine lacks to be several hosts; empty: nothing."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=TOOLS_FOLDERS)]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 util-linux openssh-server procps)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = subprocess.run([_tool("unshare"), "--net", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "this machine lets nobody make network namespaces"


def _tool(name: str) -> str:
    return shutil.which(name, path=TOOLS_FOLDERS)


def _run(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run([_tool(words[0]), *words[1:]], check=check, capture_output=True, text=True)


class Host:
    """One host; ``name`` is its hostname and its name in the ssh configuration."""

    def __init__(self, hosts: Hosts, index: int):
        self.name, self.address = f"{hosts.prefix}{index}", f"{hosts.network}.{10 + index}"
        self.namespace, self.cable = f"rm-{self.name}", f"rmv-{self.name}"
        self.bridge, folder = hosts.bridge, hosts.folder
        self.make_network()
        config = folder / f"{self.name}.sshd"
        config.write_text(SSHD.format(address=self.address, folder=folder, name=self.name))
        # as Debian writes it: the name of a host resolves to its loopback
        (folder / f"{self.name}.hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        script = (
            f"hostname {self.name}; mount --make-rprivate /; mount -t tmpfs tmpfs /dev/shm; mkdir -p /run/sshd; "
            f"mount --bind '{folder / self.name}.hosts' /etc/hosts; exec {_tool('sshd')} -D -e -f '{config}'"
        )
        isolated = ["--uts", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
        inside = [_tool("ip"), "netns", "exec", self.namespace, _tool("unshare"), *isolated, "bash", "-c", script]
        words = [_tool("setpriv"), "--pdeathsig", "KILL", *inside]  # ends with the tests, however these end
        with (folder / f"{self.name}.log").open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def make_network(self) -> None:
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _run("ip", "link", "set", self.cable, "master", self.bridge, "up")
        _run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        _run("ip", "-n", self.namespace, "link", "set", "lo", "up")

    def init(self) -> int:
        """The id, seen from outside, of the host's first process."""
        return int(_run("pgrep", "-P", str(self.process.pid)).stdout.split()[0])

    def cut_off(self) -> None:
        """Pull the cable."""
        _run("ip", "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        _run("ip", "link", "set", self.cable, "up")

    def inside(self) -> list[str]:
        """The words before a command that let it run on the host."""
        return [_tool("nsenter"), "-t", str(self.init()), "--net", "--uts", "--pid", "--mount"]

    def run(self, command: str) -> str:
        """What a command prints on the host, cable or not."""
        return _run(*self.inside(), "bash", "-c", command).stdout

    def processes(self) -> list[str]:
        """Command lines of what runs there, the ssh server and the shell that asks left out."""
        lines = self.run("ps -eo args --no-headers").splitlines()
        return [line for line in lines if "sshd" not in line and "ps -eo" not in line]

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)  # unshare --kill-child: everything on the host with it
        self.process.wait()
        _run("ip", "link", "del", self.cable, check=False)
        _run("ip", "netns", "del", self.namespace, check=False)


class Hosts:
    """Several hosts; a context manager.

    Args:
        folder: for keys and configurations; what ``ssh_options`` names lies there.
        count: how many; they are called node1, node2, …
        bridge, network, prefix: others, if several groups of hosts are there at once.
    """

    def __init__(self, folder: Path, count: int, bridge: str = BRIDGE, network: str = NETWORK, prefix: str = "node"):
        self.folder, self.count = folder, count
        self.bridge, self.network, self.prefix = bridge, network, prefix
        self.hosts: list[Host] = []

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        self._remove_remains()
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "addr", "add", f"{self.network}.1/24", "dev", self.bridge)
            _run("ip", "link", "set", self.bridge, "up")
            self.hosts = [Host(self, index + 1) for index in range(self.count)]
            blocks = [f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts]
            (self.folder / "config").write_text("".join(blocks) + "Host *\n" + SSH.format(folder=self.folder))
            for host in self.hosts:
                self._wait_for(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _remove_remains(self) -> None:
        """Take away what tests that were killed have left; their processes died with them."""
        for name in (f"{self.prefix}{index + 1}" for index in range(self.count)):
            if _run("ip", "netns", "pids", f"rm-{name}", check=False).stdout:
                raise RuntimeError(f"{name} is in use by other tests")
            _run("ip", "link", "del", f"rmv-{name}", check=False)
            _run("ip", "netns", "del", f"rm-{name}", check=False)
        _run("ip", "link", "del", self.bridge, check=False)

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            host.end()
        _run("ip", "link", "del", self.bridge, check=False)

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __iter__(self):
        return iter(self.hosts)

    @property
    def ssh_options(self) -> str:
        return f"-F {self.folder / 'config'}"

    def _wait_for(self, host: Host) -> None:
        question = ["ssh", "-F", self.folder / "config", host.name, "true"]
        for _ in range(50):
            if subprocess.run(question, capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{host.name} does not answer: {(self.folder / f'{host.name}.log').read_text()}")
