# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers on a folder: pairs by a CrossEncoder, or texts by a SentenceTransformer."""

from answers import answer, question
from sentence_transformers import CrossEncoder, SentenceTransformer, __version__
from transformers import __version__ as transformers

if __name__ == "__main__":
    asked = question()
    if "pairs" in asked:
        model = CrossEncoder(asked["folder"], device="cpu")
        found = model.predict([tuple(pair) for pair in asked["pairs"]], batch_size=4, show_progress_bar=False)
        scores = found.tolist()
    else:
        model = SentenceTransformer(asked["folder"], device="cpu")
        scores = model.encode(asked["texts"], batch_size=4, show_progress_bar=False)[:, -1].tolist()
    answer(version=__version__, transformers=transformers, scores=scores)
