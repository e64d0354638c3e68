"""Which logits of a published network belong to the classes of a data set, by their names."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError

# Names in messages: the first ones of a list that may have thousands.
SHOWN = 4


def plain(name: str) -> str:
    """A class name without case and separators."""
    return re.sub(r"[\W_]+", "", name).lower()


def imagenet_rows(published: Any, data: DataSplits, model: str) -> list[int]:
    """The logit of each class of a data set, in a network of timm with ImageNet's labels; [] if these are all logits.

    A class may have the name of a WordNet id (n01440764) or any of the words that ImageNet has for it (tench).

    `published` is timm's PretrainedCfg; `model` names the network in messages.

    Raises:
        UserError: the labels have no names, a class is none of them, or two classes are the same one.
    """
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    if not data.classes and data.num_classes == published.num_classes:
        return []
    instead = "fine-tune a network on your classes, and give it with model=timm model.name=NAME model.checkpoint=FILE"
    subset, classes = infer_imagenet_subset(published), data.classes
    if subset is None or not classes:
        raise UserError(
            f"model={model}: its weights have {published.num_classes} classes, and this data set has "
            f"{data.num_classes}: {instead}"
        )
    info = ImageNetInfo(subset)
    rows: dict[str, set[int]] = {}
    for row, (wnid, words) in enumerate(zip(info.label_names(), info.label_descriptions(), strict=True)):
        for name in (wnid, *words.split(",")):
            rows.setdefault(plain(name), set()).add(row)
    unknown = [name for name in classes if plain(name) not in rows]
    if unknown:
        shown = f"{', '.join(unknown[:SHOWN])}{', ...' if len(unknown) > SHOWN else ''}"
        raise UserError(
            f"model={model} knows ImageNet's classes, and {len(unknown)} of {len(classes)} classes are none of them "
            f"({shown}): name these as WordNet ids or as ImageNet does, or {instead}"
        )
    for name in classes:
        if len(rows[plain(name)]) > 1:
            wnids = ", ".join(info.label_names()[row] for row in sorted(rows[plain(name)]))
            raise UserError(f"model={model}: '{name}' names several classes of ImageNet: call it one of {wnids}")
    chosen = [next(iter(rows[plain(name)])) for name in classes]
    if len(set(chosen)) < len(chosen):
        twice = [name for name, row in zip(classes, chosen, strict=True) if chosen.count(row) > 1]
        raise UserError(f"model={model}: {' and '.join(twice)} are one class of ImageNet: keep one of them")
    return chosen


def keep_rows(module: nn.Module, rows: Sequence[int], model: str) -> None:
    """Leave only the logits at `rows` of a timm network, in that order; UserError if its head is no single layer."""
    head = module.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise UserError(f"model={model}: its head is not a single layer, so classes cannot be left out: choose another")
    for name, parameter in head.named_parameters():
        setattr(head, name, nn.Parameter(parameter.detach()[list(rows)].clone()))
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(rows))
    module.num_classes = len(rows)  # type: ignore[assignment]
