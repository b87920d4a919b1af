# SPDX-License-Identifier: Apache-2.0
"""Scores of texts from any model that the trainer saves.

from reward_model.inference import load
reward = load("output")
reward.score(["Human: 2 + 2? Assistant:"], [" 4"])
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from reward_model.batching.batch import Batch
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.batching.planner import Planner
from reward_model.common.distributed import DistributedContext, by_itself
from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.config.groups import BatchConfig, DataConfig
from reward_model.config.model_folder import require_plausible_folder
from reward_model.config.options import read_run
from reward_model.config.reading import LONGEST
from reward_model.config.scoring import TOKENS
from reward_model.data.chat_template import give_template, settle_template
from reward_model.data.chats import half_character, in_plain, is_chat, template_arguments, write
from reward_model.data.comparisons import BadRow, Comparison, Comparisons
from reward_model.data.encoding import Encoded, Encoding
from reward_model.data.preprocessing import compare
from reward_model.data.rows import Texts, texts_to_score
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.data.whole_texts import WholeTexts
from reward_model.evaluation.judged import Judged, columns_of, judge, scored_at
from reward_model.models.adapters import is_adapter, merged, merged_before
from reward_model.models.attention import SEPARATE, AttentionBackend, window
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, is_reward_model, load_for_training, read_config
from reward_model.models.many_heads import beta_of, take_heads
from reward_model.models.pair_encoding import for_scoring, told
from reward_model.models.saved_forms import form_of, load_form
from reward_model.models.saving import NAMING
from reward_model.models.scorer import SCORE_PAIRS, Scorer, embedding_rows, head_layer
from reward_model.novelty.fitted import Novelty, read_novelty
from reward_model.objectives.losses import likeliest_grade

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


class RowScores(NamedTuple):
    """The scores of a row's responses, and what there is beside them, a number for each response.

    beside: of a model with several heads ``std``, the standard deviation of their scores (the population's), and
    ``lower``, score − β·std; of one that ``reward-model novelty fit`` was run on ``novelty``, the share of held-out
    training texts that are less novel, and ``novel``, whether that has come to its threshold; else nothing.
    """

    scores: list[float]
    beside: dict[str, Sequence[float]]


class RewardScorer:
    """A saved model with its tokenizer, scoring as the trainer's evaluation does.

    beta: of the lower bound r − β·u, u the standard deviation over several heads; ``score_beta`` in ``config.json``.
    novelty: how far states are from those of the training texts; None: nobody has fitted it.
    """

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
        self.beta = beta_of(scorer)
        self.novelty: Novelty | None = None
        self._wants_states = False
        self.temperature = getattr(scorer.config, "score_temperature", None) or 1.0  # of a probability, not of scores
        self.sharing: AttentionBackend | None = None  # of score_rows, once it is chosen
        self.longest = 0  # tokens of the longest text for which it was chosen
        self.positions = most_positions(scorer)
        made_for = getattr(scorer.config.get_text_config(), "max_position_embeddings", None) or 0
        self.made_for = made_for if made_for > 0 else sys.maxsize
        self.has_said_long = False

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
            table = self._columns_of_texts(texts).double().numpy()
            count = self._score_columns
            return self._judged(Judged.of(data, *columns_of(table[:, :count])), table[:, count:].T)
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
            with self._states_caught() as caught:

                def also(batch: Batch, scores: torch.Tensor) -> list[torch.Tensor]:
                    return list(self._of_states(caught)[batch.points.responses].unbind(1)) if caught else []

                found, more = judge(self.forward, data, plan, loaded, context, pad, also=also)
        finally:
            self.forward.use(SEPARATE)
        return self._judged(found, more)

    def _judged(self, found: Judged, more: Sequence[np.ndarray]) -> Judged:
        """Raw scores as this model gives them, with the bounds of several heads and the novelty beside them."""
        found = found.on_scale(1.0, self.mean).with_bounds(self.beta)
        if self.novelty is None:
            return found
        return replace(found, beside=found.beside | {"novelty": more[0]}, novel_from=self.novelty.threshold)

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
            UserError: not as many responses as prompts, half a character in a text, or a text that is longer than the
                model's table of positions.
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

        Each gets one start and one end token, whether it brought them or not (:mod:`reward_model.data.whole_texts`), so
        that one that was cut is scored as if it ended there, while OpenRLHF's own server scores it at its last word.
        The policy and the reward model need the same special tokens.

        Args:
            prompts: of the queries, which share them; one that its query does not begin with is not looked at.

        Raises:
            UserError: not as many queries as prompts, half a character, or a model that reads pairs.
        """
        if isinstance(queries, str) or isinstance(prompts, str):
            raise UserError("give lists of queries and prompts, not text")
        if len(queries) != len(prompts):
            raise UserError(f"{len(queries)} queries and {len(prompts)} prompts: give one of each per text")
        if self.encoding.pairs:
            raise UserError("this model reads pairs of prompt and answer, and a query has both in one text: use score")
        rows = []
        for number, (query, prompt) in enumerate(zip(queries, prompts), 1):
            try:
                rows.append(self._whole_texts.encoded(query, prompt).row)
            except BadRow as problem:
                raise UserError(f"query {number}: {problem}") from problem
        return [score for (score,) in self.score_rows(rows)]

    @cached_property
    def _whole_texts(self) -> WholeTexts:
        """Made once, as it renders the chat template; OpenRLHF asks with one query at a time."""
        return WholeTexts(self.tokenizer, self.special, embedding_rows(self.scorer))

    def _require_positions(self, rows: Sequence[Comparison]) -> int:
        """The tokens of the longest text; says once that texts are longer than those that the model was made for.

        Raises:
            UserError: a text that is longer than the model's table of positions.
        """
        longest = 0
        for number, row in enumerate(rows, 1):
            length = len(row.prompt) + max(map(len, row.responses), default=0)
            if length > self.positions:
                what = f"row {number} has a text of {length} tokens"
                raise UserError(f"{what}, and the model takes {self.positions}: cut it (rows has max_seq_len)")
            longest = max(longest, length)
        if longest > self.made_for and not self.has_said_long:
            what = f"a text has {longest} tokens, more than the {self.made_for} that the model was made for"
            logger.warning(f"{what}: its score may mean little")
            self.has_said_long = True
        return longest

    def _score_texts(self, texts: Sequence[Comparison], batch_size: int = 16) -> list[float]:
        """The score of the one response of each of some rows."""
        return (self._columns_of_texts(texts, batch_size)[:, 0] - self.mean).tolist()

    @torch.no_grad()
    def _columns_of_texts(self, texts: Sequence[Comparison], batch_size: int = 16) -> torch.Tensor:
        """The raw score of each, beside it that of every head where there are several, and what states say, (n, c)."""
        found = torch.empty(len(texts), self._columns)
        self._require_positions(texts)
        order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)  # texts of one length need no pads
        if self.pad is None and self.scorer.pooling == "classifier":
            batch_size = 1  # a class of Transformers that is scored at the last token takes no pads then
        for first in range(0, len(texts), batch_size):
            chosen = order[first : first + batch_size]
            rows = [texts[i] for i in chosen]
            batch = collate(rows, self.forward.layout).to(self.forward.device)
            beyond = [pads_at_end(row.prompt + row.responses[0], self.pad) for row in rows]
            beyond = torch.tensor(beyond, device=self.forward.device)
            found[chosen] = self._columns_at(batch, batch.tokens.ends - beyond)
        return found

    @property
    def _score_columns(self) -> int:
        return 1 if self.scorer.heads == 1 else 1 + self.scorer.heads

    @property
    def _columns(self) -> int:
        of_states = head_layer(self.scorer).in_features if self._wants_states else int(self.novelty is not None)
        return self._score_columns + of_states

    def _columns_at(self, batch: Batch, at: torch.Tensor) -> torch.Tensor:
        """The same of the responses of a batch, on the host."""
        with self._states_caught() as caught:
            scores = self.forward(batch, at).float()
        heads = self.forward.heads
        parts = [scores[:, None]] + ([] if heads is None else [heads.float()])
        parts += [self._of_states(caught)] if caught else []
        return torch.cat(parts, dim=1).cpu()

    @contextmanager
    def _states_caught(self) -> Iterator[list[torch.Tensor]]:
        """While this lasts, the list holds what the head was given last, if anybody wants to know."""
        caught: list[torch.Tensor] = []
        if self.novelty is None and not self._wants_states:
            yield caught
            return

        def catch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            caught[:] = inputs[:1]

        hook = head_layer(self.scorer).register_forward_pre_hook(catch)
        try:
            yield caught
        finally:
            hook.remove()

    def _of_states(self, caught: list[torch.Tensor]) -> torch.Tensor:
        """What is read of the states that the head was given: their novelty, (n, 1), or they themselves, (n, h)."""
        states = caught[0]
        if states.dim() == 3 and len(states) == 1:  # a class of Transformers that scores every token, of one text
            states = states[:, -1]
        if states.dim() != 2:
            raise UserError(f"{type(self.scorer.unwrapped).__name__} gives its head no state for each text: no novelty")
        if self._wants_states:
            return states.float()
        assert self.novelty is not None  # else nothing is caught
        return self.novelty(states)[:, None]

    def _row_scores(self, columns: torch.Tensor) -> RowScores:
        """Of the responses of a row."""
        scores = [score - self.mean for score in columns[:, 0].tolist()]
        beside: dict[str, Sequence[float]] = {}
        count = self._score_columns
        if self.scorer.heads > 1:
            spread = columns[:, 1:count].std(1, correction=0).tolist()
            beside = {"std": spread, "lower": [r - self.beta * u for r, u in zip(scores, spread)]}
        if self.novelty is not None:
            novelty = columns[:, count].tolist()
            beside |= {"novelty": novelty, "novel": self.novelty.is_novel(novelty)}
        return RowScores(scores, beside)

    # --- rows: a prompt and its responses, encoded together ---

    def rows(
        self,
        prompts: Sequence[str | list[dict]],
        responses: Sequence[Sequence[str | dict | list[dict]]],
        max_seq_len: int | None = None,
        chat: bool = False,
    ) -> list[Comparison]:
        """Each prompt with its responses as token ids, made as training makes them. Equal and empty responses are fine.

        Args:
            prompts: text, which is joined with each response as it is, or a list of messages.
            responses: some of each prompt: text, a message, or a list of messages.
            max_seq_len: the longest text in tokens, beyond which the left of its prompt is cut; None: nothing is cut.
            chat: prompts and responses of text go through the chat template, as ``--chat`` trains.

        Raises:
            UserError: not as many lists of responses as prompts, or a row that cannot be scored; says which.
        """
        if isinstance(prompts, str) or len(prompts) != len(responses):
            raise UserError("give a list of prompts, and of each prompt a list of its responses")
        texts = []
        for number, (prompt, found) in enumerate(zip(prompts, responses), 1):
            if isinstance(found, (str, dict)):
                raise UserError(f"row {number}: give a list of responses, not one")
            try:
                texts.append(texts_to_score(prompt, found, self.tokenizer, chat))
            except BadRow as error:
                raise UserError(f"row {number}: {error}") from error
        rows = []
        for number, each in enumerate(self.encoded(texts, max_seq_len), 1):
            if isinstance(each, BadRow):
                raise UserError(f"row {number}: {each}")
            rows.append(each.row)
        return rows

    def encoded(self, texts: Sequence[Texts], max_seq_len: int | None = None) -> list[Encoded | BadRow]:
        """Rows that are written as text → what they are in token ids, or why they cannot be scored.

        Args:
            max_seq_len: as in :meth:`rows`.
        """
        most = max_seq_len or sys.maxsize
        found: list[Encoded | BadRow] = []
        for text, each in zip(texts, self.encoding.encoded(texts)):
            if isinstance(each, BadRow):
                found.append(each)
                continue
            different = {tuple(ids): None for ids in each.whole}  # equal answers are compared with none
            try:
                made = compare(
                    each.prompt, [list(ids) for ids in different], self.special, most, text.names, each.fixed
                )
            except BadRow as problem:
                found.append(problem)
                continue
            answers = dict(zip(different, made["responses"]))
            row = Comparison(
                made["prompt"],
                [answers[tuple(ids)] for ids in each.whole],
                prompt_hash=hash(text.prompt) or None,
                prompt_tokens=made["prompt_tokens"],
                two_segments=each.two_segments,
            )
            found.append(Encoded(row, made["cut"], each.empty))
        return found

    def choose_attention(self, longest: int, wanted: str = "auto") -> str:
        """Choose once how :meth:`score_rows` lets texts stand in rows. It does so by itself if nobody has.

        Args:
            longest: tokens of the longest text that will come.
            wanted: as ``--attention`` of main.py.

        Returns:
            A line that says which, and why.

        Raises:
            UserError: the attention that is wanted is not right for this model.
        """
        with by_itself():
            said = self.forward.choose_attention(longest, wanted)
        self.sharing, self.longest = self.forward.attention, longest
        self.forward.use(SEPARATE)
        self.scorer.eval()  # trying backends out has trained, too
        return said

    def score_rows(self, rows: Sequence[Comparison], tokens_per_batch: int = TOKENS) -> list[list[float]]:
        """The scores of each row's responses, in the order given; as :meth:`assess_rows`, without what is beside."""
        return [row.scores for row in self.assess_rows(rows, tokens_per_batch)]

    def assess_rows(self, rows: Sequence[Comparison], tokens_per_batch: int = TOKENS) -> list[RowScores]:
        """Each row's responses, in the order given; a prompt is encoded once where the model allows it.

        Args:
            rows: as :meth:`rows` makes them. Those of one prompt share it, too, where they come into one batch.
            tokens_per_batch: the most tokens of a forward pass, pads included; a single longer text stays whole.
        """
        return [self._row_scores(columns) for columns in self._columns_of_rows(rows, tokens_per_batch)]

    def scores_of_heads(self, rows: Sequence[Comparison], tokens_per_batch: int = TOKENS) -> list[np.ndarray]:
        """The scores of each row's responses by each head, (responses, K) float64; as :meth:`assess_rows`.

        Their mean over the heads is the score, to rounding. A model with one head has K = 1.
        """
        first = 1 if self.scorer.heads > 1 else 0  # before those of the heads stands their mean
        columns = self._columns_of_rows(rows, tokens_per_batch)
        return [each[:, first : self._score_columns].double().numpy() - self.mean for each in columns]

    def states_of_rows(self, rows: Sequence[Comparison], tokens_per_batch: int = TOKENS) -> torch.Tensor:
        """What the head is given of each response of each row, in the order given, (n, h) float32, on the host."""
        self._wants_states = True
        try:
            columns = self._columns_of_rows(rows, tokens_per_batch)
        finally:
            self._wants_states = False
        return torch.cat(columns)[:, self._score_columns :]

    @torch.no_grad()
    def _columns_of_rows(self, rows: Sequence[Comparison], tokens_per_batch: int) -> list[torch.Tensor]:
        """The raw columns of each row's responses, as :meth:`_columns_of_texts` has them."""
        if self.pad is None and self.scorer.pooling == "classifier":  # takes no pads, see score_ids
            columns = self._columns_of_texts([row.text(k) for row in rows for k in range(len(row.responses))])
            return list(columns.split([len(row.responses) for row in rows]))
        found = [torch.zeros(len(row.responses), self._columns) for row in rows]
        longest = self._require_positions(rows)
        if self.sharing is None or longest > max(self.longest, window(self.scorer.config)):
            logger.info(self.choose_attention(longest))
        assert self.sharing is not None  # it was chosen
        pad = self.pad if self.scorer.pooling == "last" else None
        self.forward.use(self.sharing)
        try:
            layout = self.forward.layout
            pieces = [piece for i, row in enumerate(rows) for piece in _pieces(i, row, layout, tokens_per_batch)]
            for part in _batches(pieces, layout, tokens_per_batch):
                batch = collate([piece.row for piece in part], layout).to(self.forward.device)
                columns = self._columns_at(batch, scored_at(batch, pad))[batch.points.responses.cpu()]
                places = batch.points.row_indices[batch.points.rows].tolist()
                filled = [piece.first for piece in part]
                for place, values in zip(places, columns):
                    found[part[place].of][filled[place]] = values
                    filled[place] += 1
        finally:
            self.forward.use(SEPARATE)
        return found


class _Piece(NamedTuple):
    """Some responses of a row: which row, the first of them, the row with these alone, and its size."""

    of: int
    first: int
    row: Comparison
    size: _Size


class _Size(NamedTuple):
    """What texts take in a batch.

    rows: of them. texts: their responses. tokens: of all, a prompt counted once a row. widest: of these, of one row.
    apart: tokens, a prompt counted once a response. longest: of these, of one text.
    """

    rows: int = 0
    texts: int = 0
    tokens: int = 0
    widest: int = 0
    apart: int = 0
    longest: int = 0

    def beside(self, other: _Size) -> _Size:
        return _Size(
            self.rows + other.rows,
            self.texts + other.texts,
            self.tokens + other.tokens,
            max(self.widest, other.widest),
            self.apart + other.apart,
            max(self.longest, other.longest),
        )

    def with_response(self, prompt: int, response: int) -> _Size:
        """Of a row that has one more response, of so many tokens."""
        tokens = (self.tokens or prompt) + response
        text = prompt + response
        return _Size(1, self.texts + 1, tokens, tokens, self.apart + text, max(self.longest, text))

    def cost(self, layout: Layout) -> int:
        """Tokens of a batch, pads included."""
        if layout.kind == "packed":
            return self.tokens
        if layout.kind == "shared":
            return self.rows * self.widest
        return self.apart if layout.kind == "unpadded" else self.texts * self.longest


def _pieces(number: int, row: Comparison, layout: Layout, most: int) -> Iterator[_Piece]:
    """A row, in pieces that keep to a number of tokens; one response at least in each."""
    first, size, prompt = 0, _Size(), len(row.prompt)
    for at, response in enumerate(row.responses):
        grown = size.with_response(prompt, len(response))
        # a mask of every token by every other grows with the square of a row
        is_full = layout.kind == "shared" and grown.texts > layout.most_responses
        if at > first and (is_full or grown.cost(layout) > most):
            yield _Piece(number, first, replace(row, responses=row.responses[first:at]), size)
            first, grown = at, _Size().with_response(prompt, len(response))
        size = grown
    if row.responses:
        yield _Piece(number, first, replace(row, responses=row.responses[first:]) if first else row, size)


def _batches(pieces: list[_Piece], layout: Layout, most: int) -> Iterator[list[_Piece]]:
    """Pieces packed up to a number of tokens: by length where rows are padded, else those of one prompt together."""
    if layout.kind in ("shared", "separate"):
        pieces = sorted(pieces, key=lambda piece: piece.size.longest)
    else:
        places: dict[int | None, int] = {}
        for place, piece in enumerate(pieces):
            places.setdefault(piece.row.prompt_hash, place)
        pieces = sorted(pieces, key=lambda piece: places[piece.row.prompt_hash])
    part: list[_Piece] = []
    size = _Size()
    for piece in pieces:
        if part and size.beside(piece.size).cost(layout) > most:
            yield part
            part, size = [], _Size()
        part.append(piece)
        size = size.beside(piece.size)
    if part:
        yield part


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
    novelty: bool = True,
) -> RewardScorer:
    """A model that the trainer saved, in whichever form it was saved, or any reward model that Transformers loads.

    Args:
        folder: or a name on the hub. A LoRA adapter is merged into its base, in the cache of tokenized rows.
        dtype: of the weights, a ``torch.dtype`` or ``fp32``, ``bf16`` or ``fp16``; None: as saved.
        form: of a folder that holds two; None: ``dschat`` only where there is nothing else.
        trust_remote_code: run the code that the model brings.
        novelty: read what ``reward-model novelty fit`` has left beside the model, if it has.

    Raises:
        UserError: no such model, weights missing, or a novelty that was fitted to other weights.
    """
    named = Path(folder)
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
    take_heads(scorer, folder)
    try:
        pad = _pad_of(scorer, tokenizer, its_form == "dschat")
        reward = RewardScorer(scorer, tokenizer, device, pad, told(folder, scorer.config))
    except UserError as error:  # of the tokenizer
        raise UserError(f"{folder}: {error}") from error
    reward.novelty = read_novelty(named, scorer) if novelty else None
    return reward


def require_head(model: str, trust_remote_code: bool) -> None:
    """Raises UserError if a folder holds no model with a score head: said of every model before the first is scored."""
    folder = Path(model)
    if not folder.is_dir() or is_adapter(model) or not (folder / "config.json").is_file() or form_of(folder):
        return  # loading it says more
    if not is_reward_model(model, read_config(model, trust_remote_code)):
        raise UserError(f"{model} has no trained score head")


@dataclass(frozen=True)
class Reading:
    """How a model reads rows: whether text goes through the chat template, and the tokens of the longest text."""

    chat: bool
    max_seq_len: int


def load_to_read(
    name: str,
    dtype: str = "auto",
    device: torch.device | str = "auto",
    chat: bool | None = None,
    chat_template: str | None = None,
    max_seq_len: int | None = None,
    trust_remote_code: bool = False,
    novelty: bool = True,
    beta: float | None = None,
) -> tuple[RewardScorer, Reading]:
    """A model, and how it reads rows: as the run that trained it did, where nothing else is said.

    Args:
        name: a folder or a hub name.
        dtype: of the weights; ``auto``: as saved, and float32 on a CPU for float16.
        device: ``auto``: a GPU if there is one.
        novelty: as in :func:`load`.
        beta: of the lower bound of several heads; None: as the model says.

    Raises:
        UserError: no such model or device, weights missing, no chat template where one is needed, ``max_seq_len``
            beyond what the model takes, or ``beta`` for a model with one head.
    """
    device = _device(device)
    wanted = None if dtype == "auto" else dtype
    scorer = load(name, wanted, device, trust_remote_code=trust_remote_code, novelty=novelty)
    if wanted is None and device.type == "cpu" and scorer.forward.dtype == torch.float16:
        logger.info(f"{name} is saved in float16, which CPUs hardly compute in: taken as float32")
        scorer = load(name, "fp32", device, trust_remote_code=trust_remote_code, novelty=novelty)
    if beta is not None:
        if scorer.scorer.heads == 1:
            raise UserError(f"--beta {beta:g}: {name} has one head, and no lower bound; leave the flag out")
        scorer.beta = beta
    tokenizer = scorer.tokenizer
    named = getattr(scorer.scorer.config, NAMING, None)  # also of what was exported
    run = read_run(Path(name) / "run.json") or (named if isinstance(named, dict) else {})
    trained = run.get("max_seq_len")
    if chat_template:
        give_template(tokenizer, chat_template)
    if chat is None:
        chat = bool(run.get("chat"))
        if chat:
            logger.info("text goes through the chat template, as in the training; --chat false: not")
    if chat and not tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {name} has no chat template; --chat_template gives it one")
    settle_template(tokenizer, datetime.datetime.now(), is_trained=True)
    most = _most_tokens(scorer)
    if max_seq_len and max_seq_len > most:
        raise UserError(f"--max_seq_len {max_seq_len}: {name} takes {most} tokens")
    return scorer, Reading(
        bool(chat), min(most, max_seq_len or (trained if isinstance(trained, int) and trained > 0 else LONGEST))
    )


def _device(name: torch.device | str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device


def most_positions(scorer: Scorer) -> int:
    """Tokens of the longest text for which a model with a table of positions has a place; of others no limit.

    RoBERTa counts positions from behind its pad, and OPT's table has two rows more than positions.
    """
    config = scorer.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    tables = (
        each
        for name, each in scorer.named_modules()
        if isinstance(each, torch.nn.Embedding)
        and positions <= each.num_embeddings <= positions + 2
        and ("position" in name.rsplit(".", 1)[-1] or name.endswith("wpe"))
    )
    free = [each.num_embeddings - (0 if each.padding_idx is None else each.padding_idx + 1) for each in tables]
    return min([positions, *free]) if free else sys.maxsize


def _most_tokens(scorer: RewardScorer) -> int:
    """Tokens of the longest text that a model and its tokenizer take, beyond which a training refuses texts, too."""
    return int(min(scorer.positions, scorer.made_for, scorer.tokenizer.model_max_length))
