# SPDX-License-Identifier: Apache-2.0
"""Data sets and splits against upstream's own raw_datasets.py and data_utils.py, in a DeepSpeedExamples checkout."""

import importlib
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest

from reward_model.common.errors import UserError
from reward_model.data.layouts import BY_NAME, NO_REJECTED
from reward_model.data.sources import read_sources, split_indices

FOLDER = "applications/DeepSpeed-Chat/dschat/utils/data"
ANSWER = ("yes", "no, never", "", "It is (see [1]) so [2].", "[a]b (c) d", "他是", "two\nlines ", " 1. one")


@pytest.fixture(scope="module")
def data_utils():
    """Upstream's module; the packages around it and DeepSpeed are empty stand-ins."""
    checkout = os.environ.get("DEEPSPEED_EXAMPLES")
    if not checkout:
        pytest.skip("DEEPSPEED_EXAMPLES is unset: name the folder of a DeepSpeedExamples checkout")
    folder = Path(checkout) / FOLDER
    if not (folder / "raw_datasets.py").is_file():
        pytest.skip(f"DEEPSPEED_EXAMPLES: no {FOLDER} in {checkout}")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dschat", "dschat.utils", "dschat.utils.data", "deepspeed", "deepspeed.accelerator"):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["dschat.utils.data"].__path__ = [str(folder)]
        sys.modules["deepspeed.accelerator"].get_accelerator = None
        yield importlib.import_module("dschat.utils.data.data_utils")
        for name in {name for name in sys.modules if name.startswith("dschat")} - before:
            del sys.modules[name]


def rows_of(name, rng):
    """Twenty made-up rows with the columns of a data set."""

    def row():
        prompt, first, second = rng.choice(ANSWER), rng.choice(ANSWER), rng.choice(ANSWER)
        if "webgpt" in name:
            scores = {"score_0": rng.choice([-1.0, 0.0, 0.5]), "score_1": rng.choice([-1.0, 0.0, 0.5])}
            return {"question": {"full_text": prompt}, "answer_0": first, "answer_1": second, **scores}
        if "SHP" in name:
            return {"history": prompt, "human_ref_A": first, "human_ref_B": second, "labels": rng.randint(0, 1)}
        if "miracl" in name:
            return {
                "query": prompt,
                "positive_passages": [{"text": first}, {"text": "other"}],
                "negative_passages": [{"text": second}],
            }
        return {"prompt": prompt, "chosen": first, "rejected": second}

    return [row() for _ in range(20)]


def upstream_data_set(data_utils, name, hub, monkeypatch, output_path):
    monkeypatch.setattr(data_utils.raw_datasets, "load_dataset", lambda *args, **kwargs: hub)
    if name == "local/jsonfile":
        return data_utils.raw_datasets.LocalJsonFileDataset(output_path, 7, 0, name, output_path)
    return data_utils.get_raw_dataset(name, output_path, 7, 0)


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_and_words_are_upstreams(name, data_utils, monkeypatch, tmp_path):
    rng = random.Random(name)
    if "synthetic" in name or "webgpt" in name:
        splits = ("train",)
    else:
        splits = {"local/jsonfile": ("train", "eval"), "stanfordnlp/SHP": ("train", "test", "validation")}.get(
            name, ("train", "dev" if "miracl" in name else "test")
        )
    hub = {split: datasets.Dataset.from_list(rows_of(name, rng)) for split in splits}
    upstream = upstream_data_set(data_utils, name, hub, monkeypatch, str(tmp_path))
    if name == "local/jsonfile":
        (tmp_path / "data").mkdir()
        for split in splits:
            hub[split].to_json(tmp_path / "data" / f"{split}.json")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    for sources, theirs in zip(read_sources(name, seed=7), (upstream.get_train_data(), upstream.get_eval_data())):
        (source,) = sources
        assert len(source.rows) == len(theirs)
        for ours, row in zip(map(source.read, source.rows), theirs):
            assert ours["prompt"] + ours["chosen"] == upstream.get_prompt_and_chosen(row)
            assert ours["prompt"] + ours["rejected"] == upstream.get_prompt_and_rejected(row)


@pytest.mark.parametrize("name", NO_REJECTED)
def test_refused_names_have_no_rejected_answer_upstream(name, data_utils, monkeypatch, tmp_path):
    upstream = upstream_data_set(data_utils, name, {}, monkeypatch, str(tmp_path))
    assert upstream.get_prompt_and_rejected({}) is None
    with pytest.raises(UserError, match="no rejected answers"):
        read_sources(name, seed=0)


def test_every_name_of_upstreams_is_known(data_utils):
    source = Path(data_utils.__file__).read_text()
    names = [line.split('"')[1] for line in source.splitlines() if '" in dataset_name:' in line]
    assert len(names) > 10
    assert set(names) == {*BY_NAME, *NO_REJECTED}


@pytest.mark.parametrize("shares", ["2,4,4", "9,1", "1,1,1", "0,10,0", "0.1,0.25,0.65"])
def test_splits_are_upstreams(shares, data_utils, tmp_path):
    for size in [*range(1, 40), 1000]:
        for part in range(len(shares.split(","))):
            theirs = data_utils.get_raw_dataset_split_index(
                0, str(tmp_path), "made", 5, "train", shares, part, size, rebuild=True
            )
            assert split_indices(size, shares, part, seed=5).tolist() == theirs
