# SPDX-License-Identifier: Apache-2.0
"""Scores of texts from any model that the trainer saves.

from reward_model.inference import load
reward = load("output")
reward.score(["Human: 2 + 2? Assistant:"], [" 4"])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from reward_model.batching.collate import collate
from reward_model.batching.planner import Planner
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.config.groups import BatchConfig, DataConfig
from reward_model.config.model_folder import require_plausible_folder
from reward_model.data.chats import half_character, in_plain, is_chat, write
from reward_model.data.comparisons import BadRow, Comparison, Comparisons
from reward_model.data.encoding import Encoding
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.evaluation.judged import Judged, judge
from reward_model.models.adapters import is_adapter, merged, merged_before
from reward_model.models.attention import SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.pair_encoding import for_scoring, told
from reward_model.models.saved_forms import form_of, load_form
from reward_model.models.scorer import SCORE_PAIRS, Scorer, embedding_rows
from reward_model.objectives.losses import likeliest_grade

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


class RewardScorer:
    """A saved model with its tokenizer, scoring as the trainer's evaluation does."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str = "cpu",
        pad: int | None = None,
        pairs: bool | None = None,
    ):
        """
        Args:
            pad: of which a text is not scored at the last one: the pad that the model's ``config.json`` names, as
                Transformers' classes have it. None: a text is scored at its last token, whatever that is.
            pairs: whether prompt and response are a pair for the tokenizer; None: as ``config.json`` says, or pairs for
                an encoder with a classification head of its own.
        """
        device = torch.device(device)
        self.scorer = scorer.to(device).eval()
        self.tokenizer, self.pad = tokenizer, pad
        # the mask hides what fills a row, but it has to be in the embedding; RoBERTa counts positions by its pad
        fills = (pad, tokenizer.pad_token_id, 0)
        fill = next(i for i in fills if i is not None and 0 <= i < embedding_rows(scorer))
        self.special = choose_special_tokens(tokenizer, embedding_rows(scorer), fill=fill)
        said = getattr(scorer.config, SCORE_PAIRS, None) if pairs is None else pairs
        self.encoding = Encoding(tokenizer, self.special, for_scoring(scorer, tokenizer, said))
        scorer.read_with(self.encoding)
        dtype = next(scorer.parameters()).dtype
        self.forward = ForwardPass(self.scorer, self.scorer, dtype, device, self.special.pad)
        self.mean = getattr(scorer.config, "score_mean", 0.0)  # of a normalized model: its head has no bias to take it
        self.thresholds = [value - self.mean for value in getattr(scorer.config, "score_thresholds", [])]
        self.lowest_grade = getattr(scorer.config, "lowest_grade", 0)
        self.temperature = getattr(scorer.config, "score_temperature", None) or 1.0  # of a probability, not of scores

    def judge(
        self,
        data: Comparisons,
        context: DistributedContext,
        batch_size: int = 32,
        tokens_per_batch: int = 0,
        attention: Literal["auto", "timed", "slices", "flex", "varlen", "dense", "separate"] = "auto",
        seed: int = 0,
    ) -> Judged:
        """The scores of a data set's responses, each prompt's together, on all ranks; every rank gets all of them.

        Args:
            data: tokenized for this model.
            batch_size: of a rank, in judged pairs or single responses.
            tokens_per_batch: the most tokens of a forward pass, pads included; 0: no limit.
            attention: as ``--attention`` of main.py.
            seed: of the order in which ties are broken when prompts are brought together.

        Raises:
            UserError: the attention that was asked for is not right for this model.
        """
        if self.pad is None and self.scorer.pooling == "classifier":  # takes no pads, see score_ids
            rows = (data[i] for i in range(len(data)))
            texts = [row.text(k) for row in rows for k in range(len(row.responses))]
            return Judged.of(data, np.array(self._score_texts(texts)))
        batches = BatchConfig(merge="prompt", per_device_train_batch_size=batch_size, tokens_per_batch=tokens_per_batch)
        planner = Planner(batches, batch_size, seed, context, by_row=False)
        groups = planner.evaluation_groups(data, 0)
        longest = int(data.lengths.max())
        logger.info(
            self.forward.choose_attention(longest, attention, lambda layout: planner.first(data, groups, layout))
        )
        try:
            plan = planner.evaluation(groups, self.forward.layout.kind)
            loaded = planner.load(data, plan, self.forward.layout)
            pad = self.pad if self.scorer.pooling == "last" else None
            found, _ = judge(self.forward, data, plan, loaded, context, pad)
        finally:
            self.forward.use(SEPARATE)
        return replace(found, scores=found.scores - self.mean)

    def grades(self, scores: Sequence[float]) -> list[int]:
        """The likeliest grade of each score, by the thresholds that ``--loss ordinal`` has learned.

        Raises:
            UserError: a model that was trained with another loss.
        """
        if not self.thresholds:
            raise UserError("this model has no thresholds: it was not trained with --loss ordinal")
        found, thresholds = (torch.tensor(values, dtype=torch.float64) for values in (scores, self.thresholds))
        return (likeliest_grade(found, thresholds) + self.lowest_grade).tolist()

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16) -> list[float]:
        """The score of each response to its prompt.

        An encoder is given the two as a pair, ``tokenizer(prompt, response)``, if it was trained so; otherwise they are
        joined as they are, and closed with the end token, as is a response whose prompt is empty.

        A model that was saved with ``--normalize_scores`` gives its reference rows mean 0 and standard deviation 1.
        Nothing is cut: a text longer than those of the training is scored as it is.

        Raises:
            UserError: not as many responses as prompts, or half a character in a text.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise UserError("give lists of prompts and responses, not text")
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts and {len(responses)} responses: give one of each per text")
        _require_whole([prompt + response for prompt, response in zip(prompts, responses)])
        return self._score_texts(self.encoding.rows(prompts, responses), batch_size)

    def score_chats(
        self, chats: Sequence[list[dict]], batch_size: int = 16, tools: list | None = None, **template_arguments
    ) -> list[float]:
        """The score of each list of chat messages, at the end of what the tokenizer's template makes of it.

        Args:
            tools: for the template, as in ``apply_chat_template``.
            template_arguments: others that the template takes.

        Raises:
            UserError: one chat in place of a list of them, no chat template, a template that refuses a chat, or half a
                character in a text.
        """
        if not all(isinstance(chat, Sequence) and not isinstance(chat, str) for chat in chats):
            raise UserError("give a list of chats, each a list of messages")
        given = template_arguments | ({"tools": tools} if tools else {})
        try:
            plain = [in_plain(f"chat {i}", list(chat)) for i, chat in enumerate(chats, 1)]
            if bad := [i for i, chat in enumerate(plain, 1) if not is_chat(chat)]:
                raise UserError(f"chat {bad[0]} is not a list of messages with role and content")
            texts = write(self.tokenizer, plain, given)
        except BadRow as error:
            raise UserError(str(error)) from error
        _require_whole(texts)
        return self.score_ids(self.encoding.written(texts), batch_size)

    def score_ids(self, ids: list[list[int]], batch_size: int = 16, second: Sequence[int] | None = None) -> list[float]:
        """The score of each text that is given as token ids, as it is: nothing is added at its end.

        Args:
            second: of each text, how many of its last tokens are the second segment of a pair, its closing separator
                included, 0 where it is one text. None: all are.
        """
        counts = second or [0] * len(ids)
        texts = [Comparison.of_ids(text, count) for text, count in zip(ids, counts, strict=True)]
        return self._score_texts(texts, batch_size)

    @torch.no_grad()
    def _score_texts(self, texts: Sequence[Comparison], batch_size: int = 16) -> list[float]:
        """The score of the one response of each of some rows."""
        scores = torch.empty(len(texts))
        order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)  # texts of one length need no pads
        if self.pad is None and self.scorer.pooling == "classifier":
            batch_size = 1  # a class of Transformers that is scored at the last token takes no pads then
        for first in range(0, len(texts), batch_size):
            chosen = order[first : first + batch_size]
            rows = [texts[i] for i in chosen]
            batch = collate(rows, self.forward.layout).to(self.forward.device)
            beyond = [pads_at_end(row.prompt + row.responses[0], self.pad) for row in rows]
            beyond = torch.tensor(beyond, device=self.forward.device)
            scores[chosen] = self.forward(batch, batch.tokens.ends - beyond).float().cpu()
        return (scores - self.mean).tolist()


def pads_at_end(ids: Sequence[int], pad: int | None) -> int:
    """How far before its last token a text is scored: Transformers' classes take the last token that is no pad.

    Where the pad is the end token, as TRL trains, that is the token before it. All pads: the first token.

    >>> pads_at_end([5, 6, 2], pad=0), pads_at_end([5, 6, 2], pad=2), pads_at_end([2, 2], pad=2)
    (0, 1, 1)
    """
    kept = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad), 0)
    return len(ids) - 1 - kept


def _pad_of(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, is_dschat: bool) -> int | None:
    """The pad by which a model is scored; says it where this is not the end of a text.

    ``config.json`` names it, and for DeepSpeed-Chat's form the tokenizer, which is what the drop-in goes by.
    """
    pad = tokenizer.pad_token_id if is_dschat else scorer.config.get_text_config().pad_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if scorer.pooling != "last":
        return pad
    place = "the tokenizer's pad" if is_dschat else "pad_token_id in config.json"
    if pad is None:
        logger.warning(f"{place} is not set: texts are scored at their last token, and Transformers takes them singly")
    elif pad == end:
        token = tokenizer.convert_ids_to_tokens(pad)
        logger.warning(
            f"{place} is the end token {token}: a text is scored at the token before it, as Transformers has it"
        )
    elif tokenizer.pad_token_id not in (None, pad):
        logger.warning(
            f"the tokenizer's pad is {tokenizer.pad_token_id} and {place} {pad}: scored at the end of a text, which "
            "Transformers finds only where a batch has no pads"
        )
    return pad


def _require_whole(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts, 1):
        if half := half_character(text):
            raise UserError(f"text {i} has half a character, {half}, which is no text")


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    form: Literal["hf", "dschat"] | None = None,
    trust_remote_code: bool = False,
) -> RewardScorer:
    """A model that the trainer saved, in whichever form it was saved, or any reward model that Transformers loads.

    Args:
        folder: or a name on the hub. A LoRA adapter is merged into its base, in the cache of tokenized rows.
        dtype: of the weights, a ``torch.dtype`` or ``fp32``, ``bf16`` or ``fp16``; None: as saved.
        form: of a folder that holds two; None: ``dschat`` only where there is nothing else.
        trust_remote_code: run the code that the model brings.

    Raises:
        UserError: no such model, or weights missing.
    """
    if not Path(folder).is_dir() and not HUB_NAME.fullmatch(str(folder)):
        raise UserError(f"{Path(folder)}: no such folder")
    if is_adapter(str(folder)):
        folder = merged_before(str(folder)) or merged(str(folder), DataConfig().cache_folder, trust_remote_code)
    folder = Path(folder)
    if folder.is_dir():
        require_plausible_folder(folder, trust_remote_code)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no model: there is no config.json in it")
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str):
        raise UserError(f"dtype {dtype}: give one of {', '.join(DTYPES)}, or a torch.dtype")
    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(str(error) if folder.is_dir() else f"{folder}: no such folder, and {error}") from error
    its_form = form_of(folder, form) if folder.is_dir() else None
    if its_form:
        with never_asking(trust_remote_code):
            scorer = load_form(folder, its_form, dtype, trust_remote_code)
    else:
        scorer = load_for_training(
            str(folder), dtype or "auto", seed=0, expect_head=True, trust_remote_code=trust_remote_code
        )
    try:
        pad = _pad_of(scorer, tokenizer, its_form == "dschat")
        return RewardScorer(scorer, tokenizer, device, pad, told(folder, scorer.config))
    except UserError as error:  # of the tokenizer
        raise UserError(f"{folder}: {error}") from error
