# SPDX-License-Identifier: Apache-2.0
"""CrossEncoder and SentenceTransformer, in an environment of their own (``TOOL_SENTENCE_TRANSFORMERS``)."""

import math

import foreign
import pytest
import tiny
from foreign import CHOSEN, PROMPTS, REJECTED

from reward_model import __main__ as commands
from reward_model.inference import load

pytestmark = pytest.mark.slow
ROWS = list(zip(PROMPTS + PROMPTS, CHOSEN + REJECTED))


@pytest.fixture
def ask(tmp_path):
    python = foreign.interpreter("TOOL_SENTENCE_TRANSFORMERS", "sentence-transformers")
    return lambda questions: foreign.ask(python, "with_sentence_transformers.py", tmp_path, questions)


def name_of(found, what):
    return f"sentence-transformers {found['version']} (Transformers {found['transformers']}), {what}"


def test_cross_encoder_of_encoders_that_read_pairs(ask, tmp_path):
    """Needs encoders that read pairs: joined texts score otherwise in every program that takes pairs."""
    families = ("bert", "roberta", "deberta")
    models = [foreign.Saved(tmp_path / family, family=family, pairs=True) for family in families]
    encoding = getattr(load(models[0].folder), "encoding", None)
    if not getattr(encoding, "pairs", False):
        pytest.skip("the encoders that are saved read joined texts")
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


def test_sentence_transformer_of_a_mean_over_the_tokens(ask, tmp_path, capsys):
    """Needs the form of Sentence-Transformers' modules, whose last layer has a bias that takes the mean off."""
    families = ("bert", "llama")
    models = [foreign.Saved(tmp_path / family, family=family, pooling="mean", mean=0.75) for family in families]
    questions = []
    for family, saved in zip(families, models):
        texts = ["".join(row) + (saved.tokenizer.eos_token or "") for row in ROWS]
        if (saved.folder / "modules.json").is_file():
            questions.append({"folder": saved.folder, "texts": texts})
            continue
        flags = ["export", str(saved.folder), str(tmp_path / family / "st"), "--to", "sentence-transformers"]
        try:
            failed = commands.main(flags)
        except SystemExit as status:  # argparse knows no such flag
            failed = status.code
        if failed:
            pytest.skip(f"export has no --to sentence-transformers: {capsys.readouterr().err}")
        questions.append({"folder": tmp_path / family / "st", "texts": texts})
    differences = foreign.Differences()
    for family, saved, found in zip(families, models, ask(questions)):
        differences.note(name_of(found, "SentenceTransformer"), family, saved.scores(), found["scores"])
    differences.check()
