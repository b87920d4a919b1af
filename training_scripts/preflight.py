#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Whether the hosts of a run are alike and reach each other, asked before any of them starts to train.

    preflight.py [--allow WHAT...] HOST:SLOTS,HOST:SLOTS… PORT MAIN_FLAG...

Prints the first host's address, for the others to reach it by; complaints go to standard error, one a line. ``SSH`` is
the command that reaches a host. This file is sent to the hosts, where it needs the same interpreter and no package.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

MARK = "preflight: "  # before a host's answer: a login may print something of its own
TIMEOUT = 120.0  # seconds for an answer: a fingerprint of weights may have to come over a network
CLOCKS_APART = 30.0  # seconds: file times and certificates bear less than hours, and ssh takes a few
LEAST_FREE = 2e9  # bytes, beside the weights
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "peft")
ALIKE = {  # what all hosts must share: fact → what a complaint calls it
    "code": "this checkout's code",
    "python": "Python",
    **{name: name for name in PACKAGES},
    "model": "the model",
    "data": "the data",
    "kind": "its processors",
}
TOPICS = ("alike", "path", "slots", "disk", "clock", "port", "shared")  # that may be allowed; not ssh, nor no address
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


# On a host


def look(checkout: str, flags: list[str]) -> dict:
    """What a host has. Paths are as the run will see them."""
    options = run_flags(flags)
    output = Path(options.output_dir or ".").absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    count = gpus()
    data = [*options.data_path, *map(without_name, options.eval_data_path)]
    code = ("reward_model/**/*.py", "reward_model/config/zero/*.json", "training_scripts/*.py")
    files = [file for pattern in code for file in Path(checkout).glob(pattern)]
    return {
        "time": time.time(),
        "came_in_by": (os.environ.get("SSH_CONNECTION", "").split() or ["", "", ""])[2],
        "addresses": subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split(),
        "python": ".".join(str(number) for number in sys.version_info[:3]),
        **{name: version(name) for name in PACKAGES},
        "code": fingerprint(files),
        "model": source(options.model_name_or_path),
        "data": " ".join(source(path) for path in data),
        "missing": {
            "model": [name for name in [options.model_name_or_path] if name and not source(name)],
            "data": [path for path in data if not source(path)],
        },
        "gpus": count,
        "kind": "GPUs" if count else "no GPU",
        "folder": str(there),
        "writable": os.access(there, os.W_OK),
        "free": shutil.disk_usage(there).free,
        "need": LEAST_FREE + weights(options.model_name_or_path),
    }


def run_flags(flags: list[str]) -> argparse.Namespace:
    """Of main.py's flags those that name files."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", default="")
    parser.add_argument("--data_path", "--data-path", nargs="+", default=[])
    parser.add_argument("--eval_data_path", "--eval-data-path", nargs="+", default=[])
    parser.add_argument("--output_dir", "--output-dir")
    return parser.parse_known_args(flags)[0]


def without_name(entry: str) -> str:
    """The path of an entry of --eval_data_path, which may be NAME=PATH."""
    return entry if os.path.exists(entry) else entry.partition("=")[2] or entry


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def source(name: str) -> str:
    """A fingerprint of what a path holds; empty: nothing is there. A hub's name is taken at its word."""
    path = Path(name)
    if path.is_dir():
        return fingerprint([file for file in path.rglob("*") if not is_hidden(file.relative_to(path))])
    if path.is_file():
        return fingerprint([path])
    is_hub_name = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(DATA_FILES)
    return "on the hub" if is_hub_name else ""


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def fingerprint(files: list[Path]) -> str:
    """Of names, sizes and contents; of a file above 64 MiB the first and last MiB. Empty: no file."""
    digest = hashlib.blake2b(digest_size=8)
    found = sorted((file for file in files if file.is_file()), key=lambda file: (file.name, str(file)))
    for file in found:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            if size <= 64 << 20:
                digest.update(content.read())
            else:
                digest.update(content.read(1 << 20))
                content.seek(-(1 << 20), os.SEEK_END)
                digest.update(content.read())
    return digest.hexdigest() if found else ""


def weights(model: str) -> int:
    """Bytes of the weights in a folder; 0 for a hub's name."""
    files = Path(model).glob("*") if model and Path(model).is_dir() else ()
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin"))


def gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def listen(port: str, note: str, others: str) -> dict:
    """On the first host: take a connection of each other one, while a file lies there for them to see."""
    try:
        with socket.create_server(("", int(port)), backlog=1024) as server:
            Path(note).touch()
            print("listening", flush=True)
            server.settimeout(0.5)
            waiting, asker, end = int(others), os.getppid(), time.monotonic() + 30.0
            while waiting and os.getppid() == asker and time.monotonic() < end:  # who does not come says why
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()
                    waiting -= 1
    except OSError as error:
        return {"problem": f"port {port}: {os.strerror(error.errno)} (MASTER_PORT=N takes another)"}
    finally:
        Path(note).unlink(missing_ok=True)
    return {}


def reach(address: str, port: str, note: str) -> dict:
    """On the others: whether the first host's file is seen, and its port reached."""
    answer = {}
    for _ in range(10):  # a network file system may take a moment
        if Path(note).exists():
            break
        time.sleep(0.3)
    else:
        answer["unshared"] = f"does not see what the first host writes to {Path(note).parent}"
    try:
        with socket.create_connection((address, int(port)), timeout=10):
            pass
    except OSError as error:
        reason = error.strerror or error
        answer["problem"] = f"cannot reach {address}, port {port}: {reason} (a firewall, or MASTER_ADDR)"
    return answer


# On the launching machine


class Host:
    """A host as seen from here.

    Args:
        name: as ssh knows it.
        slots: processes that the hostfile gives it.
    """

    def __init__(self, name: str, slots: int):
        self.name, self.slots = name, slots
        self.facts: dict = {}
        self.asked = self.answered = 0.0  # seconds since the epoch

    def start(self, *question: str) -> subprocess.Popen:
        python = ["env", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", sys.executable]  # as the run will have it
        inside = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([*python, '-', *question])}"
        words = [*shlex.split(os.environ.get("SSH", "ssh")), self.name, f"bash -c {shlex.quote(inside)}"]
        with Path(__file__).open("rb") as program:  # unbuffered: communicate() does not see what readline() read ahead
            return subprocess.Popen(words, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)

    def answer(self, process: subprocess.Popen, before: str = "") -> dict:
        """The host's answer; ``{"silent": why}`` if it gives none."""
        try:
            out, error = (text.decode(errors="replace") for text in process.communicate(timeout=TIMEOUT))
        except subprocess.TimeoutExpired:
            process.kill()
            return {"silent": f"no answer within {TIMEOUT:.0f} s"}
        for line in (before + out).splitlines():
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        reason = (error.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return {"silent": f"no connection by ssh: {reason}" if process.returncode == 255 else reason}

    def look(self, *question: str) -> None:
        self.asked = time.time()
        self.facts = self.answer(self.start(*question))
        self.answered = time.time()


def complaints(hosts: list[Host]) -> list[tuple[str, str]]:
    """(topic, what is wrong) for all that the hosts' facts show."""
    found = [("ssh", f"{host.name}: {host.facts['silent']}") for host in hosts if "silent" in host.facts]
    hosts = [host for host in hosts if "silent" not in host.facts]
    for fact, called in ALIKE.items():
        common = Counter(host.facts[fact] for host in hosts).most_common(1)[0][0] if hosts else None
        having = [host.name for host in hosts if host.facts[fact] == common]
        for host in hosts:
            if host.facts[fact] != common and not host.facts["missing"].get(fact):  # those are said below
                found.append(("alike", f"{host.name}: {differs(called, host.facts[fact], common, having)}"))
        if common == "" and fact in PACKAGES[:3]:
            found += [("alike", f"{name}: no {called} in {sys.executable}") for name in having]
    for host in hosts:
        found += [(topic, f"{host.name}: {fault}") for topic, fault in own_faults(host)]
    first = hosts[0] if hosts else None
    if first and first.facts["free"] < first.facts["need"]:
        free, need = first.facts["free"] / 1e9, first.facts["need"] / 1e9
        found.append(("disk", f"{first.name}: {free:.1f} GB free at {first.facts['folder']}, {need:.1f} GB needed"))
    return found


def differs(called: str, value: str, common: str, having: list[str]) -> str:
    if len(common) == 16 or " " in common:  # a fingerprint
        return f"{called} differs from that of {', '.join(having)}"
    return f"{called}: {value or 'none'}, {', '.join(having)}: {common or 'none'}"


def own_faults(host: Host) -> list[tuple[str, str]]:
    """What is wrong with a host, whatever the others are like."""
    facts, found = host.facts, []
    found += [("path", f"no {path}") for paths in facts["missing"].values() for path in paths]
    if facts["gpus"] and facts["gpus"] < host.slots:
        found.append(("slots", f"{host.slots} slots in the hostfile, {facts['gpus']} GPUs"))
    if not facts["writable"]:
        found.append(("disk", f"cannot write to {facts['folder']}"))
    ahead = max(facts["time"] - host.answered, 0) or min(facts["time"] - host.asked, 0)
    if abs(ahead) > CLOCKS_APART:
        found.append(("clock", f"clock {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"))
    return found


def address_of(first: Host) -> str:
    """The address by which other hosts reach the first one: where our ssh came in, unless that is its loopback."""
    facts = first.facts
    own = [facts["came_in_by"], *facts["addresses"]]
    return next((address for address in own if address and not address.startswith("127.") and address != "::1"), "")


def meet(hosts: list[Host], address: str, port: str) -> list[tuple[str, str]]:
    """Let all hosts connect to the first one's port, and look for what it writes."""
    note = str(Path(hosts[0].facts["folder"], f".preflight-{os.getpid()}-{port}"))
    listening = hosts[0].start("listen", port, note, str(len(hosts) - 1))
    found, said, line = [], "", "none yet"
    while line and line.strip() != "listening" and not line.startswith(MARK):  # a login may print something first
        line = listening.stdout.readline().decode(errors="replace")
        said += line
    if line.strip() == "listening":
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = pool.map(lambda host: host.answer(host.start("reach", address, port, note)), hosts[1:])
            for host, answer in zip(hosts[1:], answers):
                found += [("port", f"{host.name}: {answer[key]}") for key in ("problem", "silent") if key in answer]
                found += [("shared", f"{host.name}: {answer['unshared']}")] if "unshared" in answer else []
        if found:
            listening.terminate()  # and with it what it started
    answer = {} if found else hosts[0].answer(listening, said)
    return found + [("port", f"{hosts[0].name}: {answer[key]}") for key in ("problem", "silent") if key in answer]


def check(hosts: list[Host], port: str, flags: list[str], address: str = "") -> tuple[str, list[tuple[str, str]]]:
    """(address of the first host, complaints)."""
    checkout = str(Path(__file__).resolve().parent.parent)
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(lambda host: host.look("look", checkout, *flags), hosts))
    found = complaints(hosts)
    if any("silent" in host.facts for host in hosts):
        return address, found
    address = address or address_of(hosts[0])
    if not address:
        return "", [*found, ("address", f"{hosts[0].name}: no address but its loopback: set MASTER_ADDR")]
    return address, found + meet(hosts, address, port)


def main() -> int:
    questions = {"look": lambda checkout, *flags: look(checkout, list(flags)), "listen": listen, "reach": reach}
    if sys.argv[1:2] and sys.argv[1] in questions:
        print(MARK + json.dumps(questions[sys.argv[1]](*sys.argv[2:])), flush=True)
        return 0
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--allow", nargs="*", default=[])
    parser.add_argument("--address", default="")
    parser.add_argument("hosts")
    parser.add_argument("port")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for topic in set(options.allow) - set(TOPICS):
        print(f"error: PREFLIGHT_ALLOW: no topic {topic}; there are {', '.join(TOPICS)}", file=sys.stderr)
        return 1
    named = [part.rpartition(":") for part in options.hosts.split(",")]
    hosts = [Host(name, int(slots)) for name, _, slots in named]
    address, found = check(hosts, options.port, options.flags, options.address)
    for topic, fault in found:
        kind = "allowed" if topic in options.allow else "error"
        print(f"{kind}: {fault} [{topic}]", file=sys.stderr)
    if any(topic not in options.allow for topic, _ in found):
        return 1
    facts = hosts[0].facts
    what = f"{sum(host.slots for host in hosts)} processes on {len(hosts)} hosts"
    print(f"preflight: {what}, torch {facts['torch']}, deepspeed {facts['deepspeed']}: ready", file=sys.stderr)
    print(address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
