"""A stand-in for the Hugging Face Hub: serves one checkpoint's directory as ``org/name``."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(directory, repository, sent):
    """A server to be run in a thread; calls ``sent(name)`` before it sends a whole file."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{repository}"):
                names = sorted(p.name for p in Path(directory).iterdir())
                listing = {
                    "id": repository,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in names],
                }
                if "/tree/" in path:
                    listing = [self.entry(Path(directory, n)) for n in names]
                return self.send(json.dumps(listing).encode(), body, kind="application/json")
            file = Path(directory, path.rpartition("/")[2])
            if not path.startswith(f"/{repository}/resolve/") or not file.is_file():
                return self.send(b"", body, status=404, headers={"X-Error-Code": "EntryNotFound"})
            data, status, headers = file.read_bytes(), 200, {}
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if span := self.headers.get("Range"):
                first, _, last = span.removeprefix("bytes=").partition("-")
                whole, end = len(data), int(last or len(data) - 1) + 1
                data, status = data[int(first) : end], 206
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
            elif body:
                sent(file.name)
            self.send(data, body, status, headers)

        def entry(self, file):
            data = file.read_bytes()
            return {
                "type": "file",
                "path": file.name,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }

        def send(self, data, body, status=200, headers=(), kind="application/octet-stream"):
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": len(data),
                **dict(headers),
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            if body:
                self.wfile.write(data)

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
