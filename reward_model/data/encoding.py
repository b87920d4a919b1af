# SPDX-License-Identifier: Apache-2.0
"""How prompt and response become token ids: for training, evaluation, scoring and the check of what was saved alike.

Joined, as decoders read them: the text of both, closed with the end token. As a pair, as encoders read them:
``tokenizer(prompt, response)``, a separator between the two and, where the tokenizer makes them, segment ids. What a
chat template wrote is one text that nothing is added to, and so is, closed, a response without a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.data.comparisons import BadRow, Comparison
from reward_model.data.rows import Texts
from reward_model.data.tokenizer import SpecialTokens

WRITTEN = "written by the chat template"  # why a row is one text, although others are pairs
ALONE = "without a prompt (in its field, or before the mark of the last turn)"
NOT_FRAMED = "the tokenizer does not separate this prompt and response as it separates others"


class Frame(NamedTuple):
    """What a tokenizer puts around a pair of texts.

    before, between, after: ids. has_segment_ids: whether it says by ids which tokens are the response's: ones for the
    response and what comes after it, zeros for the rest.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    has_segment_ids: bool


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame | None:
    """What a tokenizer puts around a pair, found by trying one; None: it makes no pairs.

    Without a token between prompt and response there is no pair to read, and segment ids of another kind than zeros
    and ones (XLNet, Funnel) are none that this package can make.
    """
    try:
        made = tokenizer("a", "b", verbose=False)
        ids = list(made["input_ids"])
        first, second = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in "ab")
    except Exception:  # a tokenizer that knows no pairs raises what it likes
        return None
    last = len(ids) - len(second)
    begin = next((i for i in range(last) if ids[i : i + len(first)] == first), last)
    end = begin + len(first)
    at = next((i for i in range(last, end, -1) if ids[i:][: len(second)] == second), None)  # not next to the first
    if not first or not second or at is None:
        return None
    segments, told = list(made.get("token_type_ids") or [0] * len(ids)), [0] * at + [1] * (len(ids) - at)
    if any(segments) and segments != told:
        return None
    return Frame(ids[:begin], ids[end:at], ids[at + len(second) :], segments == told)


class EncodedRow(NamedTuple):
    """A row as token ids.

    prompt: of what was asked; of a pair with the tokens around it. whole: of each response after its prompt. fixed: how
    many tokens at the beginning and at the end of ``prompt`` stay when it is cut; None: whatever starts a text. empty:
    of each response whether it has no token of its own, as one of characters that the tokenizer does not know. single:
    why the row is one text although others are pairs; None: it is not, or none are.
    """

    prompt: list[int]
    whole: list[list[int]]
    empty: list[bool]
    fixed: tuple[int, int] | None = None
    single: str | None = None

    @property
    def two_segments(self) -> bool:
        return self.fixed is not None


class Encoded(NamedTuple):
    """A row to score, and whether it lost the left of its prompt. empty: as that of :class:`EncodedRow`."""

    row: Comparison
    cut: bool
    empty: Sequence[bool] = ()


@dataclass(frozen=True)
class Encoding:
    """A tokenizer, and how it is given texts.

    pairs: prompt and response are given as a pair.
    """

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    pairs: bool = False

    @cached_property
    def frame(self) -> Frame:
        """What the tokenizer puts around a pair.

        Raises:
            UserError: it makes no pairs.
        """
        found = frame_of(self.tokenizer)
        if found is None:
            raise UserError(
                "the tokenizer makes no pairs of texts: tokenizer(prompt, response) has no separator, or segment ids "
                "of a kind of its own"
            )
        return found

    @property
    def has_segment_ids(self) -> bool:
        """Whether the tokenizer makes pairs and says by ids which of their tokens are the response's."""
        return self.pairs and self.frame.has_segment_ids

    def joined(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, with the start token that the tokenizer puts before them and one end token."""
        return [end_text(ids, self.special) for ids in self._opened(texts)]

    def written(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a chat template wrote: it writes special tokens itself, and others add none either."""
        return self._ids(texts, add_special_tokens=False)

    def paired(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[list[int], int]]:
        """Ids of each prompt with its response, and at which of them the second segment, the response's, begins.

        0 where the tokenizer makes something else of a pair than of the one that was tried.

        Raises:
            UserError: the tokenizer makes no pairs.
        """
        if not prompts:
            return
        before, between, after, _ = self.frame
        each = list(dict.fromkeys(prompts))
        lengths = dict(zip(each, map(len, self._ids(each, add_special_tokens=False))))
        for prompt, ids in zip(prompts, self._ids(list(prompts), list(responses))):
            begin = len(before) + lengths[prompt] + len(between)
            end = len(ids) - len(after)
            is_framed = ids[begin - len(between) : begin] == between and end >= begin and ids[end:] == after
            yield ids, begin if is_framed else 0

    def rows(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Comparison]:
        """Each prompt with its one response, to be scored; nothing is cut, and nothing said of what is judged.

        Raises:
            UserError: the tokenizer makes no pairs, or makes them otherwise than the one that was tried.
        """
        texts = list(zip(prompts, responses))
        is_pair = [self.pairs and prompt != "" for prompt in prompts]
        chosen = [text for text, pair in zip(texts, is_pair) if pair]
        pairs = self.paired([prompt for prompt, _ in chosen], [response for _, response in chosen])
        joined = iter(self.joined([prompt + response for (prompt, response), pair in zip(texts, is_pair) if not pair]))
        found = []
        for number, pair in enumerate(is_pair, 1):
            ids, begin = next(pairs) if pair else (next(joined), 0)
            if pair and not begin:
                raise UserError(f"text {number}: {NOT_FRAMED}")
            found.append(Comparison(ids[:begin], [ids[begin:]], two_segments=pair))
        return found

    def encoded(self, texts: Sequence[Texts]) -> Iterator[EncodedRow | BadRow]:
        """Ids of each row of a data set, or why it cannot be used."""
        of_kind: dict[str, list[Texts]] = {"pair": [], "joined": [], "written": []}
        for text in texts:
            of_kind[self._kind(text)].append(text)
        rows = {
            "pair": self._pairs_of(of_kind["pair"]),
            "joined": self._single_texts(of_kind["joined"], templated=False),
            "written": self._single_texts(of_kind["written"], templated=True),
        }
        for text in texts:
            yield next(rows[self._kind(text)])

    def _kind(self, text: Texts) -> str:
        if text.templated:
            return "written"
        return "pair" if self.pairs and text.prompt and text.has_prompt else "joined"

    def _single_texts(self, texts: Sequence[Texts], templated: bool) -> Iterator[EncodedRow | BadRow]:
        parts = [part for text in texts for part in (text.prompt, *text.whole)]
        ids = iter(self.written(parts) if templated else self._opened(parts))
        why = (WRITTEN if templated else ALONE) if self.pairs else None
        for text in texts:
            prompt, *whole = (next(ids) for _ in range(1 + len(text.whole)))
            empty = [is_empty(prompt, each) for each in whole]
            closed = whole if templated else [end_text(each, self.special) for each in whole]
            yield EncodedRow(prompt, closed, empty, single=why)

    def _pairs_of(self, texts: Sequence[Texts]) -> Iterator[EncodedRow | BadRow]:
        prompts = [text.prompt for text in texts for _ in text.whole]
        found = self.paired(prompts, [whole[len(text.prompt) :] for text in texts for whole in text.whole])
        for text in texts:
            made = [next(found) for _ in text.whole]
            ids, begin = made[0]
            before, between, after, _ = self.frame
            whole = [each for each, _ in made]
            empty = [len(each) == begin + len(after) for each in whole]
            if all(at for _, at in made):
                yield EncodedRow(ids[:begin], whole, empty, (len(before), len(between)))
            else:
                yield BadRow(NOT_FRAMED)

    def _opened(self, texts: Sequence[str]) -> list[list[int]]:
        return [one_start(ids, self.special) for ids in self._ids(list(texts))]

    def _ids(self, *texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        if not texts[0]:
            return []
        return self.tokenizer(*texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def is_empty(prompt: list[int], whole: list[int]) -> bool:
    """Whether a text has nothing after its prompt."""
    return whole == prompt[: len(whole)]


def one_start(ids: list[int], special: SpecialTokens) -> list[int]:
    """The ids with one start token, where the text began with one and the tokenizer put another before it."""
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] and ids[0] in special.starts else ids


def end_text(ids: list[int], special: SpecialTokens) -> list[int]:
    """The ids with one end token at their end, unless they already end in one that closes a text or a turn."""
    return ids if ids and ids[-1] in special.endings else [*ids, special.end]
