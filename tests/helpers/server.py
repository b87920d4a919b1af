# SPDX-License-Identifier: Apache-2.0
"""A real uvicorn on loopback, in a thread, and a client of the standard library."""

import http.client
import json
import threading
import time
from types import SimpleNamespace

import uvicorn

from reward_model.config.scoring import ServeConfig
from reward_model.inference import load_to_read
from reward_model.serving.api import bound
from reward_model.serving.server import Service


class Running:
    """A service that listens. ``release`` lets held batches go on, if ``held``."""

    def __init__(self, folder, key=None, held=False, loaded=None, **changes):
        self.config = ServeConfig(**changes)
        self.reward, self.reading = loaded or load_to_read(str(folder), max_seq_len=self.config.max_seq_len)
        self.service = Service(str(folder), self.reward, self.reading, self.config, key)
        self.key, self.release = key, threading.Event()
        if held:
            score = self.service.batcher.score
            self.service.batcher.score = lambda rows: self.release.wait(30) and score(rows)
        self.socket = bound("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        made = uvicorn.Config(self.service.app, log_config=None, access_log=False, timeout_graceful_shutdown=20)
        self.server = uvicorn.Server(made)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        ends = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < ends
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.release.set()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def ask(self, path, body=None, method=None, **headers):
        """status, the body as an object (or text), headers."""
        if self.key and "authorization" not in headers:
            headers["authorization"] = f"Bearer {self.key}"
        return ask(self.port, path, body, method, **headers)


def ask(port, path, body=None, method=None, **headers):
    """A request on a connection of its own, as OpenRLHF and verl make them."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"content-type": "application/json"} | headers if body is not None else headers
        client.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = client.getresponse()
        text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return SimpleNamespace(
            status=answer.status, body=json.loads(text) if is_json else text.decode(), headers=answer.headers
        )
    finally:
        client.close()
