"""Stands in for `python -m sglang.launch_server` where a test is about processes: starts in a tenth of a second.

Like the real one it has a child in its group, and listens with SO_REUSEADDR. FAKE chooses how it misbehaves:
dies, silent (never listens), stubborn (it and its child ignore SIGTERM), escape (the child leaves the group).
It listens when the file that FAKE_WAITS_FOR names is there, and when FAKE_MEETS stand-ins have come to its folder.
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


def wait_until_allowed(port):
    """Load for as long as the test wants, however fast the machine is."""
    awaited = os.environ.get("FAKE_WAITS_FOR")
    while awaited and not os.path.exists(awaited):
        time.sleep(0.02)
    folder, _, count = os.environ.get("FAKE_MEETS", "").rpartition(":")
    if folder:
        open(os.path.join(folder, port), "w").close()
        while len(os.listdir(folder)) < int(count):
            time.sleep(0.02)


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
    wait_until_allowed(flags["--port"])
    http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
