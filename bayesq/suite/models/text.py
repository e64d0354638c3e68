"""Shared code of the text models: raw texts, padded tokens, and classifiers of the transformers library."""

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesq.batches import Layout, TensorExamples
from bayesq.quant.layers import MASK
from bayesq.suite.datasets.base import Examples, Photo
from bayesq.suite.errors import UserError
from bayesq.suite.models.classes import plain

log = logging.getLogger(__name__)

# Keys of a transformers configuration that do not describe the network.
NOTES = ("transformers_version", "architectures", "attn_implementation", "auto_map")

Texts = list[str] | list[tuple[str, str]]


class SequenceClassifier(nn.Module):
    """A transformers model for sequence classification, with logits in the order of the data set's labels.

    `order` has the index of the model's logit for each label of the data set; None: the orders agree.
    """

    def __init__(self, model: nn.Module, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.order = None if order is None else [int(k) for k in order]
        self.masked = MASK in inspect.signature(model.forward).parameters  # FNet takes no mask
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
        """The order of the logits."""
        return "" if self.order is None else f"order={self.order}"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration of a transformers model as JSON values, without private keys and NOTES."""
    content: dict[str, Any] = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if not key.startswith("_") and key not in NOTES}


def texts_of(examples: Examples, model: str) -> Texts:
    """The sentences (or pairs) of the examples; UserError if these are images."""
    if isinstance(examples.inputs, Tensor) or any(isinstance(item, Photo) for item in examples.inputs):
        raise UserError(f"model={model} reads text, but this data set has images: choose another model or dataset")
    return cast(Texts, list(examples.inputs))


def parts_of(examples: Examples, model: str) -> list[tuple[str, ...]]:
    """`texts_of` as tuples: of one sentence, or of two."""
    return [(text,) if isinstance(text, str) else text for text in texts_of(examples, model)]


def token_examples(
    rows: Mapping[str, list[list[int]]],
    labels: Tensor,
    padding: Mapping[str, int] | None = None,
    layout: Layout | None = None,
) -> TensorExamples:
    """Examples of different length, padded to the longest.

    Args:
        rows: name of the module's argument -> for each example, one integer per token; must include input_ids.
        labels: [n].
        padding: name of the module's argument -> its padding value; 0 for all others.
        layout: side of the padding, and which examples share a batch; None: the default layout.
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
    """Match the model's logits to the data set's classes.

    Args:
        names: the checkpoint's label names, in the order of its logits.
        classes: the data set's class names, in the order of its labels; empty if the labels have no names.
        given: label names from the configuration, in the order of the logits; None: not configured.
        key: configuration key of `given`, for messages.

    Returns:
        the logit's index for each class (None: the orders agree), and the source of the order, for the result file.

    Raises:
        UserError: `given` does not name the data set's classes.
    """
    if given is not None:
        order, known_by = _positions(given, classes), key
        if order is None:
            known = f"the data set's classes {', '.join(classes)}" if classes else "nothing: its labels have no names"
            raise UserError(f"{key}=[{','.join(map(str, given))}]: needs, in the order of the logits, {known}")
    elif not classes:
        return None, "the labels have no names"
    else:
        order, known_by = _positions(names, classes), "names in the checkpoint"
    if order is None:
        if not all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # the library's default names
            log.warning(
                f"logits named {', '.join(names)} are taken for {', '.join(classes)}; {key}=[...] sets another order"
            )
        return None, "the data set's order, because the checkpoint's label names are not its classes"
    return None if order == sorted(order) else order, known_by


def _positions(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Index of each class in `names`, ignoring case and separators; None if the two sets differ."""
    known, wanted = [plain(str(name)) for name in names], [plain(name) for name in classes]
    return [known.index(name) for name in wanted] if sorted(known) == sorted(wanted) else None
