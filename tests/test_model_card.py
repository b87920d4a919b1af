# SPDX-License-Identifier: Apache-2.0
"""The model card: what the hub reads of it, what a reader can run of it, and whose README.md it is."""

import json
import re

import pytest
import runs
import tiny
from huggingface_hub import ModelCard

from reward_model.models.saving import TAGS
from reward_model.training.model_card import BESIDE, NAME, Trained, card_of, is_ours, signed, write_card

NOTHING_WRONG = {"bad_steps": {"count": 0}, "alarms": []}
METRICS = {"pairs": 50, "accuracy": 0.91, "longer_wins_accuracy": 0.62, "loss": 0.3, "chosen_quantiles": [1.0]}
ORIGIN = {
    "base_model": "owner/base",
    "base_model_on_hub": True,
    "datasets": ["owner/data"],
    "train": {"owner/data, split train": 300, "more.jsonl": 20},
    "evaluation": {"chat": {"owner/data, split test": 50}, "": {"other|name.jsonl": 7}},
}
RUN = {"data": ORIGIN, "loss": ["logistic"], "learning_rate": 1e-3, "offload": False, "versions": {"torch": "2.13.0"}}


def card(name="model", files=("config.json", "model.safetensors"), tokenizer=None, **changes):
    values = {"run": RUN, "sets": {"chat": METRICS, "": METRICS | {"accuracy": 0.5}}, "step": 20, "evaluated": 20}
    values |= {"health": NOTHING_WRONG, "scale": {}}
    return card_of(name, files, tokenizer or tiny.tokenizer(), Trained(**values | changes))


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(card("me/model")).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "text-classification",
        "owner/base",
    )
    assert data.datasets == ["owner/data"]
    assert set(TAGS) <= set(data.tags)
    found = {(each.dataset_name, each.dataset_type): each.metric_value for each in data.eval_results}
    assert found == {("chat", "owner/data"): 0.91, ("other|name.jsonl", "preference-pairs"): 0.5}


def test_a_model_that_was_not_verified_says_so():
    assert "verified" not in card()
    text = card(not_verified="0.1 GB of host memory are free")
    assert "not verified that the saved model scores as the trained one did: 0.1 GB of host memory are free." in text


def test_what_is_on_this_disk_alone_is_no_name_of_the_hub():
    local = ORIGIN | {"base_model_on_hub": False, "base_model": "my-model", "datasets": []}
    data = ModelCard(card(run=RUN | {"data": local})).data
    assert data.base_model is None
    assert data.datasets is None


def test_metrics_data_settings_versions_and_warnings_are_told():
    health = {"bad_steps": {"count": 2}, "alarms": [{"kind": "ties", "message": "step 5: many are equal", "set": ""}]}
    text = card(health=health)
    assert "| `chat` | 50 | 0.9100 | 0.6200 | 0.3000 |" in text
    assert "| held out, `chat` | `owner/data, split test` | 50 |" in text
    assert "| held out | `other\\|name.jsonl` | 7 |" in text
    assert "| training | `more.jsonl` | 20 |" in text
    assert "| learning_rate | 0.001 |" in text
    assert "offload" not in text
    off = {"lora_dim": 0, "lora_alpha": 8.0, "score_penalty": None, "score_penalty_weight": 0.01}
    assert "lora" not in card(run=RUN | off) and "penalty" not in card(run=RUN | off)
    assert "| lora_alpha | 8.0 |" in card(run=RUN | off | {"lora_dim": 4})
    assert "| torch | 2.13.0 |" in text
    assert "- step 5: many are equal\n- 2 steps skipped" in text
    assert "Warnings" not in card()
    assert "Found after step 10, not with these weights." in card(evaluated=10)
    assert "Found after" not in card()


def test_how_to_score_fits_the_form():
    assert "AutoModelForSequenceClassification" in blocks(card())[0]
    (only,) = blocks(card(files=("config.json", "pytorch_model.bin")))
    assert "from reward_model.inference import load" in only
    files = ("1_Pooling", "2_Dense", "config.json", "model.safetensors", "modules.json")
    assert "SentenceTransformer('model')" in blocks(card(files=files))[0]
    assert ModelCard(card(files=files)).data.library_name == "sentence-transformers"
    assert "score_chats" not in card()
    assert "score_chats" in blocks(card(tokenizer=tiny.chatml()))[1]
    assert "apply_chat_template" in blocks(card(tokenizer=tiny.chatml()))[0]
    text = card(scale={"score_mean": 0.25})
    assert "0.2500" in text and "--pooler-config '{\"logit_mean\": 0.25}'" in text
    assert "vLLM's `embed`, by a bias" in card(scale={"score_mean": 0.25}, files=files)


def test_a_text_is_closed_by_whoever_has_to():
    """A tokenizer that closes a text itself would close it twice."""
    assert 'text = "2 + 2 =" + " 4" + tokenizer.eos_token' in blocks(card())[0]
    assert 'text = "2 + 2 =" + " 4"  # a prompt and its answer\n' in blocks(card(tokenizer=tiny.bert()))[0]
    pairs = blocks(card(tokenizer=tiny.bert(), naming={"pair_encoding": True}))[0]
    assert 'tokenizer("2 + 2 =", "4", return_tensors="pt")' in pairs


def test_what_the_model_is_stands_in_the_card():
    assert "| objective | logistic |" in card(naming={"objective": "logistic"})
    assert "| function_to_apply | none |" in card(naming={"objective": "logistic"})
    assert "What it is" not in card()


# --- whose README.md ---


def test_our_card_is_replaced_and_the_user_s_stays(tmp_path, capsys):
    write_card(tmp_path, signed("one\n"))
    write_card(tmp_path, signed("two\n"))
    assert (tmp_path / NAME).read_text() == signed("two\n")
    assert capsys.readouterr().out == ""
    changed = signed("two\n").replace("two", "two, and what I know of it")
    (tmp_path / NAME).write_text(changed)
    assert not is_ours(tmp_path / NAME)
    write_card(tmp_path, signed("three\n"))
    assert (tmp_path / NAME).read_text() == changed
    assert (tmp_path / BESIDE).read_text() == signed("three\n")
    assert f"README.md is yours, and stays as it is; see {BESIDE}" in capsys.readouterr().out
    (tmp_path / BESIDE).write_bytes(b"\xff mine, too")
    write_card(tmp_path, signed("four\n"))
    assert (tmp_path / BESIDE).read_bytes() == b"\xff mine, too"


# --- of a run ---


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "my-model"
    flags = ["--chat_template", "human_assistant", "--max_steps", 3, "--save_interval", 3, "--score_limit", 1e-6]
    return runs.train(demo, out, *flags), out


def test_a_run_leaves_a_card_that_names_no_folder_of_the_machine(trained, demo):
    metrics, out = trained
    text = (out / NAME).read_text()
    assert is_ours(out / NAME)
    assert str(out.parent) not in text
    assert str(demo) not in text
    assert f"| {metrics.final['pairs']} | {metrics.final['accuracy']:.4f} |" in text
    assert f"{metrics.final['longer_wins_accuracy']:.4f}" in text
    assert "| training | `train.jsonl` | 320 |" in text
    assert "| held out | `eval.jsonl` | 50 |" in text
    assert "beyond 1e-06 (--score_limit)" in text
    named = json.loads((out / "config.json").read_text())["reward_model"]
    assert (named["objective"], named["texts"], named["max_seq_len"]) == ("logistic", "text", 256)
    assert named["end_token"] == "<|endoftext|>"
    assert "| end_token | <\\|endoftext\\|> |" in text


def test_what_the_card_shows_can_be_run(trained, monkeypatch):
    _, out = trained
    monkeypatch.chdir(out.parent)
    by_transformers, by_ours = blocks((out / NAME).read_text())
    text_part, _, chat_part = by_transformers.partition("\nchat = ")
    found: dict = {}
    exec(text_part, found)
    scores = [float(found["score"])]
    exec(f"chat = {chat_part}", found)
    scores.append(float(found["score"]))
    named = by_ours.replace("reward.score_chats(", "chats = reward.score_chats(")
    exec(named.replace("reward.score(", "texts = reward.score("), found)
    assert [*found["texts"], *found["chats"]] == pytest.approx(scores, abs=1e-5)


def test_an_exported_model_has_a_card_too(trained, tmp_path):
    from reward_model.commands.export import main

    metrics, out = trained
    assert json.loads((out / "finished.json").read_text())["not_verified"] == ""
    (newest,) = (out / "checkpoints").iterdir()
    assert main([str(newest), str(tmp_path / "exported")]) == 0
    text = (tmp_path / "exported" / NAME).read_text()
    assert "# exported" in text
    first = metrics.evaluations[0]  # a checkpoint is written before the evaluation of its step
    assert f"| {first['pairs']} | {first['accuracy']:.4f} |" in text
    assert "Found after step 0, not with these weights." in text
