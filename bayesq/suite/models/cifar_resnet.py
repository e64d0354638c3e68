"""The CIFAR ResNets of He et al. (2016), section 4.2: three stages of 16, 32 and 64 channels on images of 32x32.

Layer names and shortcuts are those of the published checkpoints of akamaster/pytorch_resnet_cifar10. The shortcuts
("option A") have no weights: all weights are in 3x3 convolutions and the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayesq.batches import EncodedExamples, TensorExamples
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.checkpoint import from_checkpoint

CLASSES = 10
WIDTHS = (16, 32, 64)
# The checkpoints were trained with the statistics of ImageNet, not of CIFAR.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 32


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [b, in, h, w] to [b, out, h / stride, w / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.missing = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th pixel; the missing channels are zero, half of them on each side."""
        side = self.missing // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, self.missing - side))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [b, out, h / stride, w / stride]."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of `blocks` blocks each, global average pooling and a linear head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, 10] for images [b, 3, 32, 32]."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class CifarResNet:
    """A CIFAR ResNet with the weights of a checkpoint; nothing is trained here.

    `depth` is the number of layers with weights, 6 n + 2; `read_checkpoint` reads the checkpoint.
    """

    depth: int
    checkpoint: str

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise UserError(f"model.depth={self.depth} is not possible: choose 6 n + 2, such as 20 or 56")

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network with the checkpoint's weights; `cache_dir` is not used.

        Raises:
            UserError: the data set does not have 32x32 colour images of ten classes, or the checkpoint is missing,
                unreadable or of another network.
        """
        name = f"model=cifar_resnet{self.depth}"
        mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)

        def encode(examples: Examples) -> EncodedExamples:
            return TensorExamples({"x": (_images(name, examples, data) - mean) / std}, examples.labels)

        _images(name, data.evaluation, data)
        module, origin = from_checkpoint(lambda: self.bare({}), self.checkpoint, name)
        architecture = f"CIFAR ResNet-{self.depth}, option-A shortcuts"
        preprocessing = {"mean": list(MEAN), "std": list(STD), "image_size": IMAGE_SIZE}
        return Network(module, encode, {"architecture": architecture, **origin, **preprocessing})

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode; `blueprint` is not used."""
        return initialised(lambda: ResNet((self.depth - 2) // 6))


def _images(name: str, examples: Examples, data: DataSplits) -> Tensor:
    """The images [n, 3, 32, 32] in [0, 1]; UserError for another size or number of classes."""
    images = examples.inputs
    if isinstance(images, Tensor) and images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE) and data.num_classes == CLASSES:
        return images
    given = "x".join(map(str, images.shape[1:])) if isinstance(images, Tensor) else "other inputs"
    raise UserError(
        f"{name} reads 3x{IMAGE_SIZE}x{IMAGE_SIZE} images of {CLASSES} classes, but this data set has {given} and "
        f"{data.num_classes} classes: choose dataset=cifar10"
    )
