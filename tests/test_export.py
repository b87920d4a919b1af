# SPDX-License-Identifier: Apache-2.0
"""``reward-model export --to``: one saved form becomes another with the same scores, or a line says why not."""

import json

import pytest
import tiny
import torch
from test_verification import RUN, change, saved

from reward_model.commands.export import main
from reward_model.common.errors import UserError
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.inference import load
from reward_model.models import adapters
from reward_model.training import fresh_load, verification, verify, ways

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The guard's and the verification's processes would import everything anew; their answers are tested elsewhere."""

    def ask(question):
        return fresh_load.answer(question)

    def ask_ways(folder, texts, asked, trust_remote_code=False, adapter=None):
        place = ways.Saved(folder, texts, trust_remote_code, adapter)
        return {way: ways.answer(place, way) for way in asked}.items()

    monkeypatch.setattr(verify, "ask", ask)
    monkeypatch.setattr(verification, "ask", ask_ways)


BECOMES = {
    ("llama", None): "LlamaForSequenceClassification",
    ("gpt2", None): "GPT2ForSequenceClassification",
    ("qwen3", None): "Qwen3ForSequenceClassification",
    ("bert", None): "BertForSequenceClassification",
    ("bert", "mean"): "BertModel",
}


def raw_scores(folder, form=None):
    reward = load(folder, form=form)
    scores = reward.score(["2 + 2 =", "Where is the cat? ", "x"], [" 4", "On the mat.", " y"])
    return [score + reward.mean for score in scores]


def written(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("family", "options", "to"),
    [
        ("llama", {}, "dschat"),
        ("llama", {"form": "dschat"}, "hf"),
        ("gpt2", {"form": "dschat", "mean": 0.25}, "openrlhf"),
        ("llama", {"mean": 0.25}, "sentence-transformers"),
        ("bert", {"pooling": "mean", "mean": 0.25}, "hf"),
        ("qwen3", {"dtype": torch.bfloat16}, "hf4"),
        ("cohere", {}, "dschat"),
        ("bert", {}, "hf"),
    ],
)
def test_a_form_becomes_another(family, options, to, tmp_path):
    folder = saved(tmp_path, family, **options)
    before = raw_scores(folder)
    assert main([str(folder), str(tmp_path / "new"), "--to", to]) == 0
    new = tmp_path / "new"
    if "dtype" in options:
        assert raw_scores(new) == before
    assert raw_scores(new) == pytest.approx(before, abs=1e-5)
    assert written(new).get("score_mean") == options.get("mean")
    assert written(new)["reward_model"] == written(folder)["reward_model"]
    if to in ("hf", "hf4", "openrlhf"):
        assert written(new)["architectures"] == [BECOMES[family, options.get("pooling")]]
    if to == "dschat":
        assert {path.name for path in new.iterdir()} >= {"pytorch_model.bin", "config.json", "tokenizer.json"}
    elif to == "sentence-transformers" or "pooling" in options:
        assert (new / "modules.json").is_file()
        assert written(new, "2_Dense/config.json")["bias"] is True
    elif to == "openrlhf":
        values = [written(new)[name] for name in ("value_head_prefix", "mean", "std")]
        assert values == ["score", 0.25, 1.0]
    place = ways.Saved(new, [ways.Text("2 + 2 =", " 4"), ways.Text("Where is the cat? ", "On the mat.")])
    answers = {way: ways.answer(place, way) for way in ("our evaluation", "Transformers, as saved", "OpenRLHF")}
    lines = {line.way: line.status for line in verification._lines(answers)}
    assert "differs" not in lines.values()
    if to == "openrlhf":
        assert lines["OpenRLHF"] == "same"
        assert "normalize_reward subtracts 0.25" in answers["OpenRLHF"]["note"]


@pytest.mark.parametrize(
    ("family", "options", "to", "says"),
    [
        ("bert", {}, "sentence-transformers", "has a classification head, and is no embedding"),
        ("bert", {}, "openrlhf", "is scored otherwise \\(pooling classifier\\)"),
        ("cohere", {}, "openrlhf", "has no classification class in Transformers"),
        ("llama", {"pooling": "mean"}, "dschat", "step 3 scores the last token"),
    ],
)
def test_a_form_that_a_model_has_not_is_refused(family, options, to, says, tmp_path):
    folder = saved(tmp_path, family, **options)
    with pytest.raises(UserError, match=says):
        main([str(folder), str(tmp_path / "new"), "--to", to])
    assert not (tmp_path / "new").exists()


def test_what_transformers_4_would_read_otherwise_is_refused(tmp_path):
    folder = saved(tmp_path)
    rope = {"rope_type": "proportional", "rope_theta": 1e4}
    change(folder / "config.json", rope_parameters=rope)
    reward = load(folder)
    if getattr(reward.scorer.config, "rope_parameters", {}).get("rope_type") != "proportional":
        pytest.skip("this Transformers has no such rotary embedding")
    with pytest.raises(UserError, match="--to hf4: Transformers 4 has no setting for rotary embeddings of the type"):
        main([str(folder), str(tmp_path / "new"), "--to", "hf4"])


def test_an_adapter_is_merged_or_kept(tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = saved(tmp_path, lora=True, mean=0.25)
    before = raw_scores(folder)
    assert main([str(folder / "adapter"), str(tmp_path / "merged")]) == 0
    assert raw_scores(tmp_path / "merged") == pytest.approx(before, abs=1e-5)
    assert main([str(folder), str(tmp_path / "kept"), "--adapter"]) == 0
    assert adapters.is_adapter(str(tmp_path / "kept"))
    assert load(tmp_path / "kept").mean == 0.25  # which scores.json has kept
    assert raw_scores(tmp_path / "kept") == pytest.approx(before, abs=1e-5)
    for wrong, says in (("--to", "PEFT alone"), ("base", "has no adapter/")):
        words = [str(folder), str(tmp_path / "no"), "--adapter", "--to", "dschat"]
        if wrong == "base":
            words = [str(tmp_path / "merged"), str(tmp_path / "no"), "--adapter"]
        with pytest.raises(UserError, match=says):
            main(words)


def test_an_adapter_that_scores_otherwise_than_its_merged_model_is_refused(tmp_path):
    folder = saved(tmp_path, lora=True)
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * 1.3 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="scores otherwise than the model that has it merged"):
        main([str(folder), str(tmp_path / "kept"), "--adapter"])


def test_what_an_adapter_s_base_said_of_its_scores_is_forgotten(tmp_path, own_cache):
    """An adapter of another trainer, beside a base that was normalized."""
    folder = saved(tmp_path, lora=True)
    (folder / "adapter" / "scores.json").unlink()
    change(tmp_path / "base" / "config.json", score_mean=3.0, reward_model={"objective": "mse"})
    (folder / "adapter").rename(tmp_path / "adapter")
    merged = load(tmp_path / "adapter")
    assert merged.mean == 0.0
    assert not hasattr(merged.scorer.config, "reward_model")


def test_a_finished_run_s_card_goes_with_its_model(tmp_path):
    folder = saved(tmp_path, tokenizer=tiny.llama())
    assert main([str(folder), str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none" / "README.md").exists()
    (folder / "run.json").write_text(json.dumps(RUN | {"special": {"end": 0, "pad": 1}, "data": {}, "content": {}}))
    metrics = {"pairs": 9, "accuracy": 0.75}
    (folder / "finished.json").write_text(json.dumps({"step": 7, "metrics": metrics, "sets": {"": metrics}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"split": "alarm", "message": "many are equal"}) + "\n")
    assert main([str(folder), str(tmp_path / "new"), "--to", "sentence-transformers"]) == 0
    card = (tmp_path / "new" / "README.md").read_text()
    assert "the weights of step 7" in card
    assert "| held out | 9 | 0.7500 |" in card
    assert "- many are equal" in card
    assert "from sentence_transformers import SentenceTransformer" in card
    assert "| function_to_apply | none |" in card and "| scored_at | last token |" in card


def test_a_folder_in_use_and_one_that_is_not_there(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(UserError, match="is in use"):
        main([str(folder), str(folder)])
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "gone"), str(tmp_path / "new")])


@pytest.mark.parametrize("pairs", [True, False])
def test_an_encoder_keeps_how_it_reads_texts(pairs, tmp_path):
    folder = saved(tmp_path, "bert")
    change(folder / "config.json", score_pairs=pairs)
    assert main([str(folder), str(tmp_path / "again")]) == 0
    assert written(tmp_path / "again")["score_pairs"] is pairs
    assert load(tmp_path / "again").encoding.pairs is pairs


def test_a_pair_of_nothing_is_a_pair_for_whoever_asks():
    """Of words that no tokenizer knows nothing is left without special tokens."""
    bert = tiny.bert()
    special = choose_special_tokens(bert, len(bert))
    ids = verify.encoded("", False, bert, special, prompt="")
    asked = {"text": "", "templated": False, "messages": None, "prompt": ""}
    assert fresh_load.encode([asked], bert)[1] == [ids] and len(ids) == 3


def test_a_misspelt_flag_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unrecognized arguments: --adaptr; did you mean --adapter"):
        main([str(tmp_path), str(tmp_path / "new"), "--adaptr"])
