# SPDX-License-Identifier: Apache-2.0
"""Transformers alone, of another version, on a folder: its sequence-classification class, and its pipeline."""

import torch
from answers import answer_all
from transformers import AutoModelForSequenceClassification, AutoTokenizer, __version__, pipeline


def asked(question):
    tokenizer = AutoTokenizer.from_pretrained(question["folder"])
    model = AutoModelForSequenceClassification.from_pretrained(question["folder"], dtype="auto").eval()
    texts = question["texts"]
    given = texts if isinstance(texts[0], str) else list(zip(*texts))
    encode = {"padding": True, "return_tensors": "pt"}
    encoded = tokenizer(given, **encode) if isinstance(texts[0], str) else tokenizer(*map(list, given), **encode)
    with torch.no_grad():
        scores = model(**encoded).logits[:, 0].float().tolist()
    piped = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    rows = texts if isinstance(texts[0], str) else [{"text": one, "text_pair": other} for one, other in texts]
    of_pipeline = [found["score"] for found in piped(rows, batch_size=4)]
    return {"version": __version__, "scores": scores, "pipeline": of_pipeline}


if __name__ == "__main__":
    answer_all(asked)
