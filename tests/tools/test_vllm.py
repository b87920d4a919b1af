# SPDX-License-Identifier: Apache-2.0
"""vLLM's pooling models on a CPU, in an environment of its own (``TOOL_VLLM``), from folders that the trainer saved."""

import json
import math

import foreign
import pytest
import tiny
import torch
from foreign import BF16, CHATS, CHOSEN, PROMPTS, REJECTED

pytestmark = pytest.mark.slow
TEXTS = [prompt + response for prompt, response in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]
NEAR = 1e-4


@pytest.fixture
def vllm(tmp_path):
    """One model after another, each in a process of its own."""
    python = foreign.interpreter("TOOL_VLLM", "vLLM")

    def ask(folder, dtype="float32", **question):
        (found,) = foreign.ask(python, "with_vllm.py", tmp_path, [{"folder": folder, "dtype": dtype} | question])
        return found

    return ask


def name_of(found, what="classify"):
    return f"vLLM {found['version']} (Transformers {found['transformers']}), {what}"


def closed(saved):
    """Texts with the end token that vLLM does not add; an encoder's tokenizer closes its texts itself."""
    return [text + (saved.tokenizer.eos_token or "") for text in TEXTS]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("decoder", {}),
        ("start token", {"tokenizer": tiny.llama}),
        ("qwen3", {"family": "qwen3"}),
        ("merged adapter", {"lora": True}),
        ("encoder", {"family": "bert"}),
        ("roberta", {"family": "roberta"}),
        ("bf16", {"dtype": torch.bfloat16}),
    ],
)
def test_classify_gives_the_raw_score(form, options, vllm, tmp_path):
    saved = foreign.Saved(tmp_path / "saved", **options)
    found = vllm(saved.folder, "bfloat16" if form == "bf16" else "float32", texts=closed(saved))
    differences = foreign.Differences()
    differences.note(name_of(found), form, saved.scores(), found["texts"], BF16 if form == "bf16" else NEAR)
    differences.check()


def test_classify_of_chats(vllm, tmp_path):
    saved = foreign.chat(tmp_path / "saved")
    texts = [saved.tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    ids = saved.tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = vllm(saved.folder, texts=texts, ids=ids)
    differences = foreign.Differences()
    differences.note(name_of(found), "chat", saved.chat_scores(), found["texts"], NEAR)
    differences.note(name_of(found), "chat, ids", saved.chat_scores(), found["ids"], NEAR)
    differences.check()


def test_the_mean_of_a_normalized_model_is_taken_off_where_it_is_told(vllm, tmp_path):
    saved = foreign.Saved(tmp_path / "saved", mean=0.75)
    differences = foreign.Differences()
    found = vllm(saved.folder, texts=closed(saved))
    raw = [score - 0.75 for score in found["texts"]]
    differences.note(name_of(found), "normalized, the mean taken off here", saved.scores(), raw, NEAR)
    found = vllm(saved.folder, texts=closed(saved), options={"pooler_config": {"logit_mean": 0.75}})
    differences.note(name_of(found), "normalized, logit_mean", saved.scores(), found["texts"], NEAR)
    differences.check()


def test_without_problem_type_it_gives_a_probability(vllm, tmp_path):
    """What ``problem_type`` in config.json is for; CrossEncoder's key alone is read as well."""
    saved = foreign.Saved(tmp_path / "saved")
    file, ours = saved.folder / "config.json", saved.scores()
    config = json.loads(file.read_text())
    assert config.pop("problem_type") == "regression"
    file.write_text(json.dumps(config))
    differences = foreign.Differences()
    found = vllm(saved.folder, texts=closed(saved))
    differences.note(name_of(found), "CrossEncoder's key alone", ours, found["texts"], NEAR)
    del config["sentence_transformers"]
    file.write_text(json.dumps(config))
    found = vllm(saved.folder, texts=closed(saved))
    squeezed = [1 / (1 + math.exp(-score)) for score in ours]
    differences.note(name_of(found), "neither key, beside the sigmoid", squeezed, found["texts"], NEAR)
    differences.check()


def test_score_joins_two_texts_as_they_are(vllm, tmp_path):
    saved = foreign.Saved(tmp_path / "saved")
    answers = [response + saved.tokenizer.eos_token for response in CHOSEN + REJECTED]
    found = vllm(saved.folder, pairs=[PROMPTS + PROMPTS, answers])
    differences = foreign.Differences()
    differences.note(name_of(found, "score"), "decoder", saved.scores(), found["pairs"], NEAR)
    differences.check()
