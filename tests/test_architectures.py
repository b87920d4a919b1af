# SPDX-License-Identifier: Apache-2.0
"""Every architecture once, small, with and without LoRA: a step, saved, loaded, the same scores. Or one line."""

import re
from pathlib import Path

import architectures
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "llama4", "qwen2_5_vl", "qwen3_moe", "mixtral", "phimoe", "olmoe", "deepseek_v3", "gemma3_text",
            "gpt_oss", "glm4_moe", "ernie4_5_moe", "falcon", "falcon_mamba", "cohere2", "t5", "modernbert")  # fmt: skip
REFUSED = {  # what a user is told
    "blenderbot": "BlenderbotModel cannot score a text: ",
    "bros": "BrosModel cannot score a text: You have to specify bbox",
    "canine": "CanineModel cannot score a text: ",
}
TABLE = Path(__file__).with_name("architectures.md")


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    if torch.distributed.is_initialized():  # a test of another file, in the same process, has left one of one rank
        yield
        return
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", FAMILIES)
def test_family_is_trained_saved_and_loaded(kind):
    if kind not in architectures.text_types():
        pytest.skip(f"this Transformers has no {kind}")
    found = architectures.outcome(kind)
    assert found is not None
    assert (found.plain, found.lora) == ("works", "works")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_scored_is_refused_in_a_line(kind):
    found = architectures.outcome(kind)
    assert found is not None
    for said in (found.plain, found.lora):
        assert said.startswith(REFUSED[kind])
        assert "\n" not in said


@pytest.mark.slow
def test_every_architecture_works_or_says_why_not():
    found = filter(None, map(architectures.outcome, architectures.text_types()))
    assert [each.row() for each in found if "TRACEBACK" in each.plain + each.lora] == []


def test_the_table_is_whole():
    """Each type is in it, with what became of it; architectures.py writes it."""
    text = TABLE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| .* \| .* \| (.*) \| (.*) \|$", text, re.M)[1:]
    assert len(rows) > 150
    assert "TRACEBACK" not in text
    works = sum(plain == lora == "works" for _, plain, lora in rows)
    assert f"\n{works} of them work, with LoRA, too" in text
