"""A Hugging Face hub with one dataset on this machine, which can reject requests, fail and close connections."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPO, COMMIT = "me/set", "a" * 40

Fault = Callable[["Handler", bytes, int], bool]
"""Answers a request for ``content`` from byte ``begin`` wrongly and returns True, or does nothing and returns False."""


class Hub:
    """The stored files, the faults to come, and the requests so far."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.faults: list[Fault] = []
        """Each request for a file's bytes takes one, from the front."""
        self.requests: list[tuple[str, int]] = []
        """(path, first byte) of each request for a file's bytes."""
        self.tokens: set[str | None] = set()
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """The few URLs of the hub that reading a dataset needs."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def answer(self, value: Any, status: int = 200) -> None:
        """Send a value as JSON."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Answer ``paths-info``."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body).get("paths", [])
        self.answer([entry for entry in self.tree() if entry["path"] in paths])

    def tree(self) -> list[dict[str, Any]]:
        """List all files and folders."""
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in self.hub.files.items()
        ]
        folders = {path.rpartition("/")[0] for path in self.hub.files if "/" in path}
        return files + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]

    def below(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """List the entries of a folder."""
        return [
            entry
            for entry in self.tree()
            if (recursive and entry["path"].startswith(folder)) or entry["path"].rpartition("/")[0] == folder.strip("/")
        ]

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Send metadata of the dataset, or bytes of a file."""
        path = urlsplit(self.path).path
        resolved = re.fullmatch(rf"/datasets/{REPO}/resolve/[^/]+/(.+)", path)
        if resolved:
            self.file(resolved[1])
        elif listed := re.fullmatch(rf"/api/datasets/{REPO}/tree/[^/]+/?(.*)", path):
            self.answer(self.below(listed[1], "recursive=True" in self.path))
        elif re.fullmatch(rf"/api/datasets/{REPO}(/revision/[^/]+)?", path):
            self.answer(
                {
                    "id": REPO,
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": path} for path in self.hub.files],
                }
            )
        else:
            self.answer({"error": "Not found"}, 404)

    def file(self, path: str) -> None:
        """Send a file, or the byte range that the request names."""
        content = self.hub.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        byte_range = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(byte_range[1]) if byte_range else 0
        if self.command == "GET" and byte_range:
            self.hub.requests.append((path, begin))
            self.hub.tokens.add(self.headers.get("Authorization"))
            if self.hub.faults and self.hub.faults.pop(0)(self, content, begin):
                self.close_connection = True
                return
        self.send_file(content, begin, partial=byte_range is not None)

    def send_file(self, content: bytes, begin: int, partial: bool, only: int | None = None) -> None:
        """Send the bytes from ``begin`` on; ``only``: stop after so many, although the header promises all."""
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[begin:][:only])


def refuse(status: int, **headers: str) -> Fault:
    """Answer with an error status."""

    def fault(handler: Handler, _content: bytes, _begin: int) -> bool:
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        return True

    return fault


def break_off(after: int) -> Fault:
    """Promise all bytes, send ``after`` of them, and close the connection."""

    def fault(handler: Handler, content: bytes, begin: int) -> bool:
        handler.send_file(content, begin, partial=True, only=after)
        return True

    return fault


def ignore_the_range(handler: Handler, content: bytes, _begin: int) -> bool:
    """Send the entire file, like a server without range requests."""
    handler.send_file(content, 0, partial=False)
    return True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub at ``hub.url`` while the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
