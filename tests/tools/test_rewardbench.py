# SPDX-License-Identifier: Apache-2.0
"""rewardbench's runner, in an environment of its own (``TOOL_REWARDBENCH``), on folders that the trainer saved."""

import json
from pathlib import Path

import foreign
import pytest
import tiny
import torch
from foreign import CHATS, CHOSEN, PROMPTS, REJECTED

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("chat", {}),
        ("merged adapter", {"lora": True}),
        ("normalized", {"mean": 0.75}),
        ("bf16", {"dtype": torch.bfloat16}),
        ("qwen2", {"family": "qwen2"}),
    ],
)
def test_its_runner_scores_as_here(form, options, tmp_path):
    python = foreign.interpreter("TOOL_REWARDBENCH", "rewardbench")
    saved = foreign.Saved(tmp_path, tokenizer=tiny.chatml, **options)
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": prompt.strip(), "chosen": chosen.strip(), "rejected": rejected.strip()}
        for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dtype = "bfloat16" if form == "bf16" else "float32"
    asked = {"folder": saved.folder, "rows": rows, "output": "results", "dtype": dtype}
    found = foreign.ask(python, "with_rewardbench.py", tmp_path, **asked)
    outputs = Path(f"{saved.folder}_outputs.jsonl")  # it joins the names, and the model's begins with a slash
    written = [json.loads(line) for line in outputs.read_text().splitlines()]
    theirs = [line["scores_chosen"] for line in written] + [line["scores_rejected"] for line in written]
    name = f"rewardbench {found['version']} (Transformers {found['transformers']})"
    near = foreign.BF16 if form == "bf16" else 1e-5
    raw = [score - options.get("mean", 0.0) for score in theirs]
    assert foreign.largest_difference(name, form, saved.chat_scores(CHATS), raw) < near
