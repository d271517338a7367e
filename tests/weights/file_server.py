"""A web server on the loopback that serves weight files, with the faults of real ones."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event

import pytest

from brainfm import PretrainedCfg, WeightsNotFoundError
from brainfm.weights import find_weights


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if self.server.refuses:
            self.close_connection = True
        elif content is None:
            self.send_error(404)
        else:
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and self.server.knows_ranges else 0
            self.answer(content, start)

    def answer(self, content: bytes, start: int) -> None:
        part, whole = content[start:], len(content)
        self.send_response((206 if part else 416) if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}" if part else f"bytes */{whole}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.server.drops:
            self.server.drops -= 1
            self.close_connection = True
            part = part[: len(part) // 2]
        if self.server.hangs:
            self.server.hangs -= 1
            self.wfile.write(part[: len(part) // 2])
            self.server.hung.set()
            self.server.closed.wait(60)
            self.close_connection = True
            return
        self.wfile.write(part)

    def log_message(self, *args) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A web server on this machine. It notes requests; it can drop or hold a connection midway, or not answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.drops = 0  # answers to be cut in half
        self.hangs = 0  # answers that stop in the middle, and hold the connection
        self.hung, self.closed = Event(), Event()
        self.refuses = False
        self.knows_ranges = True


def kept(cache: Path) -> list[str]:
    """What a cache holds beside its locks."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def overlaid(cfg: PretrainedCfg, **changes) -> PretrainedCfg:
    return cfg.overlay({"url": cfg.url, "sha256": cfg.sha256} | changes)


def break_off(server: Server, cfg: PretrainedCfg, cache: Path, monkeypatch) -> Path:
    """Start a download whose connection drops midway for good; what came of it."""
    server.drops = 1
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: setattr(server, "refuses", True))
        with pytest.raises(WeightsNotFoundError, match="cannot download"):
            find_weights(cfg, cache)
    server.refuses, server.requests = False, []
    [partial] = [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return partial
