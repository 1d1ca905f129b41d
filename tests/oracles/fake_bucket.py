"""A bucket on this machine: the part of Cloud Storage's JSON API that a run needs, and its outages.

https://cloud.google.com/storage/docs/json_api/v1: objects appear whole, with their last byte, and
there are no folders and no renames.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

NAME = "bucket"
MISSING = 404, {"error": {"code": 404, "message": "Not Found"}}
UNMET = 412, {"error": {"code": 412, "message": "Precondition Failed"}}


class Bucket:
    """Objects by name, each with its generation, and what is wrong at the moment."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.lock = threading.Lock()
        self.generation = 0
        self.history: list[dict[str, tuple[int, bytes]]] = []  # the objects after every change
        self.url = ""
        self.heal()

    def heal(self) -> None:
        self.trouble = ""  # a status as "503", "reset" (the connection ends) or "hang"
        self.fails: Callable[[str, str], bool] = lambda method, name: True  # where there is trouble

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        self.generation += 1
        self.objects[name] = self.generation, data
        self.history.append(dict(self.objects))
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        generation, data = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": NAME,
            "size": str(len(data)),
            "generation": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items: list[dict[str, Any]] = []
        folders: set[str] = set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                folders.add(prefix + head + found)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet
    bucket: Bucket

    def log_message(self, *unused: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path = url.path
        bucket = self.bucket
        trouble = bucket.trouble
        name = urllib.parse.unquote(path.partition("/o/")[2]) or query.get("name", "")
        if trouble and bucket.fails(self.command, name):
            while bucket.trouble == "hang":
                time.sleep(0.02)
            if trouble.isdecimal():
                message = http.HTTPStatus(int(trouble)).phrase
                self.answer(int(trouble), {"error": {"code": int(trouble), "message": message}})
            else:
                self.close_connection = True
            return
        with bucket.lock:
            answer = self.route(path, query, body)
        self.answer(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path: str, query: dict[str, str], body: bytes) -> tuple[Any, ...]:
        bucket, method = self.bucket, self.command
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/(.+))?", path)
        if not found or found[2] != NAME:
            return MISSING
        kind, _, objects, rest = found.groups()
        if not objects:
            return 200, {"kind": "storage#bucket", "name": NAME}
        if kind == "/upload":
            return self.upload(query, body)
        if not rest:
            return 200, bucket.list(query)
        name, _, target = rest.partition(f"/rewriteTo/b/{NAME}/o/")
        name, target = map(urllib.parse.unquote, (name, target))
        if name not in bucket.objects:
            return MISSING
        generation, data = bucket.objects[name]
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return UNMET
        if target:
            return 200, {"done": True, "resource": bucket.put(target, data)}
        if method == "DELETE":
            del bucket.objects[name]
            bucket.history.append(dict(bucket.objects))
            return 204, b""
        if query.get("alt") != "media" and kind != "/download":
            return 200, bucket.describe(name)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b""
        return self.media(generation, data)

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)

    def media(self, generation: int, data: bytes) -> tuple[Any, ...]:
        headers = {"x-goog-generation": str(generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, data, headers
        first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
        last = min(int(wanted[2]), len(data) - 1) if wanted[1] and wanted[2] else len(data) - 1
        if first > last:
            return 416, b"", headers
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def upload(self, query: dict[str, str], body: bytes) -> tuple[Any, ...]:
        name = query.get("name", "")
        if query.get("uploadType") == "resumable" and "upload_id" not in query:
            return 200, b"", {"Location": f"{self.bucket.url}{self.path}&upload_id=1"}
        expected = query.get("ifGenerationMatch")
        if expected not in (None, str(self.bucket.objects.get(name, (0,))[0])):
            return UNMET
        return 200, self.bucket.put(name, body)


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """An empty bucket, for as long as the context lasts."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *unused: None  # type: ignore[method-assign] # clients go as they like
    bucket.url = f"http://localhost:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield bucket
    finally:
        bucket.heal()
        server.shutdown()
        server.server_close()
