# SPDX-License-Identifier: Apache-2.0
"""Comparisons from token ids, as data.compare writes them, without a tokenizer."""

import math
from dataclasses import fields

import datasets

from reward_model.data.comparisons import Comparison, Comparisons
from reward_model.data.preprocessing import FEATURES


def pair(prompt, better, worse, prompt_hash=None, margin=math.nan):
    """The first response beat the second."""
    return Comparison(prompt, [better, worse], [0], [1], [margin], prompt_hash)


def answer(prompt, response, target, prompt_hash=None):
    """One scored response."""
    return Comparison(prompt, [response], prompt_hash=prompt_hash, targets=[target])


def table(comparisons):
    """What the data module would read from its file."""
    rows = []
    for c in comparisons:
        texts = [(*c.prompt, *response) for response in c.responses]
        row = {f.name: getattr(c, f.name) for f in fields(Comparison) if f.name in FEATURES}
        row |= {"text_hashes": [hash(text) for text in texts], "text_lengths": [len(text) for text in texts]}
        shared = (len(texts) - 1) * len(c.prompt)
        row |= {
            "length": max(map(len, texts)),
            "tokens": sum(map(len, texts)) - shared,
            "cut": False,
            "is_plain": False,
            "is_glued": False,
            "single": None,
            "problem": None,
        }
        row["prompt_tokens"] = len(c.prompt) if c.prompt_tokens is None else c.prompt_tokens
        row["targets"] = c.targets or [math.nan] * len(texts)
        rows.append(row)
    return Comparisons(datasets.Dataset.from_list(rows, features=FEATURES))
