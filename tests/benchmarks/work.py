# SPDX-License-Identifier: Apache-2.0
"""What the contenders train on: pairs of words, as long as real ones, and a small LLaMA with random weights.

``lengths/*.csv`` hold token counts under GPT-2's tokenizer, a row a pair, no text: HH-RLHF harmless-base (test),
alpaca_eval's answers, UKPConvArg1 (train). The prompt is counted once; both answers count an end token, which the
contender adds.

A word is one token. A folder of work holds ``model/`` with the tokenizer, ``data/train.jsonl`` and ``data/eval.jsonl``.
A pair longer than the limit loses words of its prompt, and is left out where no word of the prompt would remain.

python work.py FOLDER '{"vocabulary": 8192, "hidden": 256, …}' writes a model, '{"given": "folder"}' takes one.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import zlib
from itertools import combinations, groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

LENGTHS = Path(__file__).resolve().parent / "lengths"
SEED = 0
PAD, END = 0, 1  # ids; word i has id i + 2
POSITIONS = 2048
EVAL_ROWS, EVAL_WORDS = 8, 4  # short: what the trainer evaluates before its first step is not to show in its memory


class Pair(NamedTuple):
    """Numbers of words; neither answer holds its end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def texts(self) -> tuple[list[int], list[int]]:
        """Token ids of both texts, end token included."""
        return tuple([i + 2 for i in self.prompt + answer] + [END] for answer in (self.chosen, self.rejected))


class Draw:
    """Random pairs of given lengths, the same ones at every call."""

    def __init__(self, vocabulary: int, limit: int):
        self.words, self.limit, self.random = vocabulary - 2, limit, np.random.default_rng(SEED)

    def text(self, words: int) -> list[int]:
        return self.random.integers(self.words, size=words).tolist()

    def answers(self, counts: list[int]) -> list[list[int]]:
        """Answers of so many tokens, their end tokens counted; their first words differ: only the prompt is shared."""
        firsts = self.random.choice(self.words, size=len(counts), replace=False).tolist()
        return [[first, *self.text(max(0, count - 2))] for first, count in zip(firsts, counts)]

    def prompt(self, count: int, longest: int) -> list[int]:
        """A prompt that loses what would not fit beside the longest answer."""
        return self.text(min(count, self.limit - longest))

    def pairs(self, lengths: np.ndarray, number: int) -> list[Pair]:
        """Pairs in random order; ``lengths``: (n, 3) counts of prompt, chosen, rejected."""
        usable = lengths[lengths[:, 1:].max(axis=1) < self.limit]
        rows = usable[np.resize(self.random.permutation(len(usable)), number)]
        return [Pair(self.prompt(p, max(c, r)), *self.answers([c, r])) for p, c, r in np.maximum(rows, (1, 2, 2))]

    def ranked(self, lengths: np.ndarray, number: int, responses: int) -> list[Pair]:
        """Lists of K answers, best first, as the K(K − 1)/2 pairs of each, side by side; about ``number`` pairs."""
        answers = np.maximum(lengths[:, 1:], 2)
        answers = answers[answers < self.limit]
        lists = max(1, number * 2 // (responses * (responses - 1)))
        pairs = []
        for count in lengths[np.resize(self.random.permutation(len(lengths)), lists), 0]:
            counts = self.random.choice(answers, size=responses).tolist()
            prompt = self.prompt(count, max(counts))
            pairs += [Pair(prompt, *two) for two in combinations(self.answers(counts), 2)]
        return pairs

    def real(self, file: Path, number: int) -> list[Pair]:
        """Real pairs, a word's number its hash, so that repeated texts stay repeated."""
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        pairs = []
        for i in self.random.permutation(len(rows)):
            prompt, *answers = ([self.number(w) for w in rows[i][name].split()] for name in Pair._fields)
            room = self.limit - max(map(len, answers)) - 1
            if prompt and all(answers) and answers[0] != answers[1] and room > 0:
                pairs.append(Pair(prompt[-room:], *answers))
        return pairs[:number]

    def number(self, word: str) -> int:
        return zlib.crc32(word.encode()) % self.words


def read_lengths(name: str) -> np.ndarray:
    """(n, 3) token counts: prompt, chosen, rejected."""
    with (LENGTHS / f"{name}.csv").open() as file:
        return np.array([[int(row[key]) for key in Pair._fields] for row in csv.DictReader(file)])


def shared(first: list[int], second: list[int]) -> int:
    """Tokens that two texts begin with in common."""
    return next(i for i, (a, b) in enumerate(zip_longest(first, second)) if a != b)


def tokens_once(pairs: list[Pair]) -> int:
    """Tokens of all pairs with what the two texts of a pair share counted once: P + C + R each."""
    return sum(sum(map(len, pair.texts)) - shared(*pair.texts) for pair in pairs)


def tokens_once_a_list(pairs: list[Pair]) -> int:
    """The same with neighbors of one prompt as one list: its prompt and each of its answers counted once."""
    total = 0
    for prompt, group in groupby(pairs, key=lambda pair: pair.prompt):
        answers = {tuple(answer) for pair in group for answer in (pair.chosen, pair.rejected)}
        total += len(prompt) + sum(len(answer) + 1 for answer in answers)
    return total


def write_data(folder: Path, pairs: list[Pair], draw: Draw) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = [Pair(draw.text(EVAL_WORDS), *draw.answers([EVAL_WORDS] * 2)) for _ in range(EVAL_ROWS)]
    for name, rows in (("train", pairs), ("eval", evaluation)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for pair in rows:
                prompt, *answers = (" ".join(f"w{i}" for i in words) for words in pair)
                row = {"prompt": prompt, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"}
                file.write(json.dumps(row) + "\n")


def read_pairs(folder: Path) -> list[Pair]:
    """The training pairs of a folder of work, in its order."""
    rows = map(json.loads, (folder / "data" / "train.jsonl").read_text().splitlines())
    return [Pair(*([int(word[1:]) for word in row[name].split()] for name in Pair._fields)) for row in rows]


def vocabulary_of(model: Path) -> int:
    """Rows of a model's embedding."""
    return json.loads((model / "config.json").read_text())["vocab_size"]


def take_model(folder: Path, given: str) -> None:
    """A pretrained model's config and weights; its tokenizer is one of words, as many as the embedding has rows."""
    write_tokenizer(folder, vocabulary_of(Path(given)))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(given, name), folder)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of so many tokens: pad, end, and the words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<|pad|>": PAD, "<|end|>": END} | {f"w{i}": i + 2 for i in range(vocabulary - 2)}
    words = Tokenizer(models.WordLevel(names))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=POSITIONS
    )
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> None:
    """A LLaMA with random weights and a tokenizer of ``vocabulary`` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    (take_model if "given" in arguments else write_model)(Path(sys.argv[1]), **arguments)
    print(json.dumps({"model": sys.argv[1]}))
