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
    "qwen3": {"family": "qwen3"},
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
    """Its mean and standard deviation, which config.json names, are not what is in its buffers under Transformers 5."""
    questions, ours = [], {}
    for form, options in FORMS.items():
        saved = foreign.Saved(tmp_path / form, **options)
        ours[form] = saved.chat_scores() if form == "chat" else saved.scores()
        asked = {"do": "score", "folder": saved.folder, "texts": written(saved, form)}
        questions += [asked | {"dtype": dtype} for dtype in ("bf16", "float32")]
    file = tmp_path / "normalized" / "saved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mean": 0.75, "std": 1.0}))
    questions.append(asked | {"dtype": "float32", "normalize": True})
    *raw, normalized = openrlhf(questions)
    differences = foreign.Differences()
    for question, found in zip(questions, raw):
        form, dtype = question["folder"].parent.name, question["dtype"]
        scores = [score - FORMS[form].get("mean", 0.0) for score in found["scores"]]
        near = BF16 if dtype == "bf16" else 1e-5
        differences.note(f"OpenRLHF {found['version']}", f"{form}, {dtype}", ours[form], scores, near)
    differences.check()
    print(f"OpenRLHF's mean after it was loaded: {normalized['mean']}")
    assert normalized["mean"] != [0.75], "it reads the mean of config.json now: the guide says that it does not"


def test_its_rewards_from_our_file(openrlhf, tmp_path):
    file = runs.SCRIPTS / "examples" / "openrlhf_reward.py"
    forms = FORMS | {"mean": {"pooling": "mean"}}
    questions, ours = [], []
    for form, options in forms.items():
        saved, prompts = foreign.Saved(tmp_path / form, **options), PROMPTS + PROMPTS
        ours.append(saved.chat_scores() if form == "chat" else saved.scores())
        if form == "chat":
            given = {"tokenize": False, "add_generation_prompt": True}
            prompts = [saved.tokenizer.apply_chat_template(chat[:1], **given) for chat in CHATS]
        asked = {"file": file, "model": saved.folder, "texts": written(saved, form), "prompts": prompts}
        questions.append({"do": "function"} | asked)
    differences = foreign.Differences()
    for form, scores, found in zip(forms, ours, openrlhf(questions)):
        differences.note(f"OpenRLHF {found['version']}, reward_func", form, scores, found["scores"])
    differences.check()


def test_what_it_trains_loads_here_with_its_head(openrlhf, tmp_path):
    """But for its adapters, which have no head: their scores would be those of a head that is drawn anew."""
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [text + tokenizer.eos_token for text in TEXTS]
    asked = {"do": "train", "folder": tmp_path / "base", "texts": texts}
    questions = [
        asked | {"output": tmp_path / name, "head": head, "lora": lora}
        for name, head, lora in (("a", "score", False), ("b", "value_head", False), ("c", "score", True))
    ]
    differences = foreign.Differences()
    *trained, adapter = openrlhf(questions)
    for question, found in zip(questions, trained):
        ours = load(question["output"]).score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
        name = f"OpenRLHF {found['version']}, what it trained"
        differences.note(name, question["head"], ours, found["scores"])
    differences.check()
    assert (tmp_path / "c" / "adapter_config.json").is_file()
    with pytest.raises(UserError) as raised:
        load(tmp_path / "c")
    assert adapter["head_trained"]
    said = f"is an adapter without a score head (modules_to_save): start from {tmp_path / 'base'}"
    assert str(raised.value) == f"{tmp_path / 'c'} {said}"
