# SPDX-License-Identifier: Apache-2.0
"""Scores of texts from any model that the trainer saves.

from reward_model.inference import load
reward = load("output")
reward.score(["Human: 2 + 2? Assistant:"], [" 4"])
"""

from __future__ import annotations

import json
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
from reward_model.data.chat_template import PROBE
from reward_model.data.chats import half_character, in_plain, is_chat, template_arguments, write
from reward_model.data.comparisons import BadRow, Comparison, Comparisons
from reward_model.data.preprocessing import end_text, one_start
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.evaluation.judged import Judged, judge
from reward_model.models.adapters import is_adapter, merged, merged_before
from reward_model.models.attention import SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.saved_forms import form_of, load_form
from reward_model.models.scorer import Scorer, embedding_rows
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
    ):
        """
        Args:
            pad: of which a text is not scored at the last one: the pad that the model's ``config.json`` names, as
                Transformers' classes have it. None: a text is scored at its last token, whatever that is.
        """
        device = torch.device(device)
        self.scorer = scorer.to(device).eval()
        self.tokenizer, self.pad = tokenizer, pad
        # the mask hides what fills a row, but it has to be in the embedding; RoBERTa counts positions by its pad
        fills = (pad, tokenizer.pad_token_id, 0)
        fill = next(i for i in fills if i is not None and 0 <= i < embedding_rows(scorer))
        self.special = choose_special_tokens(tokenizer, embedding_rows(scorer), fill=fill)
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
            texts = [row.prompt + response for row in rows for response in row.responses]
            return Judged.of(data, np.array(self.score_ids(texts)))
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
        """The score of each response to its prompt; the two are joined as they are, and closed with the end token.

        A model that was saved with ``--normalize_scores`` gives its reference rows mean 0 and standard deviation 1.
        Nothing is cut: a text longer than those of the training is scored as it is.

        Raises:
            UserError: not as many responses as prompts, or half a character in a text.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise UserError("give lists of prompts and responses, not text")
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts and {len(responses)} responses: give one of each per text")
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        _require_whole(texts)
        encoded = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        whole = [one_start(ids, self.special) for ids in encoded]
        return self.score_ids([end_text(ids, self.special) for ids in whole], batch_size)

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
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return self.score_ids(encoded, batch_size)

    def __call__(self, prompts: Sequence, completions: Sequence, **columns) -> list[float | None]:
        """A reward function of TRL's: ``GRPOTrainer(…, reward_funcs=load("output"))``, and of ``RLOOTrainer``.

        Texts are scored as ``score`` does, so that each is closed with the end token, also one that was cut at the
        longest completion; chats as ``score_chats`` does.

        Args:
            prompts: texts, or lists of chat messages.
            completions: texts, or lists of the messages that follow; None or an empty list: nothing to score.
            columns: what TRL hands over beside them. ``tools`` and ``chat_template_kwargs``, one for each prompt, go to
                the chat template, as in training; nothing else is read.

        Returns:
            A score for each completion, None where there is nothing to score, which TRL leaves out of the reward.

        Raises:
            UserError: not as many completions as prompts, a text that follows messages or the other way round, or what
                ``score`` and ``score_chats`` refuse.
        """
        if len(prompts) != len(completions):
            raise UserError(f"{len(prompts)} prompts and {len(completions)} completions: give one of each per text")
        scores: list[float | None] = [None] * len(prompts)
        groups: dict[str, list[int]] = {}  # of equal arguments of the template; the key of texts is empty
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            if isinstance(prompt, str) != isinstance(completion, str) and completion is not None:
                raise UserError(f"prompt {i + 1} and its completion: one is text, the other messages")
            if completion is None or (not isinstance(prompt, str) and not completion):
                continue
            groups.setdefault("" if isinstance(prompt, str) else _of_template(i, columns), []).append(i)
        for arguments, rows in groups.items():
            if arguments:
                chats = [[*prompts[i], *completions[i]] for i in rows]
                found = self.score_chats(chats, **json.loads(arguments))
            else:
                found = self.score([prompts[i] for i in rows], [completions[i] for i in rows])
            for i, score in zip(rows, found):
                scores[i] = score
        return scores

    def score_queries(self, queries: Sequence[str], prompts: Sequence[str]) -> list[float]:
        """Scores of OpenRLHF's queries: prompt and response in one text, with the special tokens of the policy in it.

        A text that begins with a special token has brought its own (a chat template has written them), and gets none at
        its beginning; any other gets what ``score`` gives it. Neither gets a second start or end token. A text that
        was cut has no end token and gets one here (of a chat, what closes a turn), while OpenRLHF's own reward server
        scores it at its last word. The policy and the reward model need the same special tokens.

        Args:
            prompts: of the queries; a query that does not begin with its prompt, which was cut, is read as one text.

        Raises:
            UserError: as ``score``.
        """
        if isinstance(queries, str) or isinstance(prompts, str):
            raise UserError("give lists of queries and prompts, not text")
        if len(queries) != len(prompts):
            raise UserError(f"{len(queries)} queries and {len(prompts)} prompts: give one of each per text")
        _require_whole(queries)
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.special.endings | self.special.starts))
        templated = [query.startswith(tuple(names)) for query in queries]
        texts = [query for query, is_templated in zip(queries, templated) if is_templated]
        if closing := self._closing() if texts else "":
            texts = [_closed(text, closing) for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        of_templated = iter(self.score_ids(encoded if closing else [end_text(ids, self.special) for ids in encoded]))
        plain = [pair for pair, is_templated in zip(zip(queries, prompts), templated) if not is_templated]
        parts = [(prompt, query[len(prompt) :]) if query.startswith(prompt) else ("", query) for query, prompt in plain]
        of_plain = iter(self.score([prompt for prompt, _ in parts], [response for _, response in parts]))
        return [next(of_templated if is_templated else of_plain) for is_templated in templated]

    def _closing(self) -> str:
        """What the chat template writes after the assistant's last word; nothing where there is no template."""
        answer = "Xyz."
        try:
            (text,) = write(self.tokenizer, [[PROBE[0], {"role": "assistant", "content": answer}]])
        except BadRow:
            return ""
        return text.rpartition(answer)[2] if answer in text else ""

    @torch.no_grad()
    def score_ids(self, ids: list[list[int]], batch_size: int = 16) -> list[float]:
        """The score of each text that is given as token ids, as it is: nothing is added at its end."""
        scores = torch.empty(len(ids))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # texts of one length need no pads
        if self.pad is None and self.scorer.pooling == "classifier":
            batch_size = 1  # a class of Transformers that is scored at the last token takes no pads then
        for first in range(0, len(ids), batch_size):
            chosen = order[first : first + batch_size]
            texts = [ids[i] for i in chosen]
            batch = collate([Comparison([], [text]) for text in texts], self.forward.layout).to(self.forward.device)
            beyond = torch.tensor([pads_at_end(text, self.pad) for text in texts], device=self.forward.device)
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


def _closed(text: str, closing: str) -> str:
    """A chat as its template ends it: a policy stops at the token that closes a turn, or was cut before it."""
    if text.endswith(closing):
        return text
    token = closing.rstrip()
    return text + (closing[len(token) :] if token and text.endswith(token) else closing)


def _of_template(i: int, columns: dict) -> str:
    """The arguments of the chat template in the columns of a row, as JSON."""
    row = {name: columns[name][i] for name in ("tools", "chat_template_kwargs") if columns.get(name)}
    try:
        return json.dumps(template_arguments(row), sort_keys=True)
    except BadRow as error:
        raise UserError(f"prompt {i + 1}: {error}") from error


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
        return RewardScorer(scorer, tokenizer, device, _pad_of(scorer, tokenizer, its_form == "dschat"))
    except UserError as error:  # of the tokenizer's tokens
        raise UserError(f"{folder}: {error}") from error
