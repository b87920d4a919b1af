# SPDX-License-Identifier: Apache-2.0
"""Texts that arrive whole, prompt and answer together: a policy's tokens decoded with special tokens kept, most often.

Such a text may have its start and end tokens in it, or may have lost them: OpenRLHF keeps both, verl takes the start
token away, and an answer that was cut at the most tokens has no end. Here it gets what training gives every text: one
start token where the model has seen one, and one end. So a text that was cut is scored as if it ended where it was cut,
which is the only place at which the model has learned to score; and the same text scores alike with and without them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from reward_model.data.chat_template import PROBE
from reward_model.data.chats import half_character, in_plain, is_chat, write
from reward_model.data.comparisons import BadRow, Comparison, common_prefix
from reward_model.data.encoding import Encoded, end_text, one_start
from reward_model.data.rendering import render
from reward_model.data.tokenizer import SpecialTokens


class WholeTexts:
    """Makes token ids of whole texts, for one model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special: SpecialTokens,
        rows: int,
        max_seq_len: int = sys.maxsize,
        chat: bool = False,
    ):
        """
        Args:
            rows: ids that the model knows, from 0 on.
            max_seq_len: tokens of the longest text.
            chat: texts come from the chat template, even where nothing in them tells.
        """
        self.tokenizer, self.special, self.rows, self.max_seq_len = tokenizer, special, rows, max_seq_len
        self.start = self.tokenizer.bos_token or ""
        self.mark, self.starts, self.tail = "", False, list[int]()
        try:
            written = render(self.tokenizer, PROBE) if self.tokenizer.chat_template else ""
        except Exception:  # a template that refuses these two turns: its texts are taken as plain ones
            written = ""
        if written:
            self.starts = bool(self.start) and written.startswith(self.start)
            self.mark = self._mark(written.removeprefix(self.start) if self.starts else written, chat)
            ids = self._encode(written, False)
            last = max((i for i, token in enumerate(ids) if token in self.special.endings), default=len(ids))
            self.tail = ids[last:]

    def _mark(self, written: str, chat: bool) -> str:
        """What chats begin with, after their start token: a special token or, under ``--chat``, the user's mark."""
        special = [str(token) for token in self.tokenizer.all_special_tokens]
        special += [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        found = [token for token in special if token and written.startswith(token)]
        return max(found, key=len) if found else written.partition(PROBE[0]["content"])[0] if chat else ""

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def ids(self, text: str, closed: bool = True) -> list[int]:
        """A text's token ids with one start and one end; not ``closed``: of a prompt, which has no end yet."""
        if self.mark and text.removeprefix(self.start).startswith(self.mark):
            if self.starts and not text.startswith(self.start):
                text = self.start + text
            ids = self._encode(text, False)
            return self._with_tail(ids) if closed else ids
        ids = one_start(self._encode(text, True), self.special)
        if len(ids) > 1 and ids[-1] == ids[-2] == self.special.end:  # an encoder's tokenizer adds one of its own
            ids = ids[:-1]
        return end_text(ids, self.special) if closed else ids

    def _with_tail(self, ids: list[int]) -> list[int]:
        """A chat's ids up to where the template ends a chat."""
        tail = self.tail
        if not tail:
            return end_text(ids, self.special)
        if ids[-len(tail) :] == tail:
            return ids
        return ids + tail[1:] if ids[-1:] == tail[:1] else ids + tail

    def encoded(self, text: str, prompt: str | None = None) -> Encoded:
        """A text as a row to score.

        Args:
            prompt: with which the text begins; of a text that is too long its left is cut, as in training, and texts of
                one prompt share it.

        Raises:
            BadRow: half a character, no token, or a text that is too long and has no prompt to be cut.
        """
        if half := half_character(text) or half_character(prompt or ""):
            raise BadRow(f"the text has half a character, {half}, which is no text")
        ids = self.ids(text)
        if not prompt:
            return self._row(ids, 0, None)
        shared = min(common_prefix(self.ids(prompt, closed=False), ids), len(ids) - 1)
        return self._row(ids, shared, hash(prompt) or None)

    def given(self, ids: Sequence[int]) -> Encoded:
        """Token ids as a row to score, as they are.

        Raises:
            BadRow: none, or one that the model does not know.
        """
        if not ids or not all(0 <= token < self.rows for token in ids):
            raise BadRow(f"token ids are numbers from 0 to {self.rows - 1}, one at least")
        return self._row(list(ids), 0, None)

    def chat(self, messages: list[dict], arguments: dict) -> Encoded:
        """Messages as a row to score: what the template makes of them, to the letter.

        Raises:
            BadRow: no messages, or the template refuses them.
        """
        chat = in_plain("messages", messages)
        if not is_chat(chat):
            raise BadRow("messages is not a list of messages with role and content")
        (text,) = write(self.tokenizer, [chat], arguments)
        return self._row(self._encode(text, False), 0, None)

    def _row(self, ids: list[int], prompt: int, prompt_hash: int | None) -> Encoded:
        surplus = len(ids) - self.max_seq_len
        if surplus > 0:
            start = 1 if prompt and ids[0] in self.special.starts else 0
            if start + surplus > prompt:
                cut = "" if prompt == 0 else ", and its prompt is shorter than what is too much"
                raise BadRow(f"the text has {len(ids)} tokens, and the longest may have {self.max_seq_len}{cut}")
            ids, prompt = ids[:start] + ids[start + surplus :], prompt - surplus
        if not ids:
            raise BadRow("the text has no token")
        return Encoded(Comparison(ids[:prompt], [ids[prompt:]], prompt_hash=prompt_hash), surplus > 0)
