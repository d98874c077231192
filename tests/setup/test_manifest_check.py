"""A manifest is checked before a run, once."""

from collections.abc import Callable

import pytest

from vcf_batch.manifest.manifest import Manifest
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job


def test_ids_are_not_checked_again_on_a_resume(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniqueness is not rechecked on a resume of the same manifest."""
    claim.claim(settle())
    monkeypatch.setattr(Manifest, "check", pytest.fail)
    settle()
