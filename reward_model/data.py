# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set → Comparisons: token ids of a prompt and its responses, and what was judged of them.

A row holds a pair (``prompt, chosen, rejected``, or ``chosen, rejected`` with the prompt inside, Anthropic's form), a
list (``prompt, responses`` with ``scores`` or ``ranks``), or one answer (``prompt, response`` with a ``score`` or
``label``); text, which is joined as it is, or chat messages. A row that cannot be used stops the run or is counted by
reason; an over-long one loses the left of its prompt and is counted; nothing else happens to a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from reward_model import sources
from reward_model.errors import UserError, say
from reward_model.sources import Source, read_sources
from reward_model.tokenizer import SpecialTokens

EVAL_SHARE = 0.1  # of the prompts, where a data set brings no evaluation rows: upstream's share too
ROWS_PER_PROCESS = 2_000  # below this a fast tokenizer's own threads beat starting a process
ASSISTANT = "\n\nAssistant:"  # Anthropic's mark of the last turn
PAIR = ("chosen", "rejected")
OTHER_ROWS = "responses with scores or ranks, or response with a score or label"
GRADES = {  # Llama 2's, arXiv 2307.09288, table 27; as numbers they are its large margins, a third of them its small
    "significantly better": 3.0,
    "better": 2.0,
    "slightly better": 1.0,
    "negligibly better": 0.0,
    "unsure": 0.0,
    "negligibly better / unsure": 0.0,
}

FEATURES = datasets.Features(
    {
        "prompt": datasets.List(datasets.Value("int32")),
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "better": datasets.List(datasets.Value("int32")),
        "worse": datasets.List(datasets.Value("int32")),
        "margin": datasets.List(datasets.Value("float32")),
        "rating": datasets.List(datasets.Value("float32")),
        "probability": datasets.List(datasets.Value("float32")),
        "ranks": datasets.List(datasets.Value("int32")),
        "targets": datasets.List(datasets.Value("float32")),
        "length": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "prompt_hash": datasets.Value("int64"),
        "prompt_tokens": datasets.Value("int32"),
        "text_hashes": datasets.List(datasets.Value("int64")),
        "text_lengths": datasets.List(datasets.Value("int32")),
        "cut": datasets.Value("bool"),
        "problem": datasets.Value("string"),
    }
)


class BadRow(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Comparison:
    """A prompt, K responses, and what was judged of them.

    prompt: ids that every response shares, the longest common prefix of the jointly tokenised texts.
    responses: K lists of ids that follow it; each ends with an end token.
    better, worse: judged pairs as indices into ``responses``; better[i] beat worse[i].
    margin: by how much, one number per judged pair; NaN where the row says nothing.
    prompt_hash: equal for rows that were asked the same; None: unlike any other.
    rating: Llama 2's grade of each judged pair, 3 (significantly better) to 0; NaN or none at all: not said.
    probability: that better beats worse, per judged pair; NaN or none at all: not said.
    similarity: cosine of the embeddings of a judged pair's answers; none at all: not computed.
    ranks: of the responses, 0 the best, equal where tied; none at all: the row says no order.
    targets: score or label of each response; NaN or none at all: not said.
    prompt_tokens: of what was asked; the responses may go on alike. None: the whole prompt.
    """

    prompt: list[int]
    responses: list[list[int]]
    better: list[int] = field(default_factory=list)
    worse: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    prompt_hash: int | None = None
    rating: list[float] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens to compute when the responses share the prompt."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


class Comparisons:
    """A sequence of Comparisons in an Arrow file; reads one from disk when asked for it.

    For each of them, (r,) int64: ``lengths`` of the longest text, ``tokens`` of the prompt and all responses,
    ``prompt_tokens`` of what was asked (the responses may go on alike), ``pairs`` judged. What planning needs lies in
    memory, 8 bytes a number; the tokens stay in the file.
    """

    def __init__(self, table: datasets.Dataset):
        self.table = table
        self.lengths = self._numbers("length")
        self.tokens = self._numbers("tokens")
        self.prompt_tokens = self._numbers("prompt_tokens")
        self.pairs = np.asarray(self._arrow("better").value_lengths(), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Comparison:
        row = self.table[int(index)]
        return Comparison(**{f.name: row[f.name] for f in fields(Comparison) if f.name in row})

    def _arrow(self, column: str) -> pyarrow.Array:
        values = self.table.with_format("arrow")[column][:]
        return values.combine_chunks() if isinstance(values, pyarrow.ChunkedArray) else values

    def _numbers(self, column: str) -> np.ndarray:
        return np.asarray(self._arrow(column), dtype=np.int64)

    def prompt_hashes(self) -> np.ndarray:
        """Equal numbers, equal prompts. (r,)"""
        return self._numbers("prompt_hash")

    def texts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each whole text, one row's after the other, a hash and its tokens, (t,); texts of each row, (r,)."""
        hashes = self._arrow("text_hashes")
        lengths = self._arrow("text_lengths").flatten()
        return tuple(
            np.asarray(values, dtype=np.int64) for values in (hashes.flatten(), lengths, hashes.value_lengths())
        )

    def targets(self) -> np.ndarray:
        """Score or label of every response, one row's after the other; NaN where there is none. (t,)"""
        return np.asarray(self._arrow("targets").flatten(), dtype=np.float64)

    def select(self, indices: np.ndarray) -> Comparisons:
        return Comparisons(self.table.select(indices))

    def with_similarity(self, cosines: np.ndarray) -> Comparisons:
        """With a cosine for each judged pair, one row's after the other."""
        values = np.split(cosines.astype(np.float32), np.cumsum(self.pairs)[:-1])
        return Comparisons(self.table.add_column("similarity", [v.tolist() for v in values]))


@dataclass(frozen=True)
class Rules:
    """How rows become Comparisons.

    max_seq_len: longest text in tokens. on_bad_row: ``stop`` or ``skip``. cache: folder for tokenised rows.
    processes: for tokenising; 0: as many as there are cores and work. lack: what a training row, given as a Comparison
    without its tokens, lacks for the loss; it raises BadRow, or gives None.
    """

    max_seq_len: int
    on_bad_row: str
    cache: Path
    processes: int = 0
    lack: Callable[[Comparison], str | None] | None = None


def load_comparisons(
    train_paths: list[str],
    eval_paths: list[str],
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    rules: Rules,
    seed: int,
    data_split: str | None = None,
) -> tuple[Comparisons, Comparisons]:
    """Training and evaluation Comparisons, tokenised once and then read from the cache.

    Evaluation rows are those of ``eval_paths``; else those that the training entries bring; else, for an entry that
    brings none, a tenth of its prompts is held out.

    Raises:
        UserError: unreadable data, a bad row under ``stop``, or nothing left.
    """
    train, evaluation, undivided = [], [], []
    for path in train_paths:
        train_sources, eval_sources = read_sources(path, seed, data_split, hold_out=not eval_paths)
        tokenised = [tokenise(source, tokenizer, special, rules, rules.lack) for source in train_sources]
        if eval_paths or eval_sources:
            train += tokenised
        else:
            undivided += tokenised
        if not eval_paths:
            evaluation += [tokenise(source, tokenizer, special, rules, nothing_judged) for source in eval_sources]
    for path in eval_paths:
        evaluation += _evaluation_rows(path, tokenizer, special, rules, seed, nothing_judged)
    if any(len(part) for part in undivided):
        undivided, held_out = _hold_out(undivided, seed)
        train, evaluation = train + undivided, evaluation + held_out
    for name, parts in (("training", train), ("evaluation", evaluation)):
        if sum(len(part) for part in parts) == 0:
            raise UserError(f"no {name} rows are left")
    return _join(train), _join(evaluation)


def load_answers(path: str, tokenizer, special: SpecialTokens, rules: Rules, seed: int) -> Comparisons:
    """The rows of a file, or the evaluation rows of a folder or hub name, whether they judge anything or not.

    Raises:
        UserError: unreadable data, or a bad row under ``stop``.
    """
    return _join(_evaluation_rows(path, tokenizer, special, rules, seed, None))


def _evaluation_rows(path: str, tokenizer, special, rules: Rules, seed: int, lack) -> list[Comparisons]:
    # a folder or hub name stands for its evaluation rows, a file for all of its rows
    first, second = read_sources(path, seed)
    return [tokenise(source, tokenizer, special, rules, lack) for source in second or first]


def nothing_judged(row: Comparison) -> str | None:
    """What an evaluation row lacks, which needs an order or a score of some kind."""
    if row.better or not np.isnan(row.targets).all():
        return None
    return f"the row has {answers(row)} and no order, score or label: nothing to evaluate"


def answers(row: Comparison) -> str:
    """How many there are, in words."""
    count = len(row.targets)
    return "one answer" if count == 1 else f"{ {2: 'two', 3: 'three', 4: 'four'}.get(count, count) } answers"


def _join(parts: list[Comparisons]) -> Comparisons:
    return parts[0] if len(parts) == 1 else Comparisons(datasets.concatenate_datasets([p.table for p in parts]))


def _hold_out(parts: list[Comparisons], seed: int) -> tuple[list[Comparisons], list[Comparisons]]:
    """Keep a tenth of the prompts of some parts for evaluation, so that no prompt is on both sides."""
    hashes = [part.prompt_hashes() for part in parts]
    prompts = np.unique(np.concatenate(hashes))
    order = np.random.RandomState(seed).permutation(len(prompts))
    held = prompts[order[: max(1, round(EVAL_SHARE * len(prompts)))]]
    if len(prompts) < 2:
        raise UserError("there is one prompt and there are no evaluation rows: name some with --eval_data_path")
    masks = [np.isin(h, held) for h in hashes]
    rows = sum(int(mask.sum()) for mask in masks)
    say(f"no evaluation rows: held out {len(held)} of {len(prompts)} prompts ({rows} rows)")
    train = [part.select(np.flatnonzero(~mask)) for part, mask in zip(parts, masks)]
    evaluation = [part.select(np.flatnonzero(mask)) for part, mask in zip(parts, masks)]
    return train, evaluation


def tokenise(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    rules: Rules,
    lack: Callable[[Comparison], str | None] | None = None,
) -> Comparisons:
    """One source's rows as Comparisons, from the cache if this content was tokenised like this before.

    Args:
        lack: as in :class:`Rules`; None: any row will do.

    Raises:
        UserError: a bad row under ``stop``; names the source, the row's number and the reason.
    """
    work = partial(
        _tokenise_rows,
        source=replace(source, rows=None, numbers=None),
        tokenizer=tokenizer,
        special=special,
        max_seq_len=rules.max_seq_len,
    )
    key = _fingerprint(source, tokenizer, special, rules)
    rules.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = rules.processes or min(cores, len(source.rows) // ROWS_PER_PROCESS)
    # whoever comes first on this machine does the work, the others wait here and then read the cache
    with FileLock(rules.cache / f"{key}.lock"):
        table = source.rows.map(
            work,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=source.rows.column_names,
            features=FEATURES,
            new_fingerprint=key,
            cache_file_name=str(rules.cache / f"{key}.arrow"),
            desc=f"tokenising {os.path.basename(source.name)}",
        )
    return Comparisons(_without_bad_rows(source, table, rules, lack))


def _fingerprint(source: Source, tokenizer, special: SpecialTokens, rules: Rules) -> str:
    """A name for the tokenised rows: content of the source, the tokenizer's own files, the rules, and this code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        source.rows._fingerprint,
        source.adapt.__name__,
        vocabulary,
        tokenizer.chat_template,
        [special.end, sorted(special.endings), sorted(special.starts)],
        rules.max_seq_len,
        *[Path(module).read_text(encoding="utf-8") for module in (__file__, sources.__file__)],
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _without_bad_rows(source: Source, table: datasets.Dataset, rules: Rules, lack) -> datasets.Dataset:
    problems = np.array(table["problem"][:], dtype=object)
    if lack is not None:
        judged = ("better", "worse", "margin", "rating", "probability", "ranks", "targets")
        parts = table.select_columns(list(judged)).with_format("arrow").iter(ROWS_PER_PROCESS)
        rows = (row for part in parts for row in part.to_pylist())
        problems = np.array([p or _lacking(lack, Comparison([], [], **row)) for p, row in zip(problems, rows)], object)
    bad = np.flatnonzero(problems != None)  # noqa: E711  (elementwise)
    if len(bad) and rules.on_bad_row == "stop":
        advice = f"{len(bad)} of {len(problems)} rows cannot be used; --on_bad_row skip leaves them out"
        if len(bad) == len(problems):
            advice = f"none of the {len(problems)} rows can be used"
        raise UserError(f"{source.name}, row {source.numbers[bad[0]]}: {problems[bad[0]]} ({advice})")
    for reason, count in Counter(problems[bad]).most_common():
        say(f"{source.name}: skipped {count} of {len(problems)} rows: {reason}")
    good = table.select(np.flatnonzero(problems == None)) if len(bad) else table  # noqa: E711
    cut = int(np.sum(good["cut"][:]))
    note = f", {cut} with the prompt cut from the left to fit {rules.max_seq_len} tokens" if cut else ""
    say(f"{source.name}: {len(good)} rows{note}")
    return good


def _lacking(lack, row: Comparison) -> str | None:
    try:
        return lack(row)
    except BadRow as problem:
        return str(problem)


def _tokenise_rows(rows: dict[str, list], source, tokenizer, special, max_seq_len) -> dict[str, list]:
    """A batch of rows in columns → a batch of FEATURES in columns."""
    size = len(next(iter(rows.values())))
    texts: list[Texts | str] = []
    for i in range(size):
        try:
            row = source.read({name: column[i] for name, column in rows.items()})
            texts.append(read_row(row, tokenizer))
        except BadRow as problem:
            texts.append(str(problem))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            texts.append(
                f"the row lacks what {source.adapt.__name__.strip('_')} needs ({type(error).__name__}: {error})"
            )
    ids = _encode(tokenizer, [text for text in texts if isinstance(text, Texts)])
    out: dict[str, list] = {name: [] for name in FEATURES}
    for text in texts:
        record = {name: [] for name in FEATURES}
        record |= dict.fromkeys(("length", "tokens", "prompt_hash", "prompt_tokens"), 0)
        record |= {"cut": False, "problem": None}
        if isinstance(text, str):
            record["problem"] = text
        else:
            try:
                prompt, *whole = next(ids)
                record |= compare(prompt, whole, special, max_seq_len, text.names) | text.judged
                record["prompt_hash"] = _hash(text.prompt.encode("utf-8", "replace"))
            except BadRow as problem:
                record["problem"] = str(problem)
        for name, column in out.items():
            column.append(record[name])
    return out


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class Texts:
    """A row as text.

    prompt: what was asked. whole: the texts that begin with it, one for each answer. names: of the answers, for
    messages. judged: the fields of a Comparison that say what was judged. templated: a chat template wrote the texts,
    special tokens included.
    """

    prompt: str
    whole: list[str]
    names: Sequence[str]
    judged: dict
    templated: bool


def read_row(row: dict, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Check a row and write it as text.

    Raises:
        BadRow: a field is missing, empty or of the wrong type, a number is none, or two answers are equal.
    """
    is_pair = all(row.get(name) not in (None, "") for name in PAIR)  # a CSV file has "" for nothing
    if row.get("responses") is not None and not is_pair:
        found, names, judged = _list(row)
    elif row.get("response") is not None and not is_pair:
        found, names, judged = [row["response"]], ["response"], judge_answer(row)
    else:
        found, names, judged = [row.get(name) for name in PAIR], PAIR, judge_pair(row)
    prompt = row.get("prompt")
    for name, value in zip(names, found):
        if value is None:
            others = ", ".join(row)
            is_absent = names is PAIR and name not in row
            needs = f"; the row has {others}, and needs prompt, chosen, rejected (or {OTHER_ROWS})"
            raise BadRow(f"{name} is missing" + (needs if is_absent else ""))
        if not isinstance(value, str) and not _is_chat(value):
            raise BadRow(f"{name} is {_type(value)}, not text or chat messages")
    if prompt is not None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise BadRow(f"prompt is {_type(prompt)}, not text or chat messages")
    if "prompt" in row and prompt is None:
        raise BadRow("prompt is missing")
    _require_different(found, names)
    if not all(isinstance(value, str) for value in (*found, prompt or "")):
        return _read_chat(prompt, found, names, judged, tokenizer)
    if prompt is None:
        prompt = _common_prompt(found)
        found = [text[len(prompt) :] for text in found]
    for name, text in zip(names, found):
        if not text.strip():
            raise BadRow(f"{name} is empty")
    return Texts(prompt, [prompt + text for text in found], names, judged, templated=False)


def _require_different(found: list, names: Sequence[str], how: str = "") -> None:
    for i, value in enumerate(found):
        if value in found[:i]:
            raise BadRow(f"{names[found.index(value)]} and {names[i]} are equal{how}")


def judge_pair(row: dict) -> dict:
    """What a row says of its chosen and rejected answer; a margin that it does not name is that of its scores.

    A rating or probability that is none is left out, since other data sets use these words for other things: whoever
    needs one will miss it.

    Raises:
        BadRow: a margin or score that is no number.
    """
    scores = [_number(row, f"{name}_score", f"score_{name}") for name in PAIR]
    margin = _number(row, "margin")
    return {
        "better": [0],
        "worse": [1],
        "margin": [scores[0] - scores[1] if math.isnan(margin) else margin],
        "rating": [_within(row.get("rating"), 3, GRADES)],
        "probability": [_within(row.get("probability"), 1)],
        "ranks": [0, 1],
        "targets": scores,
    }


def _list(row: dict) -> tuple[list, list[str], dict]:
    """The answers of a list, their names, and what the row says of them."""
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
    """What numbers of a list's answers say: every pair of them that is not tied, by how much, and their order.

    Args:
        scores: higher is better. ranks: lower is better; they decide where there are both.
    """
    order = ranks if ranks is not None else [-score for score in scores or []]
    dense = np.unique(order, return_inverse=True)[1].tolist() if order else []
    pairs = [(i, j) for i in range(len(dense)) for j in range(len(dense)) if dense[i] < dense[j]]
    return {
        "better": [i for i, _ in pairs],
        "worse": [j for _, j in pairs],
        "margin": [scores[i] - scores[j] if scores else math.nan for i, j in pairs],
        "rating": [math.nan] * len(pairs),
        "probability": [math.nan] * len(pairs),
        "ranks": dense,
        "targets": scores or [math.nan] * size,
    }


def judge_answer(row: dict) -> dict:
    """What a row says of its one answer.

    Raises:
        BadRow: a score or label that is none, or both.
    """
    if row.get("score") is not None and row.get("label") is not None:
        raise BadRow("the row has a score and a label: keep one of them")
    if isinstance(row.get("label"), bool):
        row = row | {"label": int(row["label"])}
    nothing = {name: [] for name in ("better", "worse", "margin", "rating", "probability", "ranks")}
    return nothing | {"targets": [_number(row, "score", "label")]}


def _number(row: dict, *names: str) -> float:
    """The number under the first of some names that holds something; NaN: none does."""
    name, value = next(((name, row[name]) for name in names if row.get(name) is not None), ("", None))
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{name} is {_type(value)}, not a number")
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise BadRow(f"{name} is {value}")
    return float(value)


def _within(value, most: float, words: dict[str, float] | None = None) -> float:
    """A number from 0 to ``most``, or what a word stands for; NaN: neither."""
    if isinstance(value, str):
        value = (words or {}).get(" ".join(value.lower().split()))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= most else math.nan


def _type(value) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _common_prompt(texts: list[str]) -> str:
    """What whole dialogues share, up to the last "Assistant:" where there is one; nothing, if there is one text."""
    shared = texts[0] if len(texts) > 1 else ""
    for text in texts[1:]:
        shared = shared[: common_prefix(shared, text)]
    turn = shared.rfind(ASSISTANT)
    if turn >= 0:
        return shared[: turn + len(ASSISTANT)]
    # no turns: do not cut inside a word
    return shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1]


def _read_chat(prompt, found: list, names: Sequence[str], judged: dict, tokenizer) -> Texts:
    if not tokenizer.chat_template:
        raise BadRow("chat messages need a tokenizer with a chat template, and this one has none")
    found = [_as_messages(value) for value in found]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _as_messages(prompt or [])
    # UltraFeedback and others give the prompt twice: alone, and at the head of each answer
    if not all(_holds(messages[:-1], prompt) for messages in found):
        found = [prompt + messages for messages in found]
    first, turns = found[0], 0
    while turns < min(map(len, found)) - 1 and all(messages[turns] == first[turns] for messages in found):
        turns += 1
    for name, messages in zip(names, found):
        content = messages[-1]["content"]
        if content is None or not str(content).strip():
            raise BadRow(f"{name} is empty")
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends with a message of role {messages[-1]['role']}, not assistant")
    written = []
    try:
        for messages in found:
            written.append(close_turn(tokenizer.apply_chat_template(messages, tokenize=False), tokenizer))
        head = tokenizer.apply_chat_template(first[:turns], tokenize=False, add_generation_prompt=True) if turns else ""
    except Exception as error:  # templates raise what they like
        raise BadRow(f"the chat template refuses it: {error}") from error
    _require_different(written, names)
    # a template may write a lone prompt differently: keep what is really shared
    prompt = head[: min(common_prefix(head, text) for text in written)]
    return Texts(prompt, written, names, judged, templated=True)


def _as_messages(value) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    # Arrow fills every message with the keys of all others
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in value]


def _holds(messages: list[dict], prompt: list[dict]) -> bool:
    """Whether the prompt's messages stand in a row somewhere among the others."""
    starts = range(len(messages) - len(prompt) + 1)
    return any(messages[i : i + len(prompt)] == prompt for i in starts)


def close_turn(text: str, tokenizer) -> str:
    """Drop the line break that templates write after the last end-of-turn token: the score is read at that token."""
    stripped = text.rstrip()
    closing = {str(token) for token in tokenizer.all_special_tokens}
    closing |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return stripped if any(stripped.endswith(token) for token in closing) else text


def _encode(tokenizer, texts: list[Texts]):
    """Ids of the prompt and of each whole text of each row, one row after the other."""
    ids: dict[bool, object] = {}
    for templated in (False, True):
        group = [part for t in texts if t.templated is templated for part in (t.prompt, *t.whole)]
        encoded = tokenizer(group, add_special_tokens=not templated, verbose=False)["input_ids"] if group else []
        ids[templated] = iter(encoded)
    for text in texts:
        yield [next(ids[text.templated]) for _ in range(1 + len(text.whole))]


def compare(
    prompt: list[int],
    whole: list[list[int]],
    special: SpecialTokens,
    max_seq_len: int,
    names: Sequence[str] = PAIR,
) -> dict:
    """Token ids of a prompt and of whole texts → a Comparison's tokens, and what planning needs to know of them.

    Closes the texts, and cuts the prompt to fit the limit.

    Args:
        prompt: ids of the prompt alone; only its part that all texts begin with may be cut.
        whole: ids of each answer after its prompt.
        names: of the answers, for messages.

    Raises:
        BadRow: the same ids twice, or an answer longer than the limit.
    """
    whole = [end_text(text, special) for text in whole]
    _require_different(whole, names, how=" once tokenised")
    prompt_length = min(common_prefix(prompt, text) for text in whole)
    surplus = max(map(len, whole)) - max_seq_len
    if surplus > 0:
        # a start token stays: the model has never seen a text without one
        start = 1 if prompt_length and prompt[0] in special.starts else 0
        if start + surplus > prompt_length:
            raise BadRow(f"an answer alone is longer than --max_seq_len {max_seq_len}")
        whole = [text[:start] + text[start + surplus :] for text in whole]
        prompt_length -= surplus
    # each response keeps a token of its own: the one its score is read at
    shared = min(common_prefix(whole[0], text) for text in whole[1:]) if len(whole) > 1 else prompt_length
    shared = min(shared, *(len(text) - 1 for text in whole))
    return {
        "prompt": whole[0][:shared],
        "responses": [text[shared:] for text in whole],
        "length": max(map(len, whole)),
        "tokens": sum(map(len, whole)) - (len(whole) - 1) * shared,
        "prompt_tokens": min(prompt_length, shared),
        "text_hashes": [_hash(np.array(text, dtype=np.int32).tobytes()) for text in whole],
        "text_lengths": [len(text) for text in whole],
        "cut": surplus > 0,
    }


def end_text(ids: list[int], special: SpecialTokens) -> list[int]:
    """The ids with one end token at their end, unless they already end in one that closes a text or a turn."""
    return ids if ids and ids[-1] in special.endings else [*ids, special.end]


def common_prefix(first: Sequence, second: Sequence) -> int:
    """How many items, ids or characters, two sequences begin with in common."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second))
