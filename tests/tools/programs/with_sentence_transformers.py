# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers on a folder: pairs by a CrossEncoder, or texts by a SentenceTransformer."""

from answers import answer_all
from sentence_transformers import CrossEncoder, SentenceTransformer, __version__
from transformers import __version__ as transformers


def asked(question):
    options = {"batch_size": 4, "show_progress_bar": False}
    if "pairs" in question:
        model = CrossEncoder(question["folder"], device="cpu")
        scores = model.predict([tuple(pair) for pair in question["pairs"]], **options).tolist()
    else:
        model = SentenceTransformer(question["folder"], device="cpu")
        scores = model.encode(question["texts"], **options)[:, -1].tolist()
    return {"version": __version__, "transformers": transformers, "scores": scores}


if __name__ == "__main__":
    answer_all(asked)
