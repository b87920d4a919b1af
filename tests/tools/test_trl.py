# SPDX-License-Identifier: Apache-2.0
"""TRL, in an environment of its own (``TOOL_TRL``), with models that the trainer saved, and ours with TRL's."""

import math

import foreign
import models
import pytest
import tiny
import torch
from foreign import CHATS, CHOSEN, PROMPTS, REJECTED

from reward_model.inference import load

pytestmark = pytest.mark.slow
PAIRS = len(PROMPTS)
FORMS = {
    "text": {},
    "chat": {"tokenizer": tiny.chatml},
    "start token": {"tokenizer": tiny.llama},
    "adapter": {"lora": True},
    "encoder": {"family": "bert"},
    "normalized": {"mean": 0.75},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.fixture
def trl(tmp_path):
    python = foreign.interpreter("TOOL_TRL", "TRL")
    return lambda questions: foreign.ask(python, "with_trl.py", tmp_path, questions)


def logistic(scores):
    """The mean of -log sigmoid(chosen - rejected), of the chosen scores and then the rejected."""
    gaps = torch.tensor(scores[:PAIRS]) - torch.tensor(scores[PAIRS:])
    return torch.nn.functional.softplus(-gaps).mean().item()


def mean(scores):
    return sum(scores) / len(scores)


def test_its_reward_trainer_goes_on_from_what_we_save(trl, tmp_path):
    """The loss of the first step is that of our scores, so that the head was kept."""
    questions, ours = [], {}
    for form, options in FORMS.items():
        saved = foreign.Saved(tmp_path / form, **options)
        ours[form] = saved.chat_scores() if form == "chat" else saved.scores()
        rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
        if form == "chat":
            rows = {"chosen": CHATS[:PAIRS], "rejected": CHATS[PAIRS:]}
        if form == "encoder":  # TRL closes texts with the eos_token, which this tokenizer has not
            texts = [p + r for p, r in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
            ids = saved.tokenizer(texts)["input_ids"]
            rows = {"chosen_ids": ids[:PAIRS], "rejected_ids": ids[PAIRS:]}
        if form == "adapter":
            rows |= {"adapter": saved.folder / "adapter", "base": saved.base}
        rows["dtype"] = "bfloat16" if form == "bf16" else "float32"
        questions.append({"do": "go_on", "folder": saved.folder, "output": tmp_path / form / "trl", **rows})
    differences = foreign.Differences()
    for form, found in zip(FORMS, trl(questions)):
        off = FORMS[form].get("mean", 0.0)
        expected = [logistic(ours[form])] * 2 + [mean(ours[form]) + off]
        near = 0.01 if form == "bf16" else 1e-5
        assert abs(expected[0] - math.log(2)) > 2 * near  # what scores that are all alike would give
        theirs = [found["eval_loss"], found["losses"][0], found["mean"]]
        differences.note(f"TRL {found['version']}, RewardTrainer", f"{form}, losses and mean", expected, theirs, near)
    differences.check()


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_what_it_draws_is_scored_as_here(trainer, trl, tmp_path):
    """By the callable always; by a path, chats are, and text goes without its end token, as TRL adds none."""
    forms = {form: FORMS[form] for form in ("chat", "text", "normalized", "encoder")} | {"mean": {"pooling": "mean"}}
    questions = []
    for form, options in forms.items():
        saved = foreign.Saved(tmp_path / form, **options)
        policy = tmp_path / form / "policy"
        models.write("llama", policy, **foreign.SIZES)
        (tiny.chatml if form == "chat" else tiny.tokenizer)(policy)
        prompts = [chat[:1] for chat in CHATS[:PAIRS]] if form == "chat" else PROMPTS
        by_path = form != "mean"  # a form that Transformers does not load
        asked = {"folder": saved.folder, "policy": policy, "prompts": prompts, "by_path": by_path, "trainer": trainer}
        questions.append({"do": "reward", "output": tmp_path / form / "trl", **asked})
    differences = foreign.Differences()
    for form, question, found in zip(forms, questions, trl(questions)):
        reward, name = load(question["folder"]), f"TRL {found['version']}, {trainer}"
        drawn = list(zip(found["prompts"], found["completions"]))
        if form == "chat":
            ours = without_end = reward.score_chats([prompt + completion for prompt, completion in drawn])
        else:
            ours = reward.score(*map(list, zip(*drawn)))
            texts = [prompt + completion for prompt, completion in drawn]
            without_end = reward.score_ids(reward.tokenizer(texts, add_special_tokens=False)["input_ids"])
        by_callable = [rewards[-1] for rewards in found["rewards"]]
        differences.note(name, f"{form}, callable", ours, by_callable)
        assert found["logged"]["rewards/RewardScorer/mean"] == pytest.approx(mean(ours), abs=1e-5)
        if question["by_path"]:
            raw = [rewards[0] - reward.mean for rewards in found["rewards"]]  # TRL does not take the mean off
            differences.note(name, f"{form}, path", without_end, raw)
            assert found["logged"]["rewards/saved/mean"] == pytest.approx(mean(without_end) + reward.mean, abs=1e-5)
            if form != "chat":
                assert differences.note(name, f"{form}, path, beside a text with its end", ours, raw, math.inf) > 1e-3
    differences.check()


def test_what_it_trains_loads_here_with_its_head(trl, tmp_path):
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [p + r for p, r in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
    ids = [[*given, tokenizer.eos_token_id] for given in tokenizer(texts)["input_ids"]]
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, "steps": 6, "ids": ids}
    kinds = {"model": None, "adapter SEQ_CLS": {"task_type": "SEQ_CLS"}, "adapter": {"modules_to_save": ["score"]}}
    questions = []
    for kind, lora in kinds.items():
        asked = {"do": "train", "folder": tmp_path / "base", "output": tmp_path / kind} | rows
        questions.append(asked | ({"lora": lora} if lora else {}))
    differences = foreign.Differences()
    for kind, found in zip(kinds, trl(questions)):
        assert (tmp_path / kind / "adapter_config.json").is_file() is (kind != "model")
        ours = load(tmp_path / kind).score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
        differences.note(f"TRL {found['version']}, what it trained", kind, ours, found["scores"])
    differences.check()
