"""Photos and image tensors to batches of an ImageNet network, with the preprocessing that timm records for it.

What becomes of 16-bit greys, transparency and EXIF orientation: see bayesq.suite.datasets.pictures.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bayesq.batches import Batch, EncodedExamples
from bayesq.suite.datasets.base import Examples, Photo, photo_sha256
from bayesq.suite.datasets.pictures import decoded
from bayesq.suite.errors import UserError
from bayesq.tensor_file import digest

T = TypeVar("T")
R = TypeVar("R")
# Image tensors are resized by torch, which has no more filters than these; the others become the finer one.
FILTERS = ("bilinear", "bicubic")
# Sets up to this size stay decoded in memory, as bytes: 7,133 photos of 224x224, hence any usual calibration set, which
# is read several times. The 50,000 of ImageNet's validation set would take 7.5 GB.
DECODED_BYTES = 2**30
# Photos that are decoded before they are asked for.
AHEAD = 64


@dataclass(frozen=True)
class ImageExamples(ABC):
    """Images that are normalised batch by batch.

    Attributes:
        labels: [n].
        mean, std: of the network's training pixels in [0, 1], per channel.
    """

    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def _digest(self) -> str:
        """sha256 hex of everything `batches` yields."""

    @abstractmethod
    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        """Images [b, 3, height, width] in [0, 1], not normalised, at the positions [b] of each batch."""

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex over images, labels and what is done to them; computed once."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        return self._digest()

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every image once, in order; the last batch may be smaller.

        Raises:
            UserError: a photo cannot be decoded.
        """
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        positions = torch.arange(len(self)).split(batch_size)
        for index, images in zip(positions, self._images(positions, device), strict=False):
            yield Batch({"x": images.sub_(mean).div_(std)}, self.labels[index].to(device), index)


@dataclass(frozen=True)
class EncodedPhotos(ImageExamples):
    """Photos that are resized and cropped, held as bytes: a quarter of the memory of floats.

    Attributes:
        pixels: [n, 3, height, width] uint8.
    """

    pixels: Tensor

    def _digest(self) -> str:
        return digest({"pixels": self.pixels, "labels": self.labels}, {"mean": str(self.mean), "std": str(self.std)})

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        for index in batches:
            yield self.pixels[index].to(device).float().div_(255)


@dataclass(frozen=True)
class StreamedPhotos(ImageExamples):
    """Photos that are decoded anew in every pass, while the network works on the batch before.

    Attributes:
        photos: n photos.
        decode: a photo to [3, height, width] uint8.
        preprocessing: what `decode` does, for the checksum.
    """

    photos: Sequence[Photo]
    decode: Callable[[Photo], Tensor]
    preprocessing: str

    def _digest(self) -> str:
        state = hashlib.sha256()
        for checksum in in_threads(_content, self.photos, "read photos"):
            state.update(checksum.encode())
        return digest({"labels": self.labels}, {"photos": state.hexdigest(), "preprocessing": self.preprocessing})

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        ahead = prefetched(self.photos, self.decode, max((len(index) for index in batches), default=0))
        for index in batches:
            yield torch.stack([next(ahead) for _ in index]).to(device).float().div_(255)


@dataclass(frozen=True)
class ScaledImages(ImageExamples):
    """Image tensors that are scaled as a whole, batch by batch: at 224 pixels CIFAR-10 takes 6 GB.

    Attributes:
        images: [n, 3, height, width] in [0, 1].
        size: height and width of the network's input.
        interpolation: one of FILTERS.
    """

    images: Tensor
    size: tuple[int, int]
    interpolation: str

    def _digest(self) -> str:
        what = {key: str(getattr(self, key)) for key in ("size", "interpolation", "mean", "std")}
        return digest({"images": self.images, "labels": self.labels}, what)

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        for index in batches:
            images = functional.interpolate(
                self.images[index].to(device), self.size, mode=self.interpolation, antialias=True, align_corners=False
            )
            yield images.clamp_(0, 1)  # cubic filters overshoot


def prefetched(items: Sequence[T], work: Callable[[T], R], ahead: int) -> Iterator[R]:
    """`work` on every item, in order, with up to `ahead` more done in threads before they are asked for.

    Decoding and resizing release the interpreter's lock.
    """
    threads = ThreadPoolExecutor(os.cpu_count())
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when whoever iterates stops early
        threads.shutdown(cancel_futures=True)


def in_threads(work: Callable[[T], R], items: Sequence[T], step: str) -> Iterator[R]:
    """`work` on every item, in order, with a bar."""
    results = prefetched(items, work, AHEAD)
    yield from tqdm(results, total=len(items), desc=step, unit="", disable=None, leave=False)


def _content(photo: Photo) -> str:
    """sha256 hex of the encoded photo."""
    with _named(photo):
        return photo_sha256(photo)


@contextmanager
def _named(photo: Photo) -> Iterator[None]:
    """Name the photo that cannot be read or decoded.

    Raises:
        UserError: the block failed.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{photo} is not a readable photo: {error}") from error


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
        """Decode every photo once.

        A set above DECODED_BYTES is decoded batch by batch instead, in every pass.

        Raises:
            UserError: the inputs are not photos, or one cannot be decoded (of a large set: once its batch comes).
        """
        photos = photos_of(self.model, examples)
        given = examples.labels, tuple(self.config["mean"]), tuple(self.config["std"])
        if len(photos) * prod(self.config["input_size"]) > DECODED_BYTES:
            preprocessing = json.dumps(self.description, sort_keys=True)
            return StreamedPhotos(*given, photos, self._pixels, preprocessing)
        pixels = torch.empty(len(photos), *self.config["input_size"], dtype=torch.uint8)
        # in the order they are stored: of a file of many photos neighbours are read together
        order = sorted(range(len(photos)), key=photos.__getitem__)
        decoded_photos = in_threads(lambda row: self._pixels(photos[row]), order, "decode photos")
        for row, image in zip(order, decoded_photos, strict=True):
            pixels[row] = image
        return EncodedPhotos(*given, pixels)

    def _pixels(self, photo: Photo) -> Tensor:
        """One photo [3, height, width] uint8."""
        with _named(photo):
            return self.crop(decoded(photo.read_bytes()))


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
