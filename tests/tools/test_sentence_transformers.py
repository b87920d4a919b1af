# SPDX-License-Identifier: Apache-2.0
"""CrossEncoder and SentenceTransformer, in an environment of their own (``TOOL_SENTENCE_TRANSFORMERS``)."""

import json

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
    return lambda **question: foreign.ask(python, "with_sentence_transformers.py", tmp_path, **question)


def name_of(found, what):
    return f"sentence-transformers {found['version']} (Transformers {found['transformers']}), {what}"


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_cross_encoder_of_an_encoder_that_reads_pairs(family, ask, tmp_path):
    """Needs encoders that read pairs: joined texts score otherwise in every program that takes pairs."""
    saved = foreign.Saved(tmp_path, family=family)
    if not json.loads((saved.folder / "config.json").read_text()).get("score_pairs"):
        pytest.skip("the encoder that was saved reads joined texts (score_pairs is not in its config.json)")
    found = ask(folder=saved.folder, pairs=ROWS)
    assert foreign.largest_difference(name_of(found, "CrossEncoder"), family, saved.scores(), found["scores"]) < 1e-5


@pytest.mark.parametrize(("family", "tokenizer"), [("llama", None), ("llama", tiny.llama), ("qwen2", None)])
def test_cross_encoder_of_a_decoder_joins_the_two_texts(family, tokenizer, ask, tmp_path):
    """The end token has to be in the answer, and the two texts become tokens apart from each other."""
    saved = foreign.Saved(tmp_path, family=family, tokenizer=tokenizer, mean=0.75)
    rows = [(prompt, response + saved.tokenizer.eos_token) for prompt, response in ROWS]
    found = ask(folder=saved.folder, pairs=rows)
    raw = [score - 0.75 for score in found["scores"]]
    apart = [saved.tokenizer(prompt)["input_ids"] + end_of(saved, answer) for prompt, answer in rows]
    ours = load(saved.folder).score_ids(apart)
    assert foreign.largest_difference(name_of(found, "CrossEncoder"), f"{family}, ids", ours, raw) < 1e-5
    assert foreign.largest_difference(name_of(found, "CrossEncoder"), f"{family}, texts", saved.scores(), raw) < 1e-5


def end_of(saved, answer):
    return saved.tokenizer(answer, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sentence_transformer_of_a_mean_over_the_tokens(family, ask, tmp_path, capsys):
    """Needs ``reward-model export FOLDER OUT --to sentence-transformers``."""
    saved = foreign.Saved(tmp_path, family=family, pooling="mean", mean=0.75)
    if commands.main(["export", str(saved.folder), str(tmp_path / "st"), "--to", "sentence-transformers"]):
        pytest.skip(f"export has no --to sentence-transformers: {capsys.readouterr().err}")
    texts = ["".join(row) + (saved.tokenizer.eos_token or "") for row in ROWS]
    found = ask(folder=tmp_path / "st", texts=texts)
    ours = saved.scores()
    differences = [ours[0] - found["scores"][0], ours[0] - found["scores"][0] + 0.75]
    off = min(differences, key=abs) - differences[0]  # with the mean or without
    print(f"the mean is {'not ' if off else ''}applied")
    theirs = [score - off for score in found["scores"]]
    assert foreign.largest_difference(name_of(found, "SentenceTransformer"), family, ours, theirs) < 1e-5
