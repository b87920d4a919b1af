# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reward_model.config.groups import Group, flag


@dataclass(frozen=True)
class VerifyConfig(Group):
    """By which texts a saved model is verified, and how it is told."""

    _argument_group_name: ClassVar[str] = "verification"

    data: str | None = flag(
        None,
        metavar="PATH",
        help="A file, folder or hub name, as main.py takes it, of which 32 rows are scored. Default: texts of this "
        "package.",
    )
    json: bool = flag(False, help="Print one object of JSON in place of text.")
    trust_remote_code: bool = flag(False, help="Run the code that the model brings. Look at it first.")
    debug: bool = flag(False, help="Show tracebacks, and what libraries print.")
