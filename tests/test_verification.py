# SPDX-License-Identifier: Apache-2.0
"""``reward-model verify``: right folders have no line that differs, spoilt ones differ on the right line."""

import json
import sys
from dataclasses import replace

import models
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification

import reward_model
from reward_model.__main__ import main as command
from reward_model.common.errors import UserError
from reward_model.config.verification import VerifyConfig
from reward_model.data.encoding import Encoding
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.inference import Reading, load_to_read
from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import head_layer
from reward_model.training import verification, verify, ways
from reward_model.training.by_keys import sglang, vllm
from reward_model.training.naming import kind_of_texts, name_model
from reward_model.training.texts import Text, end_token, made_up, scored_as, texts_of
from reward_model.training.verify import whole

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {
    "loss": ["logistic"],
    "margin": "0.5",
    "max_seq_len": 64,
    "score_penalty": "center",
    "score_penalty_weight": 0.01,
}
FEW = 5  # texts: a short one, long ones, and chats where there are any


def saved(root, family="llama", form="hf", tokenizer=None, lora=False, dtype=torch.float32, mean=None, **options):
    """A model with weights that have moved, named and saved as a run does."""
    own = models.write(family, root / "base", max_position_embeddings=128, n_positions=128)
    tokenizer = tokenizer or own
    tokenizer.save_pretrained(root / "base")
    scorer = load_for_training(str(root / "base"), dtype, seed=0, **options)
    if lora:
        add_lora(scorer, 4, 6, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        head_layer(scorer).weight.add_(0.3 * torch.randn_like(head_layer(scorer).weight))
    special = choose_special_tokens(tokenizer, models.VOCABULARY)
    for config in (scorer.config, scorer.config.get_text_config()):
        config.pad_token_id = special.pad
    if mean is not None:
        scorer.config.score_mean = mean
    name_model(scorer, tokenizer, RUN | {"special": {"end": special.end}})
    saving.save(scorer, tokenizer, root / "out", form)
    return root / "out"


def here(folder, asked=tuple(ways.WAYS)):
    """The lines of a folder, its ways asked in this process."""
    values = json.loads((folder / "config.json").read_text())
    place = ways.Saved(folder, [])
    texts = made_up(place.tokenizer, verification.longest_of(values, place.tokenizer))
    place.texts = [*texts[: FEW - 2], *texts[-2:]]
    answers = {way: ways.answer(place, way) for way in ("our evaluation", *asked)}
    return {line.way: line for line in verification._lines(answers)}


QUICK = ("special tokens", "Transformers, as saved", "OpenRLHF")


def differing(folder, *more):
    """The ways that differ, of the quick ones and some more."""
    return {way: line.note for way, line in here(folder, (*QUICK, *more)).items() if line.status == "differs"}


def change(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


TRIED = ("special tokens", "Transformers, float32", "Transformers, as saved", "saved again")


@pytest.mark.parametrize(
    ("family", "options", "also"),
    [
        (
            "llama",
            {"tokenizer": "chatml"},
            ("padded on the left", "chats, apply_chat_template", "pipeline", "OpenRLHF"),
        ),
        ("bert", {"pooling": "mean", "mean": 0.25}, ()),
        slow("llama", {"tokenizer": "llama", "form": "both"}, ("padded on the left", "pipeline", "DeepSpeed-Chat")),
        slow("gpt2", {"lora": True}, ("pipeline", "base and adapter", "OpenRLHF")),
        slow("qwen3", {"dtype": torch.bfloat16}, ("padded on the left", "pipeline", "OpenRLHF")),
        slow("bert", {}, ("pipeline",)),
        slow("roberta", {}, ("pipeline",)),
        slow("cohere", {"form": "both", "mean": 0.25}, ("padded on the left", "DeepSpeed-Chat")),
    ],
)
def test_a_right_folder_has_no_line_that_differs(family, options, also, tmp_path):
    if "tokenizer" in options:
        options = options | {"tokenizer": getattr(tiny, options["tokenizer"])()}
    lines = here(saved(tmp_path, family, **options))
    assert [way for way, line in lines.items() if line.status == "differs"] == []
    assert {way: line.status for way, line in lines.items() if way in (*TRIED, *also)} == dict.fromkeys(
        (*TRIED, *also), "same"
    )
    compared = [line for line in lines.values() if line.largest is not None and line.status == "same"]
    assert all(line.texts > 0 and line.largest <= line.explained for line in compared)


def test_pads_on_the_left_that_shift_positions_are_told(tmp_path):
    folder = saved(tmp_path, "gpt2")
    line = here(folder, ["padded on the left"])["padded on the left"]
    assert (line.status, line.largest > line.explained) == ("told", True)
    assert "pad on the right, as its tokenizer does (with position_ids the same)" in line.note
    change(folder / "tokenizer_config.json", padding_side="left")  # then everybody gets it so
    assert here(folder, ["padded on the left"])["padded on the left"].status == "differs"


# --- spoilt ---


def test_a_sigmoid_is_found(tmp_path):
    folder = saved(tmp_path)
    change(folder / "config.json", problem_type=...)
    assert list(differing(folder, "pipeline")) == ["pipeline"]
    assert vllm(json.loads((folder / "config.json").read_text()), None) == (
        "classify would give sigmoid(score): problem_type in config.json is not regression",
        False,
    )


@pytest.mark.parametrize("has_run", [True, False])
def test_another_pad_is_found(has_run, tmp_path):
    folder = saved(tmp_path)
    if has_run:  # which alone knows that the end token was none
        change(folder / "config.json", pad_token_id=0)
        change(folder / "tokenizer_config.json", pad_token=tiny.EOS)
        (folder / "run.json").write_text(json.dumps({"special": {"pad": 1}}))
        found = differing(folder)
        assert found["special tokens"] == "pad_token_id in config.json is 0, and the training's pad was 1"
        assert set(found) == {"special tokens", "OpenRLHF"}  # it takes the last token, others the one before
    else:
        change(folder / "config.json", pad_token_id=5)
        found = differing(folder)
        assert found["special tokens"] == "pad_token_id in config.json is 5, and the tokenizer pads with 1"
        assert "Transformers, as saved" in found  # which takes pads of a batch for text


def test_an_adapter_of_another_head_is_found(tmp_path):
    folder = saved(tmp_path, lora=True)
    file = folder / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    (head,) = [name for name in state if "score" in name]
    save_file(state | {head: state[head] * 1.2}, file, metadata={"format": "pt"})
    assert list(differing(folder, "base and adapter")) == ["base and adapter"]


def test_an_adapter_whose_base_is_gone_is_not_verified(tmp_path):
    folder = saved(tmp_path, lora=True)
    change(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    line = here(folder, ["base and adapter"])["base and adapter"]
    assert (line.status, line.note) == ("not verified", f"its base {tmp_path / 'gone'} is not here")


def with_ends(tokenizer, ends):
    """The tokenizer, which puts end tokens after every text from now on."""
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    closing = " ".join([tokenizer.eos_token] * ends)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {closing}".strip(), special_tokens=[end]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        (1, "end token: <|endoftext|> is added to a text by config.json, and none is for this tokenizer"),
        (2, "a text gets 0 start and 2 end tokens"),
    ],
)
def test_a_tokenizer_that_closes_texts_once_more_is_found(ends, says, tmp_path):
    folder = saved(tmp_path)
    with_ends(tiny.tokenizer(), ends).save_pretrained(folder)
    assert differing(folder)["special tokens"] == says


def test_altered_weights_of_step_3_are_found(tmp_path):
    folder = saved(tmp_path, form="both")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["v_head.weight"] *= 1.1
    torch.save(state, folder / "pytorch_model.bin")
    assert list(differing(folder, "DeepSpeed-Chat")) == ["DeepSpeed-Chat"]


def test_an_altered_dense_layer_is_found(tmp_path):
    folder = saved(tmp_path, "bert", pooling="mean", mean=0.25)
    file = folder / "2_Dense" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"linear.bias": state["linear.bias"] + 0.1}, file)
    assert list(differing(folder)) == ["Transformers, as saved"]


def test_a_missing_weight_is_found(tmp_path):
    folder = saved(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = differing(folder)
    assert "model.norm.weight" in found["our evaluation"]
    assert "1 missing keys, model.norm.weight among them" in found["Transformers, as saved"]


def test_scores_that_are_no_numbers_differ():
    reference = {"scores": [1.0, 2.0, 3.0], "tolerances": [0.1] * 3, "mean": 0.5}
    line = verification.compared("a", {"scores": [1.0, float("nan"), 3.0]}, reference)
    assert (line.status, line.largest) == ("differs", float("inf"))
    line = verification.compared("a", {"scores": [0.5, None, 2.55], "applies_mean": True}, reference)
    assert (line.status, line.texts, round(line.largest, 6)) == ("same", 2, 0.05)
    line = verification.compared("a", {"scores": [1.2, 2.0, 3.0], "note": "so"}, reference)
    assert line.note == "text 1 of 3 gets 1.2, and 1 here; so"


# --- by keys ---


def test_what_servers_would_do():
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config |= {"problem_type": "regression", "sentence_transformers": {"activation_fn": ways_identity()}}
    said, is_right = vllm(config | {"score_mean": 0.25}, None)
    assert is_right
    assert "--pooler-config '{\"logit_mean\": 0.25}'" in said
    assert "logit_mean" not in vllm(config, None)[0]
    assert sglang(config, None)[1]
    for would in (vllm, sglang):
        assert not would(config | {"id2label": {"0": "a", "1": "b"}}, None)[1]
    assert "embed" in vllm(config, "modules")[0]
    narrow, wide = ({"word_embed_proj_dim": size, "hidden_size": 32} for size in (16, 32))
    assert "it refuses" in vllm(config | narrow, None)[0] and "it refuses" not in vllm(config | wide, None)[0]
    assert "no class" in sglang(config | {"architectures": ["OPTForSequenceClassification"]}, None)[0]


def ways_identity():
    return "torch.nn.modules.linear.Identity"


# --- texts ---


def test_a_text_is_closed_once_whoever_closes_it():
    plain, closing = tiny.tokenizer(), with_ends(tiny.tokenizer(), 1)
    assert (end_token(plain), end_token(closing), end_token(tiny.bert())) == (tiny.EOS, None, None)
    special = choose_special_tokens(plain, models.VOCABULARY)
    text = Text("2 + 2 =", " 4")
    ids = whole(scored_as(text, Encoding(plain, special)))
    assert ids == plain("2 + 2 = 4" + tiny.EOS)["input_ids"]
    assert whole(scored_as(text, Encoding(closing, special))) == ids
    chat = Text("", "", messages=[{"role": "user", "content": "a"}])
    found = whole(scored_as(chat, Encoding(tiny.chatml(), special, pairs=True)))
    assert found[-2:] == tiny.chatml()("<|im_end|>\n")["input_ids"]
    bert = tiny.bert()
    pair = scored_as(text, Encoding(bert, choose_special_tokens(bert, models.VOCABULARY), pairs=True))
    assert whole(pair) == bert("2 + 2 =", " 4")["input_ids"] and pair.two_segments


def test_texts_of_data_keep_prompt_and_response_apart(tmp_path, own_cache):
    rows = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, {"prompt": "x"}, {"prompt": "y", "chosen": "a"}]
    rows += [{"prompt": "3 + 3 =", "chosen": " 6", "rejected": " 7"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = texts_of(str(tmp_path / "data.jsonl"), tiny.tokenizer(), False, None)
    assert texts == [Text("2 + 2 =", " 4"), Text("3 + 3 =", " 7")]
    as_chats = texts_of(str(tmp_path / "data.jsonl"), tiny.chatml(), True, None)
    assert as_chats[0].templated
    assert as_chats[0].prompt + as_chats[0].response == (
        "<|im_start|>user\n2 + 2 =<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )


def test_long_texts_are_left_out():
    texts = made_up(tiny.tokenizer(), 20)
    assert 0 < len(texts) < len(made_up(tiny.tokenizer()))
    with pytest.raises(UserError, match="are longer than the 3 tokens"):
        made_up(tiny.tokenizer(), 3)


# --- what the model is ---


def test_the_config_says_what_the_model_is(tmp_path):
    config = json.loads((saved(tmp_path, mean=0.25, tokenizer=tiny.llama()) / "config.json").read_text())
    assert config["reward_model"] == {
        "objective": "logistic",
        "margin": 0.5,
        "penalty": "0.01 center",
        "texts": "text",
        "chat": False,
        "end_token": tiny.EOS,
        "pair_encoding": False,
        "max_seq_len": 64,
        "scored_at": "last token",
        "normalized": True,
        "version": reward_model.__version__,
    }
    assert (config["problem_type"], config["function_to_apply"]) == ("regression", "none")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.reward_model["objective"] == "logistic"
    saving.forget_scale(model.config)
    assert not hasattr(model.config, "reward_model") and not hasattr(model.config, "score_mean")


def test_a_model_without_its_run_is_read_as_the_run_said(tmp_path):
    """What was exported has no run.json; a run.json beside the model has the last word."""
    folder = saved(tmp_path, tokenizer=tiny.chatml())
    named = json.loads((folder / "config.json").read_text())["reward_model"]
    change(folder / "config.json", reward_model=named | {"max_seq_len": 40, "chat": True})
    assert load_to_read(str(folder))[1] == Reading(True, 40)
    (folder / "run.json").write_text(json.dumps({"content": {}, "max_seq_len": 48, "chat": False}))
    assert load_to_read(str(folder))[1] == Reading(False, 48)


def test_chats_are_known_by_what_the_template_writes():
    from reward_model.data.comparisons import Comparison

    tokenizer = tiny.chatml()
    chat = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))["input_ids"]
    text = tokenizer("Human: x")["input_ids"]
    assert kind_of_texts(tokenizer, [Comparison(chat, [[5]])] * 3) == "chat"
    assert kind_of_texts(tokenizer, [Comparison(text, [[5]])] * 3) == "text"
    assert kind_of_texts(tiny.tokenizer(), [Comparison(chat, [[5]])] * 3) == "text"
    plain = tiny.tokenizer(chat_template="Human: {{ messages[0].content }}")  # as text that no template wrote has it
    assert [kind_of_texts(plain, [Comparison(text, [[5]])], chat=flag) for flag in (False, True)] == ["text", "chat"]


# --- the command, in processes of its own ---


def test_the_command_tells_and_ends_with_1(tmp_path, capsys, monkeypatch):
    """A process for all ways; the answers of this process in its place where they are the same."""
    folder = saved(tmp_path, "gpt2", lora=True, mean=0.25)
    asked = ("our evaluation", "special tokens", "pipeline")
    monkeypatch.setattr(verification, "ask", lambda *given: {way: ways.answer(place, way) for way in asked}.items())
    place = ways.Saved(folder, made_up(tiny.tokenizer(), 60)[:3])
    assert command(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "our evaluation              reference     3 texts; float32, GPT2ForSequenceClassification" in said
    assert "nothing differs beyond rounding" in said
    assert "0.25; reward_model.inference alone subtracts it" in said
    change(folder / "config.json", problem_type=...)
    place = ways.Saved(folder, place.texts)
    assert command(["verify", str(folder / "adapter"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert [line["way"] for line in found["lines"] if line["status"] == "differs"] == ["pipeline", "vLLM, by its keys"]


DYING = """#!{python}
import json, os, sys
question, answer = (open(name, mode) for name, mode in zip(sys.argv[3:], "ra"))
for way in json.load(question)["ways"]:
    print(json.dumps({{"begins": way}}), file=answer, flush=True)
    if way == "pipeline":
        os.kill(os.getpid(), 9)
    print(json.dumps({{"way": way, "scores": [1.0], "tolerances": [0.1], "mean": 0, "note": ""}}), file=answer)
"""


def test_a_process_that_dies_costs_one_way(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(DYING.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(verification.sys, "executable", str(tmp_path / "python"))
    asked = ["our evaluation", "pipeline", "Transformers, as saved"]
    lines = {line.way: line for line in verification._lines(dict(verification.ask(tmp_path, [], asked)))}
    assert {way: line.status for way, line in lines.items()} == {
        "our evaluation": "reference",
        "pipeline": "not verified",
        "Transformers, as saved": "same",
    }
    assert lines["pipeline"].note == "its process ended by signal 9"


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    """What the processes answer is what this one does."""
    folder = saved(tmp_path, tokenizer=tiny.chatml())
    found = reward_model.verify(folder)
    assert found.is_same
    there = {line.way: line.status for line in found.lines}
    assert {way: line.status for way, line in here(folder).items()}.items() <= there.items()
    assert found.texts == len(made_up(tiny.chatml(), 128))


def test_what_cannot_be_verified_is_an_error_or_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        reward_model.verify(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no model"):
        reward_model.verify(tmp_path)
    folder = saved(tmp_path)
    monkeypatch.setattr(verify, "free_memory", lambda: 10**8)
    found = reward_model.verify(folder, VerifyConfig())
    assert {line.status for line in found.lines} == {"not verified"}
    assert found.is_same
    assert replace(found, lines=[verification.Line("a", "differs")]).is_same is False
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter alone"):
        reward_model.verify(tmp_path / "alone")
