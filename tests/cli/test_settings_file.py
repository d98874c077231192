"""Files of settings: the record of a run, and what a command line amounts to."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from support import runs
from vcf_batch.cli import main, settings_file
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output.output import Output


@pytest.mark.parametrize("settled", [None, {"naive": 0.3, "concat": 1.0, "cross_attention": 0.3, "ip_adapter": 1.0}])
def test_the_record_of_a_run_is_a_file_of_its_settings(tmp_path: Path, settled: dict[str, float] | None) -> None:
    """Strengths that were left to their defaults are left to them again."""
    output = tmp_path / "out"
    runs.begin_output(runs.write_manifest(tmp_path / "in", 4), output, 2, default_strengths=settled)
    values = settings_file.read(str(output / "run.json"))
    given = None if settled else 1.0
    assert RunConfig.from_mapping(values) == Output(output).config.replace(default_strengths=None, strength=given)


def test_printed_settings_are_a_file_of_settings(tmp_path: Path) -> None:
    arguments = ["generate", "in.parquet", "out", "--steps", "7", "--reference-root", "/a", "--negative-prompt", "a: b"]
    printed = CliRunner().invoke(main, [*arguments, "--dump-config"])
    assert printed.exit_code == 0
    file = tmp_path / "run.yaml"
    file.write_text(printed.output)
    assert RunConfig.from_mapping(settings_file.read(str(file))) == RunConfig(
        manifest="in.parquet", output="out", steps=7, reference_root=("/a",), negative_prompt="a: b"
    )
    assert yaml.safe_load(printed.output)["guidance_scale"] is None
    assert not (tmp_path / "out").exists()


def test_printed_settings_have_no_credentials() -> None:
    arguments = ["generate", "https://me:secret@host/in.parquet", "out", "--reference-root", "s3://k:secret@bucket/a"]
    printed = CliRunner().invoke(main, [*arguments, "--dump-config"]).output
    assert "secret" not in printed and "bucket/a" in printed
