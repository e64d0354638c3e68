"""What models of text share: raw texts, padded tokens, and classifiers of the transformers library."""

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesq.batches import Layout, TensorExamples
from bayesq.quant.layers import MASK
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

# Keys of a transformers configuration that say nothing about the network.
NOTES = ("transformers_version", "architectures", "attn_implementation", "auto_map")

Texts = list[str] | list[tuple[str, str]]


class SequenceClassifier(nn.Module):
    """A transformers model for sequence classification; its logits in the order of the data set's labels.

    Args:
        model: called with keyword arguments, returns an object with `logits`.
        order: position among the model's logits of each of the data set's labels; None: they agree.
    """

    def __init__(self, model: nn.Module, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.order = None if order is None else [int(k) for k in order]
        self.masked = MASK in inspect.signature(model.forward).parameters  # FNet's takes none
        classes = cast(Any, model).config.num_labels
        if self.order is not None and not all(0 <= k < classes for k in self.order):
            raise ValueError(f"order={self.order}: the model has logits 0 to {classes - 1}")

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [b, classes]."""
        if not self.masked:
            inputs.pop(MASK, None)
        logits: Tensor = self.model(**inputs).logits
        return logits if self.order is None else logits[:, self.order]

    def extra_repr(self) -> str:
        """The order, which no parameter shows."""
        return "" if self.order is None else f"order={self.order}"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration of a transformers model as JSON values, without the place it was read from.

    What is asked of the library in every build (attention) and what it notes for itself is left out.
    """
    content: dict[str, Any] = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if not key.startswith("_") and key not in NOTES}


def texts_of(examples: Examples, model: str) -> Texts:
    """The sentences, or pairs of them, of the examples.

    Raises:
        UserError: they hold images.
    """
    texts = [] if isinstance(examples.inputs, Tensor) else list(examples.inputs)
    if isinstance(examples.inputs, Tensor) or any(isinstance(text, Path) for text in texts):
        raise UserError(f"model={model} reads text, but this data set gives images: choose another model or dataset")
    return cast(Texts, texts)


def token_examples(
    rows: Mapping[str, list[list[int]]],
    labels: Tensor,
    padding: Mapping[str, int] | None = None,
    layout: Layout | None = None,
) -> TensorExamples:
    """Examples of different length, padded to the longest.

    Args:
        rows: name of the module's argument -> numbers of each token of each example; input_ids among them.
        labels: [n].
        padding: what fills up an argument, where that is not 0.
        layout: where padding lies, and which examples share a batch.
    """
    layout = layout or Layout()

    def padded(name: str) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows[name]]
        return nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=(padding or {}).get(name, 0), padding_side=layout.side
        )

    lengths = torch.tensor([len(row) for row in rows["input_ids"]])
    return TensorExamples({name: padded(name) for name in rows}, labels, lengths, layout)


def label_order(
    names: Sequence[str], classes: Sequence[str], given: Sequence[str] | None, key: str
) -> tuple[list[int] | None, str]:
    """Which logit stands for which of the data set's classes, and how that is known.

    Args:
        names: the checkpoint's names of its logits, in their order.
        classes: the data set's names, in the order of its labels; none where they have no names.
        given: names in the order of the logits, from the configuration; None: nothing was given.
        key: what `given` is or would be called in the configuration.

    Returns:
        position of each class among the logits, None where that is the data set's order; and a phrase for the result.

    Raises:
        UserError: what was given are not the data set's classes.
    """
    if given is not None:
        order = _positions(given, classes)
        if order is None:
            known = f"the data set's classes {', '.join(classes)}" if classes else "nothing: its labels have no names"
            raise UserError(f"{key}=[{','.join(map(str, given))}]: needs, in the order of the logits, {known}")
        return _unless_identity(order), key
    if not classes:
        return None, "the labels have no names"
    order = _positions(names, classes)
    if order is None:
        if not all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # the library's names where nobody gave any
            log.warning(
                f"logits named {', '.join(names)} are taken for {', '.join(classes)}; {key}=[...] tells another order"
            )
        return None, "the data set's order, because the checkpoint's label names are not its classes"
    return _unless_identity(order), "names in the checkpoint"


def _positions(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Place of each class among the names, whatever their case and separators; None if they are not the same set."""
    plain = [re.sub(r"[\W_]+", "", str(name)).lower() for name in names]
    wanted = [re.sub(r"[\W_]+", "", name).lower() for name in classes]
    if sorted(plain) != sorted(wanted):
        return None
    return [plain.index(name) for name in wanted]


def _unless_identity(order: list[int]) -> list[int] | None:
    return None if order == list(range(len(order))) else order
