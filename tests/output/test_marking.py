"""Every image says that it is synthetic and how it was made, in each format, and its pixels stay as they are."""

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from support import runs
from vcf_batch import images
from vcf_batch.output import marking, shards
from vcf_batch.records import Row, Sample

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
OWN = f"{{{marking.NAMESPACE}}}"
SAMPLE = Sample(
    Row(1, "k-1", "<a prompt>"),
    "success",
    {
        "seed": 7,
        "reference_weights": [0.25, 0.75],
        "negative_prompt": "<a secret>",
        "fusion": "concat",
        "strength": None,
        "guidance_scale": 5.0,
    },
)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)


def properties(data: bytes) -> dict[str, str]:
    """The XMP properties of an image file, by qualified name."""
    with Image.open(io.BytesIO(data)) as image:
        [description] = ElementTree.fromstring(image.info["xmp"]).iter(
            "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
        )
    return dict(description.attrib)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpg"])
def test_the_mark_is_read_back_and_leaves_the_pixels_alone(image_format: str) -> None:
    plain = images.encode(PIXELS, image_format)
    data = images.encode(PIXELS, image_format, marking.xmp(SAMPLE, "ab12"))
    assert data == images.encode(PIXELS, image_format, marking.xmp(SAMPLE, "ab12"))
    assert images.decode(data, PIXELS.size) == images.decode(plain, PIXELS.size)
    found = properties(data)
    assert found[f"{IPTC}DigitalSourceType"].endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    assert {name.removeprefix(OWN): value for name, value in found.items() if name.startswith(OWN)} == {
        "key": "k-1",
        "model": "ab12",
        "seed": "7",
        "reference_weights": "[0.25, 0.75]",
        "fusion": "concat",
        "guidance_scale": "5.0",
    }


def test_a_runs_images_are_marked_unless_it_says_otherwise(tmp_path: Path) -> None:
    """The same pixels, with a mark that names neither prompt nor reference, or without one."""
    model, manifest = runs.save_model(tmp_path / "model"), runs.write_manifest(tmp_path / "in", 3)
    loaded = runs.load(manifest, tmp_path / "out", model, steps=1)
    samples = []
    for mark in (True, False):
        runs.commit(runs.another(loaded, manifest, tmp_path / str(mark), mark=mark))
        samples.append(list(shards.read_samples(str(tmp_path / str(mark) / "00000.tar"))))
    for marked, plain in zip(*samples, strict=True):
        assert properties(marked["png"])[f"{OWN}key"] == marked["__key__"]
        assert properties(marked["png"])[f"{OWN}model"] == loaded.components.model
        assert marked["txt"].encode() not in marked["png"] and b"reference0.png" not in marked["png"]
        with Image.open(io.BytesIO(plain["png"])) as image:
            assert not image.info
        assert images.decode(marked["png"], 32 * 32) == images.decode(plain["png"], 32 * 32)
