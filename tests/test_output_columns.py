"""The table of columns: what is made from it has every column, and nothing else."""

from vcf_batch.config.limits import TOLD_SIZES
from vcf_batch.config.row_settings import settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.sampling import Sampling
from vcf_batch.output import sample_records
from vcf_batch.output_columns import COLUMNS, SETTINGS
from vcf_batch.records import SCORES, Row, Sample


def test_a_sample_has_a_value_for_every_column() -> None:
    row = Row(0, "a", "a red disc")
    settings = settings_of(row, RunConfig(manifest="in", output="out", guidance_scale=2, strength=1))
    record = sample_records.record_of(Sample(row, "failed", settings, error_message="broken"), [], False)
    assert record.keys() == COLUMNS.keys()
    assert settings.keys() == {*SETTINGS}
    assert {name for name, column in COLUMNS.items() if column.origin == "manifest"} == sample_records.of_manifest(
        row, [], False
    ).keys()


def test_every_score_and_every_sampling_setting_has_a_column() -> None:
    assert [name for name in COLUMNS if name in SCORES] == [*SCORES]
    # What a Stable Diffusion XL is told is the run's alone, and run.json has it.
    assert vars(Sampling()).keys() - {*TOLD_SIZES} <= COLUMNS.keys()


def test_a_meaning_is_made_of_sentences_that_fit_into_a_table() -> None:
    for column in COLUMNS.values():
        assert column.meaning.endswith(".") and not {"|", "\n"} & {*column.meaning}, column.name
