"""A small Hugging Face Hub on the loopback: enough of its HTTP interface for the real client to download and upload.

It keeps everything in memory: repositories with commits and branches, private and gated ones, large files behind a
redirect as on the real Hub, ranges, and faults that a test orders in advance.
"""

import base64
import hashlib
import json
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".pt")  # kept as LFS objects, under their sha256


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # commit → path → bytes
    branches: dict = field(default_factory=dict)  # name → commit

    def commit(self, files, branch="main"):
        before = self.commits.get(self.branches.get(branch), {})
        content = before | files
        listing = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in content.items())
        name = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[name] = content
        self.branches[branch] = name
        return name


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" contains `where`.

    `kind` is a status code, or "truncate" (the connection breaks after `at` bytes of the body), "hang" (nothing comes
    after them), "stall" (nothing comes for `at` seconds), "drop" (the connection breaks without an answer), "corrupt"
    (the last bytes are others), "page" (a web page instead of the file). `code` is the Hub's name of a status code, and
    `met` is set when the fault has happened.
    """

    where: str
    kind: object
    times: int = 1
    at: float = 0
    code: str = ""
    met: Event = field(default_factory=Event)


class LoopbackHub:
    """The server. `asked` lists the requests as "METHOD /path", `ranges` the Range headers for large files."""

    def __init__(self):
        self.forgotten = Event()
        self.tokens = {"read-token": {"read"}, "write-token": {"read", "write"}}
        self.reset()
        self.lock = Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, as the real one has
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self):
        """Forget everything, and let go of the connections that a fault holds."""
        self.forgotten.set()
        self.forgotten = Event()
        self.repositories = {}
        self.objects = {}  # sha256 → bytes, uploaded
        self.faults = []
        self.asked = []
        self.ranges = []

    def add(self, repo, files, branch="main", **access):
        """Commit files to a repository, made if it is not there; returns the commit."""
        return self.repositories.setdefault(repo, Repository(**access)).commit(files, branch)

    @property
    def downloads(self):
        """How many times the content of a large file was asked for, whatever came of it."""
        return sum(request.startswith("GET /cdn/") for request in self.asked)

    def _take_fault(self, request):
        with self.lock:
            self.asked.append(request)
            for fault in self.faults:
                if fault.times and fault.where in request:
                    fault.times -= 1
                    fault.met.set()
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle(self):
        with suppress(ConnectionError):  # the client gave up
            super().handle()

    # --- answers ---

    def _send(self, status, body=b"", headers=(), kind="application/json"):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code, message):
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _send_file(self, data, headers, fault):
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        if start and not part:
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        if fault is not None and fault.kind == "corrupt":
            part = part[:-4] + bytes(255 - value for value in part[-4:])
        if fault is not None and fault.kind in ("truncate", "hang"):
            self.send_response(206 if start else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: int(fault.at)])
            self.wfile.flush()
            if fault.kind == "hang":
                self.hub.forgotten.wait(60)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self._send(206 if start else 200, part, headers, "application/octet-stream")

    # --- requests ---

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        path = unquote(self.path.split("?")[0])
        fault = self.hub._take_fault(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0) or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        if fault is not None:
            if fault.kind == "stall":
                self.hub.forgotten.wait(fault.at)
            elif fault.kind == "drop":
                self.close_connection = True
                return None
            elif fault.kind == "page":
                return self._send(200, b"<!DOCTYPE html><title>Log in</title>", {"ETag": '"page"'}, "text/html")
            elif isinstance(fault.kind, int):
                return self._refuse(fault.kind, fault.code, "ordered by the test")
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"), fault)
        if path.startswith("/api/") or ".git/info/lfs/" in path:
            return self._api(path)
        return self._resolve(path.strip("/"), fault)

    def _read_chunks(self):
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _rights(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token, set()), bool(token)

    def _resolve(self, path, fault):
        name, _, rest = path.partition("/resolve/")
        repo = self.hub.repositories.get(name)
        rights, named = self._rights()
        if named and not rights:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not rights):
            return self._refuse(404 if rights else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not rights:
            return self._refuse(401, "GatedRepo", "Access to this model is restricted")
        revision = next(
            (r for r in [*repo.branches, *repo.commits] if rest == r or rest.startswith(f"{r}/")), rest.split("/")[0]
        )
        file = rest[len(revision) + 1 :]
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        data = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return self._send(
                404, {}, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        if not file.endswith(LARGE):
            blob = b"blob %d\0" % len(data) + data  # as git names it
            headers |= {"ETag": f'"{hashlib.sha1(blob).hexdigest()}"'}
            if self.command == "HEAD":
                return self._send(200, b"", headers | {"Content-Length": str(len(data))})
            return self._send_file(data, headers, fault)
        oid = hashlib.sha256(data).hexdigest()
        headers |= {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/cdn/{name}/{commit}/{file}",
            "ETag": '"redirect"',
        }
        return self._send(302, b"", headers)

    def _cdn(self, path, fault):
        self.hub.ranges.append(self.headers.get("Range"))
        organisation, name, commit, file = path.split("/", 3)
        data = self.hub.repositories[f"{organisation}/{name}"].commits[commit][file]
        self._send_file(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, fault)

    def _api(self, path):
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.startswith("/api/objects/"):
            oid = path.rsplit("/", 1)[-1]
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self._send(400, {"error": "another hash"})
            self.hub.objects[oid] = self.body
            return self._send(200)
        rights, _ = self._rights()
        if "write" not in rights:
            status = 403 if rights else 401
            return self._refuse(status, "", "You don't have the rights" if rights else "Invalid username or password.")
        return self._write(path)

    def _write(self, path):
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(self.body)["objects"]
            actions = [
                o
                if o["oid"] in self.hub.objects
                else o | {"actions": {"upload": {"href": f"{self.hub.url}/api/objects/{o['oid']}"}}}
                for o in objects
            ]
            return self._send(200, {"transfer": "basic", "objects": actions})
        organisation, name, verb, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.hub.repositories.get(f"{organisation}/{name}")
        revision = "/".join(rest)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if verb == "branch":
            if revision in repo.branches:
                return self._send(409, {"error": "Reference already exists"})
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, {})
        if revision not in repo.branches:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if verb == "preupload":
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self._send(200, {"files": modes})
        files = {}
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repo.commit(files, revision)
        url = f"{self.hub.url}/{organisation}/{name}/commit/{commit}"
        return self._send(200, {"success": True, "commitOid": commit, "commitUrl": url})
