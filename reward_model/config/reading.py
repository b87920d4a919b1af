# SPDX-License-Identifier: Apache-2.0
"""The flags of every command that loads a saved model and reads rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from reward_model.config.groups import COUNT, Bounds, Group, flag

LONGEST = 4_096  # tokens, where neither a run nor the model says less


@dataclass(frozen=True)
class ReadingConfig(Group):
    """How a saved model is loaded, and how texts become its token ids."""

    _bounds: ClassVar[Bounds] = {"max_seq_len": COUNT}

    max_seq_len: int | None = flag(
        None,
        metavar="TOKENS",
        aliases=("--max_length",),
        help=f"The longest text; a longer one loses the left of its prompt. Default: as the run that trained the "
        f"model, or what the model takes, up to {LONGEST:,}.",
    )
    chat: bool | None = flag(
        None,
        help="Put a prompt and answers of plain text through the chat template. Default: as the run that trained the "
        "model.",
    )
    chat_template: str | None = flag(
        None, metavar="FILE|human_assistant", help="A chat template in place of the tokenizer's own."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", aliases=("--torch_dtype",), help="Of the weights. Default: as saved, and float32 on a CPU for float16."
    )
    trust_remote_code: bool = flag(False, help="Run the code that a model brings. Look at it first.")
    debug: bool = flag(False, help="Show tracebacks, and what libraries print.")


def beta_flag() -> Any:
    """``--beta`` of the commands that say how sure several heads are."""
    return flag(
        None,
        metavar="BETA",
        help="The lower bound of several heads is score − BETA · std. Default: score_beta in the model's config.json, "
        "which is 1 unless somebody wrote another number there.",
    )
