"""Photos to batches of an ImageNet network, with the preprocessing that timm records for it.

What becomes of 16-bit greys, transparency and EXIF orientation: see bayesq.suite.datasets.pictures.
"""

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.batches import Batch
from bayesq.suite.datasets.base import Examples, StoredPhoto, photo_sha256
from bayesq.suite.datasets.pictures import decoded
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import EncodedExamples
from bayesq.tensor_file import digest

Photo = Path | StoredPhoto
# Sets up to this size stay decoded in memory, as bytes: 7,133 photos of 224x224, hence any usual calibration set, which
# is read several times. The 50,000 of ImageNet's validation set would take 7.5 GB.
DECODED_BYTES = 2**30


@dataclass(frozen=True)
class EncodedPhotos:
    """Photos that are resized and cropped, but normalised batch by batch: a quarter of the memory of floats.

    Attributes:
        pixels: [n, 3, height, width] uint8.
        labels: [n].
        mean, std: of the network's training pixels in [0, 1], per channel.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex over pixels, labels and normalisation; computed once."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        return digest({"pixels": self.pixels, "labels": self.labels}, {"mean": str(self.mean), "std": str(self.std)})

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every photo once, in order; the last batch may be smaller."""
        for index in torch.arange(len(self)).split(batch_size):
            images = normalised(self.pixels[index].to(device), self.mean, self.std)
            yield Batch({"x": images}, self.labels[index].to(device), index)


@dataclass(frozen=True)
class StreamedPhotos:
    """Photos that are decoded anew in every pass, while the network works on the batch before.

    Attributes:
        photos: n photos.
        decode: a photo to [3, height, width] uint8.
        preprocessing: what `decode` does, for the checksum.
        labels, mean, std: as in EncodedPhotos.
    """

    photos: Sequence[Photo]
    decode: Callable[[Photo], Tensor]
    preprocessing: str
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex over the photos' encoded bytes, labels and preprocessing; nothing is decoded; computed once."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,
            tqdm(total=len(self), desc="read photos", unit="", disable=None, leave=False) as bar,
        ):
            state = hashlib.sha256()
            for found in threads.map(_content, self.photos):
                state.update(found.encode())
                bar.update()
        return digest({"labels": self.labels}, {"photos": state.hexdigest(), "preprocessing": self.preprocessing})

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every photo once, in order; about two batches are decoded at any time.

        Raises:
            UserError: a photo cannot be decoded.
        """
        ahead = prefetched(self.photos, self.decode, batch_size)
        for index in torch.arange(len(self)).split(batch_size):
            pixels = torch.stack([next(ahead) for _ in index])
            yield Batch({"x": normalised(pixels.to(device), self.mean, self.std)}, self.labels[index].to(device), index)


def prefetched(photos: Sequence[Photo], decode: Callable[[Photo], Tensor], ahead: int) -> Iterator[Tensor]:
    """`decode` of every photo, in order, with up to `ahead` more decoded in threads before they are asked for."""
    threads = ThreadPoolExecutor(os.cpu_count())
    waiting: deque[Future[Tensor]] = deque()
    try:
        for photo in photos:
            waiting.append(threads.submit(decode, photo))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when whoever iterates stops early
        threads.shutdown(cancel_futures=True)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Network inputs [b, 3, height, width] float32 of pixels [b, 3, height, width] uint8."""
    shape = (1, -1, 1, 1)
    shift, scale = (torch.tensor(values, device=pixels.device).view(shape) for values in (mean, std))
    return pixels.float().div_(255).sub_(shift).div_(scale)


def _content(photo: Photo) -> str:
    """sha256 hex of the encoded photo.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return photo_sha256(photo)
    except (OSError, ValueError) as error:
        raise unreadable(photo, error) from error


def unreadable(photo: Photo, error: Exception) -> UserError:
    """The one line for a photo that cannot be read or decoded."""
    return UserError(f"{photo} is not a readable photo: {error}")


class PhotoEncoder:
    """Decodes, resizes and crops as a timm network expects it.

    Args:
        model: the network's name on the command line, for messages.
        module: a timm network; its `pretrained_cfg` holds size, crop, interpolation, mean and std.
        image_size: pixels a side, if not the network's own.
    """

    def __init__(self, model: str, module: nn.Module, image_size: int | None = None) -> None:
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        self.model = model
        size = {} if image_size is None else {"input_size": (3, image_size, image_size)}
        self.config = resolve_data_config(size, model=module)
        self.crop: Callable[[Image.Image], Tensor] = create_transform(**self.config, is_training=False, normalize=False)

    @property
    def description(self) -> dict[str, object]:
        """The preprocessing, as JSON values for the result file."""
        config = self.config
        return {
            "image_size": list(config["input_size"][1:]),
            "crop_pct": config["crop_pct"],
            "crop_mode": config["crop_mode"],
            "interpolation": config["interpolation"],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
        }

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Decode every photo once, in threads: the decoder and the resizing release the interpreter's lock.

        A set above DECODED_BYTES is decoded batch by batch instead, in every pass.

        Raises:
            UserError: the inputs are not photos, or one cannot be decoded (of a large set: once its batch comes).
        """
        photos = photos_of(self.model, examples)
        mean, std = tuple(self.config["mean"]), tuple(self.config["std"])
        if len(photos) * prod(self.config["input_size"]) > DECODED_BYTES:
            preprocessing = json.dumps(self.description, sort_keys=True)
            return StreamedPhotos(photos, self._pixels, preprocessing, examples.labels, mean, std)
        pixels = torch.empty(len(photos), *self.config["input_size"], dtype=torch.uint8)
        # in the order they are stored: of a file of many photos neighbours are read together
        order = sorted(range(len(photos)), key=photos.__getitem__)
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,
            tqdm(total=len(photos), desc="decode photos", unit="", disable=None, leave=False) as bar,
        ):
            for row, image in zip(order, threads.map(lambda row: self._pixels(photos[row]), order), strict=True):
                pixels[row] = image
                bar.update()
        return EncodedPhotos(pixels, examples.labels, mean, std)

    def _pixels(self, photo: Photo) -> Tensor:
        """One photo [3, height, width] uint8."""
        try:
            return self.crop(decoded(photo if isinstance(photo, Path) else io.BytesIO(photo.read())))
        except (OSError, ValueError) as error:
            raise unreadable(photo, error) from error


def photos_of(model: str, examples: Examples) -> Sequence[Photo]:
    """The inputs, if they are photos.

    Raises:
        UserError: they are something else.
    """
    inputs = examples.inputs
    photos = [] if isinstance(inputs, Tensor) else [item for item in inputs if isinstance(item, Photo)]
    if not photos or len(photos) != len(inputs):
        raise UserError(f"model={model} reads photo files, and this data set gives none: choose dataset=imagenet")
    return photos
