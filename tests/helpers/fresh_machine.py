# SPDX-License-Identifier: Apache-2.0
"""A machine for the set-up, made of stand-ins: a package index of tiny wheels, a Python of its own, an nvidia-smi.

Nothing of the machine that runs the tests reaches it: no variable, no pip settings, no installed package.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
SCRIPTS = TOP / "training_scripts"
BASH = shutil.which("bash")
TAG = f"python{sys.version_info[0]}.{sys.version_info[1]}"
TORCH_MODULE = """
__version__ = {version!r}
class cuda:
    is_available = staticmethod(lambda: {sees_gpus})
class version:
    cuda = {cuda!r}
    hip = None
"""
# stands for uv: writes down what it is asked for, and installs torch from a folder where there is one
UV_SCRIPT = """#!/bin/sh
echo "$@" >>{log}
[ -d {builds} ] || {{ echo "error: Failed to fetch: https://download.pytorch.org/whl/cpu/torch/" >&2; exit 2; }}
while [ "$1" != --python ]; do shift; done
exec "$2" -m pip install --quiet --no-index --find-links {builds} torch
"""
NVIDIA_SMI = """#!/bin/sh
if [ "$1" = -L ]; then
  echo "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)"
  echo "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1)"
else
  echo "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {cuda} |"
fi
"""


def wheel(folder, name, version, needs=(), files=None, scripts=None, file_version=None):
    """Write a wheel; its module is called as it is, unless ``files`` says otherwise."""
    stem = f"{name.replace('-', '_')}-{file_version or version}"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    members = {
        **(files or {f"{name.replace('-', '_')}/__init__.py": ""}),
        **{f"{name}-{version}.data/scripts/{script}": text for script, text in (scripts or {}).items()},
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    path = Path(folder, f"{stem}-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            entry = zipfile.ZipInfo(member)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, text)
    return path


def torch_wheel(folder, version="2.13.0", says=None, sees_gpus=False, cuda=None):
    """``says``: its ``__version__``, which may name a build that its metadata does not."""
    module = TORCH_MODULE.format(version=says or version, sees_gpus=sees_gpus, cuda=cuda)
    return wheel(folder, "torch", version, files={"torch/__init__.py": module})


class Machine:
    """A checkout, a home, an index and interpreters in a folder; ``set_up`` runs there as in a fresh shell."""

    def __init__(self, folder, requirements):
        self.folder = folder
        self.checkout, self.home, self.bin = folder / "my checkout", folder / "home", folder / "bin"
        self.wheels, self.builds, self.uv_log = folder / "wheels", folder / "builds", folder / "uv.log"
        for made in (self.checkout / "training_scripts", self.home, self.bin, self.wheels):
            made.mkdir(parents=True)
        for name in ("setup.sh", "set_up.py"):
            shutil.copy(SCRIPTS / name, self.checkout / "training_scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(TOP / name, self.checkout)
        self.offer(need for need in requirements if need.name != "torch")
        torch_wheel(self.wheels, says="2.13.0+cu130", cuda="13.0")  # as PyPI has it
        self.tool("nvidia-smi", "#!/bin/sh\nexit 9\n")  # as with a driver and no GPU
        wheel(self.wheels, "uv", "0.9", scripts={"uv": UV_SCRIPT.format(log=self.uv_log, builds=self.builds)})

    @property
    def own(self):
        return self.checkout / ".venv"

    def python(self, name="python", without=(), conda=False):
        """An interpreter that is no environment, with no package, not even pip; ``without`` modules of the library."""
        prefix = self.folder / name
        library = prefix / "lib" / TAG
        (library / "site-packages").mkdir(parents=True)
        (prefix / "bin").mkdir()
        shutil.copy(Path(sys.base_prefix, "bin", TAG), prefix / "bin" / "python3")
        (prefix / "include").symlink_to(Path(sysconfig.get_path("include", vars={"base": sys.base_prefix})).parent)
        for item in Path(os.__file__).parent.iterdir():
            if item.name not in ("site-packages", "__pycache__", *without):
                (library / item.name).symlink_to(item)
        if conda:
            (prefix / "conda-meta").mkdir()
        return prefix / "bin" / "python3"

    def environment(self, base, name="my env"):
        """A virtual environment, as a user makes one."""
        self.run([base, "-m", "venv", self.folder / name], check=True)
        return self.folder / name / "bin" / "python3"

    def offer(self, requirements):
        """Put what is required on the index, in the pinned version or else the lowest that will do."""
        pins = re.findall(r"^([\w-]+)==([\w.]+)", (TOP / "constraints.txt").read_text(), re.MULTILINE)
        for need in requirements:
            lowest = need.text.split(">=")[1].split(",")[0] if ">=" in need.text else "1.0"
            for version in {v for name, v in pins if name == need.name} or {lowest}:
                wheel(self.wheels, need.name, version, needs=["torch"] * (need.name == "peft"))

    def put(self, python, *wheels):
        """Install wheels without pip."""
        prefix = Path(python).parent.parent
        for path in wheels:
            zipfile.ZipFile(path).extractall(prefix / "lib" / TAG / "site-packages")

    def put_all(self, python, *but):
        """Every package that is needed, in its newest version, except some."""
        newest = {path.name.split("-")[0]: path for path in sorted(self.wheels.glob("*.whl"))}
        for name, path in newest.items():
            if name not in ("uv", *but):
                self.put(python, path)

    def tool(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, cuda="13.0"):
        self.tool("nvidia-smi", NVIDIA_SMI.format(cuda=cuda))

    def index(self):
        """The wheels as a package index has them: a page for each project."""
        folder = self.folder / "simple"
        shutil.rmtree(folder, ignore_errors=True)
        for path in self.wheels.glob("*.whl"):
            page = folder / path.name.split("-")[0].replace("_", "-") / "index.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            with page.open("a") as file:
                file.write(f'<a href="{path.as_uri()}">{path.name}</a>\n')
        return folder.as_uri()

    def variables(self, python, **changes):
        """What a stranger's shell has, an index that answers, and changes; a variable that is None is unset."""
        values = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:{Path(python).parent}:/usr/bin:/bin",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": self.index(),
            "TMPDIR": str(self.folder),
        }
        return {name: str(value) for name, value in (values | changes).items() if value is not None}

    def run(self, words, **options):
        values = {"HOME": str(self.home), "PATH": "/usr/bin:/bin"}
        return subprocess.run([str(word) for word in words], env=values, capture_output=True, text=True, **options)

    def shell(self, commands, python, **changes):
        """Commands after setup.sh, from another folder."""
        words = [BASH, "-euo", "pipefail", "-c", f'source "$0"; {commands}']
        words.append(str(self.checkout / "training_scripts" / "setup.sh"))
        values = self.variables(python, **changes)
        return subprocess.run(words, cwd=self.home, env=values, capture_output=True, text=True, timeout=120)

    def set_up(self, python, *flags, **changes):
        """(interpreter that set_up chose, what it said)"""
        done = self.shell(f'set_up {" ".join(flags)}; printf "%s" "$PYTHON"', python, **changes)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout), done.stderr

    def refusal(self, python, **changes):
        """The one line with which set_up ends, and what it said before."""
        done = self.shell("set_up; echo went on", python, **changes)
        assert (done.returncode, done.stdout) == (1, ""), done
        *before, line = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line, "\n".join(before)

    def packages(self, python, folder=None):
        """name → version, of an interpreter's own site-packages."""
        folder = folder or Path(python).parent.parent / "lib" / TAG / "site-packages"
        names = [path.name.removesuffix(".dist-info") for path in folder.glob("*.dist-info")]
        return {name.split("-")[0].lower(): name.split("-")[1] for name in names}
