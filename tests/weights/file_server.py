"""A web server on the loopback that serves weight files, with the faults of real ones."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
        self.wfile.write(part)

    def log_message(self, *args) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A web server on this machine. It notes requests, and can drop a connection midway or refuse to answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.drops = 0  # answers to be cut in half
        self.refuses = False
        self.knows_ranges = True
