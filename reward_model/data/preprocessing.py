# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set → Comparisons: token ids of a prompt and its responses, and what was judged of them.

A row that cannot be used stops the run or is counted by reason; an over-long one loses the left of its prompt and is
counted; nothing else happens to a row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError, printable
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.data import chats, comparisons, encoding, files, layouts, rows, strengths
from reward_model.data.comparisons import BadRow, Comparison, Comparisons, Origins, answers, common_prefix
from reward_model.data.encoding import EncodedRow, Encoding, is_empty
from reward_model.data.files import Source
from reward_model.data.rows import PAIR, Texts, read_row, require_different
from reward_model.data.sources import Splits, amount_of, read_sources, require_splits, take, training_sources
from reward_model.data.tokenizer import SpecialTokens

EVAL_SHARE = 0.1  # of the rows, where a data set brings no evaluation rows: upstream's share too
CODE = (
    sys.modules[__name__],
    chats,
    comparisons,
    encoding,
    files,
    layouts,
    rows,
    strengths,
)  # which what is cached depends on
FEW_ROWS = 50  # a share of them is known to ± 14 points at best: 1.96·√(¼ / 50)
MOST_HELD_OUT = 0.2
ALL_SPLITS = Splits()
ROWS_PER_PROCESS = 2_000  # below this a fast tokenizer's own threads beat starting a process

FEATURES = datasets.Features(
    {
        "prompt": datasets.List(datasets.Value("int32")),
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "better": datasets.List(datasets.Value("int32")),
        "worse": datasets.List(datasets.Value("int32")),
        "margin": datasets.List(datasets.Value("float32")),
        "rating": datasets.List(datasets.Value("float32")),
        "probability": datasets.List(datasets.Value("float32")),
        "strength": datasets.List(datasets.Value("float32")),
        "ranks": datasets.List(datasets.Value("int32")),
        "targets": datasets.List(datasets.Value("float32")),
        "subset": datasets.Value("string"),
        "length": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "prompt_hash": datasets.Value("int64"),
        "prompt_tokens": datasets.Value("int32"),
        "two_segments": datasets.Value("bool"),
        "text_hashes": datasets.List(datasets.Value("int64")),
        "text_lengths": datasets.List(datasets.Value("int32")),
        "cut": datasets.Value("bool"),
        "is_plain": datasets.Value("bool"),
        "is_glued": datasets.Value("bool"),
        "single": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class PreprocessingConfig:
    """How rows become Comparisons.

    max_seq_len: longest text in tokens. on_bad_row: ``stop`` or ``skip``. cache: folder for tokenized rows.
    processes: for tokenizing; 0: as many as there are cores and work. missing: why the loss has nothing to learn from a
    training row, given as a Comparison without its tokens; it raises BadRow, or gives None. names: field → the column
    that holds it. splits: names of those that are read. chat: rows of text go through the chat template, too. pairs:
    prompt and response are a pair for the tokenizer, as in :class:`reward_model.data.encoding.Encoding`.
    """

    max_seq_len: int
    on_bad_row: str
    cache: Path
    processes: int = 0
    missing: Callable[[Comparison], str | None] | None = None
    names: dict[str, str] = field(default_factory=dict)
    splits: Splits = ALL_SPLITS
    chat: bool = False
    pairs: bool = False


def load_comparisons(
    train_paths: list[str],
    eval_sets: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    preprocessing: PreprocessingConfig,
    seed: int,
    data_split: str | None = None,
    most: tuple[int, int] = (0, 0),
) -> tuple[Comparisons, dict[str, Comparisons]]:
    """Training Comparisons, and those of each evaluation set by its name, tokenized once and then read from the cache.

    Evaluation rows are those of ``eval_sets``; else one set without a name: what the training entries bring or, for an
    entry that brings none, a tenth of its rows, which is held out.

    Args:
        eval_sets: name → paths.
        most: training rows and rows of an evaluation set, drawn at random where there are more; 0: all.

    Raises:
        UserError: unreadable data, a bad row under ``stop``, or nothing left.
    """
    require_splits(train_paths, preprocessing.splits.train)
    train, undivided = [], []
    evaluation: dict[str, list[Comparisons]] = {name: [] for name in eval_sets or ("",)}
    for entry in train_paths:
        path, amount = amount_of(entry)
        train_sources, eval_sources = read_sources(
            path, seed, data_split, not eval_sets, preprocessing.names, preprocessing.splits, preprocessing.chat
        )
        train_sources = take(train_sources, amount, seed, path)
        tokenized = [
            tokenize(source, tokenizer, special, preprocessing, preprocessing.missing) for source in train_sources
        ]
        if eval_sets or eval_sources:
            train += tokenized
        else:
            undivided += tokenized
        if not eval_sets:
            evaluation[""] += [
                tokenize(source, tokenizer, special, preprocessing, nothing_judged) for source in eval_sources
            ]
    for name, paths in eval_sets.items():
        for path in paths:
            evaluation[name] += _evaluation_rows(path, tokenizer, special, preprocessing, seed, nothing_judged)
    if is_divided := any(len(part) for part in undivided):
        undivided, held_out = _hold_out(undivided, seed)
        train += undivided
        evaluation[""] += held_out
    rows = _at_most(train, most[0], "training rows", seed)
    sets = {
        name: _at_most(parts, most[1], f"evaluation rows of {name}" if name else "evaluation rows", seed)
        for name, parts in evaluation.items()
    }
    for name, held in sets.items():
        for line in doubts(rows, held, is_divided):
            logger.warning(f"{name}: {line}" if name else line)
    return rows, sets


def _at_most(parts: list[Comparisons], most: int, what: str, seed: int) -> Comparisons:
    """The rows of several parts, or so many of them. Raises UserError if there are none."""
    if sum(len(part) for part in parts) == 0:
        raise UserError(f"no {what} are left")
    found = _join(parts)
    if not most or len(found) <= most:
        return found
    logger.info(f"{most} of {len(found)} {what}, drawn at random")
    return found.select(np.sort(np.random.RandomState(seed).permutation(len(found))[:most]))


def doubts(train: Comparisons, evaluation: Comparisons, is_divided: bool) -> Iterator[str]:
    """What makes an evaluation say less than it seems to: few rows, or rows that are trained on; and what it costs.

    Args:
        is_divided: evaluation rows were taken from the training rows here.
    """
    few, total = len(evaluation), len(train) + len(evaluation)
    if few < FEW_ROWS:
        more = "more of them say more (--eval_data_path, --max_eval_samples)"
        yield f"{counted(few, 'held-out row')}: the metrics say little; {more}"
    elif is_divided and few > total * MOST_HELD_OUT:
        yield f"{few} of {total} rows are held out, more than one in {round(1 / MOST_HELD_OUT)}"
    hashes, _, counts = evaluation.texts()
    seen = np.isin(hashes, train.texts()[0])
    known = np.bitwise_and.reduceat(seen, np.cumsum(counts) - counts)
    if known.any():
        yield f"{int(known.sum())} of {few} held-out rows have only texts that are trained on, too"


def load_evaluation(
    paths: list[str], tokenizer, special: SpecialTokens, preprocessing: PreprocessingConfig, seed: int, most: int = 0
) -> Comparisons:
    """The rows of files, or the evaluation rows of folders and hub names, that judge anything, if only a tie.

    Args:
        most: drawn at random where there are more; 0: all.

    Raises:
        UserError: unreadable data, a bad row under ``stop``, or nothing left.
    """
    parts = []
    for path in paths:
        parts += _evaluation_rows(path, tokenizer, special, preprocessing, seed, nothing_said)
    return _at_most(parts, most, "evaluation rows", seed)


def load_answers(
    path: str, tokenizer, special: SpecialTokens, preprocessing: PreprocessingConfig, seed: int
) -> Comparisons:
    """The rows of a file, or the evaluation rows of a folder or hub name, whether they judge anything or not.

    Raises:
        UserError: unreadable data, or a bad row under ``stop``.
    """
    return _join(_evaluation_rows(path, tokenizer, special, preprocessing, seed, None))


def load_shifted(
    paths: list[str], tokenizer, special: SpecialTokens, preprocessing: PreprocessingConfig, seed: int
) -> Comparisons:
    """The same of several, of whose rows each has to have two answers.

    Raises:
        UserError: unreadable data, a bad row under ``stop``, or nothing left.
    """
    parts = []
    for path in paths:
        parts += _evaluation_rows(path, tokenizer, special, preprocessing, seed, nothing_to_tell_apart)
    return _at_most(parts, 0, "rows of --meta_data", seed)


def nothing_to_tell_apart(row: Comparison) -> str | None:
    """Why a row has no two answers whose scores could differ."""
    return None if len(row.targets) > 1 else f"--meta_data needs two answers or more, and the row has {answers(row)}"


def load_training_texts(
    paths: list[str], tokenizer, special: SpecialTokens, preprocessing: PreprocessingConfig, seed: int
) -> Comparisons:
    """The rows of files, or the training rows of folders and hub names, whether they judge anything or not.

    Raises:
        UserError: unreadable data, a bad row under ``stop``, or nothing left.
    """
    found, _ = training_sources(paths, seed, preprocessing.names, preprocessing.splits, preprocessing.chat)
    parts = [tokenize(source, tokenizer, special, preprocessing, None) for source in found]
    return _at_most(parts, 0, "texts", seed)


def _evaluation_rows(
    path: str, tokenizer, special, preprocessing: PreprocessingConfig, seed: int, missing
) -> list[Comparisons]:
    # a folder or hub name stands for its evaluation rows, a file for all of its rows
    path, amount = amount_of(path)
    splits = replace(preprocessing.splits, train=None)
    first, second = read_sources(path, seed, names=preprocessing.names, splits=splits, chat=preprocessing.chat)
    found = take(second or first, amount, seed, path)
    return [tokenize(source, tokenizer, special, preprocessing, missing) for source in found]


def nothing_judged(row: Comparison) -> str | None:
    """Why there is nothing to evaluate in a row, which needs an order or a score of some kind."""
    if row.better or not np.isnan(row.targets).all():
        return None
    return f"the row has {answers(row)} and no order, score or label: nothing to evaluate"


def nothing_said(row: Comparison) -> str | None:
    """The same for those who also ask how far apart tied answers are."""
    return None if len(row.ranks) > 1 else nothing_judged(row)


def _join(parts: list[Comparisons]) -> Comparisons:
    if len(parts) == 1:
        return parts[0]
    origins = Origins.joined([part.origins for part in parts])
    return Comparisons(datasets.concatenate_datasets([part.table for part in parts]), origins)


def _hold_out(parts: list[Comparisons], seed: int) -> tuple[list[Comparisons], list[Comparisons]]:
    """Keep a tenth of the rows of some parts for evaluation, by whole prompts, so that none is on both sides."""
    hashes = [part.prompt_hashes() for part in parts]
    prompts, counts = np.unique(np.concatenate(hashes), return_counts=True)
    if len(prompts) < 2:
        raise UserError("there is one prompt and there are no evaluation rows: name some with --eval_data_path")
    held = prompts[_about(EVAL_SHARE, counts, seed)]
    masks = [np.isin(h, held) for h in hashes]
    rows = sum(int(mask.sum()) for mask in masks)
    logger.info(f"no evaluation rows: held out {rows} of {counts.sum()} rows, {len(held)} of {len(prompts)} prompts")
    train = [part.select(np.flatnonzero(~mask)) for part, mask in zip(parts, masks)]
    evaluation = [part.select(np.flatnonzero(mask)) for part, mask in zip(parts, masks)]
    return train, evaluation


def _about(share: float, counts: np.ndarray, seed: int) -> np.ndarray:
    """Prompts, drawn at random, that have about a share of all rows together: those that still fit; at least one.

    Args:
        counts: rows of each prompt, (p,).

    Returns:
        Indices of prompts.
    """
    left, held = max(1, round(share * counts.sum())), []
    for prompt in np.random.RandomState(seed).permutation(len(counts)):
        if counts[prompt] <= left:
            held.append(prompt)
            left -= counts[prompt]
    return np.array(held or [counts.argmin()])


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    preprocessing: PreprocessingConfig,
    missing: Callable[[Comparison], str | None] | None = None,
) -> Comparisons:
    """One source's rows as Comparisons, from the cache if this content was tokenized like this before.

    Args:
        missing: as in :class:`PreprocessingConfig`; None: any row will do.

    Raises:
        UserError: a bad row under ``stop``; names the source, the row's number and the reason.
    """
    work = partial(
        _tokenize_rows,
        source=replace(source, rows=None, numbers=None),
        how=Encoding(tokenizer, special, preprocessing.pairs),
        max_seq_len=preprocessing.max_seq_len,
        chat=preprocessing.chat,
    )
    key = _fingerprint(source, tokenizer, special, preprocessing)
    preprocessing.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = preprocessing.processes or min(cores, len(source.rows) // ROWS_PER_PROCESS)
    # whoever comes first on this machine does the work, the others wait here and then read the cache
    with FileLock(preprocessing.cache / f"{key}.lock"):
        try:
            table = source.rows.map(
                work,
                batched=True,
                num_proc=processes if processes > 1 else None,
                remove_columns=source.rows.column_names,
                features=FEATURES,
                new_fingerprint=key,
                cache_file_name=str(preprocessing.cache / f"{key}.arrow"),
                desc=printable(f"tokenizing {os.path.basename(source.name)}"),
            )
        except (UnicodeDecodeError, OverflowError, pyarrow.ArrowException):
            deque(source.stored(), maxlen=0)  # says which row it was
            raise
    good = _good_rows(source, table, preprocessing, missing)
    assert source.numbers is not None  # filled in when the object was made
    found = Comparisons(
        table if len(good) == len(table) else table.select(good), Origins.of(source.name, source.numbers[good])
    )
    _say_rows(source, found.table, preprocessing, tokenizer)
    return found


def _fingerprint(source: Source, tokenizer, special: SpecialTokens, preprocessing: PreprocessingConfig) -> str:
    """A name for the tokenized rows: content of the source, the tokenizer's own files, the config, and this code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        source.rows._fingerprint,
        [source.layout.key, sorted(source.names.items()), preprocessing.chat, preprocessing.pairs],
        list(tokenizer.model_input_names),
        vocabulary,
        tokenizer.chat_template,
        [special.end, sorted(special.endings), sorted(special.starts)],
        preprocessing.max_seq_len,
        *[Path(module.__file__ or "").read_text(encoding="utf-8") for module in CODE],
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _good_rows(source: Source, table: datasets.Dataset, preprocessing: PreprocessingConfig, missing) -> np.ndarray:
    """Which rows can be used; says how many cannot.

    Raises:
        UserError: a row that cannot be used, under ``stop``.
    """
    problems = np.array(table["problem"][:], dtype=object)
    if missing is not None:
        judged = ("better", "worse", "margin", "rating", "probability", "strength", "ranks", "targets")
        parts = table.select_columns(list(judged)).with_format("arrow").iter(ROWS_PER_PROCESS)
        rows = (row for part in parts for row in part.to_pylist())
        problems = np.array(
            [p or reason_of(missing, Comparison([], [], **row)) for p, row in zip(problems, rows)], object
        )
    bad = np.flatnonzero(problems != None)  # noqa: E711  (elementwise)
    if len(bad) and preprocessing.on_bad_row == "stop":
        assert source.numbers is not None
        advice = f"{len(bad)} of {len(problems)} rows cannot be used; --on_bad_row skip leaves them out"
        if len(bad) == len(problems):
            advice = f"none of the {len(problems)} rows can be used"
        raise UserError(f"{source.name}, row {source.numbers[bad[0]]}: {problems[bad[0]]} ({advice})")
    for reason, count in Counter(problems[bad]).most_common():
        logger.warning(f"{source.name}: skipped {count} of {len(problems)} rows: {reason}")
    return np.flatnonzero(problems == None)  # noqa: E711


def _say_rows(source: Source, good: datasets.Dataset, preprocessing: PreprocessingConfig, tokenizer) -> None:
    """How many rows there are, how many were cut, and what is doubtful about their form."""
    cut = int(np.sum(good["cut"][:]))
    note = f", {cut} with the prompt cut from the left to fit {preprocessing.max_seq_len} tokens" if cut else ""
    logger.log(logging.WARNING if cut else logging.INFO, f"{source.name}: {counted(len(good), 'row')}{note}")
    for reason, count in sorted(Counter(filter(None, good["single"][:])).items()):
        logger.info(f"{source.name}: {_of(count, len(good))} {reason}, and read as one text, not as a pair")
    plain, glued = (int(np.sum(good[name][:])) for name in ("is_plain", "is_glued"))
    for line in joined_as_they_are(plain, glued, len(good), bool(tokenizer.chat_template)):
        logger.warning(f"{source.name}: {line}")


def joined_as_they_are(plain: int, glued: int, rows: int, has_template: bool) -> Iterator[str]:
    """What is doubtful about the form of rows of plain text, of which so many have nothing before their answer."""
    if plain and has_template:
        yield (
            f"{_of(plain, rows)} plain text, joined as it is, and the tokenizer has a chat template: "
            "--chat puts them through it"
        )
    elif glued > rows / 2:
        yield (
            f"{_of(glued, rows)} joined with nothing between prompt and answer: end the prompts with a space, or make "
            "turns of them with --chat, for which --chat_template human_assistant gives this tokenizer a template"
        )


def _of(count: int, total: int) -> str:
    return f"{count} of {counted(total, 'row')} {'is' if count == 1 else 'are'}"


def reason_of(missing: Callable[[Comparison], str | None], row: Comparison) -> str | None:
    """Why there is nothing to learn or to evaluate in a row; None: there is."""
    try:
        return missing(row)
    except BadRow as problem:
        return str(problem)


def _tokenize_rows(
    rows: dict[str, list], source: Source, how: Encoding, max_seq_len: int, chat: bool
) -> dict[str, list]:
    """A batch of rows in columns → a batch of FEATURES in columns."""
    size = len(next(iter(rows.values())))
    each = ({name: column[i] for name, column in rows.items()} for i in range(size))
    texts = [read_text(source, row, how.tokenizer, chat) for row in each]
    encoded = how.encoded([text for text in texts if isinstance(text, Texts)])
    out: dict[str, list] = {name: [] for name in FEATURES}
    for text in texts:
        record: dict[str, Any] = {name: [] for name in FEATURES}
        record |= dict.fromkeys(("length", "tokens", "prompt_hash", "prompt_tokens"), 0)
        record |= dict.fromkeys(("cut", "is_plain", "is_glued", "two_segments"), False)
        record |= {"subset": "", "single": None, "problem": None}
        if isinstance(text, str):
            record["problem"] = text
        else:
            try:
                record |= _record(text, next(encoded), how, max_seq_len)
            except BadRow as problem:
                record["problem"] = str(problem)
        for name, column in out.items():
            column.append(record[name])
    return out


def _record(text: Texts, row: EncodedRow | BadRow, how: Encoding, max_seq_len: int) -> dict[str, Any]:
    """Of FEATURES those that a row's text and ids say. Raises BadRow if it cannot be used."""
    if isinstance(row, BadRow):
        raise row
    _require_tokens(row.empty, text.names)
    record = compare(row.prompt, row.whole, how.special, max_seq_len, text.names, row.fixed) | text.judged
    is_joined = not row.two_segments
    return record | {
        "is_plain": is_joined and is_plain(text, how.tokenizer),
        "is_glued": is_joined and is_glued(text),
        "two_segments": row.two_segments,
        "single": row.single,
        "prompt_hash": _hash(text.prompt.encode("utf-8", "replace")),
    }


def _require_tokens(empty: Sequence[bool], names: Sequence[str]) -> None:
    """Raise BadRow if an answer has no token."""
    if any(empty):
        raise BadRow(f"{names[list(empty).index(True)]} is empty once tokenized")


def is_plain(text: Texts, tokenizer) -> bool:
    """Whether a text was written by no chat template, neither ours nor one before it."""
    return not text.templated and not any(token in text.whole[0] for token in tokenizer.all_special_tokens)


def is_glued(text: Texts) -> bool:
    """Whether an answer begins where its prompt ends, as no language with spaces writes it."""
    before, after = text.prompt[-1:], text.whole[0][len(text.prompt) :][:1]
    ends = before.isalnum() or before in tuple(".,:;?!")
    return not text.templated and before.isascii() and after.isascii() and ends and after.isalnum()


def read_text(source: Source, row: dict, tokenizer, chat: bool) -> Texts | str:
    """A row of a source as text, or why it cannot be used."""
    try:
        return read_row(source.read(row), tokenizer, chat)
    except BadRow as problem:
        return str(problem)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        return printable(f"the row lacks what its layout needs ({type(error).__name__}: {error})")


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def compare(
    prompt: list[int],
    whole: list[list[int]],
    special: SpecialTokens,
    max_seq_len: int,
    names: Sequence[str] = PAIR,
    fixed: tuple[int, int] | None = None,
) -> dict:
    """Token ids of a prompt and of whole texts → a Comparison's tokens, and what planning needs to know of them.

    Cuts the prompt to fit the limit.

    Args:
        prompt: ids of the prompt alone; only its part that all texts begin with may be cut.
        whole: ids of each answer after its prompt, closed with an end token where it needs one.
        names: of the answers, for messages.
        fixed: how many tokens at either end of the prompt stay when it is cut, as around the first text of a pair;
            None: a start token.

    Raises:
        BadRow: the same ids twice, an answer longer than the limit, or one that adds no token to a prompt that is cut.
    """
    require_different(whole, names, how=" once tokenized")
    prompt_length = min(common_prefix(prompt, text) for text in whole)
    surplus = max(map(len, whole)) - max_seq_len
    if surplus > 0:
        _require_tokens([is_empty(prompt, text) for text in whole], names)
        # a start token stays: the model has never seen a text without one
        start, end = fixed or (int(bool(prompt_length) and prompt[0] in special.starts), 0)
        if start + surplus + end > prompt_length:
            longest = max(range(len(whole)), key=lambda i: len(whole[i]))
            alone = f"{len(whole[longest]) - prompt_length + start + end} tokens"
            raise BadRow(f"{names[longest]} alone is longer than --max_seq_len {max_seq_len}: {alone}")
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
