# SPDX-License-Identifier: Apache-2.0
"""A model under evaluation: how it reads rows, and what its scores come to on sets and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.evaluation import EvaluateConfig
from reward_model.config.groups import DataConfig
from reward_model.data.comparisons import BadRow, Comparisons
from reward_model.data.files import Source
from reward_model.data.preprocessing import PreprocessingConfig, load_evaluation, tokenize
from reward_model.data.sources import Splits, amount_of, raw_sources
from reward_model.evaluation.assessment import Responses, assess, mistakes
from reward_model.evaluation.benchmarks import Benchmark, Question, measure, recognize, write_results
from reward_model.evaluation.judged import Judged
from reward_model.inference import RewardScorer, load_to_read
from reward_model.judging.evaluations import Evaluations, Scored


@dataclass(frozen=True)
class Subject:
    """A model, loaded, and how it is asked.

    name: as it was given. preprocessing: how rows become token ids for it.
    """

    name: str
    scorer: RewardScorer
    preprocessing: PreprocessingConfig
    config: EvaluateConfig
    context: DistributedContext

    @classmethod
    def load(cls, name: str, config: EvaluateConfig, context: DistributedContext) -> Subject:
        """Load a model, on the device of this process.

        Raises:
            UserError: it does not load, or has no score head.
        """
        scorer, reading = load_to_read(
            name,
            config.dtype,
            context.device,
            config.chat,
            config.chat_template,
            config.max_seq_len,
            config.trust_remote_code,
            beta=config.beta,
        )
        preprocessing = PreprocessingConfig(
            max_seq_len=reading.max_seq_len,
            on_bad_row=config.on_bad_row,
            cache=DataConfig(data_output_path=config.data_output_path).cache_folder,
            processes=config.num_proc,
            names=DataConfig(columns=config.columns).names,
            splits=Splits(None, config.split),
            chat=reading.chat,
            pairs=scorer.encoding.pairs,
        )
        return cls(name, scorer, preprocessing, config, context)

    def judge(self, name: str, paths: Sequence[str], found: Evaluations) -> Scored | None:
        """Score a set, and add what it comes to.

        Args:
            name: of the set; '' has none.
            paths: its entries. Files of benchmarks are taken out of it, and make numbers of their own.

        Returns:
            The scores of what is no benchmark; None: nothing is left.

        Raises:
            UserError: rows that cannot be used, or scores that are not finite.
        """
        asked = list(self._benchmarks(paths))
        of_benchmarks = {path for path, _, _ in asked}
        for benchmark in dict.fromkeys(id(each) for _, each, _ in asked):
            parts = [(each, questions) for _, each, questions in asked if id(each) == benchmark]
            found.benchmarks.append(
                self._ask(parts[0][0], [question for _, questions in parts for question in questions])
            )
        rest = [path for path in paths if path not in of_benchmarks]
        if not rest:
            return None
        data = load_evaluation(
            rest, self.scorer.tokenizer, self.scorer.special, self.preprocessing, self.config.seed,
            self.config.max_samples,
        )  # fmt: skip
        judged = self._score(data)
        found.assessments.append(self.assess(judged, name, rest))
        return Scored(judged, self.scorer.tokenizer)

    def assess(self, judged: Judged, name: str, paths: Sequence[str]) -> dict:
        """What is found of this model on a set, with its names and the pairs that it has most wrong."""
        stored = self.config.temperature or self.scorer.temperature
        found: dict[str, Any] = {"model": self.name, "data": list(paths)} | ({"set": name} if name else {})
        found |= assess(judged, Responses(judged), self.config.seed, stored)
        fit = getattr(self.scorer.scorer.config, "score_temperature_fit", None)
        if "stored" in found.get("calibration", {}) and self.config.temperature is None and isinstance(fit, dict):
            found["calibration"]["stored_fit"] = fit
        if "stored" in found.get("calibration", {}) and self.config.temperature is not None:
            found["calibration"]["is_given"] = True
        if len(judged):
            found["mistakes"] = mistakes(judged, self.scorer.tokenizer)
        return found

    def _score(self, data: Comparisons) -> Judged:
        config = self.config
        judged = self.scorer.judge(
            data, self.context, config.batch_size, config.tokens_per_batch, config.attention, config.seed
        )
        if not np.isfinite(judged.scores).all():
            count = int(np.sum(~np.isfinite(judged.scores)))
            raise UserError(f"{self.name}: {counted(count, 'score')} not finite; --dtype fp32 has a wider range")
        return judged

    # --- benchmarks ---

    def _benchmarks(self, paths: Sequence[str]) -> Iterator[tuple[str, Benchmark, list[Question]]]:
        """Entries that are a benchmark's, which benchmark, and the questions of each of their files."""
        for path in paths:
            if amount_of(path)[1] is not None:
                continue  # a part of a benchmark has no numbers of it
            for first in raw_sources(path, self.config.split, 1):
                benchmark = _recognized(first)
                if benchmark is None:
                    break  # a folder or name is a benchmark's as a whole, or not at all
                logger.info(f"{first.name}: known as {benchmark.name} by its columns")
            else:
                for source in _without_raw(path, raw_sources(path, self.config.split)):
                    benchmark = _recognized(source)
                    assert benchmark is not None  # by its first row
                    yield path, benchmark, list(_questions(benchmark, source))

    def _ask(self, benchmark: Benchmark, questions: list[Question]) -> dict:
        """The numbers of a benchmark, each answer scored in a row of its own."""
        rows = [
            {"prompt": question.row["prompt"], "responses": [answer], "ranks": [0]}
            for question in questions
            for answer in question.row["responses"]
        ]
        if not self.scorer.tokenizer.chat_template:
            raise UserError(
                f"{benchmark.name} is asked as chats, and the tokenizer of {self.name} has no chat template: "
                "--chat_template gives it one"
            )
        source = Source(benchmark.name, datasets.Dataset.from_list(rows))
        data = tokenize(source, self.scorer.tokenizer, self.scorer.special, self._lenient())
        if not len(data):
            raise UserError(f"{benchmark.name}: none of its answers can be used, for the reasons above")
        scores = dict(zip(data.origins.numbers.tolist(), self._score(data).scores.tolist()))
        numbers = iter(range(1, len(rows) + 1))
        of_each: list[list[float] | None] = []
        for question in questions:
            mine = [scores.get(next(numbers)) for _ in question.row["responses"]]
            of_each.append(None if None in mine else [float(score) for score in mine if score is not None])
        if self.config.output_dir and self.context.is_first:
            write_results(Path(self.config.output_dir), self.name, benchmark, questions, of_each)
        return {"model": self.name} | measure(benchmark, questions, of_each)

    def _lenient(self) -> PreprocessingConfig:
        """Rows that cannot be used are left out and counted: the benchmark says of how many questions it is."""
        longest, cache = self.preprocessing.max_seq_len, self.preprocessing.cache
        return PreprocessingConfig(longest, "skip", cache, pairs=self.preprocessing.pairs)


def _recognized(source: Source) -> Benchmark | None:
    for _, row in source.stored(1):
        try:
            first = source.named(row)
        except BadRow:
            return None
        return recognize(first, first, source.name)
    return None


def _without_raw(path: str, sources: list[Source]) -> list[Source]:
    """RewardBench is published twice, raw and filtered, and its own code takes what was filtered."""
    raw, filtered = ([s for s in sources if kind in Path(s.name).name] for kind in ("raw", "filtered"))
    if not raw or not filtered or len(raw) + len(filtered) < len(sources):
        return sources
    left = ", ".join(source.name for source in raw)
    logger.info(f"{path}: left out {left}, as the benchmark's own code does")
    return filtered


def _questions(benchmark: Benchmark, source: Source) -> Iterator[Question]:
    """Raises UserError: a row does not hold what the benchmark's rows have."""
    for number, row in source.stored():
        try:
            yield from benchmark.questions(source.named(row), source.name)
        except BadRow as problem:
            raise UserError(f"{source.name}, row {number}: {problem}; read as {benchmark.name}") from problem
