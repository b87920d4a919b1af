# SPDX-License-Identifier: Apache-2.0
"""A saved model, loaded and asked in a process of its own: ``python -m reward_model.training.fresh_load FILE FILE``.

The first file is a question as :mod:`reward_model.training.verify` writes it, the second gets the answer, both JSON.
What Transformers can load is loaded by Transformers alone, as anybody would; the rest by ``reward_model.load``.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

BATCH = 8  # texts of unlike lengths, so that there are pads
PIPED = 2  # texts of the pipeline: whether it puts a function on the score shows in one


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What the saved model and its tokenizer say.

    Args:
        question: ``folder``; ``forms``, each of ``hf``, ``dschat``; ``ids`` of each text to score, and ``second``, how
            many of them are the second segment of a pair; ``written``, texts with ``text``, ``templated``, ``messages``
            and, of a pair, ``prompt``; ``settings``, names of values in ``config.json``.

    Returns:
        ``scores`` of each form; ``piped``, what Transformers' pipeline gives for a few of the ids, where it takes the
        form; for each of ``written`` its ``texts``, as the chat template writes its messages, and
        its ``ids``; ``settings`` as found.
    """
    from transformers import AutoTokenizer

    folder = Path(question["folder"])
    trust = question.get("trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    texts, ids = encode(question["written"], tokenizer)
    asked = question["ids"], question.get("second") or [0] * len(question["ids"])
    scores, piped = {}, []
    for form in question["forms"]:
        scores[form], more = _scores(folder, form, *asked, tokenizer, trust)
        piped += more
    return {
        "scores": scores,
        "piped": piped,
        "texts": texts,
        "ids": ids,
        "settings": {name: config.get(name) for name in question["settings"]},
    }


def encode(written: list[dict[str, Any]], tokenizer) -> tuple[list[str], list[list[int]]]:
    """Texts, messages as the chat template writes them, and their ids; of a pair those of both texts."""
    texts = [
        tokenizer.apply_chat_template(each["messages"], tokenize=False) if each["messages"] else each["text"]
        for each in written
    ]
    ids = [
        tokenizer(text, add_special_tokens=not each["templated"], verbose=False)["input_ids"]
        if each.get("prompt") is None
        else tokenizer([each["prompt"]], [text], verbose=False)["input_ids"][0]  # alone, an empty text would be none
        for text, each in zip(texts, written)
    ]
    return texts, ids


Scores = tuple[list[float], list[float]]  # of all texts, and of the first few by the pipeline


def _scores(folder: Path, form: str, ids: list[list[int]], second: list[int], tokenizer, trust: bool) -> Scores:
    from reward_model.models.saved_forms import form_of

    if form == "hf" and form_of(folder, "hf") is None:
        return _by_transformers(folder, ids, second, tokenizer, trust)
    from reward_model.inference import load

    reward = load(folder, form="dschat" if form == "dschat" else "hf", trust_remote_code=trust)
    return [score + reward.mean for score in reward.score_ids(ids, BATCH, second)], []


def _by_transformers(folder: Path, ids: list[list[int]], second: list[int], tokenizer, trust: bool) -> Scores:
    import torch
    from transformers import AutoModelForSequenceClassification, TextClassificationPipeline

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{len(info[kind])} {kind.replace('_', ' ')}, {sorted(map(str, info[kind]))[0]} among them"
            )
    model.eval()
    texts, takes = {"input_ids": ids}, inspect.signature(model.forward).parameters
    if any(second) and "token_type_ids" in tokenizer("a", "b") and "token_type_ids" in takes:
        texts["token_type_ids"] = [[0] * (len(text) - count) + [1] * count for text, count in zip(ids, second)]
    scores: list[float] = []
    for first in range(0, len(ids), BATCH):
        part = {name: values[first : first + BATCH] for name, values in texts.items()}
        batch = tokenizer.pad(part, padding=True, return_tensors="pt")
        names = {"input_ids", "attention_mask", *texts} & set(batch)
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in names}).logits
        scores += logits.float().squeeze(-1).tolist()
    pipe = TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    piped = []
    for i in range(min(PIPED, len(ids))):  # ids, since no text need have these
        given = {name: torch.tensor([values[i]]) for name, values in texts.items()}
        with torch.no_grad():
            output = pipe.forward(given | {"attention_mask": torch.ones_like(given["input_ids"])})
        piped.append(float(pipe.postprocess(output)["score"]))
    return scores, piped


def main(question_file: str, answer_file: str) -> None:
    """Write the answer, or under ``problem`` why there is none, or under ``no_memory`` that there was too little."""
    from reward_model.common.errors import first_line

    found: dict[str, Any]
    try:
        found = answer(json.loads(Path(question_file).read_text(encoding="utf-8")))
    except Exception as error:  # whatever a folder that does not load raises
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            found = {"no_memory": first_line(error)}
        else:
            found = {"problem": f"{type(error).__name__}: {first_line(error)}"}
    Path(answer_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
