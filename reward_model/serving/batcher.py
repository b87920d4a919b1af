# SPDX-License-Identifier: Apache-2.0
"""Requests → batches: one thread makes token ids, one computes scores, of rows of whichever requests have come."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.data.comparisons import BadRow, Comparison
from reward_model.data.encoding import Encoded
from reward_model.inference import RowScores

LONGEST_WAIT = 60  # seconds, of what Retry-After says
AHEAD = 4  # batches, whose rows are made ready while one is computed

Score = Callable[[Sequence[Comparison]], list[RowScores]]


class Full(Exception):
    """More answers wait than may. ``seconds``: after which a request may be tried again."""

    def __init__(self, seconds: int):
        super().__init__(f"too many answers wait for their score; try again in {seconds} s")
        self.seconds = seconds


class Ending(Exception):
    """The server ends and takes nothing any more."""


@dataclass(eq=False)
class Job:
    """The rows of a request.

    encode: makes them; it may raise BadRow or UserError. answers: how many they have together. future: their scores.
    """

    encode: Callable[[], list[Encoded]]
    answers: int
    future: Future = field(default_factory=Future)
    rows: list[Encoded] = field(default_factory=list)
    scores: list[RowScores | None] = field(default_factory=list)
    left: int = 0

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # whoever asked has given up
            self.future.set_exception(error)

    def take(self, place: int, scores: RowScores) -> None:
        """Put the scores of a row into their place; with the last of them the job is done."""
        self.scores[place] = scores
        self.left -= 1
        if not self.left:
            with suppress(InvalidStateError):
                self.future.set_result(self.scores)


class Batcher:
    """A bounded queue, and the two threads that work it off, first come, first served.

    seen: is told the rows and tokens of each batch and the seconds that it took.
    """

    def __init__(self, score: Score, tokens: int, most: int, seen: Callable[[int, int, float], None] | None = None):
        """
        Args:
            score: rows → the scores of their responses, and what is beside them.
            tokens: of a batch, about: rows are taken until there are so many.
            most: answers that may wait.
        """
        self.score, self.tokens, self.most = score, tokens, most
        self.seen = seen or (lambda rows, tokens, seconds: None)
        self.waiting = 0  # answers that were taken and have no score yet
        self.rate = 0.0  # answers a second, of the last batches
        self.is_ending = False
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._ready: deque[tuple[Job, int]] = deque()
        self._ready_tokens = 0
        self._encoding = False
        names = {"tokens": self._encode, "scores": self._compute}
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in names.items()]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, job: Job) -> Future:
        """Take a request, whose future will have its scores. A future that is cancelled is not computed any more.

        Raises:
            Full: it does not fit beside those that wait.
            Ending: nothing is taken any more.
        """
        with self._changed:
            if self.is_ending or not self.is_alive:
                raise Ending
            if self.waiting + job.answers > self.most:
                seconds = self.waiting / self.rate if self.rate else 1.0
                raise Full(min(LONGEST_WAIT, max(1, math.ceil(seconds))))
            self.waiting += job.answers
            self._jobs.append(job)
            self._changed.notify_all()
        job.future.add_done_callback(lambda future: self._leave(job))
        return job.future

    def _leave(self, job: Job) -> None:
        with self._changed:
            self.waiting -= job.answers
            self._changed.notify_all()

    def end(self, seconds: float) -> None:
        """Take nothing any more, finish what was taken, for so many seconds at most, and end the threads."""
        with self._changed:
            self.is_ending = True
            self._changed.notify_all()
        ends = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        for job in [*self._jobs, *(job for job, _ in self._ready)]:
            job.fail(Ending())

    # --- the first thread ---

    def _encode(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                if not job.future.cancelled():
                    self._take_in(job, job.encode())
            except (BadRow, UserError) as error:
                job.fail(error)
            except Exception as error:  # of a tokenizer, on a text that nobody has thought of
                logger.error(f"a request could not be made token ids: {type(error).__name__}: {first_line(error)}")
                job.fail(error)
        with self._changed:
            self._encoding = False
            self._changed.notify_all()

    def _next_job(self) -> Job | None:
        with self._changed:
            self._encoding = False
            while not self._jobs or self._ready_tokens > AHEAD * self.tokens:
                if self.is_ending and not self._jobs:
                    return None
                self._changed.wait()
            self._encoding = True
            return self._jobs.popleft()

    def _take_in(self, job: Job, rows: list[Encoded]) -> None:
        job.rows, job.scores, job.left = rows, [None] * len(rows), len(rows)
        with self._changed:
            self._ready += [(job, place) for place in range(len(rows))]
            self._ready_tokens += sum(row.row.tokens for row in rows)
            self._changed.notify_all()

    # --- the second thread ---

    def _compute(self) -> None:
        while part := self._next_rows():
            begun = time.perf_counter()
            rows = [job.rows[place].row for job, place in part]
            for (job, place), scores in zip(part, self._scores(rows)):
                if isinstance(scores, Exception):
                    job.fail(scores)
                else:
                    job.take(place, scores)
            seconds = time.perf_counter() - begun
            answers = sum(len(row.responses) for row in rows)
            self.rate = 0.7 * self.rate + 0.3 * answers / seconds if self.rate else answers / seconds
            self.seen(len(rows), sum(row.tokens for row in rows), seconds)

    def _next_rows(self) -> list[tuple[Job, int]]:
        """Rows of about one batch; none: the end."""
        part: list[tuple[Job, int]] = []
        tokens = 0
        with self._changed:
            while not part:
                while not self._ready:
                    if self.is_ending and not self._jobs and not self._encoding:
                        return []
                    self._changed.wait()
                while self._ready and tokens < self.tokens:
                    job, place = self._ready.popleft()
                    size = job.rows[place].row.tokens
                    self._ready_tokens -= size
                    if not job.future.done():  # it is, where somebody gave up, or another of its rows has failed
                        part.append((job, place))
                        tokens += size
                self._changed.notify_all()
        return part

    def _scores(self, rows: list[Comparison]) -> list[RowScores | Exception]:
        """Of each row; where a batch fails, its rows are tried alone, so that one does not take the others with it."""
        try:
            return [_finite(scores) for scores in self.score(rows)]
        except Exception as error:
            logger.error(f"a batch of {len(rows)} could not be computed: {type(error).__name__}: {first_line(error)}")
            if len(rows) == 1:
                return [error]
        return [self._scores([row])[0] for row in rows]


def _finite(assessed: RowScores) -> RowScores | Exception:
    if all(map(math.isfinite, assessed.scores)):
        return assessed
    return ArithmeticError("a score is not finite; --dtype fp32 has a wider range")
