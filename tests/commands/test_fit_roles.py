"""Fitting the projections of roles: from the tiny world, from a folder of pictures, from a table of pairs."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from support import runs, sd_layouts
from vcf_batch.cli import main
from vcf_batch.commands.fit_roles import changed, fit_roles
from vcf_batch.errors import UsageError
from vcf_batch.models import resolution
from vcf_batch.setup.model_check import stored_roles
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.roles import projections


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return runs.save_model(tmp_path / "model")


def test_tiny_brings_pairs_of_its_own(tmp_path: Path) -> None:
    """What a role keeps of its own attribute is far more than what it keeps of any other."""
    out = tmp_path / "roles.safetensors"
    options = ["--model", "tiny", "--count", "24", "--out", str(out), "--json"]
    told = json.loads(CliRunner().invoke(main, ["model", "fit-roles", *options], catch_exceptions=False).stdout)
    assert told["pairs"] == dict.fromkeys(("palette", "style", "position", "size", "pattern", "shape", "color"), 24)
    for role, shares in told["kept"].items():
        assert shares[role] > 1.5 * max(share for name, share in shares.items() if name != role)
    assert {*projections.read(str(tmp_path))} == {"style", "palette"}


def test_roles_are_fitted_to_a_stable_diffusion_xl(tmp_path: Path) -> None:
    model = sd_layouts.save_vcf_sdxl(tmp_path)
    for number in range(9):
        picture(number).save(tmp_path / f"{number}.png")
    fit_roles(str(model), str(tmp_path), 9, None, lambda line: None)
    pipeline = VCFPipeline.from_pretrained(str(model)).set_up("cpu")
    images = pipeline.generate(["a"] * 2, [picture(1)] * 2, seeds=[1, 1], reference_roles=["style", "all"])
    assert images.isfinite().all() and not torch.equal(images[0], images[1])


def test_pictures_are_recoloured_turned_grey_blurred_and_shuffled(model: Path, tmp_path: Path) -> None:
    """The file lies beside the aligner, and makes another model of it."""
    for number in range(9):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "note.txt").write_text("no image")
    before, told = resolution.resolve(str(model)), list[str]()
    assert stored_roles(before) == set()
    found = fit_roles(str(model), str(tmp_path), 9, None, told.append)
    assert found.pairs == {"palette": 18, "style": 9, "layout": 9}
    after = resolution.resolve(str(model))
    assert after.identity != before.identity and stored_roles(after) == {"style", "palette"}
    with pytest.raises(UsageError, match=r"roles\.safetensors is there already"):
        fit_roles(str(model), str(tmp_path), 9, None, told.append)


def test_a_change_is_of_one_kind() -> None:
    first = picture(1)
    made = {(kind, number): other for number, (kind, _, other) in enumerate(changed(first, 5))}
    assert [kind for kind, _ in made] == ["palette", "palette", "style", "layout"]
    recoloured, grey, blurred, shuffled = (np.asarray(each, int) for each in made.values())
    pixels = np.asarray(first, int)
    assert np.abs(recoloured.max(2) - pixels.max(2)).max() <= 2, "the same brightness of each pixel"
    assert (grey == grey[..., :1]).all() and not (pixels == recoloured).all()
    assert blurred.std() < pixels.std()
    assert sorted(map(tuple, shuffled.reshape(-1, 3))) == sorted(map(tuple, pixels.reshape(-1, 3)))


@pytest.mark.parametrize("size", [(1, 1), (2000, 3)])
def test_a_picture_of_few_pixels_is_not_shuffled(size: tuple[int, int]) -> None:
    """Its pieces would be empty, which no encoder takes."""
    made = [*changed(Image.new("RGB", size, "red"), 5)]
    assert [kind for kind, *_ in made] == ["palette", "palette", "style"]
    assert all(picture.size == size for _, *both in made for picture in both)


def test_pairs_of_a_table(model: Path, tmp_path: Path) -> None:
    def table(attributes: list[str | None]) -> str:
        rows = [
            {"first": {"bytes": png(picture(2 * n))}, "second": {"bytes": png(picture(2 * n + 1))}, "attribute": name}
            for n, name in enumerate(attributes)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
        return str(tmp_path / "pairs.parquet")

    with pytest.raises(UsageError, match="0 pairs that differ in palette alone"):
        fit_roles(str(model), table(["style"] * 8), 9, None, print)
    with pytest.raises(UsageError, match=r"pair 1 of .* does not say what differs"):
        fit_roles(str(model), table(["style", None]), 9, None, print)
    found = fit_roles(str(model), table(["style", "palette", "subject"] * 8), 9, None, print)
    assert found.pairs == {"style": 8, "palette": 8, "subject": 8}


def test_what_cannot_be_fitted_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiny is no folder of yours"):
        fit_roles("tiny", None, 9, None, print)
    with pytest.raises(UsageError, match="needs --pairs"):
        fit_roles(str(model), None, 9, str(tmp_path / "roles.safetensors"), print)
    (tmp_path / "pairs.parquet").write_bytes(b"text")
    with pytest.raises(UsageError, match="is no Parquet file of pairs"):
        fit_roles(str(model), str(tmp_path / "pairs.parquet"), 9, None, print)
    (tmp_path / "pairs.csv").write_text("first,second,attribute")
    with pytest.raises(UsageError, match=r"pairs\.csv is a file; name the folder that holds the images$"):
        fit_roles(str(model), str(tmp_path / "pairs.csv"), 9, None, print)
    pq.write_table(pa.table({"first": ["a.png"]}), tmp_path / "pairs.parquet")
    with pytest.raises(UsageError, match="has no column 'second'"):
        fit_roles(str(model), str(tmp_path / "pairs.parquet"), 9, None, print)


@pytest.mark.parametrize("images", [[], ["a.png", "b.png"]], ids=["none", "two"])
def test_a_pair_has_one_image_in_each_column(model: Path, tmp_path: Path, images: list[str]) -> None:
    """A list in the column of a pair is not cut to its first image."""
    row = {"first": images, "second": ["a.png"], "attribute": "style"}
    schema = pa.schema({"first": pa.list_(pa.string()), "second": pa.list_(pa.string()), "attribute": pa.string()})
    pq.write_table(pa.Table.from_pylist([row], schema), tmp_path / "pairs.parquet")
    with pytest.raises(UsageError, match=rf"pair 0 of .* the column 'first' has {len(images)} images; a pair has one"):
        fit_roles(str(model), str(tmp_path / "pairs.parquet"), 9, None, print)
