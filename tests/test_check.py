# SPDX-License-Identifier: Apache-2.0
"""``reward-model check``: what a look at flags and the first rows of the data shows."""

import json

import pytest
import tiny

from reward_model.commands import check
from reward_model.common.errors import UserError

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
