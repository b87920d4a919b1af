# SPDX-License-Identifier: Apache-2.0
"""The files that the patches add, put together as in dschat/utils/, under a package name of their own."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PACKAGE = "dschat_added"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UTILS = '''"""What the added files import of upstream's utils.py."""


def print_rank_0(msg, rank=None):
    print(msg)


def to_device(batch, device):
    return {name: value.to(device) for name, value in batch.items()}
'''


def assemble(folder):
    """Write the package; ``folder`` is then what applications/DeepSpeed-Chat is to dschat."""
    utils = folder / PACKAGE / "utils"
    shutil.copytree(TOP / "patches" / "added", utils, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOP / "reward_model" / "reward_model.py", utils / "model")
    (utils / "utils.py").write_text(UTILS)
    return folder


def module(name):
    return importlib.import_module(f"{PACKAGE}.utils.{name}")


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def start(folder, script, *words, cwd=None, **variables):
    """A Python process that can import the package, without what a launcher may have set here."""
    values = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.Popen(
        [sys.executable, "-c", script, *[str(word) for word in words]],
        cwd=cwd or folder,
        env=values | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=300):
    """The last line that a process prints, which has to succeed."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    return out.splitlines()[-1]
