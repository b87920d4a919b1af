# SPDX-License-Identifier: Apache-2.0
"""The shell set-up: what is missing, what is required, and what it says without a compiler."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SETUP = TOP / "training_scripts" / "setup.sh"
SCRIPTS = [
    *sorted((TOP / "training_scripts").glob("*.sh")),
    TOP / "patches" / "apply.sh",
    TOP / "tests" / "run.sh",
    TOP / ".ci" / "run",
]
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def shell(commands, cwd=TOP, setup=SETUP, **environment):
    """Run commands after setup.sh; a variable that is None is unset. Installing anything is an error."""
    never = "pip_install() { die 'it would install'; }"
    if setup == SETUP:  # nor may it make a .venv in this checkout
        never += "; make_environment() { pip_install; }"
    values = {name: value for name, value in (os.environ | environment).items() if value is not None}
    words = [BASH, "-euo", "pipefail", "-c", f"source {shlex.quote(str(setup))}; {never}; {commands}"]
    return subprocess.run(words, cwd=cwd, env=values, capture_output=True, text=True, timeout=60)


def output(commands, **environment):
    result = shell(commands, PYTHON=sys.executable, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def missing(*modules, **environment):
    return output(f'missing "$PYTHON" {" ".join(modules)}', **environment).split()


@pytest.fixture
def bare_path(tmp_path):
    """A folder for PATH in which there is only what set_up itself calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    return folder


def add_tool(folder, name, script=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def needs_all_modules():
    lacking = shell(f'missing "$PYTHON" {" ".join(trainer_modules())}', PYTHON=sys.executable).stdout.split()
    if lacking:
        pytest.skip(f"this interpreter lacks {' '.join(lacking)}")


def trainer_modules():
    """The modules that set_up asks for."""
    return re.search(r"modules=\((.*?) *\"\$\{@%%=\*\}\"\)", SETUP.read_text(), re.DOTALL)[1].split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    result = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on PATH")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    result = subprocess.run(["shellcheck", "-x", str(script)], cwd=TOP, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_missing_says_nothing_of_modules_that_are_there():
    assert missing("json", "sys", "pytest") == []


def test_missing_reports_absent_modules():
    assert missing("json", "no_such_module", "pytest", "nor_this_one") == ["no_such_module", "nor_this_one"]


def test_missing_takes_no_folder_of_the_name_for_a_module(tmp_path):
    (tmp_path / "no_such_module").mkdir()  # as a user's folder "datasets" would be
    assert missing("no_such_module", cwd=tmp_path) == ["no_such_module"]


def test_missing_fails_where_there_is_no_such_interpreter(tmp_path):
    assert shell(f"missing {tmp_path}/python json").returncode != 0


def test_requirements_are_pyprojects_dependencies_but_torch(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nrequires-python = ">=3.10"\n# "a comment"\ndependencies = [\n    "torch>=2.4",\n'
        '    "transformers>=4.56,<6",\n    "torchvision",\n    "tqdm",\n]\n\n'
        '[project.optional-dependencies]\ndev = ["pytest>=8"]\n'
    )
    assert output(f"requirements {tmp_path}").split() == ["transformers>=4.56,<6", "torchvision", "tqdm"]


def names(requirements):
    return {re.match(r"[\w-]+", line)[0] for line in requirements.splitlines() if line and not line.startswith("#")}


def test_requirements_bring_every_module_that_set_up_asks_for():
    assert names(output(f"requirements {TOP}")) == set(trainer_modules()) - {"torch"}


def test_every_constraint_is_of_a_requirement():
    constrained = names((TOP / "constraints.txt").read_text())
    assert constrained
    assert constrained <= names(output(f"requirements {TOP}"))


def test_without_a_compiler_set_up_says_in_one_line_what_to_install(bare_path):
    needs_all_modules()
    result = shell("set_up; echo went on", PYTHON=sys.executable, PATH=str(bare_path), CXX=None)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: no C++ compiler")
    assert "apt install g++" in result.stderr


@pytest.mark.parametrize(("name", "variable"), [("c++", None), ("g++", None), ("clang++", "clang++")])
def test_a_compiler_of_any_name_will_do(bare_path, name, variable):
    needs_all_modules()
    add_tool(bare_path, name)
    result = shell('set_up; echo "$PYTHON"', PYTHON=sys.executable, PATH=str(bare_path), CXX=variable)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, sys.executable, "")


def test_set_up_puts_the_interpreters_folder_first_on_path(bare_path):
    needs_all_modules()
    add_tool(bare_path, "c++")
    result = shell('set_up; echo "$PATH"', PYTHON=sys.executable, PATH=str(bare_path), CXX=None)
    assert result.stdout.strip() == f"{Path(sys.executable).parent}:{bare_path}"


def test_set_up_installs_when_a_module_is_missing(bare_path):
    add_tool(bare_path, "c++")
    result = shell("set_up no_such_module", PYTHON=sys.executable, PATH=str(bare_path), CXX=None)
    assert (result.returncode, result.stderr) == (1, "error: it would install\n")


def test_a_package_may_have_another_name_than_its_module(tmp_path, bare_path):
    setup = tmp_path / "training_scripts" / "setup.sh"
    setup.parent.mkdir()
    shutil.copy(SETUP, setup)
    add_tool(bare_path, "c++")
    add_tool(bare_path, "python3", '[ "$1" = - ] && shift 2 && echo "$@" >asked; echo xdist')
    commands = 'make_environment() { echo "${@:3}" >installed; }; set_up ruff xdist=pytest-xdist'
    shell(commands, setup=setup, cwd=tmp_path, PYTHON=None, PATH=str(bare_path))
    assert (tmp_path / "installed").read_text() == "ruff pytest-xdist\n"
    assert (tmp_path / "asked").read_text().endswith("ruff xdist\n")


@pytest.mark.parametrize("lacking", ["torch", "peft", "tensorboard"])
def test_set_up_completes_an_environment_that_lacks_a_module(tmp_path, bare_path, lacking):
    setup = tmp_path / "training_scripts" / "setup.sh"
    setup.parent.mkdir()
    shutil.copy(SETUP, setup)
    # interpreters that only answer which modules they lack
    add_tool(bare_path, "python3", '[ "$1" = - ] && echo torch')
    add_tool(tmp_path / ".venv" / "bin", "python", f'for m; do [ "$m" != {lacking} ] || echo {lacking}; done')
    result = shell("set_up", setup=setup, PYTHON=None, PATH=str(bare_path))
    assert (result.returncode, result.stderr) == (1, "error: it would install\n")


def test_an_interpreter_given_by_name_still_gives_an_absolute_path(bare_path):
    needs_all_modules()
    add_tool(bare_path, "c++")
    path = f"{bare_path}:{Path(sys.executable).parent}"
    result = shell('set_up; echo "$PATH"', PYTHON=Path(sys.executable).name, PATH=path, CXX=None)
    assert result.stderr == ""
    assert result.stdout.startswith("/")


def test_without_python_set_up_says_in_one_line_what_to_install(bare_path):
    result = shell("set_up; echo went on", PYTHON=None, PATH=str(bare_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no python3: install Python 3.10 or newer\n"
