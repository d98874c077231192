"""The LoRAs of a run, told wherever its models are."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch.cli import main
from vcf_batch.output.output import Output
from vcf_batch.report import card, contact_sheet, page, status

LORA = {"name": "ink.safetensors", "identity": "f" * 64, "scale": 0.5}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Four rows in two shards; the record names a LoRA, as that of a run with ``--lora INK=ink.safetensors:0.5``."""
    runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "out", 2)
    file = tmp_path / "out/run.json"
    document = json.loads(file.read_text())
    document["models"]["lora"] = {"INK": LORA}
    file.write_text(json.dumps(document))
    return tmp_path / "out"


def test_a_status_names_them(output: Path) -> None:
    found = status.read(str(output))
    assert "  lora      INK, ink.safetensors at 0.5\n" in str(found)
    assert found.to_dict()["loras"] == ["INK, ink.safetensors at 0.5"]


def test_card_and_page_name_them(output: Path) -> None:
    assert f"| lora INK | `ink.safetensors` | `{'f' * 16}` |" in card.render(Output(str(output)))
    assert f"ink.safetensors ({'f' * 16})" in page.render(Output(str(output)))


def test_a_contact_sheet_has_a_line_for_each(output: Path) -> None:
    with_lora = contact_sheet.contact_sheet(str(output), 4)
    document = json.loads((output / "run.json").read_text())
    del document["models"]["lora"]
    (output / "run.json").write_text(json.dumps(document))
    without = contact_sheet.contact_sheet(str(output), 4)
    assert with_lora.height > without.height and with_lora.width == without.width


def test_an_export_and_a_copy_name_them(output: Path, tmp_path: Path) -> None:
    for command, target in (("export", tmp_path / "exported"), ("push", tmp_path / "pushed")):
        result = CliRunner().invoke(main, [command, str(output), str(target)])
        assert result.exit_code == 0, result.output
    [source] = json.loads((tmp_path / "exported/export.json").read_text())["sources"]
    assert source["models"]["lora INK"] == {"name": "ink.safetensors", "identity": "f" * 64}
    assert "ink.safetensors" in (tmp_path / "pushed/README.md").read_text()
