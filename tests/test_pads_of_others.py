# SPDX-License-Identifier: Apache-2.0
"""Reward models that others trained are scored where their ``config.json`` says, as in Transformers and TRL."""

import json
import re

import models
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from reward_model.data.tokenizer import choose_special_tokens
from reward_model.inference import load, pads_at_end
from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.training.run import set_pad

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [("the cat", " sat on the mat and the other"), ("x", " y"), ("where is", " the cat?")]
SMALL = models.GROUPED | {"num_labels": 1}


def write(folder, pad_token=None, pad_token_id=None, **sizes):
    """A reward model as TRL leaves one, and a tokenizer without a pad of its own, unless one is named."""
    tokenizer = tiny.tokenizer(folder, pad_token=pad_token)
    rows = len(tokenizer)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(SMALL | {"vocab_size": rows} | sizes), **ids)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def by_transformers(folder, pad, texts=TEXTS):
    """Scores by Transformers' own class, in one batch where it takes one, filled with a pad."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id] for prompt, response in texts]
    if pad is None:
        return [model(torch.tensor([row])).logits.item() for row in ids]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    batch = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    return model(batch, attention_mask=mask).logits.flatten().tolist()


def end():
    return tiny.tokenizer(pad_token=None).eos_token_id


@pytest.mark.parametrize(
    ("pad_token", "pad_token_id", "said"),
    [
        (None, None, "pad_token_id in config.json is not set"),
        (tiny.EOS, "end", "scored at the token before it"),  # TRL's default
        (None, "end", "scored at the token before it"),
        (tiny.PAD, 1, None),
        (tiny.PAD, 7, "which Transformers finds only where a batch has no pads"),
    ],
)
def test_scores_are_those_of_transformers(pad_token, pad_token_id, said, tmp_path, capsys):
    pad = end() if pad_token_id == "end" else pad_token_id
    tokenizer = write(tmp_path, pad_token, pad)
    reward = load(tmp_path)
    printed = capsys.readouterr().out
    assert (said in printed) if said else "pad" not in printed
    prompts, responses = zip(*TEXTS)
    assert reward.score(prompts, responses) == pytest.approx(by_transformers(tmp_path, pad), abs=1e-5)
    assert len(reward.tokenizer) == len(tokenizer)  # nothing was added
    assert reward.tokenizer.pad_token == pad_token


def test_pad_and_end_differ_by_more_than_rounding(tmp_path):
    """Otherwise the tests above would pass with either rule."""
    write(tmp_path, tiny.EOS, end())
    before = torch.tensor(by_transformers(tmp_path, end()))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": None}))
    at_end = torch.tensor(by_transformers(tmp_path, None))
    assert (before - at_end).abs().min() > 0.1 * before.std()


def test_rule_on_any_ids():
    """Against Transformers' own expression."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, 3, (1, int(torch.randint(1, 7, (1,), generator=generator))), generator=generator)
        rightmost = (torch.arange(ids.shape[1]) * (ids != 2).int()).argmax(-1).item()
        assert pads_at_end(ids[0].tolist(), 2) == ids.shape[1] - 1 - rightmost
        assert pads_at_end(ids[0].tolist(), None) == 0


def test_an_encoder_without_a_pad_in_its_config(tmp_path):
    """Transformers' own class is called, which takes no more than one text then."""
    tokenizer = tiny.tokenizer(tmp_path, pad_token=None)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 1}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("ctrl", **sizes, dff=32, **ids)
    ).save_pretrained(tmp_path)
    reward = load(tmp_path)
    assert reward.scorer.pooling == "classifier"
    found = reward.score(*zip(*TEXTS))
    assert found == pytest.approx(by_transformers(tmp_path, None), abs=1e-5)


def test_training_on_says_once_that_the_place_moves(tmp_path, capsys):
    write(tmp_path, tiny.EOS, end(), vocab_size=328)
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0)
    special = choose_special_tokens(AutoTokenizer.from_pretrained(tmp_path), 328)
    capsys.readouterr()
    set_pad(scorer, special)
    set_pad(scorer, special)
    assert len(re.findall("it was scored at the token before", capsys.readouterr().out)) == 1
    assert scorer.config.pad_token_id == special.pad != end()


@pytest.mark.parametrize("what", ["no head", "another pad"])
def test_training_on_says_nothing_where_nothing_moves(what, tmp_path, capsys):
    write(tmp_path, tiny.PAD, 1)
    if what == "no head":
        models.write("llama", tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 0}))
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0)
    special = choose_special_tokens(AutoTokenizer.from_pretrained(tmp_path), 328)
    capsys.readouterr()
    set_pad(scorer, special)
    assert capsys.readouterr().out == ""


def test_what_we_save_is_scored_at_its_end_without_a_word(tmp_path, capsys):
    tokenizer = models.write("llama", tmp_path / "base")
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=0)
    set_pad(scorer, choose_special_tokens(tokenizer, 320))
    for form in ("hf", "dschat"):
        saving.save(scorer, tokenizer, tmp_path / form, form)
        capsys.readouterr()
        assert load(tmp_path / form).pad == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert "pad" not in capsys.readouterr().out
