#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Find or make an interpreter that has all the trainer needs, and print its path.

    set_up.py [--dev] [--debug]     what setup.sh runs for quickstart.sh and tests/run.sh
    set_up.py --lacking [--dev]     only print what this interpreter lacks

1. An interpreter that has everything is used as it is.
2. A virtual environment or a named conda environment that lacks something is completed. Every package that it has keeps
   its version; where that cannot be, nothing is installed and the error says what stands in the way.
3. Any other interpreter is left alone: .venv is made from it at the top of the checkout, and sees its torch, if it has
   one.

A torch that is there is never replaced. Where there is none, the build that fits the GPU's driver is installed, or
where there is no GPU the CPU build. Packages are judged by the names and versions in their metadata, which are those
that pip knows: a torch whose ``__version__`` is 2.13.0+cu130 may be called 2.13.0 there.

This file runs before anything is installed: standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parent.parent
OWN = TOP / ".venv"
MARK = "made-by-set_up.txt"  # in .venv: it may be made anew when it does not work

TORCH = "2.13.0"
TORCH_CUDA = "13.0"  # of the build of it that PyPI has for x86-64
# Measured on x86-64 with Python 3.11 and the versions of constraints.txt, all packages, in 10⁹ bytes
CPU_SIZE = "0.4 GB to download, 1.6 GB on disk"
CUDA_SIZE = "3.0 GB to download, 5.6 GB on disk"
CUDA_ROOM = 6.5e9
TORCH_INDEX = "https://download.pytorch.org/whl/"

COMPARE = {
    ">=": lambda have, want: have >= want,
    "<=": lambda have, want: have <= want,
    "==": lambda have, want: have == want,
    "!=": lambda have, want: have != want,
    "<": lambda have, want: have < want,
    ">": lambda have, want: have > want,
}


class SetUpError(Exception):
    """What the user can mend, in one line."""


class Requirement(NamedTuple):
    """A dependency: its normalized name, and all of it as pyproject.toml writes it."""

    name: str
    text: str

    def holds(self, version: str) -> bool:
        """By the numbers alone: a vendor's 2.9.0a0+nv25.09 is 2.9.0, which pip's rule for pre-releases would refuse."""
        bounds = re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.]+)", self.text)
        return all(COMPARE[sign](release(version), release(bound)) for sign, bound in bounds)


def release(version: str) -> tuple[int, ...]:
    """Its numbers: "2.13.0+cu130" → (2, 13)."""
    numbers = [int(number) for number in re.match(r"(?:v|\d+!)?(\d+(?:\.\d+)*)", version)[1].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def normalized(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(pyproject: str, dev: bool) -> list[Requirement]:
    """The dependencies that a pyproject.toml's text declares, with ``dev`` those of the tests too.

    Python 3.10 has no parser for TOML, hence a list of strings, each on one line or several.
    """
    names = ("dependencies", "dev") if dev else ("dependencies",)
    found = []
    for name in names:
        block = re.search(rf"^{name} = \[(.*?)\]\s*$", pyproject, re.DOTALL | re.MULTILINE)[1]
        for text in re.findall(r'"([^"]+)"', block):
            found.append(Requirement(normalized(re.match(r"[\w.-]+", text)[0]), text))
    return found


# What an interpreter has


class Facts(NamedTuple):
    """Of an interpreter, asked by running this file in it."""

    python: str  # its path
    prefix: str
    is_environment: bool  # a virtual one, or conda's other than its base
    packages: dict[str, str]  # normalized name → version
    torch_at: str  # the folder that would be imported, whatever the metadata says; empty: none
    has_pip: bool


def look() -> Facts:
    packages: dict[str, str] = {}
    for found in metadata.distributions():
        name, version = found.metadata["Name"], found.version
        if name and version:
            packages.setdefault(normalized(name), version)  # the first on the path is the one that is imported
    prefix = Path(sys.prefix)
    torch = importlib.util.find_spec("torch")
    is_conda = (prefix / "conda-meta").is_dir() and not (prefix / "condabin").is_dir()
    return Facts(
        sys.executable,
        sys.prefix,
        sys.prefix != sys.base_prefix or is_conda,
        packages,
        next(iter(torch.submodule_search_locations or ()), "") if torch else "",
        importlib.util.find_spec("pip") is not None,
    )


def look_at(python: Path | str) -> Facts | None:
    """None: it does not run."""
    try:
        done = subprocess.run([str(python), __file__, "--look"], capture_output=True, text=True)
    except OSError:
        return None
    return Facts(*json.loads(last_line(done.stdout))) if done.returncode == 0 else None


class Lack(NamedTuple):
    need: Requirement
    version: str | None  # too old or too new; None: not there

    def __str__(self) -> str:
        return self.need.text if self.version is None else f"{self.need.text} (it has {self.version})"


def lacking(facts: Facts, needed: list[Requirement]) -> list[Lack]:
    versions = [(need, facts.packages.get(need.name)) for need in needed]
    return [Lack(need, version) for need, version in versions if version is None or not need.holds(version)]


def listed(lacks: list[Lack]) -> str:
    return ", ".join(str(lack) for lack in lacks)


# Machines


def gpus() -> int:
    """How many the driver knows."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    return len(re.findall(r"^GPU ", listed.stdout, re.MULTILINE)) if listed.returncode == 0 else 0


def driver_cuda() -> str:
    """The newest CUDA version that the GPUs' driver runs; empty: unknown."""
    said = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    found = re.search(r"CUDA[\w ]* Version\s*:\s*(\d+\.\d+)", said)
    return found[1] if found else ""


def require_compiler() -> None:
    """Without a GPU DeepSpeed compiles an op when it starts."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++")):
        raise SetUpError(
            "no C++ compiler, and DeepSpeed compiles an op when it starts: install one, e.g. apt install g++"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise SetUpError(
            f"no {header}, and DeepSpeed compiles an op when it starts: install it, e.g. apt install python3-dev"
        )


def require_torch_that_sees_the_gpus(facts: Facts) -> None:
    """A run would train on the CPU in silence."""
    count = gpus()
    if not count or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return
    code = "import torch; print(torch.cuda.is_available(), torch.__version__, torch.version.cuda, torch.version.hip)"
    done = subprocess.run([facts.python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SetUpError(f"torch does not import in {facts.prefix}: {last_line(done.stderr)}")
    sees, version, cuda, _ = done.stdout.split()[-4:]
    if sees == "True":
        return
    driver = driver_cuda()
    built = f"is built for CUDA {cuda}" if cuda != "None" else "is built without CUDA"
    index = f"cu{driver.replace('.', '')}" if driver else "cu126"
    raise SetUpError(
        f"nvidia-smi lists {count} GPU{'s' if count > 1 else ''} and torch {version} in {facts.prefix} sees none: it "
        f"{built}, and the driver runs up to CUDA {driver or '(unknown)'}. Install a build that fits: uv pip install "
        f"--python {facts.python} --reinstall-package torch --torch-backend auto torch (or, with pip, from an index "
        f"like {TORCH_INDEX}{index}); CUDA_VISIBLE_DEVICES= trains on the CPU"
    )


# Installing


class Installer:
    """pip of one interpreter, or uv where it has no pip and cannot get it."""

    def __init__(self, facts: Facts, debug: bool):
        self.facts, self.debug = facts, debug
        self.words = [facts.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        if facts.has_pip:
            return
        try:
            self.run([facts.python, "-m", "ensurepip"])
        except SetUpError as error:
            uv = shutil.which("uv")
            if not uv:
                raise SetUpError(f"{facts.prefix} has no pip: install it, or uv ({error})") from error
            self.words = [uv, "pip", "install", "--python", facts.python]

    def run(self, words: list[str], **environment: str) -> None:
        """Raises SetUpError with what went wrong, in a line."""
        values = os.environ | {"PIP_USER": "0"} | environment  # --user, from a pip.conf, is refused in an environment
        if self.debug:
            say(" ".join(words))
        try:
            done = subprocess.run(words, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise SetUpError(f"{words[0]}: {error.strerror}") from error
        if self.debug:
            say(done.stdout.rstrip())
        if done.returncode:
            raise SetUpError(what_went_wrong(done.stdout, Path(self.facts.prefix)))

    def install(self, *arguments: str) -> None:
        self.run([*self.words, *arguments])

    def find_uv(self, folder: str) -> str:
        """uv, from the user's path or into a folder of ours: it knows torch's builds, and leaves no trace."""
        if there := shutil.which("uv"):
            return there
        self.install("--retries", "1", "--no-deps", "--target", folder, "uv")
        return str(Path(folder, "bin", "uv"))


def what_went_wrong(output: str, place: Path) -> str:
    """A line for what an installer printed."""
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return f"no space left on the disk: {place} needs {CUDA_SIZE}, the download in a temporary folder (TMPDIR)"
    unreachable = re.search(r"Temporary failure in name resolution|Name or service not known|Connection refused|"
                            r"Network is unreachable|timed out|certificate verify failed", output)  # fmt: skip
    if conflict := re.search(r"The conflict is caused by:\n((?: +.+\n)+)", output):
        return "; ".join(line.strip() for line in conflict[1].splitlines())
    found = re.findall(r"^\s*(?:ERROR|error)[:,]\s*(.+)", output, re.MULTILINE)
    caused = re.findall(r"^\s*(?:Caused by|╰─▶|├─▶):?\s*(.+)", output, re.MULTILINE)
    line = " / ".join([*found[:2], *caused[-1:]]) or last_line(output)
    return f"{unreachable[0]}: {line}" if unreachable and unreachable[0] not in line else line


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1]


def install_torch(installer: Installer, constraints: str) -> None:
    """The build that fits this machine, from torch's own index by uv; if that cannot be had, from pip's index."""
    count = gpus()
    with tempfile.TemporaryDirectory() as folder:
        try:
            uv = installer.find_uv(folder)
            words = [uv, "pip", "install", "--python", installer.facts.python, "--constraint", constraints]
            words += ["--torch-backend", "auto" if count else "cpu", f"torch=={TORCH}"]
            installer.run(words, UV_HTTP_RETRIES="0")
            return
        except SetUpError as error:
            what = "The build for this GPU's driver" if count else "The CPU build of torch"
            say(f"{what} cannot be had from {TORCH_INDEX} ({error}).")
    if platform.machine() == "x86_64":
        require_driver(count)
        say(f"Taking torch from pip's index. PyPI's build brings CUDA's libraries: with all else {CUDA_SIZE}.")
        free = shutil.disk_usage(installer.facts.prefix).free
        if free < CUDA_ROOM:
            raise SetUpError(
                f"{free / 1e9:.1f} GB free at {installer.facts.prefix}, PyPI's torch and all else take {CUDA_SIZE}: "
                "make room, or activate an environment with a smaller torch, and start again"
            )
    installer.install("--constraint", constraints, f"torch=={TORCH}")


def require_driver(count: int) -> None:
    """Said before gigabytes are downloaded in vain."""
    driver = driver_cuda() if count else ""
    if driver and release(driver)[0] < release(TORCH_CUDA)[0]:
        raise SetUpError(
            f"the GPU's driver runs up to CUDA {driver}, PyPI's torch {TORCH} is built for {TORCH_CUDA}: install a "
            f"torch that fits ({TORCH_INDEX}cu{driver.replace('.', '')}) into an environment, and activate it"
        )


def complete(facts: Facts, needed: list[Requirement], debug: bool, keep_all: bool) -> Facts:
    """Install what an environment lacks.

    Args:
        keep_all: every package that is there keeps its version; otherwise only torch does.
    """
    lacks = lacking(facts, needed)
    torch = facts.packages.get("torch")
    # an interrupted installation leaves a folder without metadata; in our own environment it is installed over
    if facts.torch_at and not torch and (keep_all or OWN not in Path(facts.torch_at).parents):
        raise SetUpError(
            f"{facts.torch_at} is a torch without package metadata, as an interrupted installation leaves it: remove "
            "it, or install it with pip"
        )
    wrong = [lack for lack in lacks if lack.version and (keep_all or lack.need.name == "torch")]
    if wrong:
        raise SetUpError(
            f"{facts.prefix}: {listed(wrong)} is needed. Nothing there is replaced: upgrade it yourself, or leave this "
            "environment (deactivate), so that .venv is made"
        )
    say(f"adding to {facts.prefix}: {listed(lacks)}" + (" (what is there keeps its version)" if keep_all else ""))
    installer = Installer(facts, debug)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        kept = facts.packages if keep_all else {"torch": torch} if torch else {}
        lines = [f"{name}=={version}" for name, version in kept.items() if re.fullmatch(r"[\w.!+-]+", version)]
        pinned = (TOP / "constraints.txt").read_text(encoding="utf-8").splitlines()
        lines += [line for line in pinned if line[:1].isalpha() and normalized(line.split("==")[0]) not in kept]
        constraints.write("\n".join(lines) + "\n")
        constraints.flush()
        if not torch:
            install_torch(installer, constraints.name)
        after = look_at(facts.python)
        constraints.write(f"torch=={after.packages['torch']}\n")
        constraints.flush()
        try:
            installer.install("--constraint", constraints.name, *(need.text for need in needed if need.name != "torch"))
        except SetUpError as error:
            raise SetUpError(f"cannot install what the trainer needs into {facts.prefix}: {error}") from error
    return require_imports(look_at(facts.python), needed)


def require_imports(facts: Facts, needed: list[Requirement]) -> Facts:
    """What an installer reports as done may not work."""
    still = lacking(facts, needed)
    if still:
        raise SetUpError(f"{facts.prefix} still lacks {listed(still)}")
    code = "import torch, deepspeed, transformers, datasets, peft"
    done = subprocess.run([facts.python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SetUpError(f"{facts.prefix}: {code} fails: {last_line(done.stderr)}")
    return facts


def own_environment(base: Facts, needed: list[Requirement], debug: bool) -> Facts:
    """.venv, made if need be and completed."""
    found = look_at(OWN / "bin" / "python")
    if found is None or not (found.has_pip or shutil.which("uv")):
        found = make_own_environment(base)
    if not lacking(found, needed):
        return found
    return complete(found, needed, debug, keep_all=not (OWN / MARK).exists())


def make_own_environment(base: Facts) -> Facts:
    if OWN.is_symlink() or OWN.exists():
        if not (OWN / MARK).exists():
            raise SetUpError(f"{OWN} is no environment that works, and was not made here: remove it, and start again")
        say(f"{OWN} does not work, as after an interrupted set-up: making it anew")
        shutil.rmtree(OWN)
    say(f"making {OWN}, once: some minutes, {CPU_SIZE} without a GPU's libraries")
    try:
        OWN.mkdir()
        (OWN / MARK).write_text("made by training_scripts/set_up.py, which may replace it\n", encoding="utf-8")
    except OSError as error:
        raise SetUpError(f"cannot make {OWN}: {error.strerror}") from error
    options = ["--system-site-packages"] if base.torch_at else []
    done = subprocess.run([base.python, "-m", "venv", *options, str(OWN)], capture_output=True, text=True)
    found = look_at(OWN / "bin" / "python") if done.returncode == 0 else None
    if found is None and (uv := shutil.which("uv")):
        words = [uv, "venv", "--quiet", "--seed", "--allow-existing", "--python", base.python, *options, str(OWN)]
        done = subprocess.run(words, capture_output=True, text=True)
        found = look_at(OWN / "bin" / "python") if done.returncode == 0 else None
    if found is None:
        output = done.stdout + done.stderr
        why = what_went_wrong(output, OWN) if "No space" in output else last_line(done.stderr or done.stdout)
        raise SetUpError(
            f"{base.python} -m venv failed ({why}): install Python's venv module, e.g. apt install python3-venv, or uv"
        )
    return found


@contextlib.contextmanager
def one_at_a_time():
    """Two set-ups of a checkout, as of the quick start and the tests in two terminals, wait for each other."""
    folder = os.open(TOP, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def say(line: str) -> None:
    """To standard error: standard output is for the interpreter's path."""
    print(line, file=sys.stderr, flush=True)


def set_up(dev: bool, debug: bool) -> Facts:
    """Raises SetUpError."""
    needed = requirements((TOP / "pyproject.toml").read_text(encoding="utf-8"), dev)
    if not gpus():
        require_compiler()
    here = look()
    chosen = here
    if lacking(here, needed):
        with one_at_a_time():
            if here.is_environment and Path(here.prefix).resolve() != OWN.resolve():
                here = look_at(here.python)  # another set-up may have completed it meanwhile
                chosen = complete(here, needed, debug, keep_all=True) if lacking(here, needed) else here
            else:
                chosen = own_environment(here, needed, debug)
    require_torch_that_sees_the_gpus(chosen)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--dev", action="store_true", help="what the tests need, too")
    parser.add_argument("--debug", action="store_true", help="show what the installers print")
    parser.add_argument("--lacking", action="store_true", help="only print what this interpreter lacks")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        print(json.dumps(look()))
        return 0
    if options.lacking:
        needed = requirements((TOP / "pyproject.toml").read_text(encoding="utf-8"), options.dev)
        print(listed(lacking(look(), needed)))
        return 0
    try:
        print(set_up(options.dev, options.debug).python)
    except SetUpError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("error: interrupted; start again, and it goes on")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
