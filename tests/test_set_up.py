# SPDX-License-Identifier: Apache-2.0
"""The set-up on machines of many kinds, made of stand-ins; and, slow, the quick start from the registry alone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh_machine import BASH, SCRIPTS, TAG, TOP, Machine, torch_wheel, wheel

SHELL = [
    *sorted(SCRIPTS.glob("*.sh")),
    *sorted((SCRIPTS / "recipes").glob("*.sh")),
    SCRIPTS / "slurm.sbatch",
    TOP / "patches" / "apply.sh",
    TOP / "tests" / "run.sh",
    TOP / ".ci" / "run",
]

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")

spec = importlib.util.spec_from_file_location("set_up", SCRIPTS / "set_up.py")
set_up = importlib.util.module_from_spec(spec)
sys.modules["set_up"] = set_up
spec.loader.exec_module(set_up)
NEEDED = set_up.requirements((TOP / "pyproject.toml").read_text(), dev=False)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path, NEEDED)
    python = made.python("probe")
    if made.run([python, "-c", ""]).returncode:
        pytest.skip(f"{sys.base_prefix} is a Python that cannot be copied")
    return made


@pytest.fixture
def python(machine):
    return machine.python()


def snapshot(folder):
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


# The scripts


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    result = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on PATH")
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    result = subprocess.run(["shellcheck", "-x", str(script)], cwd=TOP, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


# What is needed


def test_requirements_are_read_from_either_way_of_writing_a_list():
    text = 'dependencies = [\n    "torch>=2.4",\n    "My_Package.x<6",\n]\n[x]\ndev = ["ruff>=0.12"]\n'
    with_dev = [("torch", "torch>=2.4"), ("my-package-x", "My_Package.x<6"), ("ruff", "ruff>=0.12")]
    assert set_up.requirements(text, dev=True) == with_dev
    assert set_up.requirements(text, dev=False) == with_dev[:2]


def test_all_of_pyproject_is_read():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    read = [need.text for need in set_up.requirements((TOP / "pyproject.toml").read_text(), dev=True)]
    assert read == project["dependencies"] + project["optional-dependencies"]["dev"]


def test_every_constraint_is_of_a_requirement():
    pinned = re.findall(r"^([\w-]+)==", (TOP / "constraints.txt").read_text(), re.MULTILINE)
    every = set_up.requirements((TOP / "pyproject.toml").read_text(), dev=True)
    assert pinned and set(pinned) <= {need.name for need in every}


@pytest.mark.parametrize(
    ("text", "version", "holds"),
    [
        ("torch>=2.4", "2.4.0+cu121", True),
        ("torch>=2.4", "2.9.0a0+50eac811a6.nv25.9", True),
        ("torch>=2.4", "2.3.1", False),
        ("torch>=2.10", "2.9.1", False),
        ("transformers>=4.56,<6", "6.0.0", False),
        ("transformers>=4.56,<6", "5.23.0", True),
        ("x!=1.2,>=1", "1.2.0", False),
        ("x", "0", True),
    ],
)
def test_a_version_is_judged_by_its_numbers(text, version, holds):
    assert set_up.Requirement("x", text).holds(version) == holds


# A fresh machine


def test_a_torch_that_calls_itself_otherwise_than_its_wheel_is_installed_and_kept(machine, python):
    chosen, said = machine.set_up(python)
    assert chosen == machine.own / "bin" / "python"
    assert machine.packages(chosen)["torch"] == "2.13.0"
    for need in NEEDED:
        assert need.name.replace("-", "_") in machine.packages(chosen)
    assert said.count("\n") == 4
    assert "The CPU build of torch cannot be had from https://download.pytorch.org/whl/ (Failed to fetch" in said
    assert f"with all else {set_up.CUDA_SIZE}" in said  # before the download
    assert machine.uv_log.read_text().split()[:2] == ["pip", "install"]
    assert "--torch-backend cpu" in machine.uv_log.read_text()
    # and again: nothing to do, so no index is asked
    again, said = machine.set_up(python, PIP_INDEX_URL="http://127.0.0.1:9/", PATH=f"{python.parent}:/usr/bin:/bin")
    assert (again, said) == (chosen, "")


@pytest.mark.slow
def test_the_cpu_build_where_it_can_be_had(machine, python):
    machine.builds.mkdir()
    torch_wheel(machine.builds, "2.13.0+cpu")
    chosen, said = machine.set_up(python)
    assert machine.packages(chosen)["torch"] == "2.13.0+cpu"
    assert "CUDA" not in said
    assert "uv" not in machine.packages(chosen)  # a tool, not a part of the environment


@pytest.mark.slow
def test_what_the_tests_need_is_added_to_an_environment_made_by_the_quick_start(machine, python):
    machine.offer(set_up.requirements((TOP / "pyproject.toml").read_text(), dev=True)[len(NEEDED) :])
    chosen, _ = machine.set_up(python)
    again, said = machine.set_up(python, "--dev")
    assert again == chosen
    assert said.startswith(f"adding to {machine.own}: pytest>=8")
    assert "pytest_xdist" in machine.packages(chosen)


@pytest.mark.slow
def test_debug_shows_what_the_installers_print(machine, python):
    _, said = machine.set_up(python, "--debug")
    assert "Failed to fetch: https://download.pytorch.org/whl/cpu/torch/" in said
    assert "-m pip install" in said


@pytest.mark.slow
def test_a_user_install_in_pips_settings_does_no_harm(machine, python):
    chosen, _ = machine.set_up(python, PIP_USER="1")
    assert "deepspeed" in machine.packages(chosen)


@pytest.mark.slow
def test_an_interpreter_given_by_name(machine, python):
    assert machine.set_up(python, PYTHON="python3")[0] == machine.own / "bin" / "python"


@pytest.mark.slow
def test_two_at_once_do_not_trip_over_each_other(machine, python):
    words = [BASH, "-euo", "pipefail", "-c", 'source "$0"; set_up; echo "$PYTHON"']
    words.append(str(machine.checkout / "training_scripts" / "setup.sh"))
    values = machine.variables(python)
    both = [subprocess.Popen(words, env=values, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert sum("making" in said for _, said in ended) == 1
    assert any("waiting for another set-up" in said for _, said in ended)


# A Python that has something


def test_an_interpreter_with_everything_is_used_as_it_is(machine, python):
    machine.put_all(python)
    before = snapshot(python.parent.parent)
    assert machine.set_up(python, PIP_INDEX_URL="http://127.0.0.1:9/") == (python, "")
    assert not machine.own.exists()
    assert snapshot(python.parent.parent) == before


@pytest.mark.slow
def test_a_torch_of_the_machine_is_seen_and_never_replaced(machine, python):
    machine.put(python, torch_wheel(machine.folder, "2.9.0a0+50eac811a6.nv25.9"))
    chosen, said = machine.set_up(python)
    assert chosen == machine.own / "bin" / "python"
    assert "torch" not in machine.packages(chosen)
    seen = machine.run([chosen, "-c", "import torch; print(torch.__version__)"]).stdout
    assert seen == "2.9.0a0+50eac811a6.nv25.9\n"
    assert not machine.uv_log.exists()
    assert ".venv: deepspeed>=" in said


def test_a_torch_without_metadata_stops_the_set_up(machine, python):
    machine.put(python, torch_wheel(machine.folder))
    shutil.rmtree(python.parent.parent / "lib" / TAG / "site-packages" / "torch-2.13.0.dist-info")
    line, _ = machine.refusal(python)
    assert line.startswith(f"error: {python.parent.parent}/lib/{TAG}/site-packages/torch is a torch without package")


@pytest.mark.slow
def test_a_folder_named_like_a_package_is_not_the_package(machine, python):
    (machine.home / "datasets").mkdir()  # where the user stands
    chosen, _ = machine.set_up(python)
    assert "datasets" in machine.packages(chosen)


# An environment that is active


@pytest.fixture
def active(machine, python):
    return machine.environment(python)


def test_an_environment_with_torch_is_completed_in_place(machine, active):
    machine.put(active, torch_wheel(machine.folder, "2.7.1+cu126"))
    chosen, said = machine.set_up(active)
    assert chosen == active
    assert machine.packages(active)["torch"] == "2.7.1+cu126"
    assert machine.packages(active)["deepspeed"] == "0.19.8"
    assert said.startswith(f"adding to {active.parent.parent}: deepspeed")
    assert "what is there keeps its version" in said
    assert not machine.own.exists()


@pytest.mark.slow
def test_an_environment_keeps_a_version_that_our_own_would_not_have(machine, active):
    machine.put(active, torch_wheel(machine.folder), wheel(machine.folder, "transformers", "4.57.1"))
    machine.set_up(active)
    assert machine.packages(active)["transformers"] == "4.57.1"


def test_an_environment_with_everything_is_used_as_it_is(machine, active):
    machine.put_all(active)
    assert machine.set_up(active, PIP_INDEX_URL="http://127.0.0.1:9/") == (active, "")


@pytest.mark.parametrize("name", ["transformers", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_package_that_is_too_old_is_not_replaced(machine, active, name):
    machine.put_all(active, name, "peft")
    machine.put(active, wheel(machine.folder, name, "1.9"))
    before = snapshot(active.parent.parent)
    line, _ = machine.refusal(active)
    assert f"{name}>=" in line and "(it has 1.9) is needed. Nothing there is replaced" in line
    assert snapshot(active.parent.parent) == before


def test_a_package_that_would_have_to_change_stops_the_set_up(machine, active):
    machine.put_all(active, "peft")
    machine.put(active, wheel(machine.folder, "accelerate", "0.1"))
    wheel(machine.wheels, "peft", "0.17", needs=["accelerate>=1"])
    wheel(machine.wheels, "accelerate", "1.0")
    before = snapshot(active.parent.parent)
    line, _ = machine.refusal(active)
    assert "peft 0.17 depends on accelerate>=1; The user requested (constraint) accelerate==0.1" in line
    assert snapshot(active.parent.parent) == before


@pytest.mark.slow
def test_an_environment_without_pip_gets_one(machine, python):
    machine.run([python, "-m", "venv", "--without-pip", machine.folder / "bare"], check=True)
    active = machine.folder / "bare" / "bin" / "python3"
    machine.put(active, torch_wheel(machine.folder))
    assert machine.set_up(active)[0] == active
    assert "deepspeed" in machine.packages(active)


def test_an_environment_that_can_get_no_pip(machine):
    python = machine.python("debian", without=["ensurepip"])
    machine.run([python, "-m", "venv", "--without-pip", machine.folder / "bare"], check=True)
    active = machine.folder / "bare" / "bin" / "python3"
    machine.put(active, torch_wheel(machine.folder))
    assert f"{active.parent.parent} has no pip: install it, or uv" in machine.refusal(active)[0]


@pytest.mark.slow
def test_condas_named_environment_is_completed_and_its_base_is_not(machine):
    named = machine.python("envs", conda=True)
    machine.put(named, torch_wheel(machine.folder, "2.5.1"))
    assert machine.set_up(named)[0] == named
    assert "deepspeed" in machine.packages(named)

    base = machine.python("conda", conda=True)
    (base.parent.parent / "condabin").mkdir()
    machine.put(base, torch_wheel(machine.folder, "2.5.1"))
    before = snapshot(base.parent.parent)
    assert machine.set_up(base)[0] == machine.own / "bin" / "python"
    assert snapshot(base.parent.parent) == before


# What a machine may lack


def test_no_python(machine):
    shutil.copy("/bin/bash", machine.bin)
    line, _ = machine.refusal(machine.bin / "none", PATH=str(machine.bin))
    assert line == "error: no python3: install Python 3.10 or newer"


def test_a_python_that_is_too_old(machine):
    machine.tool("python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10\nexit 1\n')
    line, _ = machine.refusal(machine.bin / "python3")
    assert line.endswith("python3 is Python 3.8.10: 3.10 or newer is needed (set PYTHON)")


@pytest.mark.slow
def test_no_venv_module_then_one(machine):
    python = machine.python("debian", without=["venv", "ensurepip"])
    line, _ = machine.refusal(python)
    assert "-m venv failed (" in line and "apt install python3-venv, or uv" in line
    library = python.parent.parent / "lib" / TAG
    for name in ("venv", "ensurepip"):
        (library / name).symlink_to(Path(os.__file__).parent / name)
    assert machine.set_up(python)[0] == machine.own / "bin" / "python"


@pytest.mark.slow
def test_no_ensurepip_leaves_half_an_environment_that_the_next_run_makes_anew(machine):
    python = machine.python("debian", without=["ensurepip"])
    line, _ = machine.refusal(python)
    assert "-m venv failed (" in line
    assert machine.own.exists()
    (python.parent.parent / "lib" / TAG / "ensurepip").symlink_to(Path(os.__file__).parent / "ensurepip")
    chosen, said = machine.set_up(python)
    assert said.startswith(f"{machine.own} does not work, as after an interrupted set-up: making it anew")
    assert "deepspeed" in machine.packages(chosen)


def bare_tools(machine):
    """A PATH with what the scripts call, and no compiler."""
    folder = machine.folder / "tools"
    folder.mkdir()
    for name in ("dirname", "tail"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_no_compiler_is_said_before_anything_is_made(machine, python):
    line, before = machine.refusal(python, PATH=f"{python.parent}:{bare_tools(machine)}")
    assert line.startswith("error: no C++ compiler") and "apt install g++" in line
    assert before == "" and not machine.own.exists()


@pytest.mark.parametrize(("name", "variable"), [("c++", None), ("g++", None), ("clang++", "clang++")])
def test_a_compiler_of_any_name_will_do(machine, python, name, variable):
    machine.put_all(python)
    tools = bare_tools(machine)
    (tools / name).symlink_to("/bin/true")
    assert machine.set_up(python, PATH=f"{python.parent}:{tools}", CXX=variable)[0] == python


def test_no_headers(machine, python):
    (python.parent.parent / "include").unlink()
    line, _ = machine.refusal(python)
    assert "Python.h, and DeepSpeed compiles" in line and "apt install python3-dev" in line


@pytest.mark.slow
def test_no_network_then_one(machine, python):
    line, _ = machine.refusal(python, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert "Connection refused" in line
    chosen, said = machine.set_up(python)
    assert "making" not in said  # what is there is completed
    assert "deepspeed" in machine.packages(chosen)


@pytest.mark.slow
def test_an_index_that_lacks_a_package_then_has_it(machine, python):
    (kept,) = machine.wheels.glob("deepspeed-*.whl")
    kept.rename(machine.folder / kept.name)
    line, _ = machine.refusal(python)
    assert "cannot install what the trainer needs into" in line and "deepspeed" in line
    (machine.folder / kept.name).rename(kept)
    assert "torch" in machine.packages(machine.set_up(python)[0])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_then_room(machine, python):
    machine.own.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "none", str(machine.own)]).returncode:
        pytest.skip("cannot mount")
    try:
        (machine.own / set_up.MARK).touch()
        machine.run([python, "-m", "venv", machine.own], check=True)
        line, before = machine.refusal(python)
        assert re.search(r"error: 0\.\d GB free at .*PyPI's torch and all else take", line)
        assert "adding to" in before
        with (machine.own / "large").open("wb") as file:
            file.truncate(1)
            machine.builds.mkdir()
            torch_wheel(machine.builds)
            file.write(b"0" * (shutil.disk_usage(machine.own).free - 400_000))
            file.flush()
            wheel(machine.wheels, "deepspeed", "0.19.8", files={"deepspeed/__init__.py": "#" * 2_000_000})
            line, _ = machine.refusal(python)
            assert "no space left on the disk" in line and set_up.CUDA_SIZE in line
        (machine.own / "large").unlink()
        assert "deepspeed" in machine.packages(machine.set_up(python)[0])
    finally:
        subprocess.run(["umount", str(machine.own)])


@pytest.mark.slow
def test_an_interrupted_installation_goes_on(machine, python):
    chosen, _ = machine.set_up(python)
    library = chosen.parent.parent / "lib" / TAG / "site-packages"
    for name in ("torch-2.13.0", "deepspeed-0.19.8"):  # pip writes the metadata last
        shutil.rmtree(library / f"{name}.dist-info")
    (library / "torch" / "__init__.py").write_text("raise ImportError('half of it')")
    assert machine.set_up(python)[0] == chosen
    assert machine.packages(chosen)["torch"] == "2.13.0"
    assert machine.run([chosen, "-c", "import torch"]).returncode == 0


def test_an_environment_that_does_not_work_and_is_not_ours_stays(machine, python):
    (machine.own / "bin").mkdir(parents=True)
    (machine.own / "bin" / "python").symlink_to("/no/such/python")  # its Python was uninstalled
    (machine.own / "mine").touch()
    assert "was not made here: remove it" in machine.refusal(python)[0]
    assert (machine.own / "mine").exists()


@pytest.mark.slow
def test_a_python_that_went_away_from_under_our_environment(machine, python):
    chosen, _ = machine.set_up(python)
    chosen.unlink()
    chosen.symlink_to("/no/such/python")
    again, said = machine.set_up(python)
    assert "does not work" in said and "deepspeed" in machine.packages(again)


# GPUs


@pytest.mark.slow
def test_the_build_for_the_driver_is_asked_for(machine, python):
    machine.gpus()
    machine.builds.mkdir()
    torch_wheel(machine.builds, "2.13.0+cu126", sees_gpus=True, cuda="12.6")
    chosen, _ = machine.set_up(python)
    assert "--torch-backend auto" in machine.uv_log.read_text()
    assert machine.packages(chosen)["torch"] == "2.13.0+cu126"


def test_a_gpu_needs_no_compiler(machine, python):
    machine.gpus()
    machine.put_all(python, "torch")
    machine.put(python, torch_wheel(machine.folder, sees_gpus=True, cuda="13.0"))
    tools = bare_tools(machine)
    (tools / "nvidia-smi").symlink_to(machine.bin / "nvidia-smi")
    (tools / "sh").symlink_to("/bin/sh")
    assert machine.set_up(python, PATH=f"{python.parent}:{tools}")[0] == python


@pytest.mark.slow
def test_a_driver_that_is_too_old_for_pypis_build_is_said_before_the_download(machine, python):
    machine.gpus(cuda="12.4")
    line, before = machine.refusal(python)
    assert "driver runs up to CUDA 12.4, PyPI's torch 2.13.0 is built for 13.0" in line
    assert "https://download.pytorch.org/whl/cu124" in line
    assert "The build for this GPU's driver cannot be had" in before
    assert "torch" not in machine.packages(machine.own / "bin" / "python")


@pytest.mark.parametrize(
    ("build", "cuda"), [("2.13.0+cpu", None), pytest.param("2.13.0", "13.0", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_torch_that_sees_no_gpu_stops_the_set_up(machine, active, build, cuda):
    machine.gpus(cuda="12.4")
    machine.put_all(active, "torch")
    machine.put(active, torch_wheel(machine.folder, build, cuda=cuda))
    line, _ = machine.refusal(active)
    assert f"nvidia-smi lists 2 GPUs and torch {build} in {active.parent.parent} sees none" in line
    assert ("is built for CUDA 13.0" if cuda else "is built without CUDA") in line
    assert "--torch-backend auto" in line and "up to CUDA 12.4" in line
    assert machine.set_up(active, CUDA_VISIBLE_DEVICES="")[0] == active


# What the launchers ask


def test_launchers_are_told_what_an_interpreter_lacks(machine, python):
    machine.put_all(python, "peft", "transformers")
    machine.put(python, wheel(machine.folder, "transformers", "4.40.0"))
    done = machine.shell(f"lacking {python}", python)
    assert done.stdout == "transformers>=4.56,<6 (it has 4.40.0), peft>=0.17,<1\n"
    machine.tool("old", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10\nexit 1\n')
    assert machine.shell("lacking old", python).stdout == "Python 3.10 or newer (it is Python 3.8.10)\n"


# From the registry alone


@pytest.mark.slow
def test_the_quick_start_on_a_machine_that_has_nothing(tmp_path):
    """Downloads gigabytes. Of this machine only what the network needs goes along: a certificate, a proxy."""
    base = Path(sys.base_prefix, "bin", TAG)
    checkout = tmp_path / "a checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True).stdout.splitlines()
    for name in listed:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, checkout / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(base)
    network = {name: os.environ[name] for name in ("PIP_CERT", "SSL_CERT_FILE", "HTTPS_PROXY") if name in os.environ}
    values = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null"}
    began = time.monotonic()
    done = subprocess.run(
        [BASH, "training_scripts/quickstart.sh"], cwd=checkout, env=values | network, capture_output=True, text=True
    )
    print(done.stdout, done.stderr, f"{time.monotonic() - began:.0f} s", sep="\n")
    assert done.returncode == 0
    assert "held-out accuracy 0.97" in done.stdout
    command = done.stdout.split("a prompt and a response:\n")[1].split("\nand train")[0]
    scored = subprocess.run([BASH, "-c", command], env=values, capture_output=True, text=True)
    assert scored.returncode == 0, scored.stderr
    assert re.search(r"\[-?\d+\.\d+\]$", scored.stdout.strip())


def test_the_quick_start_s_help_sets_nothing_up(tmp_path):
    shutil.copytree(TOP / "training_scripts", tmp_path / "training_scripts")
    words = [BASH, str(tmp_path / "training_scripts" / "quickstart.sh"), "--help"]
    done = subprocess.run(words, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bash training_scripts/quickstart.sh [FLAG...]" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_scripts"]
