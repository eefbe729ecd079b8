"""A proxy before an S3 server that does to requests what networks and servers do."""

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

XML = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
WAYS = ("503", "reset", "truncate", "slow", "outage", "lost-ack", "expired", "late-marker")


class Weather:
    """Which request meets what. Thread-safe; the same seed and order of requests, the same faults.

    Args:
        way: one of `WAYS`.
        share: of the requests that are hit; of "lost-ack", of the PUTs.
        length_s: it is calm so long after the first request that it concerns.
    """

    def __init__(self, way: str, seed: int, share: float, length_s: float) -> None:
        assert way in WAYS
        self.way, self.share, self.length_s = way, share, length_s
        self.hits, self._until = 0, 0.0
        self._random, self._lock, self._row = random.Random(seed), threading.Lock(), 0

    def strikes(self, method: str, path: str) -> bool:
        with self._lock:
            if not self._concerns(method, path):
                return False
            now = time.monotonic()
            self._until = self._until or now + self.length_s
            if now > self._until:
                return False
            # Never as often in a row as a client tries again.
            hit = self.way in ("outage", "expired") or (
                self._random.random() < self.share and self._row < 3
            )
            self._row = self._row + 1 if hit else 0
            self.hits += hit
            return hit

    def _concerns(self, method: str, path: str) -> bool:
        if self.way == "late-marker":
            return method == "PUT" and "/commits/" in path
        if self.way == "truncate":
            return method == "GET" and "?" not in path
        return self.way != "lost-ack" or method == "PUT"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1
    server: "FaultProxy"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        body = body or self.rfile.read(length)
        weather = self.server.weather
        way = weather.way if weather and weather.strikes(self.command, self.path) else ""
        if way in ("reset", "outage"):
            return self._cut()
        if way == "503":
            return self._answer(503, {}, XML.format(code="SlowDown").encode())
        if way == "expired":
            return self._answer(400, {}, XML.format(code="ExpiredToken").encode())
        if way == "late-marker":
            time.sleep(self.server.delay_s)
        status, headers, found = self._forward(body)
        if way == "lost-ack":
            return self._cut()
        if way == "truncate" and len(found) > 1:
            self._answer(status, headers, found[: len(found) // 2], len(found))
            return self._cut()
        if way == "slow":
            time.sleep(0.2)
        self._answer(status, headers, found)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def handle_expect_100(self) -> bool:
        done = super().handle_expect_100()
        self.wfile.flush()
        return done

    def _chunked(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.server.host, self.server.port, timeout=60)
        dropped = {"connection", "transfer-encoding", "content-length", "expect"}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        upstream.request(
            self.command, self.path, body, {**headers, "Content-Length": str(len(body))}
        )
        response = upstream.getresponse()
        found = response.read()
        upstream.close()
        kept = {k: v for k, v in response.getheaders() if k.lower() not in dropped}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length") or "0"
        return response.status, kept, found

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _cut(self) -> None:
        """A reset: the client sees ECONNRESET, not an orderly end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: thousands of requests."""


class FaultProxy(ThreadingHTTPServer):
    """On loopback and a free port, before the server at `endpoint` (http://host:port)."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.weather: Weather | None = None
        self.delay_s = 2.0
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """No request is answered any more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed leaves its connection behind."""

    @contextmanager
    def under(self, weather: Weather) -> Iterator[Weather]:
        """Weather for the length of a block."""
        self.weather = weather
        try:
            yield weather
        finally:
            self.weather = None
