# SPDX-License-Identifier: Apache-2.0
"""Rows of a preference set → Comparisons: token ids of a prompt and its responses, and which response won.

A row holds ``prompt, chosen, rejected`` (text, joined as it is), or ``chosen, rejected`` with the prompt inside
(Anthropic's form), or chat messages, and perhaps a ``margin``. A row that cannot be used stops the run or is counted
by reason; an over-long one loses the left of its prompt and is counted; nothing else happens to a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
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

FEATURES = datasets.Features(
    {
        "prompt": datasets.List(datasets.Value("int32")),
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "better": datasets.List(datasets.Value("int32")),
        "worse": datasets.List(datasets.Value("int32")),
        "margin": datasets.List(datasets.Value("float32")),
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
    """A prompt, K responses, and the pairs that were judged among them.

    prompt: ids that every response shares, the longest common prefix of the jointly tokenised texts.
    responses: K lists of ids that follow it; each ends with an end token.
    better, worse: judged pairs as indices into ``responses``; better[i] beat worse[i].
    margin: by how much, one number per judged pair; NaN where the row says nothing.
    prompt_hash: equal for rows that were asked the same; None: unlike any other.
    """

    prompt: list[int]
    responses: list[list[int]]
    better: list[int] = field(default_factory=list)
    worse: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    prompt_hash: int | None = None

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
        return Comparison(**{f.name: row[f.name] for f in fields(Comparison)})

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

    def select(self, indices: np.ndarray) -> Comparisons:
        return Comparisons(self.table.select(indices))


@dataclass(frozen=True)
class Rules:
    """How rows become Comparisons.

    max_seq_len: longest text in tokens. on_bad_row: ``stop`` or ``skip``. cache: folder for tokenised rows.
    processes: for tokenising; 0: as many as there are cores and work. need_margin: a row without a margin is bad.
    """

    max_seq_len: int
    on_bad_row: str
    cache: Path
    processes: int = 0
    need_margin: bool = False


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
        tokenised = [tokenise(source, tokenizer, special, rules) for source in train_sources]
        if eval_paths or eval_sources:
            train += tokenised
        else:
            undivided += tokenised
        if not eval_paths:
            evaluation += [tokenise(source, tokenizer, special, rules) for source in eval_sources]
    for path in eval_paths:
        # a folder or hub name stands for its evaluation rows, a file for all of its rows
        first, second = read_sources(path, seed)
        evaluation += [tokenise(source, tokenizer, special, rules) for source in second or first]
    if any(len(part) for part in undivided):
        undivided, held_out = _hold_out(undivided, seed)
        train, evaluation = train + undivided, evaluation + held_out
    for name, parts in (("training", train), ("evaluation", evaluation)):
        if sum(len(part) for part in parts) == 0:
            raise UserError(f"no {name} rows are left")
    return _join(train), _join(evaluation)


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


def tokenise(source: Source, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, rules: Rules) -> Comparisons:
    """One source's rows as Comparisons, from the cache if this content was tokenised like this before.

    Raises:
        UserError: a bad row under ``stop``; names the source, the row's number and the reason.
    """
    work = partial(
        _tokenise_rows,
        source=replace(source, rows=None, numbers=None),
        tokenizer=tokenizer,
        special=special,
        max_seq_len=rules.max_seq_len,
        need_margin=rules.need_margin,
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
    return Comparisons(_without_bad_rows(source, table, rules))


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
        rules.need_margin,
        *[Path(module).read_text(encoding="utf-8") for module in (__file__, sources.__file__)],
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _without_bad_rows(source: Source, table: datasets.Dataset, rules: Rules) -> datasets.Dataset:
    problems = np.array(table["problem"][:], dtype=object)
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


def _tokenise_rows(rows: dict[str, list], source, tokenizer, special, max_seq_len, need_margin) -> dict[str, list]:
    """A batch of rows in columns → a batch of FEATURES in columns."""
    size = len(next(iter(rows.values())))
    texts: list[Texts | str] = []
    for i in range(size):
        try:
            row = source.read({name: column[i] for name, column in rows.items()})
            texts.append(read_row(row, tokenizer, need_margin))
        except BadRow as problem:
            texts.append(str(problem))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            texts.append(
                f"the row lacks what {source.adapt.__name__.strip('_')} needs ({type(error).__name__}: {error})"
            )
    ids = _encode(tokenizer, [text for text in texts if isinstance(text, Texts)])
    out: dict[str, list] = {name: [] for name in FEATURES}
    for text in texts:
        record = {"prompt": [], "responses": [], "better": [], "worse": [], "margin": [], "length": 0}
        record |= {
            "tokens": 0,
            "prompt_hash": 0,
            "prompt_tokens": 0,
            "text_hashes": [],
            "text_lengths": [],
            "cut": False,
            "problem": None,
        }
        if isinstance(text, str):
            record["problem"] = text
        else:
            try:
                record |= compare(*next(ids), text.margin, special, max_seq_len)
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
    """A row as text: the prompt, both whole texts that begin with it, and the margin (NaN: none).

    templated: a chat template wrote the texts, special tokens included.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float
    templated: bool


def read_row(row: dict, tokenizer: PreTrainedTokenizerBase, need_margin: bool = False) -> Texts:
    """Check a row and write it as text.

    Raises:
        BadRow: a field is missing, empty or of the wrong type, the margin is no number, or both answers are equal.
    """
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    margin = _margin(row.get("margin"), need_margin)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            others = ", ".join(row)
            raise BadRow(
                f"{name} is missing"
                + (f"; the row has {others}, and needs prompt, chosen, rejected" if name not in row else "")
            )
        if not isinstance(value, str) and not _is_chat(value):
            raise BadRow(f"{name} is {_type(value)}, not text or chat messages")
    if prompt is not None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise BadRow(f"prompt is {_type(prompt)}, not text or chat messages")
    if "prompt" in row and prompt is None:
        raise BadRow("prompt is missing")
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal")
    if not (isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str))):
        return _read_chat(prompt, chosen, rejected, margin, tokenizer)
    if prompt is None:
        prompt = _common_prompt(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(f"{name} is empty")
    return Texts(prompt, prompt + chosen, prompt + rejected, margin, templated=False)


def _margin(value, needed: bool) -> float:
    if value is None:
        if needed:
            raise BadRow("margin is missing, and --margin column needs one")
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"margin is {_type(value)}, not a number")
    if not abs(value) <= np.finfo(np.float32).max:
        raise BadRow(f"margin is {value}")
    return float(value)


def _type(value) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _common_prompt(chosen: str, rejected: str) -> str:
    """What two whole dialogues share, up to the last "Assistant:" where there is one."""
    shared = chosen[: common_prefix(chosen, rejected)]
    turn = shared.rfind(ASSISTANT)
    if turn >= 0:
        return shared[: turn + len(ASSISTANT)]
    # no turns: do not cut inside a word
    return shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1]


def _read_chat(prompt, chosen, rejected, margin: float, tokenizer) -> Texts:
    if not tokenizer.chat_template:
        raise BadRow("chat messages need a tokenizer with a chat template, and this one has none")
    chosen, rejected = _as_messages(chosen), _as_messages(rejected)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _as_messages(prompt or [])
    # UltraFeedback and others give the prompt twice: alone, and at the head of both answers
    if not all(_holds(messages[:-1], prompt) for messages in (chosen, rejected)):
        chosen, rejected = prompt + chosen, prompt + rejected
    turns = 0
    while turns < min(len(chosen), len(rejected)) - 1 and chosen[turns] == rejected[turns]:
        turns += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        content = messages[-1]["content"]
        if content is None or not str(content).strip():
            raise BadRow(f"{name} is empty")
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends with a message of role {messages[-1]['role']}, not assistant")
    written = []
    try:
        for messages in (chosen, rejected):
            written.append(close_turn(tokenizer.apply_chat_template(messages, tokenize=False), tokenizer))
        head = (
            tokenizer.apply_chat_template(chosen[:turns], tokenize=False, add_generation_prompt=True) if turns else ""
        )
    except Exception as error:  # templates raise what they like
        raise BadRow(f"the chat template refuses it: {error}") from error
    if written[0] == written[1]:
        raise BadRow("chosen and rejected are equal")
    # a template may write a lone prompt differently: keep what is really shared
    prompt = head[: min(common_prefix(head, text) for text in written)]
    return Texts(prompt, *written, margin, templated=True)


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
    """Ids of prompt, chosen and rejected of each row, one row after the other."""
    ids: dict[bool, object] = {}
    for templated in (False, True):
        group = [part for t in texts if t.templated is templated for part in (t.prompt, t.chosen, t.rejected)]
        encoded = tokenizer(group, add_special_tokens=not templated, verbose=False)["input_ids"] if group else []
        ids[templated] = iter(encoded)
    for text in texts:
        column = ids[text.templated]
        yield next(column), next(column), next(column)


def compare(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    margin: float,
    special: SpecialTokens,
    max_seq_len: int,
) -> dict:
    """Token ids of a pair → the fields of a Comparison; closes both texts, and cuts the prompt to fit the limit.

    Args:
        prompt: ids of the prompt alone; only its part that both texts begin with may be cut.
        chosen, rejected: ids of the whole texts.

    Raises:
        BadRow: the same ids on both sides, or an answer longer than the limit.
    """
    chosen, rejected = end_text(chosen, special), end_text(rejected, special)
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal once tokenised")
    prompt_length = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    surplus = max(len(chosen), len(rejected)) - max_seq_len
    if surplus > 0:
        # a start token stays: the model has never seen a text without one
        start = 1 if prompt_length and prompt[0] in special.starts else 0
        if start + surplus > prompt_length:
            raise BadRow(f"an answer alone is longer than --max_seq_len {max_seq_len}")
        chosen = chosen[:start] + chosen[start + surplus :]
        rejected = rejected[:start] + rejected[start + surplus :]
    # each response keeps a token of its own: the one its score is read at
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return {
        "prompt": chosen[:shared],
        "responses": [chosen[shared:], rejected[shared:]],
        "better": [0],
        "worse": [1],
        "margin": [margin],
        "length": max(len(chosen), len(rejected)),
        "tokens": len(chosen) + len(rejected) - shared,
        "prompt_tokens": min(prompt_length - max(surplus, 0), shared),
        "text_hashes": [_hash(np.array(text, dtype=np.int32).tobytes()) for text in (chosen, rejected)],
        "text_lengths": [len(chosen), len(rejected)],
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
