# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: what a wheel holds, and that its commands need no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from reward_model.config.deepspeed import ZERO_FOLDER

TOP = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is committed or about to be, without what git ignores."""
    if not shutil.which("git") or not (TOP / ".git").exists():
        pytest.skip("not a git checkout")
    pytest.importorskip("flit_core")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=TOP, capture_output=True, text=True
    )
    folder = tmp_path_factory.mktemp("a checkout")
    for name in listed.stdout.splitlines():
        if (TOP / name).is_file() and name.startswith(("reward_model/", "README", "LICENSE", "pyproject")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    before = sorted(checkout.rglob("*"))
    built = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(checkout)]
    subprocess.run(command, check=True)
    assert sorted(checkout.rglob("*")) == before  # no build/, no egg-info
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel installed in a folder of its own; the dependencies are those of this interpreter."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), wheel], check=True)
    return folder


@pytest.fixture
def command(site, tmp_path):
    """Run the installed ``reward-model`` in an empty folder."""

    def run(*arguments, program=(str(site / "bin" / "reward-model"),)):
        environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, *program, *map(str, arguments)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_wheel_holds_every_module_and_every_zero_file(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("reward_model/")}
    files = [*TOP.glob("reward_model/**/*.py"), *ZERO_FOLDER.glob("*.json")]
    assert {path.relative_to(TOP).as_posix() for path in files} <= names
    assert len(list(ZERO_FOLDER.glob("*.json"))) >= 9


@pytest.mark.slow
def test_plan_runs_where_there_is_no_checkout(command, demo):
    config = json.loads((demo / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    page = command("plan", "--model_name_or_path", demo / "model", "--gpus", 2, "--gpu_memory", 80)
    assert "Fastest that fits: ZeRO" in page


@pytest.mark.slow
def test_check_runs_where_there_is_no_checkout(command, demo):
    flags = ["--model_name_or_path", demo / "model", "--data_path", demo / "data"]
    said = command("check", *flags, "--deepspeed_config", "zero3_nvme.json", "--nvme_path", "disk")
    assert said == "nothing found that would stop the run\n"


def test_a_model_is_loaded_where_there_is_no_checkout(command, demo, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from reward_model.inference import load

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    model = AutoModelForSequenceClassification.from_pretrained(demo / "model", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "output")
    tokenizer.save_pretrained(tmp_path / "output")
    code = "import reward_model.inference as s; print(s.__file__, s.load('output').score(['a'], [' b'])[0])"
    where, score = command("-c", code, program=()).split()[-2:]
    assert str(TOP) not in where
    assert float(score) == pytest.approx(load(tmp_path / "output").score(["a"], [" b"])[0], abs=1e-6)


MISTAKES = """\
import sys
from reward_model.__main__ import COMMANDS, main
for name in set(COMMANDS) - {"train"}:
    try:
        assert main([name, "model", "--no_such_flag"]) != 0
    except SystemExit as end:
        assert end.code != 0
    assert "torch" not in sys.modules, name
"""


def test_a_mistake_in_a_command_is_told_before_torch_is_imported():
    """It takes ten seconds on a busy machine."""
    result = subprocess.run([sys.executable, "-c", MISTAKES], cwd=TOP, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "--no_such_flag" in result.stderr


def test_a_python_without_our_packages_is_told_what_to_do(tmp_path):
    """Each command, and main.py; -S leaves this interpreter without site-packages."""
    for words in (["-m", "reward_model", "score", "--help"], [str(TOP / "training_scripts" / "main.py"), "--help"]):
        values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            [sys.executable, "-S", *words], cwd=TOP, env=values, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {sys.executable} has no package ")
        assert "activate first" in line or "quickstart.sh makes an environment that has it" in line
