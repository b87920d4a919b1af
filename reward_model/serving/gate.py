# SPDX-License-Identifier: Apache-2.0
"""What every request passes before a route sees it: the token, the size of its body, and the metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OPEN = ("/health", "/ready")  # without the token: asked by what starts and stops servers
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 150)  # of a request
SIZES = tuple(2**i for i in range(5, 17))  # tokens of a batch

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Metrics:
    """Counts and times, in a registry of their own."""

    def __init__(self, waiting: Callable[[], int]):
        """
        Args:
            waiting: the answers that wait now.
        """
        self.registry = CollectorRegistry()
        of = {"registry": self.registry, "namespace": "reward_model"}
        self.requests = Counter("requests", "Requests that were answered", ["endpoint", "status"], **of)
        self.seconds = Histogram("request_seconds", "Time of a request", ["endpoint"], buckets=SECONDS, **of)
        self.answers = Counter("answers", "Answers that were scored", **of)
        self.tokens = Counter("tokens", "Tokens of the rows that were scored", **of)
        self.cut = Counter("cut_prompts", "Prompts that lost their left, to fit the longest text", **of)
        self.batches = Histogram("batch_tokens", "Tokens of the rows of a batch", buckets=SIZES, **of)
        self.computing = Counter("computing_seconds", "Time in which batches were computed", **of)
        Gauge("waiting_answers", "Answers that wait for their score", **of).set_function(waiting)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        self.tokens.inc(tokens)
        self.batches.observe(tokens)
        self.computing.inc(seconds)


def error_body(status: int, message: str) -> dict:
    """In the form of OpenAI's and vLLM's servers."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


class Gate:
    """An ASGI application around another."""

    def __init__(self, app, key: str | None, most: int, seconds: float, metrics: Metrics, paths: frozenset[str]):
        """
        Args:
            key: the bearer token; None: nobody needs one.
            most: bytes of a body.
            seconds: in which a body has to arrive.
            paths: by which requests are counted; others are counted together.
        """
        self.app, self.most, self.seconds, self.metrics, self.paths = app, most, seconds, metrics, paths
        self.key = key.encode() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # a client that went away, if nothing is sent

        async def noting(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    async def _pass(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not self._is_allowed(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "a bearer token is needed", {"www-authenticate": "Bearer"})
            return
        try:
            body = await asyncio.wait_for(self._body(headers, receive), self.seconds)
        except asyncio.TimeoutError:
            await _refuse(send, 408, f"the body did not arrive within {self.seconds:g} s", {"connection": "close"})
            return
        except ConnectionResetError:
            return
        if body is None:
            most = f"{self.most:,} bytes"
            await _refuse(send, 413, f"the body is larger than {most} (--max_body)", {"connection": "close"})
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> dict[str, Any]:
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)

    def _is_allowed(self, given: bytes) -> bool:
        scheme, _, token = given.partition(b" ")
        return self.key is None or (scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.key))

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """All of a body; None: it is too large.

        Raises:
            ConnectionResetError: the client is gone.
        """
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


async def _refuse(send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    body = json.dumps(error_body(status, message)).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body))} | headers
    sent = [(name.encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})
