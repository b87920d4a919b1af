# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF, in an environment of its own (``TOOL_OPENRLHF``): its reward model, its reward function, what it trains."""

import json

import foreign
import models
import pytest
import runs
import tiny
from foreign import BF16, CHATS, CHOSEN, PROMPTS, REJECTED

from reward_model.common.errors import UserError
from reward_model.inference import load

pytestmark = pytest.mark.slow
TEXTS = [prompt + response for prompt, response in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
FORMS = {
    "text": {},
    "opt": {"family": "opt"},
    "chat": {"tokenizer": tiny.chatml},
    "start token": {"tokenizer": tiny.llama},
    "merged adapter": {"lora": True},
    "normalized": {"mean": 0.75},
}


@pytest.fixture
def openrlhf(tmp_path):
    python = foreign.interpreter("TOOL_OPENRLHF", "OpenRLHF")
    return lambda questions, **options: foreign.ask(python, "with_openrlhf.py", tmp_path, questions, **options)


def written(saved, form):
    """Texts with their special tokens, as its data has them, and the policy decodes them."""
    if form == "chat":
        return [saved.tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    return [(saved.tokenizer.bos_token or "") + text + (saved.tokenizer.eos_token or "") for text in TEXTS]


def test_its_reward_model_scores_as_here(openrlhf, tmp_path):
    questions, ours = [], {}
    for form, options in FORMS.items():
        saved = foreign.Saved(tmp_path / form, **options)
        ours[form] = saved.chat_scores() if form == "chat" else saved.scores()
        asked = {"do": "score", "folder": saved.folder, "texts": written(saved, form)}
        questions += [asked | {"dtype": dtype} for dtype in ("bf16", "float32")]
    differences = foreign.Differences()
    for question, found in zip(questions, openrlhf(questions)):
        form, dtype = question["folder"].parent.name, question["dtype"]
        raw = [score - FORMS[form].get("mean", 0.0) for score in found["scores"]]  # it takes no mean off
        near = BF16 if dtype == "bf16" else 1e-5
        differences.note(f"OpenRLHF {found['version']}", f"{form}, {dtype}", ours[form], raw, near)
    differences.check()


def test_its_mean_is_read_where_it_is_told(openrlhf, tmp_path):
    """``normalize_reward`` takes ``mean`` and ``std`` from config.json."""
    saved = foreign.Saved(tmp_path / "saved", mean=0.75)
    file = saved.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mean": 0.75, "std": 1.0}))
    asked = {"do": "score", "folder": saved.folder, "texts": written(saved, "text"), "dtype": "float32"}
    (found,) = openrlhf([asked | {"normalize": True}])
    differences = foreign.Differences()
    assert found["mean"] == [0.75]
    differences.note(f"OpenRLHF {found['version']}", "normalize_reward", saved.scores(), found["scores"])
    differences.check()


@pytest.mark.parametrize("form", ["text", "chat", "start token", "encoder", "mean", "normalized"])
def test_its_rewards_from_our_file(form, openrlhf, tmp_path):
    options = FORMS | {"encoder": {"family": "bert"}, "mean": {"pooling": "mean"}}
    saved = foreign.Saved(tmp_path / "saved", **options[form])
    ours, prompts = saved.scores(), PROMPTS + PROMPTS
    if form == "chat":
        ours = saved.chat_scores()
        given = {"tokenize": False, "add_generation_prompt": True}
        prompts = [saved.tokenizer.apply_chat_template(chat[:1], **given) for chat in CHATS]
    file = runs.SCRIPTS / "examples" / "openrlhf_reward.py"
    asked = {"do": "function", "file": file, "texts": written(saved, form), "prompts": prompts}
    (found,) = openrlhf([asked], environment={"REWARD_MODEL": str(saved.folder)})
    differences = foreign.Differences()
    differences.note(f"OpenRLHF {found['version']}, reward_func", form, ours, found["scores"])
    differences.check()


def test_what_it_trains_loads_here_with_its_head(openrlhf, tmp_path):
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [text + tokenizer.eos_token for text in TEXTS]
    asked = {"do": "train", "folder": tmp_path / "base", "texts": texts, "lora": False}
    questions = [asked | {"output": tmp_path / head, "head": head} for head in ("score", "value_head")]
    differences = foreign.Differences()
    for question, found in zip(questions, openrlhf(questions)):
        ours = load(question["output"]).score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
        name = f"OpenRLHF {found['version']}, what it trained"
        differences.note(name, question["head"], ours, found["scores"])
    differences.check()


def test_an_adapter_that_it_trains_has_no_head_and_is_refused(openrlhf, tmp_path):
    """Its LoRA saves no head: the score of such a folder is that of a head which is drawn anew."""
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [text + tokenizer.eos_token for text in TEXTS]
    asked = {"do": "train", "folder": tmp_path / "base", "texts": texts, "output": tmp_path / "out", "head": "score"}
    openrlhf([asked | {"lora": True}])
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    with pytest.raises(UserError) as raised:
        load(tmp_path / "out")
    print(raised.value)
    assert "head" in str(raised.value)
