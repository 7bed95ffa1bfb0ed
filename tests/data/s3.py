"""A real S3 server on loopback, in a process of its own, and a count of what it was asked for."""

import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


class Server:
    def __init__(self, endpoint: str, log: Path) -> None:
        self.endpoint, self._log = endpoint, log
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}

    def request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """Past our own client."""
        asked = urllib.request.Request(f"{self.endpoint}/{path}", data=data, method=method)
        asked.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(asked) as answer:
            return bytes(answer.read())

    def mark(self) -> int:
        return self._log.stat().st_size

    def requests(self, since: int) -> list[str]:
        """Method and path of every request after a mark."""
        with self._log.open("rb") as stream:
            stream.seek(since)
            return re.findall(r'"(?:\x1b\[\d+m)*((?:GET|PUT|POST|DELETE|HEAD) \S+) HTTP', stream.read().decode())


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "s3.log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stderr=stream, stdout=stream)
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                server.request("GET", "")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
