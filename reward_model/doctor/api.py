# SPDX-License-Identifier: Apache-2.0
"""The doctor from Python: what ``reward-model doctor`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.config.doctor import WITH_STRENGTHS, DoctorConfig
from reward_model.doctor.biases import bias_findings, biases_of, refusal_findings, script_findings
from reward_model.doctor.cleaning import write_cleaned
from reward_model.doctor.examination import Examination
from reward_model.doctor.findings import Finding
from reward_model.doctor.judgements import Judgements, Near, findings_across, findings_within, judgements_of
from reward_model.doctor.ledger import UNKNOWN, Ledger
from reward_model.doctor.reading import EVALUATION, SETS, TRAINING, Data
from reward_model.doctor.strengths import NO_STRENGTHS, Strengths
from reward_model.doctor.usable import Cuts, findings_of_rows


def examine(data: str | Sequence[str], config: DoctorConfig | None = None) -> Examination:
    """Look at training data, and at what is evaluated on, without a model.

    >>> import reward_model
    >>> found = reward_model.examine("demo/data")  # doctest: +SKIP
    >>> found.is_healthy(), [each.name for each in found.of_level("hurts")]  # doctest: +SKIP
    (True, [])

    Args:
        data: entries of ``--data_path``: files, folders or hub names.

    Raises:
        UserError: data that cannot be read, a file that cannot be written, or a cleaned set of pairs without strengths.
    """
    config = config or DoctorConfig()
    paths = [data] if isinstance(data, str) else list(data)
    if not paths:
        raise UserError("name the data before the flags: files, folders or hub names")
    require_free(paths, config)
    ledger = Ledger(Data.find(paths, config))
    cuts = Cuts(config) if config.tokenizer else None
    for row in ledger.data.rows():
        ledger.add(row)
        if cuts:
            cuts.add(ledger, row)
    strengths = Strengths(ledger)
    if config.needs_strengths and not len(strengths):
        asked = next(name for name in WITH_STRENGTHS if getattr(config, name))
        raise UserError(f"--{asked}: {NO_STRENGTHS}")
    biases = biases_of(ledger, config.seed)
    found = Examination(paths, _counts(ledger), [], biases, _not_looked_at(ledger, config, len(strengths) > 0))
    found.findings += findings_of_rows(ledger)
    near = Near(ledger)
    judged = judgements_of(ledger, near, TRAINING)
    found.findings += _of_judgements(ledger, judged, near)
    found.findings += cuts.findings() if cuts else []
    found.findings += bias_findings(biases)
    found.findings += refusal_findings(ledger)
    found.findings += script_findings(ledger)
    found.findings += strengths.findings(config.seed)
    found.strengths = strengths.summary(config.seed)
    found.suspicious = strengths.suspicious()
    if config.cleans:
        found.cleaned = write_cleaned(ledger, strengths, judged, config)
    if config.report:
        _write_report(found, config.report)
    return found


def require_free(paths: Sequence[str], config: DoctorConfig) -> None:
    """Raises UserError: a cleaned set that would take the place of a file, or a page that of the data."""
    if config.output and Path(config.output).exists():
        raise UserError(f"--output {config.output} is there: name another file, or remove it")
    given = [Path(path) for path in (*paths, *config.evaluation_paths)]
    for path in _written(config.report) if config.report else ():
        if path.resolve() in [each.resolve() for each in given]:
            raise UserError(f"--report {config.report} writes {path.name}, which is the data: name another file")


def _of_judgements(ledger: Ledger, train: Judgements, near: Near) -> list[Finding]:
    held = judgements_of(ledger, near, EVALUATION)
    found = list(findings_within(ledger, train, TRAINING))
    found += [each for each in findings_within(ledger, held, EVALUATION) if each.count]
    return found + list(findings_across(ledger, train, held, near))


def _counts(ledger: Ledger) -> dict[str, dict[str, int]]:
    sets, pair_sets, prompts = ledger.row_array("set"), ledger.pair_sets(), ledger.row_array("prompt")
    return {
        name: {
            "rows": ledger.rows[name],
            "pairs": int((pair_sets == of_set).sum()),
            "prompts": len(np.unique(prompts[sets == of_set])),
            "answers": ledger.answers[name],
        }
        for of_set, name in enumerate(SETS)
        if ledger.rows[name]
    }


def _not_looked_at(ledger: Ledger, config: DoctorConfig, has_strengths: bool) -> list[str]:
    said = []
    if not config.tokenizer:
        said.append("what is left of the texts once they are cut: give --tokenizer and --max_seq_len")
    if not ledger.rows[SETS[EVALUATION]]:
        said.append("what is in both sets: give --eval_data_path")
    if not (ledger.pair_array("position") != UNKNOWN).any():
        said.append("which place wins: no column says in which order the answers were shown")
    if not has_strengths:
        said.append(f"strength of the preferences: {NO_STRENGTHS}")
    said.append("languages: only scripts are told apart; what is said is not understood at all")
    return said


def _written(report: str) -> tuple[Path, Path]:
    """The page, and the JSON beside it."""
    return Path(report), Path(report).with_suffix(".json")


def _write_report(found: Examination, report: str) -> None:
    """What ``--report`` asks for: the page for people, and what ``--json`` prints for programs.

    Raises:
        UserError: it cannot be written.
    """
    from reward_model.doctor.page import write_html

    page, beside = _written(report)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, write_html(found))
        write_whole(beside, json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--report {report}: {error.strerror}") from error
    logger.info(f"report: {page}, as JSON {beside}")
