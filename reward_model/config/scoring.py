# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model score`` and ``reward-model serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from reward_model.config.groups import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, DataConfig, flag
from reward_model.config.reading import ReadingConfig, beta_flag

STDIN = "-"  # the file that stands for standard input
TOKENS = 8_192  # of a forward pass: two of the longest texts that are taken where nobody says less


@dataclass(frozen=True)
class ForwardConfig(ReadingConfig):
    """How texts go through a loaded model."""

    _argument_group_name: ClassVar[str] = "model"
    _bounds: ClassVar[Bounds] = ReadingConfig._bounds | {"tokens_per_batch": COUNT}

    tokens_per_batch: int = flag(
        TOKENS, metavar="TOKENS", aliases=("--batch",), help="The most tokens of a forward pass, pads included."
    )
    attention: Literal["auto", "slices", "flex", "varlen", "dense", "separate"] = flag(
        "auto", help="How texts stand in rows; as main.py's flag."
    )
    device: str = flag("auto", metavar="DEVICE", help="cpu, cuda, cuda:1, …; auto: a GPU if there is one.")


@dataclass(frozen=True)
class ScoreConfig(ForwardConfig):
    """What is scored, and what is written."""

    _bounds: ClassVar[Bounds] = ForwardConfig._bounds | {"beta": NOT_NEGATIVE}

    lines: bool = flag(False, help="The input has one text a line, each scored as it is and closed with the end token.")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag, such as response=completion.")
    beta: float | None = beta_flag()
    best: bool = flag(False, help="Write the best answer of each row, with its number from 0 and its score.")
    output: str | None = flag(None, metavar="FILE", help="Write there. Default: standard output.")
    resume: bool = flag(
        False, help="Go on after the last whole line of --output, if the model, the flags and the input are the same."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.columns, str):
            object.__setattr__(self, "columns", [self.columns])
        DataConfig(columns=self.columns)  # refuses what is no FIELD=COLUMN

    @property
    def names(self) -> dict[str, str]:
        """Field → the column that holds it."""
        return DataConfig(columns=self.columns).names


@dataclass(frozen=True)
class ServeConfig(ForwardConfig):
    """Where a server listens, and what it takes."""

    _bounds: ClassVar[Bounds] = ForwardConfig._bounds | {
        "port": (0, 65_536, True), "max_waiting": COUNT, "max_body": POSITIVE, "timeout": POSITIVE,
        "beta": NOT_NEGATIVE,
    }  # fmt: skip

    host: str = flag(
        "127.0.0.1", metavar="ADDRESS", help="The address to listen on; 0.0.0.0 is every network of the machine."
    )
    port: int = flag(8000, metavar="N", help="The port; 0 takes a free one, which is said.")
    served_model_name: list[str] = flag(
        (), metavar="NAME", help="Names that requests may call the model by. Default: the model as it was given."
    )
    beta: float | None = beta_flag()
    api_key: str | None = flag(
        None,
        metavar="FILE",
        help="A file that holds the bearer token that requests must bring. Default: that of the environment variable "
        "REWARD_MODEL_API_KEY, or none.",
    )
    max_waiting: int = flag(
        4_096, metavar="N", help="The most answers that wait for their score; a request beyond that gets status 429."
    )
    max_body: float = flag(16.0, metavar="MB", help="The largest body of a request, in 10⁶ bytes.")
    timeout: float = flag(
        150.0,
        metavar="SECONDS",
        help="A request that has no score by then gets status 504, and a server that ends waits no longer for "
        "requests. OpenRLHF's clients wait 180 s.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.served_model_name, str):
            object.__setattr__(self, "served_model_name", [self.served_model_name])
