# SPDX-License-Identifier: Apache-2.0
"""``reward-model check``: whether main.py would take some flags, by what can be seen without loading anything."""

from __future__ import annotations

import shlex
from pathlib import Path

from reward_model.config.options import (
    expand,
    parse,
    refuse_used_folder,
    require_model_folder,
)


def main(arguments: list[str]) -> int:
    """Look at main.py's flags as a launcher does before it starts any process: values, and folders that are named.

    With ``--expand`` before them it prints them instead, what ``--config`` names in its place, as a line for a shell.

    Raises:
        UserError: a wrong flag, an output folder that holds another run, a model that is a path and not there.
    """
    if arguments[:1] == ["--expand"]:
        print(shlex.join(expand(arguments[1:])))
        return 0
    config = parse(arguments)
    if config.output.output_dir:
        refuse_used_folder(Path(config.output.output_dir))
    require_model_folder(config.model.model_name_or_path)
    return 0
