# SPDX-License-Identifier: Apache-2.0
"""The hub, where it cannot be reached."""

from __future__ import annotations

import functools
import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants

from reward_model.common.errors import first_line
from reward_model.common.logging import logger


@functools.cache
def look_into_the_cache_alone() -> None:
    """For the rest of this process, if the name of the hub's host leads nowhere; said in a line.

    huggingface_hub asks again and again for each file, which takes minutes, before it looks into its cache. Behind a
    proxy a host need not have an address here, so that nothing is concluded.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies() or not host:
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # processes that this one starts
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        logger.warning(f"{host} cannot be reached ({first_line(error)}): only what was loaded before can be found")
