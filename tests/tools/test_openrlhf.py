# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF, in an environment of its own (``TOOL_OPENRLHF``): its reward model, its reward function, what it trains."""

import foreign
import models
import pytest
import runs
import tiny
from foreign import CHATS, CHOSEN, PROMPTS, REJECTED

from reward_model.inference import load

pytestmark = pytest.mark.slow
TEXTS = [prompt + response for prompt, response in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]


@pytest.fixture
def openrlhf():
    return foreign.interpreter("TOOL_OPENRLHF", "OpenRLHF")


def written(saved, is_chat):
    """Texts as its server and its data give them, with all their special tokens."""
    if is_chat:
        return [saved.tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    start = saved.tokenizer.bos_token or ""
    return [start + text + saved.tokenizer.eos_token for text in TEXTS]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("text", {}),
        ("opt", {"family": "opt"}),
        ("chat", {"tokenizer": tiny.chatml}),
        ("start token", {"tokenizer": tiny.llama}),
        ("merged adapter", {"lora": True}),
        ("normalized", {"mean": 0.75}),
    ],
)
def test_its_reward_model_scores_as_here(form, options, openrlhf, tmp_path):
    saved = foreign.Saved(tmp_path, **options)
    ours = saved.chat_scores() if form == "chat" else saved.scores()
    mean = options.get("mean", 0.0)
    for dtype, near in (("float32", 1e-5), ("bf16", foreign.BF16)):
        texts = written(saved, form == "chat")
        asked = {"do": "score", "folder": saved.folder, "texts": texts, "dtype": dtype}
        found = foreign.ask(openrlhf, "with_openrlhf.py", tmp_path, **asked)
        raw = [score - mean for score in found["scores"]]  # it takes no mean off
        name = f"OpenRLHF {found['version']}"
        assert foreign.largest_difference(name, f"{form}, {dtype}", ours, raw) < near


@pytest.mark.parametrize("form", ["text", "chat", "start token", "encoder", "mean", "normalized"])
def test_its_rewards_from_our_file(form, openrlhf, tmp_path):
    of_form = {
        "chat": {"tokenizer": tiny.chatml},
        "start token": {"tokenizer": tiny.llama},
        "encoder": {"family": "bert"},
        "mean": {"pooling": "mean"},
        "normalized": {"mean": 0.75},
    }
    saved = foreign.Saved(tmp_path, **of_form.get(form, {}))
    if form == "chat":
        ours, texts, prompts = saved.chat_scores(), written(saved, True), []
        for chat in CHATS:
            prompts.append(saved.tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
    else:
        ours, prompts = saved.scores(), PROMPTS + PROMPTS
        texts = TEXTS if form == "encoder" else [text + saved.tokenizer.eos_token for text in TEXTS]
    file = runs.SCRIPTS / "examples" / "openrlhf_reward.py"
    asked = {"do": "function", "file": file, "texts": texts, "prompts": prompts}
    values = {"REWARD_MODEL": str(saved.folder)}
    found = foreign.ask(openrlhf, "with_openrlhf.py", tmp_path, environment=values, **asked)
    name = f"OpenRLHF {found['version']}, reward_func"
    assert foreign.largest_difference(name, form, ours, found["scores"]) < 1e-5


@pytest.mark.parametrize("head", ["score", "value_head"])
def test_what_it_trains_loads_here_with_its_head(head, openrlhf, tmp_path):
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [text + tokenizer.eos_token for text in TEXTS]
    output = tmp_path / "trained"
    asked = {"do": "train", "folder": tmp_path / "base", "texts": texts, "output": output, "head": head, "lora": False}
    found = foreign.ask(openrlhf, "with_openrlhf.py", tmp_path, **asked)
    ours = load(output).score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
    name = f"OpenRLHF {found['version']}, what it trained, {head}"
    assert foreign.largest_difference(name, "model", found["scores"], ours) < 1e-5
