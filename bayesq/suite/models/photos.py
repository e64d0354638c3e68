"""Photo files to batches of an ImageNet network, with the preprocessing that timm records for it."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.suite.cache import digest
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Batch, EncodedExamples


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
        """sha256 hex over pixels, labels and normalisation."""
        return digest({"pixels": self.pixels, "labels": self.labels}, {"mean": str(self.mean), "std": str(self.std)})

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every photo once, in order; the last batch may be smaller."""
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, -1, 1, 1)
        for index in torch.arange(len(self)).split(batch_size):
            images = self.pixels[index].to(device).float().div_(255).sub_(mean).div_(std)
            yield Batch({"x": images}, self.labels[index].to(device), index)


class PhotoEncoder:
    """Decodes, resizes and crops as a timm network expects it.

    Args:
        model: the network's name on the command line, for messages.
        module: a timm network; its `pretrained_cfg` holds size, crop, interpolation, mean and std.
    """

    def __init__(self, model: str, module: nn.Module) -> None:
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        self.model = model
        self.config = resolve_data_config({}, model=module)
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

        Raises:
            UserError: the inputs are not photo files, or one cannot be decoded.
        """
        files = photo_files(self.model, examples)
        pixels = torch.empty(len(files), *self.config["input_size"], dtype=torch.uint8)
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,
            tqdm(total=len(files), desc="decode photos", unit="", disable=None, leave=False) as bar,
        ):
            for row, image in enumerate(threads.map(self._pixels, files)):
                pixels[row] = image
                bar.update()
        return EncodedPhotos(pixels, examples.labels, tuple(self.config["mean"]), tuple(self.config["std"]))

    def _pixels(self, file: Path) -> Tensor:
        """One photo [3, height, width] uint8."""
        try:
            with Image.open(file) as image:
                return self.crop(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{file} is not a readable photo: {error}") from error


def photo_files(model: str, examples: Examples) -> Sequence[Path]:
    """The inputs, if they are files of photos.

    Raises:
        UserError: they are something else.
    """
    inputs = examples.inputs
    files = [] if isinstance(inputs, Tensor) else [item for item in inputs if isinstance(item, Path)]
    if not files or len(files) != len(inputs):
        raise UserError(f"model={model} reads photo files, and this data set gives none: choose dataset=imagenet")
    return files
