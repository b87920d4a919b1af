# SPDX-License-Identifier: Apache-2.0
"""How published data sets write their rows → the fields of :mod:`reward_model.data.rows`.

A layout has parts: one that gives the prompt, one that gives the answers and what was judged of them. Each is known by
its columns, so that ``instruction`` goes with ``response_1`` and ``response_2`` as well as with ``chosen`` and
``rejected``. The columns were read on the data sets' own pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from reward_model.data.chats import in_plain, is_chat
from reward_model.data.comparisons import BadRow
from reward_model.data.rows import DIALOGUE, FIELDS, PAIR
from reward_model.data.strengths import THEIRS

CHATS = ("conversations", "messages", "context", "conversation")  # columns that hold a whole chat
SYSTEM = ("system", "system_prompt")
SCORES = {  # ours → the names under which others give them
    "chosen_score": ("chosen_rating", "chosen-rating", "chosen_avg_rating"),
    "rejected_score": ("rejected_rating", "rejected-rating", "rejected_avg_rating"),
}
NAMED = (
    *FIELDS,
    *SYSTEM[:1],
    "question",
    "instruction",
    "input",
    "messages",
    "conversations",
)  # what --columns may name
TIE = re.compile(r"tie|both|same|equal|draw", re.IGNORECASE)  # "tie (bothbad)", "both_bad"


@dataclass(frozen=True)
class Part:
    """One way to write a prompt, or the answers with what was judged of them.

    said: in words. needs: columns by which it is known. gives: a row → some of our fields. may: columns that it reads,
    too, where they are there.
    """

    said: str
    needs: tuple[str, ...]
    gives: Callable[[dict], dict]
    may: tuple[str, ...] = ()

    def fits(self, columns: Iterable[str]) -> bool:
        return set(self.needs) <= set(columns)


@dataclass(frozen=True)
class Layout:
    """Of a data set's rows. Without parts, they have our own fields."""

    parts: tuple[Part, ...] = ()
    scores: dict[str, str] = field(default_factory=dict)  # ours → theirs

    def read(self, row: dict) -> dict:
        """A row as stored → a dict with our fields; other columns stay in it.

        Raises:
            BadRow: a column does not hold what it has in this layout.
        """
        given: dict = {name: _value(row, column) for name, column in self.scores.items()}
        for part in self.parts:
            given |= part.gives(row | given)
        return row | given

    @property
    def columns(self) -> set[str]:
        """Those that are read beside our own fields."""
        return {name for part in self.parts for name in (*part.needs, *part.may)} | set(self.scores.values())

    @property
    def key(self) -> str:
        """Tells one layout from another."""
        return "; ".join([*(part.said for part in self.parts), *map(str, self.scores.items())])

    def __str__(self) -> str:
        scores = [f"{', '.join(self.scores.values())} as scores"] if self.scores else []
        return "; ".join([*(part.said for part in self.parts if part.said), *scores])


OWN = Layout()


def number_of(cell: str | None) -> float | str | None:
    """A CSV cell that should hold a number, or the word true or false; empty: none.

    >>> number_of("0.5"), number_of("True"), number_of(" "), number_of("better")
    (0.5, 1.0, None, 'better')
    """
    if not cell or not cell.strip():
        return None
    if cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    try:
        return float(cell)
    except ValueError:
        return cell


def _value(row: dict, name: str):
    """A number that a column holds, also as text, as in CSV files."""
    value = row.get(name)
    return number_of(value) if isinstance(value, str) else value


def layout_of(columns: list[str], first: dict, chat: bool = False) -> Layout:
    """The layout of rows that have these columns.

    Args:
        first: one of the rows, which tells a whole dialogue in ``chosen`` from an answer.
        chat: whether a prompt of plain text becomes a message, before which a system's can stand.
    """
    columns = [name for name in columns if name not in CHATS or is_chat(_read(name, first))]
    for whole in WHOLE:
        if whole.fits(columns) and not set(PAIR) <= set(columns):
            return Layout((whole,))
    if set(PAIR) <= set(columns) and "prompt" not in columns and is_turns(first.get("chosen")):
        return Layout((TURNS,))
    judged = set(PAIR) <= set(columns) or {"responses"} <= set(columns)
    answers = None if judged else next((part for part in ANSWERS if part.fits(columns)), None)
    if answers is None and "response" in columns and "helpfulness" in columns:
        answers = HELPFULNESS if not {"score", "label"} & set(columns) else None
    taken = set(answers.needs if answers else ())
    prompt = None
    if "prompt" not in columns and not _holds_prompt(first):
        prompt = next((part for part in PROMPTS if part.fits(columns) and not taken & set(part.needs)), None)
    has_turns = prompt is not None or taken & set(CHATS) or _has_turns(first, chat)
    system = SYSTEM_PART if has_turns and set(SYSTEM) & set(columns) else None
    scores = {ours: name for ours, names in SCORES.items() for name in names if name in columns}
    if {"score_chosen", "chosen_score"} & set(columns) or len(scores) < len(SCORES):
        scores = {}
    return Layout(tuple(part for part in (prompt, answers, system) if part), scores)


def _read(name: str, row: dict):
    """A column as messages where it holds a chat; None where that will be refused when the row is read."""
    try:
        return in_plain(name, row.get(name))
    except BadRow:
        return None


def _holds_prompt(row: dict) -> bool:
    """Whether ``chosen`` is a whole dialogue, as text or as messages."""
    chosen = _read("chosen", row)
    if isinstance(chosen, str):
        return bool(DIALOGUE.match(chosen.lstrip()))
    return is_chat(chosen) and any(message["role"] != "assistant" for message in chosen)


def _has_turns(row: dict, chat: bool) -> bool:
    """Whether what a row says is messages, or a plain question that becomes one."""
    prompt = _read("prompt", row)
    if isinstance(prompt, str):
        return chat and not DIALOGUE.search(prompt)
    return prompt is not None or is_chat(_read("chosen", row))


# The prompt. Fields that are turns become messages, since nothing says how their texts would be joined.


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise BadRow(f"{name} is missing" if row.get(name) is None else f"{name} is not text")
    return row[name]


def _chat(row: dict, name: str) -> list[dict]:
    chat = in_plain(name, row.get(name))
    if not is_chat(chat):
        raise BadRow(f"{name} is missing" if chat is None else f"{name} is not a list of messages")
    return chat


def _chat_prompt(name: str, row: dict) -> dict:
    return {"prompt": _chat(row, name)}


def _instruction(row: dict) -> dict:
    """Alpaca's: an instruction, an input that may be empty, and earlier turns as pairs of texts."""
    earlier: list[dict] = []
    for pair in _parsed(row.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history is not a list of pairs of texts")
        earlier += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    asked = [_text(row, "instruction"), row.get("input") or ""]
    return {"prompt": earlier + _user("\n".join(text for text in asked if text))}


def _question(name: str, row: dict) -> dict:
    return {"prompt": _user(_text(row, name))}


def _system(row: dict) -> dict:
    """The prompt, or else the whole chats, with the system message that a column of its own gives."""
    said = next((row[name] for name in SYSTEM if row.get(name)), "")
    if not isinstance(said, str):
        raise BadRow("system is not text")
    names = ("prompt",) if row.get("prompt") else (*PAIR, "response")
    if not said.strip():
        return {} if names != ("prompt",) else {"prompt": _as_turn(row["prompt"])}
    given = {}
    for name in names:
        chat = _as_turn(in_plain(name, row.get(name)))
        if is_chat(chat) and chat[0]["role"] != "system":
            given[name] = [{"role": "system", "content": said}, *chat]
    return given


def _as_turn(prompt):
    return _user(prompt) if isinstance(prompt, str) else prompt


SYSTEM_PART = Part("system as the system's message", (), _system, SYSTEM)
PROMPTS = (
    *(Part(f"{name} as the chat that is answered", (name,), partial(_chat_prompt, name)) for name in CHATS),
    Part("instruction, and input, as the user's message", ("instruction",), _instruction, ("input", "history")),
    *(
        Part(f"{name} as the user's message", (name,), partial(_question, name))
        for name in ("question", "query", "input", "user_input")
    ),
)

# The answers.


def _pair(chosen: str, rejected: str, row: dict) -> dict:
    return {"chosen": row.get(chosen), "rejected": row.get(rejected)}


def _winner(first: str, second: str, row: dict) -> dict:
    """Two answers or dialogues, and a column that says ``model_a``, ``B`` or ``tie``, or one that says yes of each."""
    column = next((name for name in ("winner", "preference", "preferred") if name in row), None)
    if column:
        value = str(row[column]).strip().lower()
        ending = re.fullmatch(r"(?:model|response|answer|assistant|conversation)?[_ ]?([ab])", value)
        said = "tie" if TIE.search(value) else ending[1] if ending else None
        if said is None:
            raise BadRow(f"{column} is {row[column]}; it should be model_a, model_b or tie")
    else:
        won = [name for name in "ab" if _flag(row, f"winner_model_{name}")]
        if len(won) == 2:
            raise BadRow("winner_model_a and winner_model_b are both set")
        said = won[0] if won else "tie"
    answers = [in_plain(name, row.get(name)) for name in (first, second)]
    if "prompt" in row and all(isinstance(value, str) for value in (row["prompt"], *answers)):
        row, answers = _interleaved(row, answers)
    asked = {"prompt": row["prompt"]} if "prompt" in row else {}
    if said == "tie":
        return asked | _tie(answers)
    better, worse = answers if said == "a" else answers[::-1]
    return asked | {"chosen": better, "rejected": worse}


def _flag(row: dict, name: str) -> bool:
    value = _value(row, name)
    if value not in (0, 1, None):
        raise BadRow(f"{name} is {value}; it should be 0 or 1")
    return bool(value)


def _tie(answers: list) -> dict:
    return {"responses": answers, "ranks": [0, 0]}


def _interleaved(row: dict, answers: list) -> tuple[dict, list]:
    """The Chatbot Arena's text columns, each a JSON list with the texts of all turns → a prompt and two chats."""
    try:
        asked, *said = (json.loads(text) for text in (row["prompt"], *answers))
    except ValueError:
        return row, answers
    turns = (asked, *said)
    if not all(isinstance(texts, list) and texts and len(texts) == len(asked) for texts in turns):
        return row, answers
    if not all(isinstance(text, str) for texts in turns for text in texts):
        raise BadRow("a turn is null")
    chats = [
        [
            {"role": role, "content": text}
            for pair in zip(asked, texts)
            for role, text in zip(("user", "assistant"), pair)
        ]
        for texts in said
    ]
    return row | {"prompt": []}, chats


def _better_id(row: dict) -> dict:
    better = _value(row, "better_response_id")
    if better not in (0, 1):
        raise BadRow(f"better_response_id is {better}; it should be 0 or 1")
    better = int(better)
    return {"chosen": row.get(f"response_{better}"), "rejected": row.get(f"response_{1 - better}")}


def _strength(first: str, second: str, column: str, row: dict) -> dict:
    """HelpSteer's scale: −3, the first is much better, to 3, the second is; 0, they are equal. Llama 2's grades."""
    value = _value(row, column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3:
        raise BadRow(f"{column} is {value}; it should be a number from -3 to 3")
    answers = [row.get(first), row.get(second)]
    if value == 0:
        return _tie(answers)
    better, worse = answers if value < 0 else answers[::-1]
    return {"chosen": better, "rejected": worse, "rating": abs(value)}


def _completions(row: dict) -> dict:
    """UltraFeedback's. Its ``overall_score`` has rows of 10 that mean 1, hence the mean of the aspects where it is."""
    found = _objects(row, "completions")
    name = (
        "fine-grained_score" if all(each.get("fine-grained_score") is not None for each in found) else "overall_score"
    )
    return {"responses": [each.get("response") for each in found], "scores": [each.get(name) for each in found]}


def _answers(row: dict) -> dict:
    found = _objects(row, "answers")
    return {"responses": [each.get("answer") for each in found], "ranks": [each.get("rank") for each in found]}


def _parsed(value):
    """What JSON text in a column says; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _objects(row: dict, name: str) -> list[dict]:
    found = _parsed(row.get(name))
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise BadRow(f"{name} is not a list of objects")
    return found


def _labelled(answer: str, judged: str, row: dict) -> dict:
    """KTO's one answer and whether it is wanted."""
    found = row.get(answer) if answer == "completion" else _chat(row, answer)
    return {"response": found, "label" if judged == "kto_tag" else judged: row.get(judged)}


def _rejected_beside(name: str, row: dict) -> dict:
    """A chat that ends with the wanted answer, and the other answer."""
    chat, rejected = _chat(row, name), in_plain("rejected_response", row.get("rejected_response"))
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": rejected}


def _helpfulness(row: dict) -> dict:
    return {"score": _value(row, "helpfulness")}


HELPFULNESS = Part("helpfulness as the score", ("response", "helpfulness"), _helpfulness)
_PREFERENCES = (
    *(("response_1", "response_2", name) for name in ("preference_strength", "overall_preference", "preference")),
    *(("response1", "response2", name) for name in ("overall_preference", "preference_strength", "preference")),
)
ANSWERS = (
    *(
        Part(f"{a} before {b}", (a, b), partial(_pair, a, b))
        for a, b in (("chosen_response", "rejected_response"), ("response_j", "response_k"), ("chosen", "reject"))
    ),
    *(
        Part(f"{a} and {b} by {column}", (a, b, column), partial(_winner, a, b), ("winner_model_b", "winner_tie"))
        for a, b in (("response_a", "response_b"), ("conversation_a", "conversation_b"))
        for column in ("winner", "preference", "preferred", "winner_model_a")
    ),
    Part(
        "response_0 and response_1 by better_response_id",
        ("response_0", "response_1", "better_response_id"),
        _better_id,
        ("safer_response_id",),
    ),
    *(Part(f"{a} and {b} by {by}", (a, b, by), partial(_strength, a, b, by)) for a, b, by in _PREFERENCES),
    Part("completions by their scores", ("completions",), _completions),
    Part("answers by their ranks", ("answers",), _answers),
    *(
        Part(f"{answer} as the answer that {judged} judges", (answer, judged), partial(_labelled, answer, judged))
        for answer in ("completion", *CHATS)
        for judged in ("label", "kto_tag", "score")
    ),
    *(
        Part(
            f"the end of {name} before rejected_response", (name, "rejected_response"), partial(_rejected_beside, name)
        )
        for name in CHATS
    ),
)


# fnlp/hh-rlhf-strength-cleaned: dialogues of Anthropic's as lists of the plain texts of all turns.


def is_turns(value) -> bool:
    """Whether a value is the texts of the turns of a dialogue, the last of which is the answer."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _turns(row: dict) -> dict:
    """The dialogue with Anthropic's marks. The answer is the assistant's turn, and before it they alternate."""
    for name in PAIR:
        if not is_turns(row.get(name)):
            raise BadRow(f"{name} is not a list of texts, the turns of a dialogue")
    *asked, chosen = row["chosen"]
    *also, rejected = row["rejected"]
    if asked != also:
        raise BadRow("chosen and rejected answer different dialogues")
    marks = ("Human", "Assistant")
    said = [f"\n\n{marks[(len(asked) - i + 1) % 2]}: {text.strip()}" for i, text in enumerate(asked)]
    answers = {name: f" {text.strip()}" for name, text in zip(PAIR, (chosen, rejected))}
    return {"prompt": "".join(said) + "\n\nAssistant:"} | answers


TURNS = Part("chosen and rejected as the turns of dialogues, with Anthropic's marks", PAIR, _turns, THEIRS)

# Upstream's data sets: one row → prompt, chosen, rejected, in the words that DeepSpeed-Chat trains on.


def _dialogue(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": f" Human: {question} Assistant:", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _synthetic(row):
    return _dialogue(row["prompt"], row["chosen"], row["rejected"])


def _webgpt(row):
    # citations, "[1]", mean nothing without a browser; spaced ones first, as upstream does it
    answers = [re.sub(r"[(\[].*?[)\]]", "", re.sub(r" [(\[].*?[)\]]", "", row[f"answer_{i}"])) for i in (0, 1)]
    scores = float(row["score_0"]), float(row["score_1"])
    better = 0 if scores[0] >= scores[1] else 1
    question = _parsed(row["question"])
    asked = question["full_text"] if isinstance(question, dict) else question
    pair = _dialogue(asked, answers[better], answers[1 - better])
    return pair | {"chosen_score": scores[better], "rejected_score": scores[1 - better]}  # equal: a tie


def _shp(row):
    names = ("A", "B") if int(float(row["labels"])) == 1 else ("B", "A")
    pair = _dialogue(row["history"], *(row[f"human_ref_{name}"] for name in names))
    return pair | {f"{side}_score": _value(row, f"score_{name}") for side, name in zip(PAIR, names)}


def _miracl(row):
    def first(passages):
        return passages[0]["text"] if passages else ""

    return _dialogue(row["query"], first(row["positive_passages"]), first(row["negative_passages"]))


def _jsonfile(row):
    texts = {name: row[name] for name in ("prompt", *PAIR) if isinstance(row.get(name), str)}
    return row | {name: f" {text}" for name, text in texts.items()}


_SHP = Part(
    "history, human_ref_A and human_ref_B by labels, in upstream's words",
    ("history", "human_ref_A", "human_ref_B", "labels"),
    _shp,
    ("score_A", "score_B"),
)
_WEBGPT = Part(
    "question, answer_0 and answer_1 by their scores, in upstream's words",
    ("question", "answer_0", "answer_1", "score_0", "score_1"),
    _webgpt,
)
WHOLE = (_SHP, _WEBGPT)
_MIRACL = Layout((Part("", ("query", "positive_passages", "negative_passages"), _miracl),))
BY_NAME = {  # of a data set's name, as upstream knows it
    "Dahoas/rm-static": OWN,
    "Dahoas/full-hh-rlhf": OWN,
    "Dahoas/synthetic-instruct-gptj-pairwise": Layout((Part("", (), _synthetic),)),
    "yitingxie/rlhf-reward-datasets": OWN,
    "openai/webgpt_comparisons": Layout((_WEBGPT,)),
    "stanfordnlp/SHP": Layout((_SHP,)),
    "Cohere/miracl-zh-queries-22-12": _MIRACL,
    "Cohere/miracl-ja-queries-22-12": _MIRACL,
    "local/jsonfile": Layout((Part("", (), _jsonfile),)),
}
NO_REJECTED = (  # names that upstream knows for its first step
    "pvduy/sharegpt_alpaca_oa_vicuna_format",
    "wangrui6/Zhihu-KOL",
    "Hello-SimpleAI/HC3-Chinese",
    "mkqa-Chinese",
    "mkqa-Japanese",
    "lmqg/qg_jaquad",
    "lmqg/qag_jaquad",
)


def unread(columns: Iterable[str], layout: Layout) -> list[str]:
    """The columns that nobody reads."""
    return [name for name in columns if name not in FIELDS and name not in (*layout.columns, *THEIRS)]
