"""Stands in for `python -m sglang.launch_server` where a test is about processes: starts in a tenth of a second.

Like the real one it has a child in its group, and listens with SO_REUSEADDR. FAKE chooses how it misbehaves:
dies, silent (never listens), stubborn (it and its child ignore SIGTERM), escape (the child leaves the group).
"""

import http.server
import os
import signal
import subprocess
import sys
import time

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /model_info, with the key where one was given."""

    key = None

    def do_GET(self):
        """Only what a poll for readiness asks."""
        allowed = self.key is None or self.headers.get("Authorization") == f"Bearer {self.key}"
        self.send_response(200 if allowed and self.path == "/model_info" else 401)
        self.end_headers()


def main():
    """Flags as the real one takes them."""
    behaviour = os.environ.get("FAKE", "")
    flags = dict(zip(sys.argv[3:], sys.argv[4:], strict=False))
    if behaviour == "dies":
        print("first line\nValueError: no such model", flush=True)
        sys.exit(7)
    if "--config" in flags:
        with open(flags["--config"]) as file:
            Handler.key = file.read().removeprefix("api-key: ").strip()
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=behaviour == "escape")
    if behaviour == "silent":
        time.sleep(600)
    time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
    http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
