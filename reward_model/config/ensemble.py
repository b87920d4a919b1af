# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model ensemble``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from reward_model.common.errors import UserError
from reward_model.config.groups import COUNT, NOT_NEGATIVE, Bounds, DataConfig, flag
from reward_model.config.scoring import ForwardConfig

MOST_FOLDS = 1_000


@dataclass(frozen=True)
class EnsembleConfig(ForwardConfig):
    """Which pairs several models judge, and what is written."""

    _argument_group_name: ClassVar[str] = "ensemble"
    _bounds: ClassVar[Bounds] = ForwardConfig._bounds | {
        "folds": NOT_NEGATIVE, "repeats": COUNT, "processes": COUNT, "seed": (0, 2**31, True),
    }  # fmt: skip

    data: list[str] = flag(
        (),
        metavar="PATH",
        aliases=("--data_path",),
        help="The rows, as main.py takes them: files (.jsonl, .json, .parquet, .csv, also .gz), folders (their train "
        "files), what save_to_disk wrote, or hub names; PATH:2000 and PATH:0.5 take a part. Required.",
    )
    output: str | None = flag(
        None,
        metavar="FILE",
        help="Write the rows there, as JSON lines. Default: NAME.strengths.jsonl beside the data, where these are one "
        "file.",
    )
    resume: bool = flag(False, help="Go on where a run of the same models, flags and data was interrupted.")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag.")
    split: str | None = flag(None, metavar="NAME", help="The split of a hub name or a folder. Default: train.")
    scale: Literal["none", "std", "temperature"] = flag(
        "none",
        help="What each model's differences are divided by: nothing, which suits models that were trained alike; the "
        "root of their mean square on these rows (std); or the temperature that was saved with the model, so that a "
        "difference d stands for the probability σ(d).",
    )
    json: bool = flag(False, help="Print a summary as one object of JSON in place of text.")
    folds: int = flag(
        0,
        metavar="K",
        help="Train K models, each on the rows of all parts but one, and let each judge the part that it has not seen. "
        "Rows of one prompt stay together. The flags of the training follow after --.",
    )
    repeats: int = flag(1, metavar="R", help="With --folds: so many times, each with another split and another seed.")
    processes: int = flag(1, metavar="N", help="With --folds: the processes of each training, by torchrun.")
    seed: int = flag(0, metavar="N", help="Of the rows that PATH:2000 takes; with --folds, of the parts.")
    local_rank: int = flag(-1, metavar="N", help="Set by launchers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        DataConfig(columns=self.columns)  # refuses what is no FIELD=COLUMN
        if self.folds == 1 or self.folds > MOST_FOLDS:
            raise UserError(f"--folds {self.folds}: give 2 to {MOST_FOLDS}")
        for name, default in (("repeats", 1), ("processes", 1)):
            if getattr(self, name) != default and not self.folds:
                raise UserError(f"--{name} without --folds: it says how the models of the folds are trained")

    @property
    def names(self) -> dict[str, str]:
        """Field → the column that holds it."""
        return DataConfig(columns=self.columns).names
