"""The order in which a network calls its layers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayesq.batches import Batch
from bayesq.quant.layers import Layer
from bayesq.quant.watch import watching


def forward_order(module: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> list[list[str]]:
    """Layers in the order of their first call; consecutive layers that read the same tensor form one group.

    Layers the batch does not reach come last, in definition order.
    """
    order: list[list[str]] = []
    reached: set[str] = set()
    inputs: list[Tensor] = []  # references: a freed tensor could give its place to another

    def seen(name: str, _: int | None, x: Tensor, __: Tensor) -> None:
        if name in reached:
            return
        reached.add(name)
        if inputs and inputs[-1] is x:
            order[-1].append(name)
        else:
            order.append([name])
            inputs.append(x)

    with torch.no_grad(), watching(layers, seen):
        module(**batch.inputs)
    return order + [[name] for name in layers if name not in reached]
