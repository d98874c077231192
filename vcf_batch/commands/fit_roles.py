"""Fit the projections of the roles ``style`` and ``palette``, from pairs of pictures that differ in one attribute.

What a pair differs in shows as a difference of its aligned tokens. A role keeps the differences of its own attribute
and removes those of the others (docs/roles.md).
"""

import io
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from vcf_batch import storage
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.errors import ModelError, RowError, UsageError, redact
from vcf_batch.manifest import image_files
from vcf_batch.manifest.contract import parse_references
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.models import resolution
from vcf_batch.models.cache import fetch
from vcf_batch.models.loading import load_errors
from vcf_batch.records import Reference
from vcf_batch.setup.run_models import OWN_PROBE
from vcf_batch.vcf.aligner import ImageAligner, load_preprocessing, load_vision_tower
from vcf_batch.vcf.roles import projections
from vcf_batch.vcf.roles.projections import Projection
from vcf_batch.vcf.roles.role import BY_NAME, ROLE_FILE

PAIR_COLUMNS = ("first", "second", "attribute")
"""Columns of a table of pairs: two images, and what they differ in. ``style`` and ``palette`` are fitted; pairs of any
other attribute say what both leave out."""

FITTED = tuple(name for name, role in BY_NAME.items() if role.projected)
"""Roles that need a projection."""

LEAST = 8
"""Fewest pairs of an attribute that a projection is fitted to."""

ENCODED_AT_ONCE = 32
PIECES = 4
"""Pieces along each edge that a picture is shuffled in."""
BLUR = 1 / 40
"""Radius of the blur, as a share of a picture's shorter edge."""

Pair = tuple[str, Image.Image, Image.Image]
"""The attribute that differs, and both pictures."""


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and from how many pairs."""

    file: str
    """Place of the file with the projections."""
    pairs: dict[str, int]
    """Number of pairs by attribute."""
    kept: dict[str, dict[str, float]]
    """By role, the share of the tokens' differences that is left, by attribute: near 1 for its own, near 0 for the
    others."""


def fit_roles(model: str, pairs: str | None, count: int, out: str | None, tell: Callable[[str], object]) -> Fitted:
    """Fit the projections of a model, and write them beside its aligner.

    Args:
        model: a folder or URL with a model that has an aligner; or another name of a model, with ``out``.
        pairs: Parquet file with the columns :data:`PAIR_COLUMNS`, or folder of images, which are then recoloured,
            turned grey, blurred and shuffled. None renders pairs from the world of a model of the tiny family.
        count: number of pairs of each attribute that are rendered, or of images that are used.
        out: the file to write; None is :data:`~vcf_batch.vcf.roles.projections.ROLE_FILE` beside the aligner.
        tell: called with each line about files that are left out.

    Raises:
        ModelError: the model has no aligner or no image encoder.
        UsageError: there are too few pairs, or no place for the file.
        StorageError: the storage failed.
    """
    resolved = resolution.resolve(model)
    if out is None:
        if resolved.kind not in ("directory", "url"):
            raise UsageError(
                f"{model} is no folder of yours to write into: copy the model, or name a file with --out and put it "
                f"beside the copy's aligner as {ROLE_FILE}"
            )
        out = storage.join(resolved.location, f"aligner/{ROLE_FILE}")
    out = storage.absolute(out)
    if storage.exists(out):
        raise UsageError(f"{redact(out)} is there already; runs of the model may depend on it: move it away first")
    if pairs is None and resolution.read_config(resolved, f"{OWN_PROBE}/config.json") is None:
        raise UsageError(f"model {model!r} needs --pairs; only models of the tiny family bring pairs of their own")
    encode = _encoder(fetch(resolved), model)
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for some in _batches(rendered(count) if pairs is None else read(pairs, count, tell)):
        encoded = encode([picture for _, *both in some for picture in both])
        for (attribute, *_), own in zip(some, encoded.reshape(-1, 2, *encoded.shape[1:]), strict=True):
            tokens[attribute].append((own[0], own[1]))
    counts = {attribute: len(each) for attribute, each in tokens.items()}
    for role in FITTED:
        if counts.get(role, 0) < LEAST:
            raise UsageError(
                f"there are {counts.get(role, 0)} pairs that differ in {role} alone; give {LEAST} or more of each of "
                f"{', '.join(FITTED)}"
            )
    found = {role: projections.fit(tokens, role) for role in FITTED}
    storage.publish_bytes(out, projections.to_bytes(found), create=True)
    return Fitted(out, counts, {role: _kept(projection, tokens) for role, projection in found.items()})


def rendered(count: int) -> Iterator[Pair]:
    """Pairs from the world of the tiny family, ``count`` of each of its attributes."""
    from vcf_batch.tiny import pairs  # Imported here because only one family of models needs it.

    yield from pairs.differing(count)


def read(url: str, count: int, tell: Callable[[str], object]) -> Iterator[Pair]:
    """The pairs of a table, or those made of the images of a folder: see :func:`fit_roles`.

    Raises:
        UsageError: the table lacks a column, or names what cannot be used.
        StorageError: the storage failed.
    """
    url = storage.absolute(url)
    if url.endswith(".parquet"):
        yield from _of_table(url)
        return
    found = image_files.find(url, storage.join(url, "pairs.parquet"))
    for line in found.told():
        tell(line)
    reader = ReferenceReader(url, (url,), MAX_PIXELS)
    for number, uri in enumerate(found.uris[:count]):
        try:
            picture = reader.read(parse_references(uri)[0])
        except RowError as error:
            tell(str(error))
            continue
        yield from changed(picture, number)


def changed(picture: Image.Image, seed: int) -> Iterator[Pair]:
    """Pairs of a picture and what differs from it in one attribute: other colours, grey, blurred, and shuffled.

    A picture with an edge of fewer than :data:`PIECES` pixels is not shuffled.

    Args:
        picture: any RGB image.
        seed: seed of the new colours and of the order of the pieces.
    """
    draw = random.Random(seed)
    hue, saturation, value = picture.convert("HSV").split()
    turn = draw.randrange(48, 208)
    turned = hue.point(lambda each: (each + turn) % 256)
    yield "palette", picture, Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    yield "palette", picture, picture.convert("L").convert("RGB")
    yield "style", picture, picture.filter(ImageFilter.GaussianBlur(BLUR * min(picture.size)))
    if min(picture.size) >= PIECES:
        yield "layout", picture, _shuffled(picture, draw)


def _shuffled(picture: Image.Image, draw: random.Random) -> Image.Image:
    """The pieces of a picture in another order."""
    height, width = (edge - edge % PIECES for edge in (picture.height, picture.width))
    pixels = np.asarray(picture)[:height, :width]
    rows = [each for row in np.split(pixels, PIECES) for each in np.split(row, PIECES, axis=1)]
    draw.shuffle(rows)
    lines = [np.concatenate(rows[start : start + PIECES], axis=1) for start in range(0, len(rows), PIECES)]
    return Image.fromarray(np.concatenate(lines))


def _of_table(url: str) -> Iterator[Pair]:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(url)))
    except (pa.ArrowException, FileNotFoundError) as error:
        raise UsageError(f"{redact(url)} is no Parquet file of pairs: {error}") from error
    if missing := [name for name in PAIR_COLUMNS if name not in table.column_names]:
        raise UsageError(
            f"{redact(url)} has no column {missing[0]!r}; a table of pairs has {', '.join(PAIR_COLUMNS)}: two images, "
            "as in a manifest, and what they differ in"
        )
    reader = ReferenceReader(storage.parent(url), (), MAX_PIXELS)
    for number, row in enumerate(table.select(PAIR_COLUMNS).to_pylist()):
        try:
            both = [reader.read(_one_image(row[name], name)) for name in PAIR_COLUMNS[:2]]
        except RowError as error:
            raise UsageError(f"pair {number} of {redact(url)} cannot be used: {error}") from error
        if not isinstance(row["attribute"], str) or not row["attribute"]:
            raise UsageError(f"pair {number} of {redact(url)} does not say what differs in the column 'attribute'")
        yield row["attribute"], both[0], both[1]


def _one_image(value: Any, column: str) -> Reference:
    """The only image of a cell. Raises RowError if it has none or several."""
    named = parse_references(value, column)
    if len(named) != 1:
        raise RowError(f"the column '{column}' has {len(named)} images; a pair has one in each column")
    return named[0]


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    some: list[Pair] = []
    for pair in pairs:
        some.append(pair)
        if len(some) == ENCODED_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _encoder(folder: str, model: str) -> Callable[[Sequence[Image.Image]], Tensor]:
    """Function that gives the aligned tokens ``[B, 1 + P, Dt]`` of pictures."""
    for part in ("aligner", "image_encoder"):
        if not os.path.isdir(os.path.join(folder, part)):
            raise ModelError(f"{model} has no {part}, and roles are fitted to the tokens of an aligner")
    with load_errors(f"the aligner of {model}"):
        aligner = ImageAligner.from_pretrained(os.path.join(folder, "aligner"), dtype=torch.float32).eval()
        tower = load_vision_tower(os.path.join(folder, "image_encoder"), torch.float32).eval()
        processor = load_preprocessing(os.path.join(folder, "feature_extractor"), tower.config.image_size)

    @torch.no_grad()
    def encode(pictures: Sequence[Image.Image]) -> Tensor:
        mean, deviation = processor.image_mean, processor.image_std
        pixels = aligner.preprocess(pictures, tower.config.image_size, mean, deviation)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        aligned: Tensor = aligner(aligner.select_tokens(hidden, "all"))
        return aligned

    return encode


def _kept(projection: Projection, tokens: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """See :attr:`Fitted.kept`."""
    shares = {}
    for attribute, pairs in tokens.items():
        first, second = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
        difference = (second - first).double()
        left = difference @ projection.down.double().mT @ projection.up.double().mT
        shares[attribute] = (left.square().sum() / difference.square().sum().clamp(min=1e-12)).sqrt().item()
    return shares
