# SPDX-License-Identifier: Apache-2.0
"""vLLM's pooling models on a CPU, in an environment of its own (``TOOL_VLLM``), from folders that the trainer saved."""

import json
import math

import foreign
import pytest
import tiny
import torch
from foreign import CHATS, CHOSEN, PROMPTS, REJECTED

from reward_model.inference import load

pytestmark = pytest.mark.slow
TEXTS = [prompt + response for prompt, response in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED)]


@pytest.fixture
def vllm(tmp_path):
    python = foreign.interpreter("TOOL_VLLM", "vLLM")

    def ask(folder, dtype="float32", **question):
        return foreign.ask(python, "with_vllm.py", tmp_path, folder=folder, dtype=dtype, **question)

    return ask


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
    saved = foreign.Saved(tmp_path, **options)
    dtype = "bfloat16" if form == "bf16" else "float32"
    found = vllm(saved.folder, dtype, texts=closed(saved))
    name = f"vLLM {found['version']} (Transformers {found['transformers']}), classify"
    near = foreign.BF16 if form == "bf16" else 1e-4
    assert foreign.largest_difference(name, form, saved.scores(), found["texts"]) < near


def test_classify_of_chats(vllm, tmp_path):
    saved = foreign.chat(tmp_path)
    texts = [saved.tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    ids = saved.tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = vllm(saved.folder, texts=texts, ids=ids)
    name = f"vLLM {found['version']}, classify"
    assert foreign.largest_difference(name, "chat", saved.chat_scores(), found["texts"]) < 1e-4
    assert foreign.largest_difference(name, "chat, ids", saved.chat_scores(), found["ids"]) < 1e-4


def test_the_mean_of_a_normalized_model_is_taken_off_when_it_is_told(vllm, tmp_path):
    saved = foreign.Saved(tmp_path, mean=0.75)
    ours, texts = saved.scores(), closed(saved)
    found = vllm(saved.folder, texts=texts)
    raw = [score - 0.75 for score in found["texts"]]
    assert foreign.largest_difference(f"vLLM {found['version']}", "normalized, mean taken off here", ours, raw) < 1e-4
    found = vllm(saved.folder, texts=texts, options={"pooler_config": {"logit_mean": 0.75}})
    name = f"vLLM {found['version']}"
    assert foreign.largest_difference(name, "normalized, logit_mean", ours, found["texts"]) < 1e-4


def test_without_problem_type_it_gives_a_probability(vllm, tmp_path):
    """What ``problem_type`` in config.json is for; CrossEncoder's key alone is read as well."""
    saved = foreign.Saved(tmp_path)
    file = saved.folder / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("problem_type") == "regression"
    file.write_text(json.dumps(config))
    texts, ours = closed(saved), saved.scores()
    assert foreign.largest_difference("vLLM", "Identity alone", ours, vllm(saved.folder, texts=texts)["texts"]) < 1e-4
    del config["sentence_transformers"]
    file.write_text(json.dumps(config))
    found = vllm(saved.folder, texts=texts)["texts"]
    squeezed = [1 / (1 + math.exp(-score)) for score in ours]
    assert foreign.largest_difference("vLLM", "neither key, against the sigmoid", squeezed, found) < 1e-4


def test_score_of_pairs_reads_no_end_token_of_its_own(vllm, tmp_path):
    """``score`` of a decoder joins two texts as they are."""
    saved = foreign.Saved(tmp_path)
    answers = [response + saved.tokenizer.eos_token for response in CHOSEN + REJECTED]
    found = vllm(saved.folder, pairs=[PROMPTS + PROMPTS, answers])
    ids = [
        saved.tokenizer(prompt)["input_ids"] + saved.tokenizer(response)["input_ids"]
        for prompt, response in zip(PROMPTS + PROMPTS, answers)
    ]
    ours = load(saved.folder).score_ids(ids)
    assert foreign.largest_difference(f"vLLM {found['version']}", "score, decoder", ours, found["pairs"]) < 1e-4
