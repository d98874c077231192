"""The captioned pictures that take the place of a user's own data."""

from pathlib import Path

from click.testing import CliRunner

from vcf_batch.models.embedded import SHAPES
from vcf_batch.tiny.captioned import main
from vcf_batch.training.captions import CaptionedData


def test_pictures_have_a_caption_of_everything_and_one_of_looks(tmp_path: Path) -> None:
    """The latter names neither the object nor anything else that a prompt names, and is taken by its field alone."""
    assert CliRunner().invoke(main, [str(tmp_path), "--scenes", "6"]).exit_code == 0
    found = {}
    for field in (None, "looks"):
        data = CaptionedData.open(str(tmp_path), caption_column=field)
        found[field] = [pair.captions for pair in data.read(data.files)]
    assert all(len(captions) == 1 for captions in (*found[None], *found["looks"]))
    for (everything,), (looks,) in zip(found[None], found["looks"], strict=True):
        assert any(shape in everything for shape in SHAPES) and not any(shape in looks for shape in SHAPES)
