# SPDX-License-Identifier: Apache-2.0
"""A preference data set of this project's own text, and a tiny model with a tokenizer for it: no hub needed.

    python -m reward_model.data.demo demo        writes demo/data/{train,eval}.jsonl and demo/model

Each request asks how to do something to some thing. Four answers are graded by what they say: 3 gives steps that fit
the request, 2 stays general, 1 is about another thing, 0 refuses or mocks; four sentences in ten stray to a
neighboring grade. How long an answer is to be is drawn without regard to its grade, so length carries no signal. Of a
prompt's answers, pairs are drawn with a rating, the difference of the grades. No request of ``eval.jsonl`` occurs in
``train.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from reward_model.common.logging import quieten

PAIRS_PER_PROMPT = 3  # of six
EVAL_PROMPTS = 100
STRAY = 0.4
LENGTHS = (50, 200)  # characters

TASKS = {
    "clean": ("wipe it with a damp cloth", "rinse off the dust", "let it dry in the shade", "brush the corners"),
    "repair": ("find the loose part", "tighten every screw", "glue the crack and clamp it", "test it before use"),
    "store": ("wrap it in paper", "keep it in a dry box", "put a label on it", "check it every spring"),
    "paint": ("sand the surface first", "apply a thin coat", "wait a day between coats", "tape the edges"),
    "choose": ("set a price you can pay", "compare three of them", "read the guarantee", "ask to try it out"),
    "carry": ("empty it beforehand", "bend your knees", "use two straps", "clear the way to the door"),
}
THINGS = (
    "bicycle", "lamp", "kettle", "guitar", "tent", "chair", "mirror", "clock", "ladder", "basket", "drum", "boat",
    "camera", "radio", "bookcase", "suitcase", "umbrella", "fence", "piano", "stove", "carpet", "helmet", "violin",
    "toolbox",
)  # fmt: skip
WHERE = ("at home", "in a small flat", "before winter", "on a low budget", "with a friend", "for the first time")
ASK = ("How do I {task} a {thing} {where}?", "What is the best way to {task} a {thing} {where}?",
       "Please tell me how to {task} a {thing} {where}.")  # fmt: skip

STEP = ("For the {thing}, {step}.", "To {task} a {thing}, {step}.", "With your {thing}, {step}.")
GENERAL = (
    "It depends on many things.", "People do this in different ways.", "Some care is usually a good idea.",
    "You could look for a guide.", "Take the time that it takes.", "Opinions differ on that.",
    "It may be easy or hard.", "Perhaps someone nearby knows more.",
)  # fmt: skip
ELSEWHERE = (
    "A {other} is a fine thing too.", "I once saw a {other} in a shop.", "The {other} was invented long ago.",
    "My neighbour likes the {other}.", "There is a song about a {other}.", "A {other} can be red or blue.",
)  # fmt: skip
RUDE = (
    "I will not help with that.", "What a silly question.", "Stop asking me such things.", "Nobody cares about this.",
    "You should know that yourself.", "That is not worth my time.", "Go away and leave me alone.",
)  # fmt: skip


def answer(grade: int, task: str, thing: str, rng: random.Random) -> str:
    """Sentences, most of them of one grade, until a length is reached."""
    length = rng.uniform(*LENGTHS)
    text = ""
    while len(text) < length:
        strays = rng.random() < STRAY
        of_grade = rng.choice([g for g in (grade - 1, grade + 1) if 0 <= g <= 3]) if strays else grade
        text += " " + sentence(of_grade, task, thing, rng)
    return text


def sentence(grade: int, task: str, thing: str, rng: random.Random) -> str:
    """One sentence of one grade."""
    if grade == 3:
        return rng.choice(STEP).format(thing=thing, task=task, step=rng.choice(TASKS[task]))
    other = rng.choice([t for t in THINGS if t != thing])
    return rng.choice((RUDE, ELSEWHERE, GENERAL)[grade]).format(other=other)


def pairs(requests: list[tuple[str, str, str]], rng: random.Random) -> list[dict]:
    """Rows of ``prompt, chosen, rejected, rating``, ``PAIRS_PER_PROMPT`` of each request's six."""
    rows = []
    for task, thing, where in requests:
        prompt = "Human: " + rng.choice(ASK).format(task=task, thing=thing, where=where) + " Assistant:"
        answers = [answer(grade, task, thing, rng) for grade in range(4)]
        for low, high in rng.sample(list(itertools.combinations(range(4), 2)), PAIRS_PER_PROMPT):
            rows.append({"prompt": prompt, "chosen": answers[high], "rejected": answers[low], "rating": high - low})
    return rows


def write_data(folder: Path, seed: int = 0) -> None:
    """``train.jsonl`` and ``eval.jsonl``; the same bytes for the same seed."""
    rng = random.Random(seed)
    requests = list(itertools.product(TASKS, THINGS, WHERE))
    rng.shuffle(requests)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", requests[:EVAL_PROMPTS]), ("train", requests[EVAL_PROMPTS:])):
        text = "".join(json.dumps(row) + "\n" for row in pairs(part, rng))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_model(folder: Path, data: Path, seed: int = 0) -> None:
    """A LLaMA of two layers and 128 units with random weights, and a byte-level BPE tokenizer made from the data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that no text of a user's is dropped
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator((row[name] for row in rows for name in ("prompt", "chosen", "rejected")), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reward_model.data.demo", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"), help="gets data/ and model/ [demo]")
    quieten(debug=False)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = parser.parse_args().folder
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")


if __name__ == "__main__":
    main()
