"""A sentence encoder with mean pooling and a linear head that is fitted on the train split: MiniLM-L6 and MPNet-base.

Sentence vectors are means over token vectors, as in the training of both encoders.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.progress import bar, elapsed
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, fit_once, initialised
from bayesq.suite.models.text import SequenceClassifier, config_of, texts_of, token_examples
from bayesq.suite.tasks import TEXT_REGRESSION

MAX_POSITIONS = 512  # of both encoders
# Tensors of the packages that mean pooling does not use: a pooler, and a table of 0, 1, 2, ...
UNUSED_WEIGHTS = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
# Inverse L2 strength of the head: the best of 0.001 ... 30 for MiniLM on a held-out fifth of the train split, averaged
# over three splits of the movie snippets. Values from 0.1 to 1 are within a point; standardised features do not help.
HEAD_C = 0.3
HEAD_ITERATIONS = 1000
# Fastest of 8 ... 256 on two cores: larger batches do not fit in the CPU's cache.
FEATURE_BATCH = 32


class SentenceClassifier(nn.Module):
    """A transformer encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Mean token vectors [b, width] over the positions where `attention_mask` [b, length] is 1."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        tokens: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits [b, classes]."""
        logits: Tensor = self.classifier(self.features(input_ids, attention_mask, token_type_ids))
        return logits


class Tokenizer:
    """Encodes sentences or pairs as tokens, padded to the longest of the split.

    `model` is a name for messages, `padding` the number of the padding token; with `segments`, pairs have
    token_type_ids.
    """

    def __init__(self, file: Path, max_length: int, model: str, padding: int = 0, segments: bool = True) -> None:
        # transformers' wrapper would take seconds to import
        from tokenizers import Tokenizer as Backend

        self.model, self.padding, self.segments = model, padding, segments
        self.tokenizer = Backend.from_file(str(file))
        self.tokenizer.enable_truncation(max_length)
        self.tokenizer.no_padding()  # the file sets padding to 128 tokens, four times the usual sentence

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Token numbers and masks; UserError if the examples are no texts."""
        texts = texts_of(examples, self.model)
        encoded = self.tokenizer.encode_batch(texts)
        rows = {
            "input_ids": [item.ids for item in encoded],
            "attention_mask": [item.attention_mask for item in encoded],
        }
        if self.segments and texts and not isinstance(texts[0], str):
            rows["token_type_ids"] = [item.type_ids for item in encoded]
        return token_examples(rows, examples.labels, {"input_ids": self.padding})


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder of the transformers library, with weights from pip packages.

    Attributes:
        model: name on the command line.
        family: beginning of the names of its classes, such as Bert.
        architecture: for the result file.
        origin: package and version, for the result file.
        sha256: checksums of its files, by name; the head's cache key holds them.
        instead: what a regression task needs instead of a head, for the message.
    """

    model: str
    family: str
    architecture: str
    origin: str
    sha256: Mapping[str, str]
    instead: str

    def kind(self, name: str) -> Any:
        """A class of the library: the family's Config, Model or ForSequenceClassification."""
        import transformers

        return getattr(transformers, self.family + name)

    def config(self, folder: Path, **options: Any) -> Any:
        """The configuration in a folder.

        Attention is not fused: plain matrix products are as fast on short sentences, and their backward pass is
        deterministic on every device.
        """
        return self.kind("Config").from_pretrained(
            folder, local_files_only=True, attn_implementation="eager", **options
        )

    def load(self, folder: Path) -> nn.Module:
        """The encoder with the weights of the packages in `folder`, without pooler."""
        config = self.config(folder)
        encoder: nn.Module = initialised(lambda: self.kind("Model")(config, add_pooling_layer=False))
        encoder.load_state_dict(used_weights(folder))
        return encoder

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The classifier at a random initialisation, in evaluation mode: with a fitted head, or the library's."""
        kind = "classifier" if "classifier" in blueprint else "encoder"
        config = self.kind("Config")(**{**blueprint[kind], "attn_implementation": "eager"})

        def make() -> nn.Module:
            if kind == "classifier":
                return SequenceClassifier(self.kind("ForSequenceClassification")(config), blueprint.get("order"))
            encoder = self.kind("Model")(config, add_pooling_layer=False)
            return SentenceClassifier(encoder, nn.Linear(config.hidden_size, blueprint["num_classes"]))

        return initialised(make)


def used_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors in a package's folder, without UNUSED_WEIGHTS."""
    weights = load_file(folder / "model.safetensors")
    return {name: weight for name, weight in weights.items() if name not in UNUSED_WEIGHTS}


def check_length(max_length: int) -> None:
    """Raise UserError if the encoders do not take `max_length` tokens."""
    if not 8 <= max_length <= MAX_POSITIONS:
        raise UserError(f"model.max_length={max_length} is not possible: choose 8 to {MAX_POSITIONS} tokens")


def with_head(
    source: Encoder, folder: Path, tokenize: Tokenizer, data: DataSplits, max_length: int, cache: Path
) -> Network:
    """The classifier for `data`. Fitting the head takes one pass over the train split; the head is cached.

    Raises:
        UserError: the data set has no text, its task is regression, or its train split is empty or lacks a class.
    """
    if data.task == TEXT_REGRESSION:
        raise UserError(f"model={source.model} fits a head for classes, not for scores: add {source.instead}")
    if len(data.train) == 0:
        raise UserError(
            f"model={source.model} fits a head on training examples, and this data set has none: give it a training "
            f"file, or add {source.instead}"
        )
    encoder = source.load(folder)
    width: int = encoder.config.hidden_size  # type: ignore[assignment, union-attr]
    module = SentenceClassifier(encoder, nn.utils.skip_init(nn.Linear, width, data.num_classes)).eval()
    recipe = {
        "encoder": dict(source.sha256),
        "train": data.train.checksum(),
        "num_classes": data.num_classes,
        "max_length": max_length,
        "head": "logistic regression on mean-pooled features",
        "C": HEAD_C,
        "iterations": HEAD_ITERATIONS,
    }

    def fit() -> dict[str, Tensor]:
        return fit_head(module, tokenize(data.train), data.num_classes, source.model)

    module.classifier.load_state_dict(fit_once(cache, f"{source.model}-head", recipe, fit))
    description = {
        "architecture": f"{source.architecture}; mean pooling; linear head",
        "fp_source": f"{source.origin}; head fitted on the train split (C={HEAD_C})",
        "encoder_sha256": source.sha256["model.safetensors"],
        "max_length": max_length,
    }
    blueprint = {"encoder": config_of(module.encoder), "num_classes": data.num_classes}
    return Network(module, tokenize, description, blueprint)


def fit_head(module: SentenceClassifier, train: EncodedExamples, num_classes: int, model: str) -> dict[str, Tensor]:
    """Weight [classes, width] and bias [classes] of the head, from L2-regularised logistic regression.

    Raises UserError if a class has no examples.
    """
    from sklearn.linear_model import LogisticRegression

    if (present := len(train.labels.unique())) != num_classes:
        raise UserError(
            f"model={model} fits its head on the train split, which has {present} of {num_classes} "
            "classes: give more examples of each class"
        )
    features = torch.empty(len(train), module.classifier.in_features, dtype=torch.float64)
    batches = -(-len(train) // FEATURE_BATCH)
    with torch.inference_mode():
        for batch in bar(train.batches(FEATURE_BATCH, "cpu"), "sentence features", batches):
            features[batch.index] = module.features(**batch.inputs).double()
    regression = LogisticRegression(C=HEAD_C, max_iter=HEAD_ITERATIONS)
    with elapsed("fit the head"):
        regression.fit(features.numpy(), train.labels.numpy())
    weight, bias = torch.tensor(regression.coef_), torch.tensor(regression.intercept_)
    if num_classes == 2:  # scikit-learn fits one logit z; the logits (-z/2, z/2) have the same probabilities
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return {"weight": weight.float(), "bias": bias.float()}
