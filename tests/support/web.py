"""A web site on this machine, with pictures, and with what web servers do to those who ask for them."""

import gzip
import io
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import pytest
from PIL import Image

PIXEL = (7, 8, 9)
"""Colour of the site's pictures."""


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), PIXEL).save(buffer, "PNG")
    return buffer.getvalue()


_PACKED = {
    "/refs/gzip.png": ("gzip", gzip.compress(picture())),
    "/refs/gzip-said-only.png": ("gzip", picture()),
    "/refs/gzip-bomb.png": ("GZIP", gzip.compress(bytes(10**7))),
    "/refs/gzip-cut.png": ("x-gzip", gzip.compress(picture())[:-12]),
    "/refs/gzip-damaged.png": ("gzip", gzip.compress(picture())[:20] + bytes(60)),
    "/refs/brotli.png": ("br", b"packed"),
}
"""Encoding and body of files that the server packs although it is asked not to."""


class Site(BaseHTTPRequestHandler):
    """``/refs/`` is what tests allow references from; ``/private/`` and the same server by another name are not."""

    hits: ClassVar[list[str]] = []
    """Paths that were asked for."""
    elsewhere = ""

    def do_GET(self) -> None:
        self.hits.append(self.path)
        path = self.path.partition("?")[0]
        if path in ("/refs/a.png", "/refs/sp%20ace%20%C3%A9.png", "/private/a.png"):
            self._answer(200, picture())
        elif path.startswith("/refs/status-"):
            self._answer(int(path.rpartition("-")[2]), b"secret body")
        elif path == "/refs/page.png":
            self._answer(200, b"<!DOCTYPE html><html><body>Please log in</body></html>")
        elif path == "/refs/flaky.png":
            self._answer(200, picture()) if self.hits.count(self.path) > 1 else self._answer(503, b"")
        elif path == "/refs/short.png":
            self._answer(200, picture()[:40], length=len(picture()))
        elif path in _PACKED:
            packing, body = _PACKED[path]
            self._answer(200, body, packing=packing)
        elif path == "/refs/drip.png":
            self._drip()
        elif path.startswith("/refs/to-"):
            targets = {
                "inside": "/refs/a.png",
                "outside": "/private/a.png",
                "host": self.elsewhere,
                "file": "file:///etc/hosts",
                "metadata": "http://169.254.169.254/latest/meta-data/",
                "broken": "http://[::1/x",
                "port": "http://127.0.0.1:99999999/x",
                "letters": "http://\u043f\u0440.\u0440\u0444/x".encode().decode("latin-1"),
            }
            self.send_response(302)
            self.send_header("Location", targets[path.rpartition("-")[2]])
            self.end_headers()
        else:
            self._answer(404, b"no")

    def _answer(self, status: int, body: bytes, length: int | None = None, packing: str | None = None) -> None:
        self.send_response(status)
        if packing:
            self.send_header("Content-Encoding", packing)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        """A header without an end, one byte at a time."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nServer: ")
        for _ in range(10_000):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.01)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def running() -> Iterator[str]:
    """The site's address, such as ``http://127.0.0.1:40001``."""
    with pytest.MonkeyPatch.context() as patch, _Server(("127.0.0.1", 0), Site) as server:
        patch.setenv("no_proxy", "*")
        Site.hits.clear()
        Site.elsewhere = f"http://localhost:{server.server_address[1]}/refs/a.png"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
