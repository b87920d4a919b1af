# SPDX-License-Identifier: Apache-2.0
"""Evaluation from Python: what ``reward-model evaluate`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from reward_model.common.distributed import join, prepare_environment
from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.config.evaluation import EvaluateConfig
from reward_model.data.sources import amount_of, raw_sources
from reward_model.evaluation.assessment import FILE
from reward_model.inference import require_head
from reward_model.judging.evaluations import Evaluations, compare
from reward_model.judging.subject import Subject
from reward_model.reporting.report import MOST_RUNS, page_of_assessments


def evaluate(models: str | Sequence[str], config: EvaluateConfig) -> Evaluations:
    """Score every set of the data with each model, and say what follows; every process of a launch calls it.

    >>> import reward_model
    >>> config = reward_model.EvaluateConfig(data=["demo/data"])
    >>> found = reward_model.evaluate(["demo/output"], config)  # doctest: +SKIP
    >>> found.assessments[0]["accuracy"]["value"]  # doctest: +SKIP
    0.9767

    Raises:
        UserError: a model that does not load or has no score head, or data that cannot be used.
    """
    if not config.data:
        raise UserError("give --data: files, folders or hub names")
    models = [models] if isinstance(models, str) else models
    if config.report and len(models) * len(config.sets) > MOST_RUNS:
        raise UserError(
            f"--report: {len(models)} models on {len(config.sets)} sets; a page has a place for {MOST_RUNS} of both"
        )
    prepare_environment()
    context = join(config.local_rank)
    for model in models:
        require_head(model, config.trust_remote_code)
    found = Evaluations()
    for path in (path for paths in config.sets.values() for path in paths):
        raw_sources(amount_of(path)[0], config.split, 1)  # what is not there is said before a model is loaded
    judged: dict[str, list] = {name: [] for name in config.sets}
    for model in models:
        subject = Subject.load(model, config, context)
        for name, paths in config.sets.items():
            judged[name].append(subject.judge(name, paths, found))
    for name, of_models in judged.items():
        for (one, first), (other, second) in combinations(zip(models, of_models), 2):
            if first is None or second is None:
                continue
            try:  # what was scored is worth telling, whether it can be compared or not
                compared = compare(first, second, config.seed)
            except UserError as error:
                logger.warning(f"{one} and {other} are not compared{f' on {name}' if name else ''}: {error}")
                continue
            found.comparisons.append({"set": name, "one": one, "other": other} | compared)
    if config.output_dir and context.is_first:
        _write(found, Path(config.output_dir))
    if config.report and context.is_first:
        _write_page(found, Path(config.report))
    return found


def _write_page(found: Evaluations, page: Path) -> None:
    if not found.assessments:
        logger.warning(f"--report {page}: not written, as a page has no place for benchmarks alone")
        return
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page_of_assessments(found.assessments, page, found.comparisons)
    except OSError as error:
        raise UserError(f"--report {page}: {error.strerror}") from error


def _write(found: Evaluations, folder: Path) -> None:
    """``evaluation.json``, and rewardbench's files of benchmarks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from error
