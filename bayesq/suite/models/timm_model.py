"""Any image classifier of timm, with published weights or a user's checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.defaults import suggestion
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.hub import hub_file
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.checkpoint import from_checkpoint
from bayesq.suite.models.classes import imagenet_rows, keep_rows
from bayesq.suite.models.photos import FILTERS, PhotoEncoder, ScaledImages

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class TimmModel:
    """An architecture of timm; nothing is trained here.

    Attributes: the keys of conf/model/timm.yaml, which explains them.
    """

    architecture: str
    checkpoint: str | None = None
    revision: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise UserError(f"model.image_size={size}: needs a whole number of pixels, or null for the model's own")

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network with its weights; `cache_dir` is not used (the hub has its own cache).

        Raises:
            UserError: timm has no such network, its weights are not available, or the data set does not fit it.
        """
        published = self._published()
        if self.checkpoint is None:
            module, origin = self._pretrained(published, data)
        else:
            network = f"model={self.architecture} with {data.num_classes} classes"
            make = partial(self._create, published, num_classes=data.num_classes)
            module, origin = from_checkpoint(make, self.checkpoint, network)
        encode = _Encoder(self.architecture, module, self.image_size)
        encode.check(data.evaluation)
        description = {"architecture": f"timm {_full_name(published)}", **origin, **encode.describe(data.evaluation)}
        return Network(module, encode, description, {"num_classes": data.num_classes})

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        return self._create(self._published(), num_classes=blueprint["num_classes"])

    def _published(self) -> Any:
        """timm's PretrainedCfg of the architecture; UserError if timm does not know the name or tag."""
        base, _, tag = self.architecture.partition(".")
        if not timm.is_model(base):
            hint = suggestion(base, timm.list_models())
            raise UserError(f"model.name={self.architecture}: timm has no such network{hint}")
        tags = [name for name in get_arch_pretrained_cfgs(base) if name.startswith(f"{base}.")]
        if tag and self.architecture not in tags:
            raise UserError(f"model.name={self.architecture}: timm has {', '.join(tags) or 'no weights'} for {base}")
        return get_pretrained_cfg(self.architecture)

    def _create(self, published: Any, **options: Any) -> nn.Module:
        """The network in evaluation mode, without fused attention; UserError if the image size does not suit it."""
        if published.fixed_input_size:  # for position embeddings or windows; other networks take any size
            options["img_size"] = self.image_size
        try:
            module = initialised(lambda: timm.create_model(self.architecture, **options))
        except (AssertionError, ValueError, TypeError) as error:
            if self.image_size is None:
                raise
            raise UserError(
                f"model.image_size={self.image_size} does not suit model={self.architecture} ({error})"
            ) from error
        for part in module.modules():
            if hasattr(part, "fused_attn"):  # its backward pass is not deterministic on every device
                setattr(part, "fused_attn", False)  # noqa: B010  # mypy wants a tensor or module in an assignment
        return module

    def _pretrained(self, published: Any, data: DataSplits) -> tuple[nn.Module, dict[str, object]]:
        """The network with published weights and the logits of the data set's classes, and their origin."""
        name, instead = _full_name(published), "give the weights with model.checkpoint=FILE"
        if not published.hf_hub_id:
            raise UserError(f"model={name} has no published weights on the hub: {instead}")
        rows = imagenet_rows(published, data, name)
        repository, _, _ = published.hf_hub_id.partition("@")
        file = published.hf_hub_filename or WEIGHTS_FILE
        commit = hub_file(repository, file, self.revision, f"model={name}: {repository}", instead).name
        # given the commit, timm finds the file in the cache and does not ask the hub again
        overlay = {"hf_hub_id": f"{repository}@{commit}"}
        module = self._create(published, pretrained=True, pretrained_cfg_overlay=overlay)
        origin: dict[str, object] = {"fp_source": repository, "revision": commit}
        if rows:
            keep_rows(module, rows, name)
            origin["logits"] = f"{len(rows)} of {published.num_classes}"
        return module, origin


def _full_name(published: Any) -> str:
    """Architecture and tag; without a tag in the name, timm's default."""
    return f"{published.architecture}.{published.tag}" if published.tag else str(published.architecture)


class _Encoder(PhotoEncoder):
    """Encodes photos as PhotoEncoder does, and scales image tensors to the network's input."""

    def check(self, examples: Examples) -> None:
        """Raise a UserError for image tensors without three channels."""
        images = examples.inputs
        if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3):
            raise UserError(
                f"model={self.model} reads colour images, but this data set has "
                f"{'x'.join(map(str, images.shape[1:]))}: choose dataset=imagenet, image_folder or cifar10"
            )

    def describe(self, examples: Examples) -> dict[str, object]:
        """The preprocessing of these examples, as JSON values for the result file."""
        if not isinstance(examples.inputs, Tensor):
            return self.description
        recorded = self.config["interpolation"]
        interpolation = recorded if recorded in FILTERS else FILTERS[-1]
        return self.description | {"crop_pct": 1.0, "crop_mode": "none", "interpolation": interpolation}

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Encoded photos or scaled images; raises as PhotoEncoder does."""
        self.check(examples)
        if not isinstance(examples.inputs, Tensor):
            return super().__call__(examples)
        mean, std, size = (tuple(self.config[key]) for key in ("mean", "std", "input_size"))
        interpolation = str(self.describe(examples)["interpolation"])
        return ScaledImages(examples.labels, mean, std, examples.inputs, (size[1], size[2]), interpolation)
