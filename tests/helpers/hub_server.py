# SPDX-License-Identifier: Apache-2.0
"""A hub on loopback: as much of its API as pushing a folder needs, and what it was sent."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITES = {"auth": {"accessToken": {"role": "write"}}}
OID = "a" * 40


class Hub:
    """What a hub knows, and what it was sent.

    tokens: token → what whoami says. files: of the one repository, path → content. repos: bodies of create. refuses:
    the status with which it answers a commit; 0: it takes it. strange: requests that it does not know.
    """

    def __init__(self, tokens):
        self.tokens, self.files, self.repos, self.strange = tokens, {}, [], []
        self.large, self.refuses, self.endpoint = {}, 0, ""

    def answer(self, method, path, token, body):
        """Status and JSON."""
        if path == "/api/whoami-v2":
            return (
                (200, self.tokens[token]) if token in self.tokens else (401, {"error": "Invalid username or password."})
            )
        if method == "PUT" and path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token not in self.tokens:
            return 401, {"error": "no"}
        if path == "/api/repos/create":
            self.repos.append(json.loads(body))
            owner = self.repos[-1].get("organization") or self.tokens[token]["name"]
            return 200, {"url": f"{self.endpoint}/{owner}/{self.repos[-1]['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            mode = {True: "lfs", False: "regular"}
            named = [each["path"] for each in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {"path": each, "uploadMode": mode[each.endswith(".safetensors")], "shouldIgnore": False}
                    for each in named
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/commit/main", path):
            if self.refuses:
                return self.refuses, {"error": "the disk of the hub is full"}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            url = f"{self.endpoint}{path.removeprefix('/api/models').removesuffix('/main')}/{OID}"
            return 200, {"success": True, "commitOid": OID, "commitUrl": url, "hookOutput": ""}
        self.strange.append(f"{method} {path}")
        return 404, {"error": "not found"}


@contextmanager
def running(tokens):
    """A hub that listens, until the block is left."""
    hub = Hub(tokens)

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, found = hub.answer(self.command, self.path.partition("?")[0], token, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
