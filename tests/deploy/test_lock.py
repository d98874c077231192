"""requirements.lock, what images install, beside constraints.txt, what tests install."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
CUDA = re.compile(r"nvidia-|cuda-|triton$")
"""The names of what torch's build with CUDA needs besides."""


def pins(text: str) -> dict[str, str]:
    """Versions by name."""
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M)}


@pytest.fixture(scope="module")
def needed() -> set[str]:
    """All that the package with its extras for images needs, directly or not, in this environment."""
    found: set[tuple[str, str]] = set()
    left = [("vcf-batch", extra) for extra in ("", "plots", "s3")]
    while left:
        if (each := left.pop()) in found:
            continue
        found.add(each)
        name, extra = each
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]
    return {name for name, _ in found} - {"vcf-batch"}


def test_it_has_the_versions_that_tests_run_with() -> None:
    """Every version is that of constraints.txt; besides, there is only CUDA, and setuptools for torch."""
    locked, tested = pins(LOCK), pins((ROOT / "constraints.txt").read_text())
    assert {name: locked[name] for name in locked.keys() & tested.keys()}.items() <= tested.items()
    assert {name for name in locked.keys() - tested.keys() if not CUDA.match(name)} <= {"setuptools"}


def test_it_covers_all_that_the_package_needs(needed: set[str]) -> None:
    assert len(needed) > 50
    assert needed - pins(LOCK).keys() == set()


def test_every_requirement_has_a_hash() -> None:
    """Nothing is installed that was not named by the sha256 of its file."""
    entries = re.sub(r"^#.*\n", "", LOCK, flags=re.M).replace("\\\n", " ").splitlines()
    assert len(entries) == len(pins(LOCK)) > 100
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( ;[^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+", entry), entry[:100]


def test_torch_is_the_build_with_cuda_from_the_public_index() -> None:
    """No local build and no address of an index or a file is in it."""
    locked = pins(LOCK)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= locked.keys()
    assert "+" not in locked["torch"]
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK
