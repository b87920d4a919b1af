# SPDX-License-Identifier: Apache-2.0
"""Lets tests/ and its folders hold files of one name and share helpers/; fixtures for all of them."""

import os
import sys
from pathlib import Path

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # threads that outnumber cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import pytest
import torch

# a file stays with one worker, so these begin first: what is left at the end is short, and the cores share it
LONGEST = ("test_trainer", "test_set_up", "test_bad_input", "test_checkpoints", "test_launchers", "test_api")

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
# ops that DeepSpeed compiles are compiled once, also by tests that set another environment
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "var" / "torch_extensions"))
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in LAUNCHER:  # whoever started these tests
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test waits for the network


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    items.sort(
        key=lambda item: item.path.stem not in LONGEST
    )  # what takes longest begins first, so that cores share it
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: --all runs it"))


def pytest_configure(config):
    config.option.importmode = "importlib"  # the default, prepend, refuses two test_reward_model.py


@pytest.fixture(autouse=True)
def messages_are_printed():
    """As in a run: pytest's own handlers at the root would keep them."""
    from reward_model.common.logging import Console, logger

    handler = Console()
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def launchers_variables_go():
    """Those that a run in this process has set: the processes of the next test would inherit them."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def one_thread():
    """Tensors of a few hundred numbers: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What datasets keeps of the files it read goes with the test; rank 0 speaks."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The quick start's data, fewer rows of it, and its model."""
    import runs

    from reward_model.data.demo import write_data, write_model

    folder = tmp_path_factory.mktemp("demo")
    write_data(folder / "data")
    for name, rows in (("train", runs.PAIRS), ("eval", runs.HELD_OUT)):
        file = folder / "data" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    write_model(folder / "model", folder / "data")
    return folder
