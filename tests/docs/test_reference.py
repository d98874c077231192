"""docs/reference.md and docs/api.md are what the code says."""

import runpy
from pathlib import Path

import vcf_batch

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date() -> None:
    """After a change of options or columns: `make reference`."""
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["reference"]()
    assert (ROOT / "docs/reference.md").read_text() == made + "\n", "run `make reference`"


def test_the_page_of_public_names_is_up_to_date() -> None:
    """After a change of docstrings or settings: `make reference`. Each public name is on it, once."""
    made = runpy.run_path(str(ROOT / "docs/make_api.py"))
    assert (ROOT / "docs/api.md").read_text() == made["api"](), "run `make reference`"
    told = [name for names in made["GROUPS"].values() for name in names]
    assert sorted(told) == sorted({*vcf_batch.__all__} - {"__version__"})
