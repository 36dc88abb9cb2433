"""A small Hugging Face hub on this machine: it serves one folder as the repository of a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"


@contextmanager
def hub(repository: str, folder: Path, revision: str = "main") -> Iterator[tuple[str, list[str]]]:
    """Serve the files of `folder` as `repository`; yield the address and the paths that are asked for, as they come."""
    asked: list[str] = []

    class Handler(_Handler):
        answers = _answers(repository, folder, revision)
        seen = asked

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answers(repository: str, folder: Path, revision: str) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    answers = {
        f"/api/models/{repository}/revision/{revision}": json.dumps(info).encode(),
        f"/api/models/{repository}/tree/{COMMIT}": json.dumps(tree).encode(),
    }
    return answers | {f"/{repository}/resolve/{COMMIT}/{name}": data for name, data in files.items()}


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, bytes]
    seen: list[str]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(path)
        body = self.answers.get(path)
        self.send_response(200 if body is not None else 404)
        if body is not None:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(body or b"")
