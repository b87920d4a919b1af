# SPDX-License-Identifier: Apache-2.0
"""What is seen of a model's ``config.json`` before Transformers reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reward_model.common.errors import REMOTE_CODE, UserError

MOST_LAYERS = 4_096  # the deepest that are known have some 200; each takes milliseconds to build even without weights
LARGEST_SIZE = 2**31  # rows or columns of a weight; the largest vocabularies have a million tokens
LAYERS = re.compile(r"(layers?|depths?|blocks?|experts|stages?)$")
KERNELS = re.compile(r"(attn|experts)_implementation")


def require_plausible_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """:func:`require_plausible` for a folder's ``config.json``, if that is JSON; Transformers says the rest."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    require_plausible(str(folder), values, trust_remote_code)


def require_plausible(name_or_path: str, values: Any, trust_remote_code: bool = False) -> None:
    """Refuse a configuration that nothing but time or memory would stop, or that has code downloaded.

    Args:
        values: what ``config.json`` says.

    Raises:
        UserError: more layers than any model has, a size beyond all, or attention kernels from the hub, which are code.
    """
    for key, value in _members(values, ""):
        name = key.rpartition(".")[2]
        if isinstance(value, str) and "/" in value and KERNELS.search(name) and not trust_remote_code:
            raise UserError(f"{name_or_path}: {key} in its config.json is {value}, from the hub: {REMOTE_CODE}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if LAYERS.search(name) and value > MOST_LAYERS:
            what = f"and more than {MOST_LAYERS} are not built"
            raise UserError(f"{name_or_path}: {key} in its config.json is {value}, {what}: this is no model")
        if name.endswith(("_size", "_dim", "d_model")) and value > LARGEST_SIZE:
            raise UserError(f"{name_or_path}: {key} in its config.json is {value}: no weight has such a size")


def _members(values: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value in an object and those inside it, with the keys that lead to it; those of a list have its key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _members(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _members(value, place)
    else:
        yield place, values
