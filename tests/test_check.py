# SPDX-License-Identifier: Apache-2.0
"""``reward-model check``: what a look at flags and the first rows of the data shows."""

import json
from types import SimpleNamespace

import models
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from reward_model.commands import check
from reward_model.common.errors import UserError
from reward_model.config.options import parse
from reward_model.training.run import run_in

pytestmark = pytest.mark.usefixtures("own_cache")

PAIR = {"prompt": "Who?", "chosen": " he", "rejected": " she"}
CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def look(*flags):
    return check.main(["--model_name_or_path", "someone/model", *map(str, flags)])


def refusal(*flags):
    with pytest.raises(UserError) as caught:
        look(*flags)
    return str(caught.value)


def test_rows_that_would_stop_the_run(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", [PAIR] * 3)
    assert look("--data_path", good) == 0
    assert capsys.readouterr().out == "nothing found that would stop the run\n"
    bad = write(tmp_path / "bad.jsonl", [PAIR, PAIR | {"chosen": ""}] * 2 + [PAIR] * 200)
    assert refusal("--data_path", good, bad) == (
        f"{bad}, row 2: chosen is empty (2 of the first 100 rows cannot be used; --on_bad_row skip leaves them out)"
    )
    assert look("--data_path", bad, "--on_bad_row", "skip") == 0
    all_bad = write(tmp_path / "all.jsonl", [PAIR | {"chosen": ""}])
    assert "1 of the first 1 rows" in refusal("--data_path", all_bad, "--on_bad_row", "skip")
    assert "row 2: chosen is empty" in refusal("--data_path", good, "--eval_data_path", f"{bad}:50")
    assert refusal("--data_path", tmp_path / "none.jsonl").endswith("no such file or folder")
    assert refusal() == "--data_path is missing: name a file, a folder or a hub name, such as Dahoas/rm-static"


def test_shifted_texts_are_looked_at(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    one = write(tmp_path / "one.jsonl", [{"prompt": "Who?", "response": " he"}])
    assert "one.jsonl, row 1: --meta_data needs two answers or more" in refusal("--data_path", path, "--meta_data", one)
    assert refusal("--data_path", path, "--meta_data", tmp_path / "none.jsonl").endswith("no such file or folder")
    assert look("--data_path", path, "--meta_data", path) == 0


def test_what_the_loss_needs(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    assert "row 1: margin is missing" in refusal("--data_path", path, "--margin", "column")
    for flags in (["--margin", "strength"], ["--flip_share", "0.1"], ["--drop_share", "0.1"]):
        said = f"row 1: the row has no finite strength_mean (reward-model ensemble writes it), and {flags[0]}"
        assert said in refusal("--data_path", path, *flags)
    point = write(tmp_path / "points.jsonl", [{"prompt": "p", "response": "r", "score": 1}])
    assert "row 1: " in refusal("--data_path", point)
    assert look("--data_path", point, "--loss", "mse") == 0
    # rows to evaluate on need an order or a score of any kind
    assert look("--data_path", path, "--eval_data_path", point) == 0


def test_chats_are_written_by_the_model_s_template_where_it_is_here(tmp_path):
    path = write(tmp_path / "rows.jsonl", [CHAT])
    assert look("--data_path", path) == 0  # the model may have one
    tiny.tokenizer(tmp_path / "model")
    model = ["--model_name_or_path", tmp_path / "model", "--data_path", path]
    assert "chat messages need a tokenizer with a chat template" in refusal(*model)
    assert look(*model, "--chat_template", "human_assistant") == 0


def test_columns_and_layout_are_said_and_hub_names_too(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"question": "Who?", "chosen": "he", "rejected": "she", "id": 1}])
    look("--data_path", path, "someone/data:500")
    out = capsys.readouterr().out
    assert f"{path}: read question as the user's message\n" in out
    assert f"{path}: columns that are not read: id\n" in out
    assert "not looked at: someone/data:500, which would have to come from the hub\n" in out


def lacking(tmp_path):
    """Models with flags that have nothing to learn from in them, and what is said."""
    for family in ("llama", "bert", "gpt2"):
        models.write(family, tmp_path / family)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama", num_labels=1)
    models.write("llama", tmp_path / "reward")
    reward.save_pretrained(tmp_path / "reward")
    contrastive, language = ["--contrastive_weight", "1"], ["--sft_weight", "0.01"]
    views = "leaves no dropout (attention_dropout 0), so that two passes give equal states: add --dropout 0.1"
    return [
        ("llama", contrastive, views),
        ("llama", [*contrastive, "--dropout", "0"], "--dropout 0 leaves no dropout"),
        ("gpt2", [*contrastive, "--dropout", "0"], "--dropout 0 leaves no dropout (attn_pdrop 0, embd_pdrop 0"),
        ("llama", [*contrastive, "--dropout", "0.1"], None),
        ("llama", [*contrastive, "--lora_dim", "4", "--lora_dropout", "0.1"], None),
        ("gpt2", contrastive, None),
        ("reward", language, "is a reward model, which has lost its language-model head"),
        ("bert", language, "is an encoder"),
        ("llama", language, None),
        ("gpt2", language, None),
    ]


def test_a_model_that_lacks_what_a_term_needs_is_refused_before_anything_is_read(tmp_path):
    """By ``check``, and at the start of a run: the data that is named is not there, and nothing is said of it."""
    rows = write(tmp_path / "rows.jsonl", [PAIR])
    context = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_first=True)
    for name, flags, said in lacking(tmp_path):
        words = ["--model_name_or_path", str(tmp_path / name), *flags]
        if said is None:
            assert check.main([*words, "--data_path", str(rows)]) == 0
            continue
        with pytest.raises(UserError) as by_check:
            check.main([*words, "--data_path", str(rows)])
        with pytest.raises(UserError) as by_run:
            run_in(None, parse([*words, "--data_path", str(tmp_path / "none.jsonl")]), context, None)
        assert str(by_check.value) == str(by_run.value)
        assert said in str(by_run.value) and "\n" not in str(by_run.value)
