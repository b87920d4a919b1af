# SPDX-License-Identifier: Apache-2.0
"""A hub that cannot be reached."""

import time

import pytest
from huggingface_hub import constants

from reward_model.common import hub
from reward_model.common.errors import UserError
from reward_model.inference import load


@pytest.fixture
def nowhere(monkeypatch):
    """The host of the hub has a name that leads nowhere; nothing said offline."""
    hub.look_into_the_cache_alone.cache_clear()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield monkeypatch
    hub.look_into_the_cache_alone.cache_clear()


def test_it_is_asked_for_once(nowhere, capsys):
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(UserError, match="nobody/nothing: no such folder"):
            load("nobody/nothing")
    assert constants.HF_HUB_OFFLINE
    assert capsys.readouterr().out.count("hub.invalid cannot be reached") == 1
    assert time.monotonic() - start < 60  # huggingface_hub alone tries for minutes


def test_behind_a_proxy_nothing_is_concluded(nowhere):
    nowhere.setenv("https_proxy", "http://127.0.0.1:9")
    hub.look_into_the_cache_alone()
    assert not constants.HF_HUB_OFFLINE
