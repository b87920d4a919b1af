# SPDX-License-Identifier: Apache-2.0
"""``--config``: flags from a YAML or JSON file, among them the ``run.json`` that an earlier run left."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml

from reward_model.common.errors import UserError, first_line
from reward_model.config.groups import FLAGS
from reward_model.config.parser import read_words, require_known, words_of

NOT_OF_A_FILE = ("local_rank", "deepspeed")  # the launcher says the one; the other changes nothing


class _GivenTwice(Exception):
    """A key that a file has twice, of which YAML would drop one in silence."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _GivenTwice(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config_file(path: Path, parser, but: Container[str] = ()) -> list[str]:
    """What a file says, as words of a command line.

    Args:
        parser: of ``main.py``, which checks the values.
        but: the names of flags whose values are checked and left out.

    Raises:
        UserError: no such file, not YAML (which JSON is too), an unknown key, or a wrong value; names the file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except _GivenTwice as error:
        raise UserError(f"--config {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is neither YAML nor JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: it has no keys; write a line such as learning_rate: 1e-5 for each flag")
    if "versions" in values:  # run.json
        try:
            values = given_of_run(values, parser)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from error
    for name, value in values.items():
        require_known(str(name), FLAGS, f"--config {path}: ")
        if name == "hub_token":
            raise UserError(f"--config {path}: a file is no place for hub_token; set HF_TOKEN in the environment")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)):
            raise UserError(f"--config {path}: {name} is nested; give it a value, or a list of values")
    needed = [] if "model_name_or_path" in values else ["--model_name_or_path=-"]
    try:
        read_words(parser, [*words_of(values), *needed])
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    return words_of({name: value for name, value in values.items() if name not in but})


def given_of_run(values: dict[str, Any], parser) -> dict[str, Any]:
    """The flags that were given to the run which wrote a ``run.json``.

    The file has every flag as it was resolved. One that was not given stays open, so that it is resolved anew. Files of
    version 0.1.0 do not say what was given: there it is what differs from the default.
    """
    if "given" in values:
        if not isinstance(values["given"], list):
            raise UserError("given is no list of the flags that were given")
        given = set(map(str, values["given"]))
        return {name: value for name, value in values.items() if name in given and name not in NOT_OF_A_FILE}
    defaults = {action.dest: action.default for action in parser._actions}
    defaults |= {"margin": 0.0, "label_smoothing": 0.0, "loss_weight": [1.0] * len(values.get("loss") or [1])}
    known = {name: value for name, value in values.items() if name in FLAGS and name not in NOT_OF_A_FILE}
    return {name: value for name, value in known.items() if value is not None and value != defaults[name]}
