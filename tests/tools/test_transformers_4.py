# SPDX-License-Identifier: Apache-2.0
"""What ``reward-model export --to hf4`` writes, in a real Transformers 4 (``TOOL_TRANSFORMERS_4``).

Its class and its pipeline give our scores: rotary embeddings, tokenizer and head are read as they were saved.
"""

import json

import foreign
import pytest
import tiny
import torch
from foreign import BF16, CHOSEN, PROMPTS, REJECTED

from reward_model.inference import load
from reward_model.models import saving

pytestmark = pytest.mark.slow
ROWS = [row for row in zip(PROMPTS + PROMPTS, CHOSEN + REJECTED) if len("".join(row)) < 64]  # gpt2's positions
THETA = {"rope_type": "default", "rope_theta": 523.0}  # no version's own, so that one that is not read shows
SCALED = {"rope_type": "linear", "factor": 3.0, "rope_theta": 523.0}
FORMS = {
    "llama": {},
    "llama, another base": {"rope": THETA},
    "llama, scaled": {"rope": SCALED},
    "llama's tokenizer": {"tokenizer": tiny.llama},
    "chat": {"tokenizer": tiny.chatml},
    "bf16": {"dtype": torch.bfloat16},
    "merged adapter": {"lora": True},
    "normalized": {"mean": 0.75},
    "qwen2": {"family": "qwen2", "rope": THETA},
    "qwen3": {"family": "qwen3", "rope": THETA},
    "gemma2": {"family": "gemma2"},
    "gpt2": {"family": "gpt2"},
    "gpt_neox": {"family": "gpt_neox", "rope": THETA},
    "opt": {"family": "opt"},
    "bloom": {"family": "bloom"},
    "bert": {"family": "bert", "pairs": True},
    "roberta": {"family": "roberta", "pairs": True},
    "deberta": {"family": "deberta", "pairs": True},
}


def test_what_is_exported_scores_as_here(tmp_path):
    python = foreign.interpreter("TOOL_TRANSFORMERS_4", "Transformers 4")
    questions, ours = [], []
    for form, options in FORMS.items():
        given = {name: value for name, value in options.items() if name != "rope"}
        saved = foreign.Saved(tmp_path / form, **given)
        if "rope" in options:
            file = saved.folder / "config.json"
            config = json.loads(file.read_text())
            config["rope_parameters"] |= options["rope"]
            file.write_text(json.dumps(config))
        exported = tmp_path / form / "hf4"
        saving.save(load(saved.folder).scorer, saved.tokenizer, exported, "hf4")
        ours.append([score + options.get("mean", 0.0) for score in saved.scores(*zip(*ROWS))])
        texts = ROWS
        if "pairs" not in options:
            texts = [prompt + answer + saved.tokenizer.eos_token for prompt, answer in ROWS]
        questions.append({"folder": exported, "texts": texts})
    answers = foreign.ask(python, "with_transformers.py", tmp_path, questions)
    differences = foreign.Differences()
    for form, scores, found in zip(FORMS, ours, answers):
        assert found["version"].startswith("4."), found["version"]
        near = BF16 if form == "bf16" else 3e-5  # gemma2 scales its embeddings in another order
        for what in ("scores", "pipeline"):
            differences.note(f"Transformers {found['version']}, {what}", form, scores, found[what], near)
    differences.check()
