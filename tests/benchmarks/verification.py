# SPDX-License-Identifier: Apache-2.0
"""``reward-model verify`` of every saved form and six families, as a table: tiny models with random weights.

python tests/benchmarks/verification.py            # with the packages that are installed
"""

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import tiny
from test_verification import saved

from reward_model.training import ways
from reward_model.training.texts import made_up
from reward_model.training.verification import Line, _lines

MODELS = (  # family, what is saved, how
    ("llama", "float32", {"tokenizer": tiny.chatml}),
    ("llama", "bfloat16", {"dtype": torch.bfloat16, "tokenizer": tiny.chatml}),
    ("llama", "LoRA, float32", {"lora": True}),
    ("llama", "LoRA, bfloat16", {"lora": True, "dtype": torch.bfloat16}),
    ("llama", "hf and dschat", {"form": "both"}),
    ("llama", "dschat", {"form": "dschat"}),
    ("llama", "openrlhf", {"form": "openrlhf", "mean": 0.25}),
    ("llama", "modules", {"form": "sentence-transformers", "mean": 0.25, "tokenizer": tiny.chatml}),
    ("llama", "mean pooling", {"pooling": "mean", "mean": 0.25}),
    ("gpt2", "float32", {}),
    ("opt", "float32", {}),
    ("qwen3", "float32", {"tokenizer": tiny.chatml}),
    ("qwen3", "bfloat16", {"dtype": torch.bfloat16}),
    ("cohere", "no class: modules", {"mean": 0.25}),
    ("bert", "float32", {}),
    ("bert", "mean pooling", {"pooling": "mean", "mean": 0.25}),
    ("roberta", "float32", {}),
    ("deberta", "float32", {}),
    ("deberta", "mean pooling", {"pooling": "mean", "mean": 0.25}),
    ("modernbert", "float32", {}),
    ("modernbert", "mean pooling", {"pooling": "mean", "mean": 0.25}),
    ("modernbert", "bfloat16", {"dtype": torch.bfloat16}),
)
HEADINGS = {
    "Transformers, float32": "float32",
    "Transformers, as saved": "as saved",
    "padded on the left": "left pads",
    "chats, apply_chat_template": "chat",
    "pipeline": "pipeline",
    "saved again": "saved again",
    "base and adapter": "adapter",
    "DeepSpeed-Chat": "DeepSpeed-Chat",
    "OpenRLHF": "OpenRLHF",
    "TRL": "TRL",
    "CrossEncoder": "CrossEncoder",
    "SentenceTransformer": "SentenceTransformer",
}


def cell(line: Line) -> str:
    """A difference; in italics one that is told, with its reason in the lines of the command."""
    if line.status == "same" or line.largest is not None:
        number = f"{line.largest:.0e}".replace("e-0", "e-") if line.largest else "0"
        return {"same": number, "told": f"*{number}*"}.get(line.status, f"**{number}**")
    return {"not for it": "", "not verified": "–", "told": "*told*"}.get(line.status, f"**{line.status}**")


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    models.ENCODERS["modernbert"] = models.FAMILIES["modernbert"] = (
        "ModernBertModel",
        "ModernBertConfig",
        {**models.SIZES, "global_attn_every_n_layers": 2, "local_attention": 16},
    )
    print("| family | saved | rounding explains |", " | ".join(HEADINGS.values()), "|")
    print("|" + "---|" * (3 + len(HEADINGS)))
    for family, name, options in MODELS:
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            made = {key: value() if key == "tokenizer" else value for key, value in options.items()}
            folder = saved(Path(root), family, **made)
            place = ways.Saved(folder, [])
            place.texts = made_up(place.tokenizer, 120)
            lines = {line.way: line for line in _lines({way: ways.answer(place, way) for way in ways.WAYS})}
        explained = max((line.explained or 0 for line in lines.values()), default=0)
        print(
            f"| {family} | {name} | {explained:.0e} |",
            " | ".join(cell(lines[way]) for way in HEADINGS),
            "|",
            flush=True,
        )
        for line in lines.values():
            if line.status in ("differs", "not verified"):
                print(f"{family}, {name}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
