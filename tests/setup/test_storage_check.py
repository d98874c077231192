"""A node that does not see the storage of a run is refused."""

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.output import lease
from vcf_batch.setup import storage_check
from vcf_batch.setup.job import Job


def test_a_node_that_does_not_see_the_output_is_refused(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Every node proves that it sees the same storage: it reads the lease that the driver wrote."""
    job = settle()
    with lease.hold(job.config.output) as held:
        job = dataclasses.replace(job, token=held.token)
        storage_check.check_storage(job)
        elsewhere = dataclasses.replace(job, config=job.config.replace(output=str(tmp_path / "elsewhere")))
        with pytest.raises(UsageError, match="does not see the output"):
            storage_check.check_storage(elsewhere)
        (tmp_path / "in" / "manifest.parquet").unlink()
        with pytest.raises(UsageError, match="does not see the manifest"):
            storage_check.check_storage(job)


def test_a_node_that_does_not_see_a_reference_root_is_refused(
    settle: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is mounted on the driver alone is noticed before a row fails for it."""
    mounted, gone, web = tmp_path / "mounted", tmp_path / "gone", "https://host.invalid/images"
    mounted.mkdir()
    job = settle(reference_root=(str(mounted), str(gone), web))
    with lease.hold(job.config.output) as held:
        job = dataclasses.replace(job, token=held.token)
        assert job.roots == (str(mounted),)
        storage_check.check_storage(job)
        mounted.rmdir()
        with pytest.raises(
            UsageError, match=rf"node {socket.gethostname()} does not see the --reference-root {mounted}"
        ):
            storage_check.check_storage(job)

        def refuse(url: str, limit: int) -> bytes:
            raise PermissionError(13, "refused", url)

        monkeypatch.setattr(storage, "read_bytes", refuse)
        with pytest.raises(StorageError, match=rf"node {socket.gethostname()} may not look at the output"):
            storage_check.check_storage(job)
