# SPDX-License-Identifier: Apache-2.0
"""Reads a row of a data set as text, together with what the row says of its responses.

A row holds a pair (``prompt, chosen, rejected``, or ``chosen, rejected`` with the prompt inside, which is Anthropic's
form), a list (``prompt, responses`` with ``scores`` or ``ranks``), or one response (``prompt, response`` with a
``score`` or ``label``). Each is text, which is joined as it is, or chat messages. Data sets that write these under
other names are read by :mod:`reward_model.data.layouts`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward_model.data.chats import (
    as_chats,
    as_messages,
    in_plain,
    is_chat,
    joined,
    require_answer,
    require_characters,
    shared_text,
    template_arguments,
    write,
)
from reward_model.data.comparisons import GRADES, BadRow, common_prefix
from reward_model.data.strengths import COLUMNS as STRENGTHS
from reward_model.data.strengths import strength_of

ASSISTANT = "\n\nAssistant:"  # Anthropic's mark of the last turn
DIALOGUE = re.compile(  # marks of turns in a text that holds its prompt, by the templates that are in use
    r"Human:|User:|Assistant:|<\|im_start\|>|<\|start_header_id\|>|<\|user\|>|<\|User\|>|<start_of_turn>|\[INST\]|###|Q:",
    re.IGNORECASE,
)
PAIR = ("chosen", "rejected")
LARGEST = float(np.finfo(np.float32).max)
FIELDS = (  # that a row may have; everything else is not read
    *("prompt", *PAIR, "responses", "response", "scores", "ranks", "score", "label", "margin", "rating", "probability"),
    *("chosen_score", "rejected_score", "score_chosen", "score_rejected", "tools", "chat_template_kwargs", "subset"),
    *STRENGTHS,
)
OTHER_ROWS = "responses with scores or ranks, or response with a score or label"
JUDGMENTS = frozenset(FIELDS) - {"prompt", *PAIR, "responses", "response", "tools", "chat_template_kwargs", "subset"}


@dataclass(frozen=True)
class Texts:
    """A row as text.

    prompt: What was asked.
    whole: The texts that begin with the prompt, one for each response.
    names: What messages to the user call each response.
    judged: The fields of a Comparison that say what was judged, and its subset.
    templated: Whether a chat template wrote the texts, special tokens included.
    has_prompt: Whether the row says where the prompt ends, by a field or by the last turn's mark; otherwise it is what
        whole texts have in common, which says nothing of any of them alone.
    """

    prompt: str
    whole: list[str]
    names: Sequence[str]
    judged: dict
    templated: bool
    has_prompt: bool = True


def read_row(row: dict, tokenizer: PreTrainedTokenizerBase, chat: bool = False, to_score: bool = False) -> Texts:
    """Check a row and write it as text.

    Args:
        tokenizer: Its chat template writes rows of chat messages. Rows of text do not need it.
        chat: Whether rows of text go through the template, too, the prompt as the user's turn.
        to_score: Whether the row is only to be scored: what it judges is not read, and its responses may be equal or
            empty, as those of a policy are at times.

    Raises:
        BadRow: A field is missing, empty or of the wrong type, a value is not a number, or two responses are equal.

    Example: a pair with scores, which differ by 2.

    >>> row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "chosen_score": 3, "rejected_score": 1}
    >>> texts = read_row(row, tokenizer=None)
    >>> texts.whole
    ['2 + 2 = 4', '2 + 2 = 5']
    >>> texts.judged["better"], texts.judged["worse"], texts.judged["margin"]
    ([0], [1], [2.0])
    """
    names: Sequence[str]
    row = {name: value for name, value in row.items() if name not in JUDGMENTS} if to_score else row
    is_pair = all(row.get(name) not in (None, "") for name in PAIR)  # a CSV file has "" for nothing
    if row.get("responses") is not None and not is_pair:
        found, names, judged = _list(row)
    elif row.get("response") is not None and not is_pair:
        found, names, judged = [row["response"]], ["response"], judge_answer(row)
    else:
        found, names, judged = [row.get(name) for name in PAIR], PAIR, judge_pair(row)
    judged |= {"subset": _subset(row)}
    prompt = in_plain("prompt", row.get("prompt"))
    found = [in_plain(name, value) for name, value in zip(names, found)]
    if prompt == []:
        prompt = None  # no turns before the response
    _require_types(row, prompt, found, names, to_score)
    if not to_score:
        require_different(found, names)
    for name, value in (("prompt", prompt), *zip(names, found)):
        require_characters(name, value)
    if not all(isinstance(value, str) for value in (*found, prompt or "")):
        return _read_chat(prompt, found, names, judged, tokenizer, template_arguments(row), to_score)
    if chat:
        if not to_score:
            _require_content(found, names)
        chats = as_chats(prompt, found, names)
        return _read_chat(*chats, names, judged, tokenizer, template_arguments(row), to_score)
    if row.get("tools"):
        raise BadRow("tools go through a chat template, and the row is text: --chat makes messages of it")
    has_prompt = prompt is not None
    if prompt is None:
        _require_dialogue(found, row)
        prompt = _common_prompt(found)
        has_prompt = prompt.endswith(ASSISTANT)
        found = [text[len(prompt) :] for text in found]
    if not to_score:
        _require_content(found, names)
    return Texts(prompt, [prompt + text for text in found], names, judged, templated=False, has_prompt=has_prompt)


def _subset(row: dict) -> str:
    """The part of its data set that a row belongs to; what is no text or number is ignored, as others use the word."""
    value = row.get("subset")
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def _require_types(row: dict, prompt, found: list, names: Sequence[str], to_score: bool) -> None:
    for name, value in zip(names, found):
        if value is None:
            raise BadRow(_what_is_missing(name, row, names, to_score))
        if not isinstance(value, str) and not is_chat(value):
            raise BadRow(f"{name} is {_type(value)}, not text or chat messages")
    if prompt is not None and not isinstance(prompt, str) and not is_chat(prompt):
        raise BadRow(f"prompt is {_type(prompt)}, not text or chat messages")
    if "prompt" in row and row["prompt"] is None and not all(map(_is_dialogue, found)):
        raise BadRow(_what_is_missing("prompt", row, names, to_score))


def _what_is_missing(name: str, row: dict, names: Sequence[str], to_score: bool) -> str:
    """That a field has no value, and which of the row's other columns may have been meant for it."""
    if names is PAIR and name not in row:
        others = next((other for other in ("responses", "response") if other in row), None)
        if others is None and to_score:
            return (
                f"no response; the row has {', '.join(row)}, and needs prompt and response (or chosen and rejected, or "
                "responses); --columns response=COLUMN names what has another name"
            )
        if others is None:
            return (
                f"{name} is missing; the row has {', '.join(row)}, and needs prompt, chosen, rejected (or "
                f"{OTHER_ROWS}); --columns chosen=COLUMN names what has another name"
            )
        name = others  # as the other rows of its file have
    unknown = [column for column, value in row.items() if column not in FIELDS and value is not None]
    near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.85)
    return f"{name} is missing" + (f"; is {near[0]} a misspelling of it?" if near else "")


def _is_dialogue(value) -> bool:
    """Whether an answer holds its prompt: rows of this kind may stand among others that have a prompt of their own."""
    return bool(DIALOGUE.match(value.lstrip())) if isinstance(value, str) else value[0]["role"] != "assistant"


def _require_content(found: list[str], names: Sequence[str]) -> None:
    for name, text in zip(names, found):
        if not text.strip():
            raise BadRow(f"{name} is empty")


def _require_dialogue(found: list[str], row: dict) -> None:
    """Raise BadRow if there is no prompt, neither beside the texts nor in them."""
    if any(DIALOGUE.search(text) for text in found):
        return
    others = [name for name, value in row.items() if name not in FIELDS and isinstance(value, str) and value.strip()]
    which = f"; if it is in {' or '.join(others)}, add --columns prompt=COLUMN" if others else ""
    raise BadRow(
        "there is no prompt, and the texts have no marks of turns, such as Human: and Assistant:"
        + (which or '; give "prompt": "" if there really is none')
    )


def require_different(found: list, names: Sequence[str], how: str = "") -> None:
    """Raise BadRow if two of the texts in ``found`` are equal. The message ends with ``how``."""
    for i, value in enumerate(found):
        if value in found[:i]:
            raise BadRow(f"{names[found.index(value)]} and {names[i]} are equal{how}")


def judge_pair(row: dict) -> dict:
    """Read what a row says of its chosen and its rejected response, as fields of a Comparison.

    If the row has no margin, the margin is the difference of its scores. Two equal scores without a margin are a tie,
    from which no pair is learned. A rating, probability or strength that cannot be one is ignored, because other data
    sets use these words for other things. A loss that needs one will say that it is missing.

    Raises:
        BadRow: A margin or score is not a number, or the scores deny the order.
    """
    scores = [_number(row, f"{name}_score", f"score_{name}") for name in PAIR]
    margin = _number(row, "margin")
    if scores[0] < scores[1]:
        raise BadRow(f"chosen has the lower score: {scores[0]:g}, and rejected {scores[1]:g}")
    if scores[0] == scores[1] and not margin > 0:
        return judge_list(2, scores=scores)
    strength = strength_of(row)
    return {
        "better": [0],
        "worse": [1],
        "margin": [_difference(*scores) if math.isnan(margin) else margin],
        "rating": [_within(row.get("rating"), 3, GRADES)],
        "probability": [_within(row.get("probability"), 1)],
        "strength": [] if strength is None or abs(strength.mean) > LARGEST else [strength.mean],
        "ranks": [0, 1],
        "targets": scores,
    }


def _list(row: dict) -> tuple[list, list[str], dict]:
    """The responses of a list, their names, and what the row says of them."""
    found = row["responses"]
    if not isinstance(found, list) or not found:
        raise BadRow(f"responses is {'empty' if found == [] else _type(found)}, not a list of answers")
    numbers = {}
    for name in ("scores", "ranks"):
        values = row.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(found):
            count = f"has {len(values)} numbers" if isinstance(values, list) else f"is {_type(values)}"
            raise BadRow(f"{name} {count}, and there are {len(found)} responses")
        labels = [f"number {i} of {name}" for i in range(1, len(values) + 1)]
        numbers[name] = [_number({label: value}, label) for label, value in zip(labels, values)]
        for label, value in zip(labels, numbers[name]):
            if math.isnan(value):
                raise BadRow(f"{label} is missing")
    return found, [f"response {i}" for i in range(1, len(found) + 1)], judge_list(len(found), **numbers)


def judge_list(size: int, scores: list[float] | None = None, ranks: list[float] | None = None) -> dict:
    """Turn the scores or ranks of a list's responses into their order and into all pairs that are not tied.

    Args:
        size: The number of responses.
        scores: One for each response, of which a higher one is better.
        ranks: One for each response, of which a lower one is better. Where there are both, the ranks decide.

    Returns:
        The fields of a Comparison that say what was judged.
    """
    order = ranks if ranks is not None else [-score for score in scores or []]
    dense = np.unique(order, return_inverse=True)[1].tolist() if order else []
    pairs = [(i, j) for i in range(len(dense)) for j in range(len(dense)) if dense[i] < dense[j]]
    return {
        "better": [i for i, _ in pairs],
        "worse": [j for _, j in pairs],
        "margin": [_difference(scores[i], scores[j]) if scores else math.nan for i, j in pairs],
        "rating": [math.nan] * len(pairs),
        "probability": [math.nan] * len(pairs),
        "strength": [],
        "ranks": dense,
        "targets": scores or [math.nan] * size,
    }


def judge_answer(row: dict) -> dict:
    """Read what a row says of its one response, as fields of a Comparison.

    Raises:
        BadRow: The score or label is not a number, or the row has both.
    """
    if row.get("score") is not None and row.get("label") is not None:
        raise BadRow("the row has a score and a label: keep one of them")
    if isinstance(row.get("label"), bool):
        row = row | {"label": int(row["label"])}
    nothing = ("better", "worse", "margin", "rating", "probability", "strength", "ranks")
    return {name: [] for name in nothing} | {"targets": [_number(row, "score", "label")]}


def _difference(better: float, worse: float) -> float:
    """By how much one score beats another, as the margin of a pair, which is kept in float32."""
    if abs(better - worse) > LARGEST:
        raise BadRow(f"the scores {better:g} and {worse:g} are too far apart")
    return better - worse


def _number(row: dict, *names: str) -> float:
    """The number under the first of some names that holds a value, or NaN if none does."""
    name, value = next(((name, row[name]) for name in names if row.get(name) is not None), ("", None))
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{name} is {_type(value)}, not a number")
    if not abs(value) <= LARGEST:
        raise BadRow(f"{name} is {value}")
    return float(value)


def _within(value, most: float, words: dict[str, float] | None = None) -> float:
    """A number from 0 to ``most``, or the number that a word stands for, or NaN if the value is neither."""
    if isinstance(value, str):
        value = (words or {}).get(" ".join(value.lower().split()))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= most else math.nan


def _type(value) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _common_prompt(texts: list[str]) -> str:
    """What whole dialogs share, up to the last "Assistant:" if there is one. A single text shares nothing."""
    shared = texts[0] if len(texts) > 1 else ""
    for text in texts[1:]:
        shared = shared[: common_prefix(shared, text)]
    turn = shared.rfind(ASSISTANT)
    if turn >= 0:
        return shared[: turn + len(ASSISTANT)]
    # no turns: do not cut inside a word
    return shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1]


def texts_to_score(
    prompt: str | list[dict],
    responses: Sequence[str | dict | list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    arguments: dict | None = None,
) -> Texts:
    """Write a prompt and responses that a program gives as text. A text stays a text, whatever it looks like.

    Args:
        chat: As in :func:`read_row`.
        arguments: Those of the chat template, such as ``tools``.

    Raises:
        BadRow: A value is neither text nor chat messages, or has half a character, or the template refuses a chat.
    """
    names = [f"response {i}" for i in range(1, len(responses) + 1)] if len(responses) != 1 else ["response"]
    asked = prompt if isinstance(prompt, str) else in_plain("prompt", prompt)
    found = [each if isinstance(each, str) else in_plain(name, each) for name, each in zip(names, responses)]
    if not found:
        raise BadRow("there are no responses")
    _require_types({}, None if asked == [] else asked, found, names, to_score=True)
    for name, value in (("prompt", asked), *zip(names, found)):
        require_characters(name, value)
    if not all(isinstance(value, str) for value in (asked, *found)):
        return _read_chat(asked, found, names, {}, tokenizer, arguments or {}, to_score=True)
    if chat:
        return _read_chat(*as_chats(asked, found, names), names, {}, tokenizer, arguments or {}, to_score=True)
    if arguments:
        raise BadRow("tools and arguments of a chat template need chat messages, and the prompt and responses are text")
    return Texts(asked, [asked + text for text in found], names, {}, templated=False)


def _read_chat(
    prompt, found: list, names: Sequence[str], judged: dict, tokenizer, arguments: dict, to_score: bool
) -> Texts:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chats = joined(as_messages(prompt or []), [as_messages(value) for value in found])
    for name, messages in zip(names, chats):
        require_answer(name, messages[-1], may_be_empty=to_score)
    written = write(tokenizer, chats, arguments)
    if not to_score:
        require_different(written, names)
    return Texts(shared_text(tokenizer, chats, written, arguments), written, names, judged, templated=True)
