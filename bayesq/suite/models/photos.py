"""Batches of an ImageNet network from photos or image tensors, with the preprocessing that timm records for it.

See `bayesq.suite.datasets.pictures` for 16-bit greys, transparency and EXIF orientation.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TypeVar

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn import functional

from bayesq.batches import Batch, EncodedExamples
from bayesq.progress import bar
from bayesq.suite.datasets.base import Examples, Photo, photo_sha256
from bayesq.suite.datasets.pictures import decoded
from bayesq.suite.errors import UserError
from bayesq.tensor_file import digest

T = TypeVar("T")
R = TypeVar("R")
# The filters that torch has for image tensors. All others are replaced by the last one.
FILTERS = ("bilinear", "bicubic")
# Sets up to this size stay decoded in memory. This is 7,133 photos of 224x224, more than a usual calibration set,
# which is read several times. The 50,000 photos of ImageNet's validation set would take 7.5 GB.
DECODED_BYTES = 2**30
# Number of photos that are decoded in advance.
AHEAD = 64


@dataclass(frozen=True)
class ImageExamples(ABC):
    """Images that are normalised batch by batch.

    Attributes:
        labels: [n].
        mean, std: per channel, of the network's training pixels in [0, 1].
    """

    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    @abstractmethod
    def _checksum(self) -> str: ...

    @abstractmethod
    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        """For each batch of positions [b], the images [b, 3, height, width] in [0, 1], not normalised."""

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex of images, labels and preprocessing; computed once."""
        return self._checksum

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every image once, in order; the last batch may be smaller. UserError if a photo cannot be decoded."""
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        positions = torch.arange(len(self)).split(batch_size)
        for index, images in zip(positions, self._images(positions, device), strict=False):
            yield Batch({"x": images.sub_(mean).div_(std)}, self.labels[index].to(device), index)


@dataclass(frozen=True)
class EncodedPhotos(ImageExamples):
    """Resized and cropped photos in memory; uint8 takes a quarter of the memory of float32.

    Attributes:
        pixels: [n, 3, height, width] uint8.
    """

    pixels: Tensor

    @cached_property
    def _checksum(self) -> str:
        return digest({"pixels": self.pixels, "labels": self.labels}, {"mean": str(self.mean), "std": str(self.std)})

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        for index in batches:
            yield self.pixels[index].to(device).float().div_(255)


@dataclass(frozen=True)
class StreamedPhotos(ImageExamples):
    """Photos that are decoded again in every pass, while the network works on the previous batch.

    Attributes:
        photos: n photos.
        decode: turns a photo into [3, height, width] uint8.
        preprocessing: description of `decode`, for the checksum.
    """

    photos: Sequence[Photo]
    decode: Callable[[Photo], Tensor]
    preprocessing: str

    @cached_property
    def _checksum(self) -> str:
        state = hashlib.sha256()
        for checksum in in_threads(partial(_named, photo_sha256), self.photos, "read photos"):
            state.update(checksum.encode())
        return digest({"labels": self.labels}, {"photos": state.hexdigest(), "preprocessing": self.preprocessing})

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        ahead = prefetched(self.photos, self.decode, max((len(index) for index in batches), default=0))
        for index in batches:
            yield torch.stack([next(ahead) for _ in index]).to(device).float().div_(255)


@dataclass(frozen=True)
class ScaledImages(ImageExamples):
    """Image tensors that are scaled batch by batch, without a crop. At 224 pixels, 10,000 images would take 6 GB.

    Attributes:
        images: [n, 3, height, width] in [0, 1].
        size: height and width of the network's input.
        interpolation: one of FILTERS.
    """

    images: Tensor
    size: tuple[int, int]
    interpolation: str

    @cached_property
    def _checksum(self) -> str:
        what = {key: str(getattr(self, key)) for key in ("size", "interpolation", "mean", "std")}
        return digest({"images": self.images, "labels": self.labels}, what)

    def _images(self, batches: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        for index in batches:
            images = functional.interpolate(
                self.images[index].to(device), self.size, mode=self.interpolation, antialias=True, align_corners=False
            )
            yield images.clamp_(0, 1)  # cubic filters overshoot


def prefetched(items: Sequence[T], work: Callable[[T], R], ahead: int) -> Iterator[R]:
    """Results of `work` on every item, in order; threads compute up to `ahead` results in advance.

    Threads are enough, because decoding and resizing release the interpreter's lock.
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
    finally:  # also when the consumer stops early
        threads.shutdown(cancel_futures=True)


def in_threads(work: Callable[[T], R], items: Sequence[T], step: str) -> Iterator[R]:
    """Results of `work` on every item, in order, with a progress bar."""
    yield from bar(prefetched(items, work, AHEAD), step, len(items))


def _named(work: Callable[[Photo], R], photo: Photo) -> R:
    """`work(photo)`; if reading or decoding fails, a UserError that names the photo."""
    try:
        return work(photo)
    except (OSError, ValueError) as error:
        raise UserError(f"{photo} is not a readable photo ({error}): replace or remove it") from error


class PhotoEncoder:
    """Decodes, resizes and crops photos as a timm network expects them.

    The `pretrained_cfg` of `module` holds size, crop, interpolation, mean and std; `image_size` in pixels replaces the
    size. Messages name the network by `model`.
    """

    def __init__(self, model: str, module: nn.Module, image_size: int | None = None) -> None:
        self.model = model
        size = {} if image_size is None else {"input_size": (3, image_size, image_size)}
        self.config = resolve_data_config(size, model=module)
        self.crop: Callable[[Image.Image], Tensor] = create_transform(**self.config, is_training=False, normalize=False)

    @property
    def description(self) -> dict[str, object]:
        """The preprocessing, as JSON values for the result file."""
        config = self.config
        same = {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation")}
        lists = {key: list(config[key]) for key in ("mean", "std")}
        return {"image_size": list(config["input_size"][1:]), **same, **lists}

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Decode every photo once; sets above DECODED_BYTES are decoded batch by batch, in every pass.

        Raises:
            UserError: the inputs are not photos, or one cannot be decoded (in a large set: when its batch is read).
        """
        photos = [] if isinstance(examples.inputs, Tensor) else [x for x in examples.inputs if isinstance(x, Photo)]
        if not photos or len(photos) != len(examples):
            raise UserError(
                f"model={self.model} reads photo files, and this data set has none: choose dataset=imagenet or "
                "dataset=image_folder"
            )
        given = examples.labels, tuple(self.config["mean"]), tuple(self.config["std"])
        if len(photos) * prod(self.config["input_size"]) > DECODED_BYTES:
            preprocessing = json.dumps(self.description, sort_keys=True)
            return StreamedPhotos(*given, photos, self._pixels, preprocessing)
        pixels = torch.empty(len(photos), *self.config["input_size"], dtype=torch.uint8)
        # in storage order, because neighbours in one file are read together
        order = sorted(range(len(photos)), key=photos.__getitem__)
        decoded_photos = in_threads(lambda row: self._pixels(photos[row]), order, "decode photos")
        for row, image in zip(order, decoded_photos, strict=True):
            pixels[row] = image
        return EncodedPhotos(*given, pixels)

    def _pixels(self, photo: Photo) -> Tensor:
        """One photo [3, height, width] uint8."""
        return _named(lambda photo: self.crop(decoded(photo.read_bytes())), photo)
