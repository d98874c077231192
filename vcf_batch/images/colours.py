"""Colours: pixels are converted from the ICC profile of their file to sRGB, with the perceptual intent of LittleCMS.

A profile whose colours are those of sRGB changes nothing: with the relative colorimetric intent and black point
compensation, no colour of :data:`_PROBE` moves by more than :data:`SAME_COLOUR`. Profiles of other makes and versions
of sRGB move by 1 of 255 at most, those of other spaces by 16 and more.

A profile may come from anyone, so LittleCMS sees only what is needed of it, and only after its sizes are checked.
"""

import functools
import io
import itertools
import logging
import struct
import threading

import numpy as np
from PIL import Image, ImageCms

from vcf_batch.errors import NodeError

MAX_PROFILE_BYTES = 8 * 2**20
"""Largest profile that is used. Those of printing presses, which are the largest, have about 3 MB."""

SAME_COLOUR = 2
"""Largest difference, of 255, between a colour in a profile and the same numbers in sRGB that counts as none."""

_CLASSES = {b"mntr", b"scnr", b"prtr", b"spac"}
"""Classes of profiles that describe the pixels of a picture."""
_CHANNELS = {b"RGB ": 3, b"GRAY": 1, b"CMYK": 4}
_MODES = {b"GRAY": "L", b"CMYK": "CMYK"}
_TABLES = {b"A2B0", b"A2B1"}
_USED = {b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC", b"wtpt", b"bkpt", b"chad", *_TABLES}
"""Tags that a conversion to sRGB needs."""
_MAX_TAGS = 100

_LEVELS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 240, 255)
_PROBE = np.concatenate(
    [np.array([*itertools.product(_LEVELS, repeat=3)], np.uint8), np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)]
)[None]
"""Colours ``[1, N, 3]`` by which a profile is compared with sRGB: 17 levels of each channel, and all greys."""

_log = logging.getLogger(__name__)
_told = threading.Event()


def to_srgb(image: Image.Image, profile: bytes, is_grey: bool, name: str) -> Image.Image:
    """Convert pixels from the space of a profile to sRGB. A profile that cannot be used changes nothing.

    Args:
        image: of mode ``L``, ``RGB``, ``RGBA`` or ``CMYK``. One of RGB or RGBA is changed in place.
        profile: the file's ICC profile.
        is_grey: whether the file has grey pixels, so that its channels are equal. They may have a profile for greys.
        name: the file, for the log. The first profile of a process that cannot be used is told there.

    Raises:
        NodeError: Pillow has no LittleCMS on this machine.
    """
    try:
        space = profile[16:20]
        transform = _transform(profile, "RGBA" if space == b"RGB " and image.mode == "RGBA" else "RGB")
        if (space == b"CMYK") != (image.mode == "CMYK") or (space == b"GRAY" and not is_grey):
            raise ValueError(f"it is one for {space.decode().strip()}, and the pixels are {image.mode}")
        if transform is None:
            return image
        if space == b"CMYK":
            return transform.apply(image)
        if space == b"GRAY":
            converted = transform.apply(image if image.mode == "L" else image.getchannel(0))
            if image.mode == "RGBA":
                converted.putalpha(image.getchannel("A"))
            return converted
        return transform.apply_in_place(image.convert("RGB") if image.mode == "L" else image)
    except ImportError as error:
        raise NodeError(
            "Pillow on this machine is built without LittleCMS, which converts the colours of images; install the "
            "Pillow of PyPI"
        ) from error
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _tell(name, str(error))
        return image


def _tell(name: str, reason: str) -> None:
    if not _told.is_set():
        _told.set()
        _log.warning(
            "%s has a colour profile that cannot be used (%s): its pixels are taken as sRGB, like those of a file "
            "without a profile. Others are not told.",
            name,
            reason,
        )


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None if it changes nothing.

    Args:
        profile: the profile.
        mode: mode of the result, ``RGB`` or ``RGBA``. It is that of the pixels too, if they are neither greys nor CMYK.

    Raises:
        ValueError, OSError: the profile cannot be used.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(_lean(profile)))
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    of_pixels = _MODES.get(profile[16:20], mode)
    if of_pixels != "CMYK":
        probe = _PROBE[:, -256:, :1] if of_pixels == "L" else _PROBE
        colorimetric = ImageCms.ImageCmsTransform(
            source,
            target,
            "L" if of_pixels == "L" else "RGB",
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        moved = colorimetric.apply(Image.fromarray(probe[..., 0] if of_pixels == "L" else probe))
        if np.abs(np.asarray(moved, np.int16) - probe).max() <= SAME_COLOUR:
            return None
    return ImageCms.ImageCmsTransform(source, target, of_pixels, mode, ImageCms.Intent.PERCEPTUAL)


def _lean(profile: bytes) -> bytes:
    """The profile with those tags only that a conversion needs, once their sizes are checked.

    Raises:
        ValueError: the profile is damaged, too large, of another class or for another space.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"it has {len(profile)} bytes, over the limit of {MAX_PROFILE_BYTES}")
    try:
        (size,) = struct.unpack_from(">I", profile)
        if size > len(profile) or profile[36:40] != b"acsp":
            raise ValueError("it is cut off, or no ICC profile")
        kind, space = profile[12:16], profile[16:20]
        if kind not in _CLASSES or space not in _CHANNELS or profile[20:24] not in (b"XYZ ", b"Lab "):
            raise ValueError(f"it is of class {kind!r} for {space!r}")
        (count,) = struct.unpack_from(">I", profile, 128)
        if count > _MAX_TAGS:
            raise ValueError(f"it has {count} tags, over the limit of {_MAX_TAGS}")
        tags = [struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count)]
        kept = [tag for tag in tags if tag[0] in _USED]
        for name, offset, length in kept:
            if offset + length > size:
                raise ValueError(f"its {name.decode()} is cut off")
            if name in _TABLES:
                _check_table(profile[offset : offset + length], _CHANNELS[space])
    except (struct.error, IndexError) as error:
        raise ValueError("it is cut off") from error
    table = b"".join(struct.pack(">4sII", *tag) for tag in kept)
    head = profile[:128] + struct.pack(">I", len(kept)) + table
    # Places of tags stay, as the table only gets shorter.
    return head + profile[len(head) : size]


def _check_table(tag: bytes, channels: int) -> None:
    """Compare the size of a table of colours with its bytes, because LittleCMS reserves memory before it reads them.

    Raises:
        ValueError: the table is larger than its bytes, or of another type.
        struct.error, IndexError: it is cut off.
    """
    kind, inputs, outputs = tag[:4], tag[8], tag[9]
    if kind in (b"mft1", b"mft2"):
        points, held = tag[10] ** inputs * outputs * int(kind[3:]), len(tag)
    elif kind == b"mAB ":
        (place,) = struct.unpack_from(">I", tag, 24)
        points, held = 0, len(tag) - place
        if place:
            points = outputs * tag[place + 16]
            for dimension in tag[place : place + inputs]:
                points *= dimension
    else:
        raise ValueError(f"its table is of the type {kind!r}")
    if inputs != channels or points > held:
        raise ValueError(f"its table of {inputs} channels says {points} bytes and has {held}")
