# SPDX-License-Identifier: Apache-2.0
"""Texts by which models are compared: a prompt and a response each, and the token ids that they are scored as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.data.comparisons import Comparison
from reward_model.data.encoding import Encoding
from reward_model.data.preprocessing import read_text
from reward_model.data.rendering import render
from reward_model.data.sources import Splits, read_sources

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
MOST_ROWS = 32
MADE_UP = (  # of unlike lengths, so that a batch has pads
    ("2 + 2 =", " 4"),
    ("Human: 2 + 2? Assistant:", " Four, since two and two are four."),
    ("Is it late?", " No."),
    ("Name a fruit.", " An apple."),
    ("Where is the cat? ", "On the mat, where it sat before the rain."),
    ("Write a line about the sea. ", "The sea is wide and gray, and nobody owns it."),
    ("Question: why do leaves fall?\nAnswer:", " Trees save water in winter."),
    ("Say hello in French. ", "Bonjour!"),
    ("Sort 3, 1, 2. ", "1, 2, 3"),
    ("What is the boiling point of water at sea level, in degrees Celsius? ", "100"),
    ("def double(x):\n", "    return 2 * x\n"),
    ("Is the earth flat? ", "It is nearly a ball, a little flatter at its poles, as measurements from orbit show."),
)


@dataclass(frozen=True)
class Text:
    """A prompt and its response.

    templated: a chat template wrote both, special tokens included. messages: a chat, which the model's template writes;
    prompt and response are then empty.
    """

    prompt: str
    response: str
    templated: bool = False
    messages: list[dict] | None = None


def whole(text: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as one string: prompt and response joined, or what the chat template writes."""
    return render(tokenizer, text.messages) if text.messages else text.prompt + text.response


def scored_as(text: Text, how: Encoding) -> Comparison:
    """The ids of a text, as training makes them."""
    if text.templated or text.messages:
        return Comparison.of_ids(how.written([whole(text, how.tokenizer)])[0])
    return how.rows([text.prompt], [text.response])[0]


def end_token(tokenizer: PreTrainedTokenizerBase, end: int | None = None) -> str | None:
    """The token that others have to add to a text for it to be closed; None: the tokenizer closes it itself.

    Args:
        end: the id that closes texts; None: that of ``eos_token``, or else of ``sep_token``.
    """
    if end is None:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None or tokenizer("a", verbose=False)["input_ids"][-1:] == [end]:
        return None
    return str(tokenizer.convert_ids_to_tokens(end))


def written_chat(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A small chat in the tokenizer's template; None: it has none, or none for such a chat."""
    if not tokenizer.chat_template:
        return None
    try:
        return render(tokenizer, CHAT)
    except Exception:  # a template raises what it likes, over a chat that lacks a system turn, say
        return None


def made_up(tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> list[Text]:
    """Texts of this package, and the first few of them as chats, where the tokenizer has a template that takes them.

    Args:
        longest: tokens that the model takes; longer texts are left out.
    """
    texts = [Text(prompt, response) for prompt, response in MADE_UP]
    if written_chat(tokenizer) is not None:
        for prompt, response in MADE_UP[:4]:
            messages = [
                {"role": "user", "content": prompt.strip()},
                {"role": "assistant", "content": response.strip()},
            ]
            texts.append(Text("", "", messages=messages))
    return fitting(texts, tokenizer, longest)


def fitting(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[Text]:
    """Those texts that a model takes, with four tokens to spare for start and end.

    Raises:
        UserError: none of them.
    """
    if longest is None:
        return list(texts)
    kept = [t for t in texts if len(tokenizer(whole(t, tokenizer), verbose=False)["input_ids"]) + 4 <= longest]
    if not kept:
        raise UserError(
            f"all of {counted(len(texts), 'text')} are longer than the {longest} tokens that the model takes"
        )
    return kept


def texts_of(path: str, tokenizer: PreTrainedTokenizerBase, chat: bool, longest: int | None) -> list[Text]:
    """The first rows of a data set that can be used, a response of each.

    Args:
        path: as ``--data_path`` of main.py takes it.
        chat: rows of text go through the chat template, too.

    Raises:
        UserError: it cannot be read, or no row can be used.
    """
    training, evaluation = read_sources(path, 0, splits=Splits(), chat=chat)
    found: list[Text] = []
    problem = "it is empty"
    for source in evaluation or training:
        for number, row in source.stored(4 * MOST_ROWS):
            texts = read_text(source, row, tokenizer, chat)
            if isinstance(texts, str):
                problem = f"{source.name}, row {number}: {texts}"
                continue
            response = texts.whole[len(found) % len(texts.whole)][len(texts.prompt) :]
            found.append(Text(texts.prompt, response, texts.templated))
            if len(found) == MOST_ROWS:
                break
    if not found:
        raise UserError(f"--data {Path(path)}: no row can be used; {problem}")
    kept = fitting(found, tokenizer, longest)
    if len(kept) < len(found):
        logger.warning(f"--data {path}: left out {counted(len(found) - len(kept), 'row')} longer than the model takes")
    return kept


def budgeted(texts: Sequence[Text], parameters: int, operations: float) -> list[Text]:
    """As many texts as a CPU scores soon, the shorter ones first, two at least.

    Args:
        parameters: of the model; a forward pass is two operations for each of them and each token.
    """
    order = sorted(texts, key=lambda text: len(text.prompt) + len(text.response))
    tokens = np.cumsum([(len(text.prompt) + len(text.response)) / 3 + 20 for text in order])
    return list(order[: max(2, int((2 * parameters * tokens <= operations).sum()))])


def batches(texts: Sequence[Text], size: int) -> Iterator[tuple[list[int], list[Text]]]:
    """Places and texts of each batch; what a template wrote, to which no special tokens are added, apart."""
    for templated in (False, True):
        places = [i for i, text in enumerate(texts) if (text.templated or bool(text.messages)) is templated]
        for first in range(0, len(places), size):
            chosen = places[first : first + size]
            yield chosen, [texts[i] for i in chosen]
