# SPDX-License-Identifier: Apache-2.0
"""rewardbench's runner, in an environment of its own (``TOOL_REWARDBENCH``), on folders that the trainer saved."""

import json

import foreign
import pytest
import torch
from foreign import BF16, CHATS, PROMPTS

pytestmark = pytest.mark.slow
FORMS = {
    "chat": {},
    "merged adapter": {"lora": True},
    "normalized": {"mean": 0.75},
    "bf16": {"dtype": torch.bfloat16},
    "qwen2": {"family": "qwen2"},
}


def test_its_runner_scores_as_here(tmp_path):
    python = foreign.interpreter("TOOL_REWARDBENCH", "rewardbench")
    rows = tmp_path / "rows.jsonl"
    pairs = zip(CHATS[: len(PROMPTS)], CHATS[len(PROMPTS) :])
    lines = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions, ours = [], []
    for form, options in FORMS.items():
        saved = foreign.chat(tmp_path / form, **options)
        ours.append(saved.chat_scores(CHATS))
        dtype = "bfloat16" if form == "bf16" else "float32"
        questions.append({"folder": saved.folder, "rows": rows, "output": "results/", "dtype": dtype})
    differences = foreign.Differences()
    answers = foreign.ask(python, "with_rewardbench.py", tmp_path, questions)
    for form, scores, found in zip(FORMS, ours, answers):
        name = f"rewardbench {found['version']} (Transformers {found['transformers']})"
        raw = [score - FORMS[form].get("mean", 0.0) for score in found["chosen"] + found["rejected"]]
        differences.note(name, form, scores, raw, BF16 if form == "bf16" else 1e-5)
    differences.check()
