"""The blocks of a network: parts that it runs one after the other."""

from collections.abc import Iterator

import torch
from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential)
# Types of arguments that are no tensors and cannot be changed in place.
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Names of the parts that a network probably runs one after the other, in the order of their definition.

    These are the children of its ModuleLists and Sequentials, the blocks of a stage instead of the stage, and the
    modules beside these containers: in transformers' BERT bert.embeddings, bert.encoder.layer.0, .., bert.pooler,
    classifier, in timm's EfficientNet conv_stem, bn1, blocks.0.0, .., classifier.
    """
    return tuple(_parts(module, ""))


def _parts(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        inside = [x for x in child.modules() if isinstance(x, CONTAINERS)]
        if isinstance(module, CONTAINERS):  # containers inside a block do not count; those of a stage hold blocks
            inside = [x for x in inside if x is child or _holds_blocks(x)]
        if inside:
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name


def _holds_blocks(container: nn.Module) -> bool:
    children = list(container.children())
    return len(children) > 1 and len({type(child) for child in children}) == 1 and any(children[0].children())
