# SPDX-License-Identifier: Apache-2.0
"""Other packages at work on models that the trainer saved, each in an environment of its own, and models for them.

An environment variable names the interpreter of a package (``TOOL_TRL=/path/to/venv/bin/python``); what it names runs a
program of ``tests/tools/programs/``, which reads a question from a file of JSON and writes an answer to another.
"""

import json
import math
import os
import subprocess

import models
import pytest
import runs
import tiny
import torch

from reward_model.data.tokenizer import choose_special_tokens
from reward_model.inference import load
from reward_model.models import saving
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import head_layer

PROGRAMS = runs.TOP / "tests" / "tools" / "programs"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
PROMPTS = ["question: what does the cat eat? answer:", "where is the cat?", "the other", "a much longer prompt " * 4]
CHOSEN = [" fish.", " the cat is there. On the mat.", " mat", " and so the cat sat on the other mat"]
REJECTED = [" the mat, and the other mat.", " no", " cat sat there", " x"]
# without white space at an end, which some templates take off
CHATS = [
    [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": response.strip()}]
    for responses in (CHOSEN, REJECTED)
    for prompt, response in zip(PROMPTS, responses)
]
# what rounding in bfloat16 explains of two layers: our product of the head is in float32, theirs mostly not
BF16 = 0.05


def interpreter(variable, package):
    """The interpreter that a variable names; the test is skipped without it."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no interpreter of an environment with {package} (tests/README.md)")
    return found


def ask(python, program, room, questions, timeout=1800, environment=None):
    """What a program answers to each of some questions, in one process of another environment.

    Args:
        room: a folder, in which the program runs.

    Raises:
        AssertionError: it fails; with the end of what it printed.
    """
    asked, answered = room / "questions.json", room / "answers.json"
    asked.write_text(json.dumps(questions, default=str))
    answered.unlink(missing_ok=True)
    values = {"PYTHONPATH": str(runs.TOP), "HF_DATASETS_CACHE": str(room / "datasets"), "PYTHONNOUSERSITE": "1"}
    values |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    words = [str(python), str(PROGRAMS / program), str(asked), str(answered)]
    values = runs.environment(**values | (environment or {}))
    done = subprocess.run(words, env=values, cwd=room, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 and answered.is_file(), done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(answered.read_text())


class Saved:
    """A model with weights that have moved, in the form in which the trainer saves it, and its scores by our scorer."""

    def __init__(
        self,
        root,
        family="llama",
        tokenizer=None,
        dtype=torch.float32,
        lora=False,
        mean=None,
        pairs=False,
        **options,
    ):
        """
        Args:
            tokenizer: a function of ``tiny.py``; None: the family's.
            lora: the backbone is frozen, and ``adapter/`` is saved beside the merged model.
            mean: what the scorer takes off each score, as after ``--normalize_scores``.
            pairs: an encoder reads ``tokenizer(prompt, response)``, and otherwise the two joined.
            options: of ``load_for_training``, such as ``pooling``.
        """
        self.base, self.folder = root / "base", root / "saved"
        own = models.write(family, self.base, **SIZES)
        self.tokenizer = tokenizer(self.base) if tokenizer else own
        scorer = load_for_training(str(self.base), dtype, seed=0, **options)
        if lora:
            add_lora(scorer, 4, 8, None)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in scorer.named_parameters():
                if not lora or ".lora_" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
            head = head_layer(scorer).weight
            head.add_(0.1 * torch.randn(head.shape).to(head.dtype))
        special = choose_special_tokens(self.tokenizer, models.VOCABULARY)
        for config in (scorer.config, scorer.config.get_text_config()):
            config.pad_token_id = special.pad
        if family in models.ENCODERS:
            scorer.config.score_pairs = pairs
        if mean is not None:
            scorer.config.score_mean, scorer.config.score_std = mean, 1.0
        saving.save(scorer, self.tokenizer, self.folder)

    def scores(self, prompts=PROMPTS + PROMPTS, responses=CHOSEN + REJECTED):
        return load(self.folder).score(prompts, responses)

    def chat_scores(self, chats=CHATS):
        return load(self.folder).score_chats(chats)


def chat(root, **options):
    return Saved(root, tokenizer=tiny.chatml, **options)


def spread(scores):
    return torch.tensor(scores).std().item()


class Differences:
    """The largest difference of each pair of lists of scores; printed (``-s`` shows it), and judged at the end."""

    def __init__(self):
        self.too_large = []

    def note(self, tool, what, ours, theirs, near=1e-5):
        """Scores that are all alike would say nothing, and are refused."""
        assert len(ours) == len(theirs) > 1
        assert near == math.inf or spread(ours) > 3 * near, (what, ours)
        found = max(abs(a - b) for a, b in zip(ours, theirs))
        print(f"\n{tool}, {what}: largest difference {found:.2g}, spread of the scores {spread(ours):.2g}", flush=True)
        if not found < near:
            self.too_large.append(f"{tool}, {what}: {found:.3g}, ours {ours}, theirs {theirs}")
        return found

    def fail(self, tool, what, error):
        self.too_large.append(f"{tool}, {what}: {error}")

    def check(self):
        assert not self.too_large, "\n".join(self.too_large)
