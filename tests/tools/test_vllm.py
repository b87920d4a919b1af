# SPDX-License-Identifier: Apache-2.0
"""vLLM's pooling models on a CPU, in an environment of its own (``TOOL_VLLM``), from folders that the trainer saved."""

import json
import math
import shutil

import foreign
import pytest
import tiny
import torch
from foreign import BF16, CHATS, CHOSEN, PROMPTS, REJECTED

import reward_model

pytestmark = pytest.mark.slow
TEXTS = [prompt + response for prompt, response in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
NEAR = 1e-4
FORMS = {
    "decoder": {},
    "encoder": {"family": "bert"},
    "start token": {"tokenizer": tiny.llama},
    "merged adapter": {"lora": True},
    "bf16": {"dtype": torch.bfloat16},
    "qwen3": {"family": "qwen3"},
    "roberta": {"family": "roberta"},
}


@pytest.fixture
def vllm(tmp_path):
    """Answers of one model after another, in one process."""
    python = foreign.interpreter("TOOL_VLLM", "vLLM")

    def ask(questions):
        questions = [{"dtype": "float32"} | question for question in questions]
        return foreign.ask(python, "with_vllm.py", tmp_path, questions)

    return ask


def name_of(found, what="classify"):
    return f"vLLM {found['version']} (Transformers {found['transformers']}), {what}"


def closed(saved):
    """Texts with the end token that vLLM does not add; an encoder's tokenizer closes its texts itself."""
    tokenizer = saved.tokenizer
    closes = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # RoBERTa's, which has such a token, too
    return [text + ("" if closes else tokenizer.eos_token or "") for text in TEXTS]


def test_classify_gives_the_raw_score(vllm, tmp_path):
    questions, ours = [], []
    for form, options in FORMS.items():
        saved = foreign.Saved(tmp_path / form, **options)
        ours.append(saved.scores())
        dtype = "bfloat16" if form == "bf16" else "float32"
        questions.append({"folder": saved.folder, "texts": closed(saved), "dtype": dtype})
    differences = foreign.Differences()
    for form, scores, found in zip(FORMS, ours, vllm(questions)):
        if "error" in found:
            differences.fail(name_of(found), form, found["error"])
        else:
            differences.note(name_of(found), form, scores, found["texts"], BF16 if form == "bf16" else NEAR)
    differences.check()


def test_chats_pairs_and_the_mean_of_a_normalized_model(vllm, tmp_path):
    """``score`` joins two texts as they are; ``logit_mean`` of the pooler's configuration is taken off."""
    chat, text = foreign.chat(tmp_path / "chat"), foreign.Saved(tmp_path / "text", mean=0.75)
    texts = [chat.tokenizer.apply_chat_template(each, tokenize=False) for each in CHATS]
    ids = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = [response + text.tokenizer.eos_token for response in CHOSEN + REJECTED]
    told = {"folder": text.folder, "texts": closed(text), "options": {"pooler_config": {"logit_mean": 0.75}}}
    raw, of_mean, of_chats = vllm(
        [
            {"folder": text.folder, "texts": closed(text), "pairs": [PROMPTS + PROMPTS, answers]},
            told,
            {"folder": chat.folder, "texts": texts, "ids": ids},
        ]
    )
    differences, ours = foreign.Differences(), text.scores()
    differences.note(name_of(raw), "normalized, raw", [score + 0.75 for score in ours], raw["texts"], NEAR)
    differences.note(name_of(raw, "score"), "decoder", [score + 0.75 for score in ours], raw["pairs"], NEAR)
    differences.note(name_of(raw), "normalized, logit_mean", ours, of_mean["texts"], NEAR)
    differences.note(name_of(raw), "chat", chat.chat_scores(), of_chats["texts"], NEAR)
    differences.note(name_of(raw), "chat, ids", chat.chat_scores(), of_chats["ids"], NEAR)
    differences.check()


def test_without_problem_type_it_gives_a_probability(vllm, tmp_path):
    """What ``problem_type`` in config.json is for; CrossEncoder's key alone is read as well."""
    saved = foreign.Saved(tmp_path / "text")
    config = json.loads((saved.folder / "config.json").read_text())
    assert config["problem_type"] == "regression"
    folders = []
    for dropped in (("problem_type",), ("problem_type", "sentence_transformers")):
        folders.append(shutil.copytree(saved.folder, tmp_path / f"without {len(dropped)}"))
        kept = {name: value for name, value in config.items() if name not in dropped}
        (folders[-1] / "config.json").write_text(json.dumps(kept))
    one, neither = vllm([{"folder": folder, "texts": closed(saved)} for folder in folders])
    differences, ours = foreign.Differences(), saved.scores()
    differences.note(name_of(one), "CrossEncoder's key alone", ours, one["texts"], NEAR)
    squeezed = [1 / (1 + math.exp(-score)) for score in ours]
    differences.note(name_of(one), "neither key, beside the sigmoid", squeezed, neither["texts"], NEAR)
    differences.check()


def test_a_narrow_projection_is_for_embed(vllm, tmp_path):
    """OPT-350m's shape: the day that classify takes it, ``by_keys`` and the guide have to say so."""
    saved = foreign.Saved(tmp_path, family="opt")
    reward_model.export(saved.folder, tmp_path / "modules", "sentence-transformers")
    refused, found = vllm(
        [{"folder": saved.folder, "texts": closed(saved)}, {"folder": tmp_path / "modules", "embedded": closed(saved)}]
    )
    assert "Tried to load weights of size" in refused["error"]
    differences = foreign.Differences()
    differences.note(name_of(found, "embed"), "a decoder as modules", saved.scores(), found["embedded"], NEAR)
    differences.check()


def test_embed_of_a_mean_over_the_tokens(vllm, tmp_path):
    """The mean is the bias of the dense layer, so that it is taken off."""
    saved = foreign.Saved(tmp_path / "mean", family="bert", pooling="mean", mean=0.75)
    (found,) = vllm([{"folder": saved.folder, "embedded": closed(saved)}])
    differences = foreign.Differences()
    differences.note(name_of(found, "embed"), "mean", saved.scores(), found["embedded"], NEAR)
    differences.check()
