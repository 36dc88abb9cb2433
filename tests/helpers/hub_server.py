"""A small Hugging Face hub on this machine: it serves folders as repositories of models or datasets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of folders, by name: `org/name` is a model, `datasets/org/name` a dataset.

    Yields the address, and the paths that are asked for as they come.
    """
    asked: list[str] = []

    answers = {path: body for name, folder in repositories.items() for path, body in _answers(name, folder).items()}
    handler = type("Handler", (_Handler,), {"answers": answers, "seen": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answers(repository: str, folder: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    api = f"/api/{repository}" if repository.startswith("datasets/") else f"/api/models/{repository}"
    siblings = [{"rfilename": name} for name in files]
    info = {"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []}
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    answers = {f"{api}{end}": json.dumps(info).encode() for end in ("", "/revision/main", f"/revision/{COMMIT}")}
    answers[f"{api}/tree/{COMMIT}"] = json.dumps(tree).encode()
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
        self.send_response(404 if body is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(body or b"")
