# SPDX-License-Identifier: Apache-2.0
"""Stable reward-model training for DeepSpeed-Chat.

``train`` runs a :class:`RunConfig`; ``load`` reads a model that a run saved; ``score`` gives the scores of rows, and
``serve`` answers requests for them; ``fit_novelty`` has them say how new a text is; ``verify`` compares the ways in
which others score with a model; ``export`` writes it in a form that another program reads; ``ensemble`` writes what
several models make of pairs beside them; ``examine`` looks for what is wrong with data; ``report`` writes the page of a
run; ``UserError`` is what they raise for whatever the caller can mend. Nothing heavy is imported before one of them is
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_model.common.errors import UserError
    from reward_model.config.doctor import DoctorConfig
    from reward_model.config.ensemble import EnsembleConfig
    from reward_model.config.evaluation import EvaluateConfig
    from reward_model.config.novelty import NoveltyConfig
    from reward_model.config.options import RunConfig
    from reward_model.config.scoring import ScoreConfig, ServeConfig
    from reward_model.config.verification import VerifyConfig
    from reward_model.doctor.api import examine
    from reward_model.doctor.examination import Examination
    from reward_model.inference import load
    from reward_model.judging.api import evaluate
    from reward_model.judging.novelty import fit_novelty
    from reward_model.reporting.report import report
    from reward_model.serving.api import serve
    from reward_model.serving.ensemble import ensemble
    from reward_model.serving.stream import score
    from reward_model.training.api import train
    from reward_model.training.exporting import export
    from reward_model.training.run import TrainResult
    from reward_model.training.stopping import Interrupted
    from reward_model.training.verification import verify

__version__ = "0.1.0"
__all__ = [
    "DoctorConfig", "EnsembleConfig", "EvaluateConfig", "Examination", "Interrupted", "NoveltyConfig", "RunConfig",
    "ScoreConfig", "ServeConfig", "TrainResult", "UserError", "VerifyConfig", "ensemble", "evaluate", "examine",
    "export", "fit_novelty", "load", "report", "score", "serve", "train", "verify",
]  # fmt: skip

_MODULES = {
    "RunConfig": "reward_model.config.options",
    "NoveltyConfig": "reward_model.config.novelty",
    "Interrupted": "reward_model.training.stopping",
    "TrainResult": "reward_model.training.run",
    "UserError": "reward_model.common.errors",
    "EnsembleConfig": "reward_model.config.ensemble",
    "DoctorConfig": "reward_model.config.doctor",
    "Examination": "reward_model.doctor.examination",
    "EvaluateConfig": "reward_model.config.evaluation",
    "ScoreConfig": "reward_model.config.scoring",
    "ServeConfig": "reward_model.config.scoring",
    "VerifyConfig": "reward_model.config.verification",
    "ensemble": "reward_model.serving.ensemble",
    "evaluate": "reward_model.judging.api",
    "examine": "reward_model.doctor.api",
    "export": "reward_model.training.exporting",
    "fit_novelty": "reward_model.judging.novelty",
    "load": "reward_model.inference",
    "report": "reward_model.reporting.report",
    "score": "reward_model.serving.stream",
    "serve": "reward_model.serving.api",
    "train": "reward_model.training.api",
    "verify": "reward_model.training.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_MODULES[name]), name)
