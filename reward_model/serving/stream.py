# SPDX-License-Identifier: Apache-2.0
"""Rows → their scores, in the order of the rows, with no more of them in memory than a window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.config.scoring import ScoreConfig
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoded
from reward_model.inference import Reading, RewardScorer, RowScores, load_to_read
from reward_model.serving.inputs import Row, Rows, read_rows

ROWS = 512  # of a window, within which rows are sorted by length
PART = 32  # rows that are tokenized together
BATCHES = 16  # of the largest size, to which a window is filled at most


@dataclass(frozen=True)
class Scoring:
    """A model, loaded, and how it is asked."""

    reward: RewardScorer
    reading: Reading
    config: ScoreConfig

    @classmethod
    def load(cls, model: str, config: ScoreConfig) -> Scoring:
        """Raises UserError: it does not load, or the attention that is wanted is not right for it."""
        reward, reading = load_to_read(
            model, config.dtype, config.device, config.chat, config.chat_template, config.max_seq_len,
            config.trust_remote_code, beta=config.beta,
        )  # fmt: skip
        if config.lines and reward.encoding.pairs:
            raise UserError(f"{model} reads pairs of prompt and answer, and --lines has whole texts: give rows")
        logger.info(reward.choose_attention(reading.max_seq_len, config.attention))
        return cls(reward, reading, config)

    def outcomes(self, given: Rows, skip: int = 0) -> Iterator[dict]:
        """A dict for each row but the first ``skip``: its scores, or why there are none.

        Raises:
            UserError: an input that cannot be read any further.
        """
        config = self.config
        rows = read_rows(given, self.reward.tokenizer, config.lines, config.names, self.reading.chat, skip)
        for window in self._windows(rows):
            good = [encoded.row for _, encoded in window if isinstance(encoded, Encoded)]
            scores = iter(self.reward.assess_rows(good, config.tokens_per_batch))
            for row, encoded in window:
                if isinstance(encoded, Encoded):
                    yield self._outcome(row, encoded, next(scores))
                else:
                    yield {"row": row.number, "error": str(encoded)}

    def _windows(self, rows: Iterable[Row]) -> Iterator[list[tuple[Row, Encoded | BadRow | str]]]:
        rows = iter(rows)
        window: list[tuple[Row, Encoded | BadRow | str]] = []
        tokens = 0
        while part := list(islice(rows, PART)):
            readable = [row.texts for row in part if not isinstance(row.texts, str)]
            encoded = iter(self.reward.encoded(readable, self.reading.max_seq_len))
            for row in part:
                window.append((row, row.texts if isinstance(row.texts, str) else next(encoded)))
            tokens += sum(each.row.tokens for _, each in window[-len(part) :] if isinstance(each, Encoded))
            if len(window) >= ROWS or tokens >= BATCHES * self.config.tokens_per_batch:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _outcome(self, row: Row, encoded: Encoded, assessed: RowScores) -> dict:
        found: dict = {"row": row.number}
        scores, beside = assessed
        if not all(map(math.isfinite, scores)):
            return found | {"error": "a score is not finite; --dtype fp32 has a wider range"}
        assert not isinstance(row.texts, str)  # it has been encoded
        raw = [score + self.reward.mean for score in scores]
        if self.config.best:
            best = max(range(len(scores)), key=scores.__getitem__)
            found |= {"best": best, "score": scores[best]} | self._raw(raw[best])
            found |= {name: values[best] for name, values in beside.items()} | {"answer": row.answers[best]}
        elif list(row.texts.names) == ["response"]:
            found |= {"score": scores[0]} | self._raw(raw[0]) | {name: values[0] for name, values in beside.items()}
        else:
            found |= {"scores": scores} | self._raw(raw) | beside
            if len(scores) == 2:
                found["probability"] = probability(scores[0] - scores[1], self.reward.temperature)
        return found | ({"cut": True} if encoded.cut else {})

    def _raw(self, value: float | list[float]) -> dict:
        return {"raw": value} if hasattr(self.reward.scorer.config, "score_mean") else {}


def probability(gap: float, temperature: float) -> float:
    """σ(gap / temperature): that the first of two answers is preferred, by Bradley and Terry.

    >>> probability(0.0, 1.0), round(probability(2.0, 2.0), 3)
    (0.5, 0.731)
    """
    x = gap / temperature
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def score(model: str, rows: Rows, config: ScoreConfig | None = None) -> Iterator[dict]:
    """Score rows as ``reward-model score`` does, one after the other; each is a dict with its scores or its error.

    >>> import reward_model
    >>> rows = [{"prompt": "2 + 2?", "responses": [" 4", " 5"]}]
    >>> next(reward_model.score("demo/output", rows))  # doctest: +SKIP
    {'row': 1, 'scores': [1.9, -0.4], 'probability': 0.91}

    Args:
        model: a folder or a hub name.
        rows: a file, ``-`` for standard input, or dicts; with ``config.lines`` texts. They are read as they are asked
            for.

    Raises:
        UserError: a model that does not load, or an input that cannot be read.
    """
    config = config or ScoreConfig()
    if config.output or config.resume:
        raise UserError("output and resume are flags of the command: write what this gives wherever you like")
    return Scoring.load(model, config).outcomes(rows)
