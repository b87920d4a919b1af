# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model novelty fit``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from reward_model.config.groups import COUNT, NOT_NEGATIVE, Bounds, DataConfig, flag
from reward_model.config.scoring import ForwardConfig


@dataclass(frozen=True)
class NoveltyConfig(ForwardConfig):
    """What novelty is fitted to, and how."""

    _argument_group_name: ClassVar[str] = "novelty"
    _bounds: ClassVar[Bounds] = ForwardConfig._bounds | {
        "max_texts": COUNT, "threshold": (0, 1, True), "seed": (0, 2**32, True), "num_proc": NOT_NEGATIVE,
    }  # fmt: skip

    data: list[str] = flag(
        (),
        metavar="PATH",
        aliases=("--data_path",),
        help="The training data: files, folders (their training files) or hub names, as main.py takes them. Required.",
    )
    method: Literal["mahalanobis", "relative_mahalanobis", "exemplar", "rnd", "spread"] = flag(
        "mahalanobis",
        help="mahalanobis: distance from a Gaussian of the states; relative_mahalanobis: less that from one without "
        "correlations; exemplar: a classifier that tells a text from the rest (EX2); rnd: random network distillation; "
        "spread: how far the heads of a model trained with --heads disagree.",
    )
    max_texts: int = flag(
        20_000, metavar="N", help="The most different texts whose states are computed, a fifth of them held out."
    )
    threshold: float = flag(
        0.95,
        metavar="Q",
        help="The novelty from which on score, serve and evaluate call a text novel, 0 to 1. It is kept in the file.",
    )
    split: str | None = flag(None, metavar="NAME", help="The split of a hub name or a folder. Default: train.")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag.")
    on_bad_row: Literal["stop", "skip"] = flag("stop", help="Stop at a row that cannot be used, or skip and count it.")
    data_output_path: str | None = flag(None, metavar="FOLDER", help="The cache of tokenized rows.")
    num_proc: int = flag(0, metavar="N", help="The processes that tokenize; 0 chooses.")
    seed: int = flag(0, metavar="N", help="Of what is drawn: texts, held-out texts, and weights.")
    json: bool = flag(False, help="Print one object of JSON in place of text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        DataConfig(columns=self.columns)  # refuses what is no FIELD=COLUMN
