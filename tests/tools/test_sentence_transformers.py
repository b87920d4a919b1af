# SPDX-License-Identifier: Apache-2.0
"""CrossEncoder and SentenceTransformer, in an environment of their own (``TOOL_SENTENCE_TRANSFORMERS``)."""

import math

import foreign
import pytest
import tiny
from foreign import CHOSEN, PROMPTS, REJECTED

pytestmark = pytest.mark.slow
ROWS = list(zip(PROMPTS + PROMPTS, CHOSEN + REJECTED))


@pytest.fixture
def ask(tmp_path):
    python = foreign.interpreter("TOOL_SENTENCE_TRANSFORMERS", "sentence-transformers")
    return lambda questions: foreign.ask(python, "with_sentence_transformers.py", tmp_path, questions)


def name_of(found, what):
    return f"sentence-transformers {found['version']} (Transformers {found['transformers']}), {what}"


def test_cross_encoder_of_encoders_that_read_pairs(ask, tmp_path):
    """What every program that takes pairs gives."""
    families = ("bert", "roberta", "deberta")
    models = [foreign.Saved(tmp_path / family, family=family, pairs=True) for family in families]
    differences = foreign.Differences()
    answers = ask([{"folder": saved.folder, "pairs": ROWS} for saved in models])
    for family, saved, found in zip(families, models, answers):
        differences.note(name_of(found, "CrossEncoder"), family, saved.scores(), found["scores"])
    differences.check()


def test_cross_encoder_of_a_decoder_joins_the_two_texts(ask, tmp_path):
    """The end token has to be in the answer. A start token is no part of a pair: models with one score otherwise."""
    forms = {"llama": {}, "qwen2": {"family": "qwen2"}, "start token": {"tokenizer": tiny.llama}}
    models = [foreign.Saved(tmp_path / form, mean=0.75, **options) for form, options in forms.items()]
    rows = [[(prompt, response + saved.tokenizer.eos_token) for prompt, response in ROWS] for saved in models]
    answers = ask([{"folder": saved.folder, "pairs": pairs} for saved, pairs in zip(models, rows)])
    differences = foreign.Differences()
    for form, saved, found in zip(forms, models, answers):
        raw = [score - 0.75 for score in found["scores"]]
        near = math.inf if form == "start token" else 1e-5
        largest = differences.note(name_of(found, "CrossEncoder"), form, saved.scores(), raw, near)
        assert form != "start token" or largest > 0.1
    differences.check()


def test_sentence_transformer_of_a_mean_over_the_tokens(ask, tmp_path):
    """The mean of a normalized model is the bias of its dense layer, so that it is taken off."""
    families = ("bert", "llama")
    models = [foreign.Saved(tmp_path / family, family=family, pooling="mean", mean=0.75) for family in families]
    questions = []
    for saved in models:
        texts = ["".join(row) + (saved.tokenizer.eos_token or "") for row in ROWS]
        questions.append({"folder": saved.folder, "texts": texts})
    differences = foreign.Differences()
    for family, saved, found in zip(families, models, ask(questions)):
        differences.note(name_of(found, "SentenceTransformer"), family, saved.scores(), found["scores"])
    differences.check()
