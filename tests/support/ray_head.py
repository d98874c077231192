"""A Ray head node on this machine, as `ray start` makes it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from support import runs

RAY = str(Path(sys.executable).parent / "ray")


@contextlib.contextmanager
def running(token: str = "") -> Iterator[dict[str, str]]:
    """Start a head of two CPUs with its own folder and ports; yields the environment that reaches it.

    Args:
        token: what the head asks of whoever reaches its ports; nothing where it is empty.
    """
    port, dashboard, agent, client = runs.free_ports(4)
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        head = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
                # Any that is free: the default is a range, the same one for all heads of a machine.
                *("--min-worker-port=0", "--max-worker-port=0"),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            runs.wait_for(lambda: _answers(environment["RAY_API_SERVER_ADDRESS"], token), 90)
            yield environment
        finally:
            head.terminate()
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                head.kill()
                head.wait()


def _answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
