# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings give what they show."""

import doctest
import importlib

import pytest

MODULES = ["batching.merging", "batching.collate", "batching.plan", "data.rows", "objectives.objective"]
MODULES += ["config.options", "config.parser", "training.api"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"reward_model.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
