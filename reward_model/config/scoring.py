# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model score`` and ``reward-model serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from reward_model.config.evaluation import LONGEST
from reward_model.config.groups import COUNT, POSITIVE, Bounds, DataConfig, Group, flag

TOKENS = 8_192  # of a forward pass: two of the longest texts that are taken where nobody says less


@dataclass(frozen=True)
class ReadingConfig(Group):
    """How a saved model is loaded, and how texts become its token ids."""

    _argument_group_name: ClassVar[str] = "model"
    _bounds: ClassVar[Bounds] = {"max_seq_len": COUNT, "tokens_per_batch": COUNT}

    max_seq_len: int | None = flag(
        None,
        metavar="TOKENS",
        aliases=("--max_length",),
        help=f"The longest text; a longer one loses the left of its prompt. Default: as the run that trained the "
        f"model, or what the model takes, up to {LONGEST:,}.",
    )
    tokens_per_batch: int = flag(
        TOKENS, metavar="TOKENS", aliases=("--batch",), help="The most tokens of a forward pass, pads included."
    )
    chat: bool | None = flag(
        None,
        help="Put a prompt and answers of plain text through the chat template. Default: as the run that trained the "
        "model.",
    )
    chat_template: str | None = flag(
        None, metavar="FILE|human_assistant", help="A chat template in place of the tokenizer's own."
    )
    attention: Literal["auto", "slices", "flex", "varlen", "dense", "separate"] = flag(
        "auto", help="How texts stand in rows; as main.py's flag."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", aliases=("--torch_dtype",), help="Of the weights. Default: as saved, and float32 on a CPU for float16."
    )
    device: str = flag("auto", metavar="DEVICE", help="cpu, cuda, cuda:1, …; auto: a GPU if there is one.")
    trust_remote_code: bool = flag(False, help="Run the code that a model brings. Look at it first.")
    debug: bool = flag(False, help="Show tracebacks, and what libraries print.")


@dataclass(frozen=True)
class ScoreConfig(ReadingConfig):
    """What is scored, and what is written."""

    lines: bool = flag(False, help="The input has one text a line, each scored as it is and closed with the end token.")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag, such as response=completion.")
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
class ServeConfig(ReadingConfig):
    """Where a server listens, and what it takes."""

    _bounds: ClassVar[Bounds] = ReadingConfig._bounds | {
        "port": (0, 65_536, True), "max_waiting": COUNT, "max_body": POSITIVE, "timeout": POSITIVE,
    }  # fmt: skip

    host: str = flag(
        "127.0.0.1", metavar="ADDRESS", help="The address to listen on; 0.0.0.0 is every network of the machine."
    )
    port: int = flag(8000, metavar="N", help="The port; 0 takes a free one, which is said.")
    served_model_name: list[str] = flag(
        (), metavar="NAME", help="Names that requests may call the model by. Default: the model as it was given."
    )
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
