# SPDX-License-Identifier: Apache-2.0
"""A server from Python: what ``reward-model serve`` does."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.config.scoring import ServeConfig
from reward_model.inference import load_to_read

KEY = "REWARD_MODEL_API_KEY"


def serve(model: str, config: ServeConfig | None = None) -> bool:
    """Answer requests for scores until SIGTERM or SIGINT comes, and then those that have come.

    A second signal ends it at once; returns whether there was none.

    Args:
        model: a folder or a hub name.

    Raises:
        UserError: the extra ``serve`` is not installed, the address is taken, no key in the key's file, or a model that
            does not load.
    """
    config = config or ServeConfig()
    try:
        import uvicorn

        from reward_model.serving.server import Service
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise UserError(f"serve needs {error.name}: pip install 'dschat-reward[serve]'") from error
    key = read_key(config.api_key)
    listening = bound(config.host, config.port)  # said before a model is loaded
    try:
        reward, reading = load_to_read(
            model, config.dtype, config.device, config.chat, config.chat_template, config.max_seq_len,
            config.trust_remote_code, beta=config.beta,
        )  # fmt: skip
        service = Service(model, reward, reading, config, key)
        host, port = listening.getsockname()[:2]
        if key is None and not _is_loopback(host):
            logger.warning(f"whoever reaches {host}:{port} can ask: --api_key asks for a token")
        server = uvicorn.Server(
            uvicorn.Config(
                service.app,
                log_level="warning",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(config.timeout) + 1,
                timeout_keep_alive=60,
            )
        )
        listening.listen()  # whoever reads the next line can connect
        shown = f"[{host}]" if ":" in host else host
        logger.info(
            f"{', '.join(service.names)}: http://{shown}:{port} (/docs), texts up to {reading.max_seq_len} tokens"
        )
        said = logging.getLogger("uvicorn.error")
        said.addFilter(is_news := lambda _: not server.force_exit)  # else stacks of requests that are given up
        before = {each: signal.signal(each, _ended) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listening])
        finally:
            said.removeFilter(is_news)
            for each, handler in before.items():
                signal.signal(each, handler)
        logger.info("ended at once: requests were given up" if server.force_exit else "ended")
        return not server.force_exit
    finally:
        listening.close()


def _ended(number: int, frame) -> None:
    """uvicorn ends at a signal by itself, and gives it on when it has ended; nothing is left to do then."""


def read_key(file: str | None) -> str | None:
    """The bearer token, of a file or of the environment; None: there is none.

    Raises:
        UserError: a file that is not there, whose name is not shown, as it may be the token; or an empty token.
    """
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--api_key: no file that can be read has this name. Give a file that holds the token, or set {KEY}: "
            "what stands on a command line is seen by others"
        ) from error
    if not key or not key.isascii() or not key.isprintable():
        raise UserError("--api_key: the file holds no token of one line in ASCII")
    return key


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises UserError: the address is taken, or is none of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return found


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
