# SPDX-License-Identifier: Apache-2.0
"""Rows that cannot be used, and what is left of the others once they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.doctor import DoctorConfig
from reward_model.data.chat_template import give_template
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoding
from reward_model.data.preprocessing import compare, read_text
from reward_model.data.rows import Texts
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.doctor.findings import EXAMPLES, Finding, level_of, part
from reward_model.doctor.ledger import Ledger, Reasons
from reward_model.doctor.reading import SETS, TRAINING, BadOne, Row
from reward_model.models.loading import is_reward_model, most_tokens, read_config
from reward_model.models.pair_encoding import for_training

BATCH = 256  # rows that are tokenized together


def findings_of_rows(ledger: Ledger) -> Iterator[Finding]:
    """Rows that cannot be used by reason, empty answers among them; ties; rows with a single answer; glued texts."""
    for of_set, name in enumerate(SETS):
        total = ledger.rows[name]
        if not total:
            continue
        of = "" if of_set == TRAINING else f"{name}: "
        prefix = "" if of_set == TRAINING else f"{name}_"
        reasons = ledger.reasons[name]
        bad = reasons.total
        yield Finding(
            f"{prefix}unusable",
            "hurts" if bad else "fine",
            f"{of}{part(bad, total, 'row')} cannot be used",
            "training stops at the first of them: mend them, or leave them out with --on_bad_row skip" if bad else "",
            bad,
            total,
            reasons=reasons.to_json(),
        )
        empty = sum(count for reason, count in reasons.count.items() if reason.endswith(" is empty"))
        yield Finding(
            f"{prefix}empty",
            "hurts" if empty else "fine",
            f"{of}{part(empty, total, 'row')} have an empty answer",
            "they are among the rows that cannot be used" if empty else "",
            empty,
            total,
            rows=[o for reason, origins in reasons.first.items() if reason.endswith(" is empty") for o in origins][
                :EXAMPLES
            ],
        )
        if of_set != TRAINING:
            continue
        yield Finding(
            "ties",
            level_of(ledger.ties[name] / total, 0.2, 0.9),
            f"{part(ledger.ties[name], total, 'row')} are ties, from which no pair is learned",
            "they cost nothing but their place; --loss may not take them" if ledger.ties[name] else "",
            ledger.ties[name],
            total,
        )
        if ledger.unjudged[name]:
            yield Finding(
                "without_pairs",
                "fine",
                f"{part(ledger.unjudged[name], total, 'row')} have one answer or no order: of them only the texts were "
                "looked at",
                "",
                ledger.unjudged[name],
                total,
            )
        yield Finding(
            "glued",
            level_of(ledger.glued[name] / total, 0.02, 0.5),
            f"{part(ledger.glued[name], total, 'row')} have nothing, no space either, between prompt and answer",
            "texts are joined as they are: end the prompts with a space, or make turns of them with --chat"
            if ledger.glued[name]
            else "",
            ledger.glued[name],
            total,
        )


def as_training(config: DoctorConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, float]:
    """Whether a training of the model that has this tokenizer would read prompt and answer as a pair of texts, and how
    many tokens it would take at most.

    A tokenizer without a model is taken for a decoder's, which is said.
    """
    name = config.tokenizer or ""
    try:
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise UserError("there is no config.json beside it")
        model = read_config(name, config.trust_remote_code)
    except UserError as error:
        logger.warning(f"--tokenizer {name}: texts are joined, as for a decoder: {error}")
        return False, math.inf
    most, whose = most_tokens(model.get_text_config(), tokenizer)
    if most < config.max_seq_len:
        logger.warning(f"--max_seq_len {config.max_seq_len}: {whose} {most}, and a training would take no more")
    is_trained = is_reward_model(name, model)
    pairs = for_training(None, name, model, tokenizer, config.chat, is_trained, None, config.trust_remote_code)
    return pairs, most


@dataclass
class Cuts:
    """What becomes of the training rows once a tokenizer has cut them. equal: on the left, as this trainer does.

    equal_right: the same where other trainers cut the right.
    """

    config: DoctorConfig
    rows: int = 0
    cut: int = 0
    equal: list[str] = field(default_factory=list)
    equal_count: int = 0
    equal_right: int = 0
    problems: Reasons = field(default_factory=Reasons)
    waiting: list[tuple[str, Texts]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.config.tokenizer
        self.tokenizer = load_tokenizer(self.config.tokenizer, trust_remote_code=self.config.trust_remote_code)
        if self.config.chat_template:
            give_template(self.tokenizer, self.config.chat_template)
        largest = max(self.tokenizer.get_vocab().values()) + 1
        special = choose_special_tokens(self.tokenizer, largest, fill=self.tokenizer.pad_token_id or 0)
        pairs, most = as_training(self.config, self.tokenizer)
        self.how = Encoding(self.tokenizer, special, pairs)
        self.limit = int(min(self.config.max_seq_len, most))
        self.more = "give --max_seq_len more tokens"
        if self.limit == most:
            self.more = "the model takes no more tokens: shorten them"

    def add(self, ledger: Ledger, row: Row | BadOne) -> None:
        """Take a row; those to evaluate on, and those that cannot be used, are left out."""
        if isinstance(row, BadOne) or ledger.data.sets[row.source] != TRAINING:
            return
        source = ledger.data.sources[row.source]
        text: Texts | str = row.texts
        if row.texts.templated:  # written once more, by the tokenizer's own template
            text = read_text(source, source.rows[row.index], self.tokenizer, ledger.data.chat)
        self.rows += 1
        origin = ledger.data.origin(row.source, row.number)
        if isinstance(text, str):
            self.problems.add(text, origin)
            return
        self.waiting.append((origin, text))
        if len(self.waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Tokenize those that wait."""
        limit = self.limit
        for (origin, text), row in zip(self.waiting, self.how.encoded([text for _, text in self.waiting])):
            try:
                if isinstance(row, BadRow):
                    raise row
                if len({tuple(each[:limit]) for each in row.whole}) < len(row.whole):
                    self.equal_right += 1
                if len({tuple(each[-limit:]) for each in row.whole}) < len(row.whole):
                    self.equal_count += 1
                    self.equal += [origin] if len(self.equal) < EXAMPLES else []
                    continue
                self.cut += compare(row.prompt, row.whole, self.how.special, limit, text.names, row.fixed)["cut"]
            except BadRow as problem:
                self.problems.add(str(problem), origin)
        self.waiting.clear()

    def findings(self) -> Iterator[Finding]:
        """What is left of the rows at --max_seq_len."""
        self.flush()
        limit, total = self.limit, self.rows
        yield Finding(
            "equal_once_cut",
            level_of(self.equal_count / max(1, total), 0.0, 0.001),
            f"{part(self.equal_count, total, 'row')} have answers that are equal once cut to {limit} tokens "
            f"on the left, as here; on the right, as elsewhere, {self.equal_right:,}",
            f"they cannot be used: {self.more}, or leave them out" if self.equal_count else "",
            self.equal_count,
            total,
            rows=self.equal,
        )
        bad = self.problems.total
        yield Finding(
            "unusable_once_tokenized",
            "hurts" if bad else "fine",
            f"{part(bad, total, 'row')} cannot be used once tokenized",
            f"{self.more}, give the tokenizer a chat template, or leave them out with --on_bad_row skip" if bad else "",
            bad,
            total,
            reasons=self.problems.to_json(),
        )
        yield Finding(
            "cut",
            level_of(self.cut / max(1, total), 0.05, 0.5),
            f"{part(self.cut, total, 'row')} lose the left of their prompt at {counted(limit, 'token')}"
            f"{', read as pairs' if self.how.pairs else ''}",
            f"what was asked may be gone: {self.more}" if self.cut else "",
            self.cut,
            total,
        )
