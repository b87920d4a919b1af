# SPDX-License-Identifier: Apache-2.0
"""What the README and the guide tell a user to type to a saved model, as it stands there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import runs
import tiny
from saved import save

README, GUIDE = runs.TOP / "README.md", runs.TOP / "reward_model" / "README.md"


def block(file, heading, number=0):
    """The lines of a block of code below a heading."""
    section = re.split(r"\n#+ ", file.read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1])[0]
    return re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[number]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which ``output`` is a model with a chat template."""
    folder = tmp_path_factory.mktemp("documents")
    save(folder, template=tiny.CHATML).rename(folder / "output")
    rows = '{"prompt": "2 + 2?", "responses": [" 4", " 5"]}\n{"prompt": "2 + 2?", "response": " 4"}\n'
    (folder / "answers.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize(
    ("file", "heading"),
    [(README, "Use the saved model"), (GUIDE, "Python"), (GUIDE, "Scoring")],
    ids=["readme", "loading", "scoring"],
)
def test_python(place, monkeypatch, file, heading):
    monkeypatch.chdir(place)
    said = {}
    exec(block(file, heading, 1 if heading == "Scoring" else 0), said)
    assert len(said["reward"].score(["Human: 2 + 2? Assistant:"], [" 4"])) == 1
    if heading == "Scoring":
        assert said["found"]["row"] == 2 and "score" in said["found"]


@pytest.mark.slow
def test_the_shell_lines_of_the_readme(place):
    """Each by itself, as a user types them; the server is up before it is asked."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    values = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    lines = [line.split("   #")[0].strip() for line in block(README, "Use the saved model", 1).splitlines()]
    printed, server = [], None
    try:
        for line in lines:
            if line.endswith("&"):
                server = subprocess.Popen(line.removesuffix("&").split(), cwd=place, env=values)
                wait_for("http://127.0.0.1:8000/ready", server)
                continue
            done = subprocess.run(line, shell=True, cwd=place, env=values, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    finally:
        if server:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    best, asked, verified, _ = printed
    assert '"best":' in best and '"scores":' in asked and "Transformers" in verified
    assert (place / "other" / "pytorch_model.bin").is_file()


def wait_for(url, process):
    ends = time.monotonic() + 100
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server is not up")
