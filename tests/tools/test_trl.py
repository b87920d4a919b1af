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
def trl():
    return foreign.interpreter("TOOL_TRL", "TRL")


def logistic(scores):
    """The mean of -log sigmoid(chosen - rejected), of the chosen scores and then the rejected."""
    gaps = torch.tensor(scores[:PAIRS]) - torch.tensor(scores[PAIRS:])
    return torch.nn.functional.softplus(-gaps).mean().item()


@pytest.mark.parametrize("form", FORMS)
def test_its_reward_trainer_goes_on_from_what_we_save(form, trl, tmp_path):
    """The loss of the first step is that of our scores, so that the head was kept."""
    saved = foreign.Saved(tmp_path, **FORMS[form])
    reward = load(saved.folder)
    if form == "chat":
        scores = reward.score_chats(CHATS)
        rows = {"chosen": CHATS[:PAIRS], "rejected": CHATS[PAIRS:]}
    else:
        scores = reward.score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
        rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    if form == "encoder":  # TRL closes texts with the eos_token, which this tokenizer has not
        texts = [p + r for p, r in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
        ids = saved.tokenizer(texts)["input_ids"]
        rows = {"chosen_ids": ids[:PAIRS], "rejected_ids": ids[PAIRS:]}
    if form == "adapter":
        rows |= {"adapter": saved.folder / "adapter", "base": saved.base}
    rows["dtype"] = "bfloat16" if form == "bf16" else "float32"
    found = foreign.ask(trl, "with_trl.py", tmp_path, do="go_on", folder=saved.folder, output=tmp_path / "trl", **rows)
    near = foreign.BF16 if form == "bf16" else 1e-5
    assert foreign.spread(scores) > 0.05
    assert abs(logistic(scores) - math.log(2)) > 3 * near
    differences = [abs(found[name] - logistic(scores)) for name in ("eval_loss",)]
    differences += [abs(found["losses"][0] - logistic(scores)), abs(found["mean"] - reward.mean - mean(scores))]
    print(f"\nTRL {found['version']}, RewardTrainer, {form}: loss and mean reward differ by {max(differences):.2g}")
    assert max(differences) < near


def mean(scores):
    return sum(scores) / len(scores)


@pytest.mark.parametrize("form", ["chat", "text", "normalized", "encoder", "mean"])
@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_what_it_draws_is_scored_as_here(trainer, form, trl, tmp_path):
    """By the callable always; by a path, chats are, and text goes without its end token, as TRL adds none."""
    chats = form == "chat"
    options = FORMS | {"mean": {"pooling": "mean"}}
    saved = foreign.Saved(tmp_path, **options[form])
    policy = tmp_path / "policy"
    models.write("llama", policy, **foreign.SIZES)
    (tiny.chatml if chats else tiny.tokenizer)(policy)
    prompts = [chat[:1] for chat in CHATS[:PAIRS]] if chats else PROMPTS
    by_path = form != "mean"  # a form that Transformers does not load
    asked = {"folder": saved.folder, "policy": policy, "prompts": prompts, "by_path": by_path, "trainer": trainer}
    found = foreign.ask(trl, "with_trl.py", tmp_path, do="reward", output=tmp_path / "trl", **asked)
    reward = load(saved.folder)
    drawn = list(zip(found["prompts"], found["completions"]))
    if chats:
        ours = without_end = reward.score_chats([prompt + completion for prompt, completion in drawn])
    else:
        ours = reward.score(*map(list, zip(*drawn)))
        texts = [prompt + completion for prompt, completion in drawn]
        without_end = reward.score_ids(reward.tokenizer(texts, add_special_tokens=False)["input_ids"])
    by_callable = [rewards[-1] for rewards in found["rewards"]]
    name = f"TRL {found['version']}, {trainer}"
    assert foreign.largest_difference(name, f"{form}, callable", ours, by_callable) < 1e-5
    assert found["logged"]["rewards/RewardScorer/mean"] == pytest.approx(mean(ours), abs=1e-5)
    if by_path:
        raw = [rewards[0] - reward.mean for rewards in found["rewards"]]  # TRL does not take the mean off
        assert foreign.largest_difference(name, f"{form}, path", without_end, raw) < 1e-5
        assert found["logged"]["rewards/saved/mean"] == pytest.approx(mean(without_end) + reward.mean, abs=1e-5)
        assert chats or foreign.largest_difference(name, f"{form}, path, for the missing end", ours, raw) > 1e-3


@pytest.mark.parametrize("adapter", [None, {"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_what_it_trains_loads_here_with_its_head(adapter, trl, tmp_path):
    tokenizer = models.write("llama", tmp_path / "base", **foreign.SIZES)
    texts = [p + r for p, r in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
    ids = [[*given, tokenizer.eos_token_id] for given in tokenizer(texts)["input_ids"]]
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, "steps": 6, "ids": ids}
    rows |= {"lora": adapter} if adapter else {}
    output = tmp_path / "trl"
    found = foreign.ask(trl, "with_trl.py", tmp_path, do="train", folder=tmp_path / "base", output=output, **rows)
    assert (output / "adapter_config.json").is_file() is (adapter is not None)
    ours = load(output).score(PROMPTS + PROMPTS, CHOSEN + REJECTED)
    name = f"TRL {found['version']}, what it trained"
    assert foreign.largest_difference(name, "adapter" if adapter else "model", found["scores"], ours) < 1e-5
