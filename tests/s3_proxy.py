"""A proxy before the S3 server of tests: it counts requests, and breaks answers off."""

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class S3Proxy:
    """Between a client and the server at `endpoint`.

    Attributes:
        requests: by "GET", "HEAD", "PUT", and "LIST" for listings.
        bytes: of all bodies sent to the client.
        paths: what was asked for, in order.
        breaks_off: of so many GETs, from now on, of paths with this in them only half is sent.
    """

    def __init__(self, endpoint: str) -> None:
        self.requests: Counter[str] = Counter()
        self.bytes = 0
        self.paths: list[str] = []
        self.breaks_off: Counter[str] = Counter()
        self._target = urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Quiet."""

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy._pass_on(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.paths.clear()
        self.bytes = 0

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(size)
        upstream = http.client.HTTPConnection(self._target, timeout=60)
        upstream.request(handler.command, handler.path, body, dict(handler.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        is_listing = "list-type=" in handler.path
        named = [what for what in self.breaks_off if what in handler.path] if data else []
        is_object = handler.command == "GET" and not is_listing
        with self._lock:
            self.requests["LIST" if is_listing else handler.command] += 1
            self.bytes += len(data)
            self.paths.append(f"{handler.command} {handler.path} {handler.headers.get('Range')}")
            is_broken = is_object and any(self.breaks_off[what] > 0 for what in named)
            self.breaks_off.subtract(named if is_broken else ())
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(name, value)
        length = answer.headers["Content-Length"] if handler.command == "HEAD" else len(data)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if is_broken else data)
        handler.close_connection = is_broken


@contextmanager
def s3_proxy(endpoint: str) -> Iterator[S3Proxy]:
    """A proxy that is stopped at the end."""
    proxy = S3Proxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.stop()
