"""What holds for every test module, and the storages that several of them use."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest
from hypothesis import settings

from vcf_batch.cli import documents

# No test is timed: machines that run the suite do other things besides. The examples of `make test` are the same each
# time, so that what it refuses is the change at hand; `make test-all` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None, print_blob=True)
settings.load_profile("new")


documents.is_strict = True


@pytest.fixture(scope="module")
def restored_torch() -> Iterator[None]:
    """Afterwards torch has the threads and the kernels again that a worker in this process has changed."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from support import s3_server  # which brings the models' libraries

    with s3_server.running() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder on a real S3 server, for this process and those that it starts."""
    from support import s3_server

    options = s3_server.options(s3_endpoint)
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(options))
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder of a storage that fails one call in five; see tests/support/faulty."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "support" / "faulty"))
    monkeypatch.setenv("FAULTY", json.dumps({"every": 5, "seed": 1}))
    fsspec.register_implementation("faulty", "faulty_storage.FaultyStorage")
    return f"faulty://{tmp_path}/faulty"
