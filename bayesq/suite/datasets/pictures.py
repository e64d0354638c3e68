"""Encoded photos of any kind of file to 8-bit RGB, the way published accuracies are measured.

As in the evaluation code of torchvision and timm, the EXIF orientation of a JPEG, PNG or WebP is not applied,
transparency and colour profiles are ignored, and only the first frame of an animation is read. Unlike there,
16-bit greys are scaled to 8 bits; Pillow alone would make all values above 255 white.
"""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# Some releases of Pillow decode the 16-bit greys of these formats to mode I, from 0 to 65535.
SIXTEEN_BITS = ("PNG", "PPM")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two tags of TIFF, and a value of the second


def decoded(content: bytes) -> Image.Image:
    """An encoded photo in mode RGB; ValueError if it cannot be decoded, or its pixels have no known white."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return as_rgb(image)
    except UnidentifiedImageError as error:  # Pillow's message contains a memory address
        raise ValueError("it is not an image of a kind that Pillow reads") from error
    # Pillow raises these for damaged files, depending on the format.
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened photo in mode RGB; 16 bits are cut to the upper 8, as Pillow cuts those of colour images.

    Raises ValueError if its pixels have no known white, and what Pillow raises for a damaged file.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        tags: dict[int, Any] = getattr(image, "tag_v2", {})
        (bits, *_) = tags.get(BITS_PER_SAMPLE, (16,))
        grey = np.minimum(np.asarray(image).astype(np.int64) >> (bits - 8), 255).astype(np.uint8)
        inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            "nothing says which of its grey levels is white: save it with 8 bits, or with 16 unsigned bits"
        )
    image.info.pop("transparency", None)  # Pillow would warn that it ignores the transparency of a palette
    return image.convert("RGB")
