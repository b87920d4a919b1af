# SPDX-License-Identifier: Apache-2.0
"""``reward-model serve``: a model that answers requests for scores over HTTP.

reward-model serve output
curl -s localhost:8000/score -H 'content-type: application/json' -d '{"prompt": "2 + 2?", "responses": [" 4", " 5"]}'
"""

from __future__ import annotations

import os
import signal
import sys

from reward_model.common.errors import UserError
from reward_model.common.logging import show_messages
from reward_model.config.parser import build_parser, read_words, split_at_flags
from reward_model.config.scoring import ServeConfig


def main(arguments: list[str]) -> int:
    """Serve until a signal comes.

    Raises:
        UserError: a model or an address that cannot be used.
    """
    parser = build_parser(
        [ServeConfig],
        prog="reward-model serve",
        usage="%(prog)s MODEL [FLAG [VALUE …] …]",
        description="Scores over HTTP: POST /score, /get_reward (OpenRLHF), /classify and /pooling (vLLM's form), "
        "/v1/embeddings (verl with SGLang); GET /v1/models, /health, /ready, /metrics (Prometheus), /docs.",
        epilog="It listens on loopback unless --host says otherwise, and needs pip install 'dschat-reward[serve]'.\n"
        "example: reward-model serve output --port 5000",
    )
    named, words = split_at_flags(arguments)
    (config,) = read_words(parser, words)[:1]
    if len(named) != 1:
        raise UserError("name one model before the flags: a folder or a hub name")
    show_messages()
    from reward_model.serving.api import serve

    if serve(named[0], config):
        return 0
    sys.stdout.flush()
    os._exit(128 + signal.SIGINT)  # a batch is still computed, in which no thread can be joined
