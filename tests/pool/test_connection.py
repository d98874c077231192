"""Connecting to Ray, and what is told where Ray does not start."""

import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest
import ray
from ray.exceptions import AuthenticationError

from support import runs
from vcf_batch.errors import UsageError, VcfBatchError
from vcf_batch.pool import connection


@pytest.fixture
def head() -> Iterator[str]:
    """The address of something that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


TIMED_OUT = Exception("The current node timed out during startup. This could happen because ...")


def starting(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | None) -> list[Exception | None]:
    """Let Ray's starts end as told, in order; what is left of them."""
    left = [*outcomes]

    def start(**_: object) -> None:
        if (outcome := left.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(ray, "init", start)
    return left


def test_a_start_that_timed_out_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a busy machine Ray's own processes may need more than the 30 seconds that Ray gives them."""
    left = starting(monkeypatch, TIMED_OUT, None)
    with connection.cluster("local"):
        assert not left
    assert "started once more" in caplog.text


def test_ray_that_never_starts_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    left = starting(monkeypatch, TIMED_OUT, TIMED_OUT)
    with (
        pytest.raises(VcfBatchError, match=r"did not start on this machine, 2 times.* --address"),
        connection.cluster(None),
    ):
        pass
    assert not left


def test_any_other_error_of_a_start_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starting(monkeypatch, KeyError("something else"))
    with pytest.raises(KeyError), connection.cluster(None):
        pass


@pytest.mark.parametrize(
    "error",
    [AuthenticationError("no authentication token was found"), ConnectionError("Failed to connect to Ray cluster")],
    ids=["missing", "wrong"],
)
def test_a_missing_or_wrong_token_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, head: str
) -> None:
    """A refused token is an error of use: how to give the token is in the message."""
    starting(monkeypatch, error)
    with (
        pytest.raises(UsageError, match=rf"Ray cluster {head}: .*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN_PATH"),
        connection.cluster(head),
    ):
        pass


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_head_that_does_not_answer_is_named_before_ray_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    """Ray would wait for minutes, and say nothing."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connection, "HEAD_PAUSE_SECONDS", 0.05)
    [port] = runs.free_ports(1)
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", address if by_variable else "192.0.2.1:6379")
    left = starting(monkeypatch, None)
    with (
        pytest.raises(UsageError, match=rf"no Ray cluster answers at {address} within 0.2 seconds: .*ray start --head"),
        connection.cluster(None if by_variable else address),
    ):
        pass
    assert left


@pytest.mark.parametrize("address", ["a..b:6379", f"{'a' * 64}:6379", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_one_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    left = starting(monkeypatch, None)
    with pytest.raises(UsageError, match=r"no Ray cluster can be at .*ray start --head"), connection.cluster(address):
        pass
    assert left


def test_a_head_that_is_just_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_PAUSE_SECONDS", 0.05)
    [port] = runs.free_ports(1)
    left, late = starting(monkeypatch, None), socket.socket()

    def listen() -> None:
        late.bind(("127.0.0.1", port))
        late.listen()

    timer = threading.Timer(0.3, listen)
    timer.start()
    with late, connection.cluster(f"127.0.0.1:{port}"):
        assert not left
    timer.join()


@pytest.mark.parametrize("address", ["auto", "local", "ray://nowhere:10001", "http://nowhere:8265"])
def test_an_address_of_another_form_is_left_to_ray(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    left = starting(monkeypatch, None)
    with connection.cluster(address):
        assert not left


def test_what_ray_says_of_its_own_token_is_left_out_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks for nothing, and would stand in a log of JSON."""
    log = logging.getLogger("ray._private.authentication.authentication_token_setup")

    def start(**_: object) -> None:
        log.warning("Token authentication is enabled for this Ray cluster. Set ...")
        log.warning("Token authentication is disabled for this Ray cluster. Anyone ...")

    monkeypatch.setattr(ray, "init", start)
    with connection.cluster("local"):
        pass
    assert "is enabled" not in caplog.text and "is disabled" in caplog.text
    assert not log.filters


def test_a_home_that_cannot_be_written_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local Ray makes a token below HOME, which a container with a read-only root has to allow or replace."""
    starting(monkeypatch, OSError(30, "Read-only file system", "/home/vcf/.ray"))
    with pytest.raises(UsageError, match=r"'/home/vcf/\.ray'.*HOME.*RAY_AUTH_TOKEN"), connection.cluster("local"):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TMPDIR": "/scratch/somebody/job"}, None),
        ({"TMPDIR": "/tmp/josé"}, "/tmp"),
        ({"TMPDIR": "/scratch/somebody/job-123456789/temporary"}, "/tmp"),
        ({"TMPDIR": "/tmp/josé", "RAY_TMPDIR": "/mnt/ray"}, "/mnt/ray"),
    ],
)
def test_ray_gets_a_folder_that_it_can_use(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    """Its files lie below TMPDIR, unless that is not ASCII or too long for the names of its sockets."""
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connection.cluster(None):
        assert os.environ.get("RAY_TMPDIR") == expected
