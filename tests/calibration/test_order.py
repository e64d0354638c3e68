"""The order of the layers' first calls."""

import torch
from naive_fisher import TinyEncoder, seeded
from tiny_sets import CPU, sentences
from torch import Tensor, nn

from bayesq.batches import Batch
from bayesq.calibration.order import forward_order
from bayesq.quant.layers import quantizable_layers


def test_forward_order_groups_layers_that_read_the_same_tensor():
    module = seeded(TinyEncoder())
    module.first_defined_last_used = nn.Linear(2, 2)
    layers = quantizable_layers(module)
    reordered = {name: layers[name] for name in reversed(layers)}
    batch = next(iter(sentences().batches(2, CPU)))
    groups = forward_order(module, reordered, batch)
    assert [sorted(group) for group in groups] == [
        ["key", "query", "value"],
        ["out"],
        ["up"],
        ["down"],
        ["head"],
        ["first_defined_last_used"],
    ]
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_forward_order_follows_calls_not_definitions():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.last.weight.sum())

    module = Backwards()
    batch = Batch({"x": torch.ones(2, 4)}, torch.zeros(2).long(), torch.arange(2))
    assert forward_order(module, quantizable_layers(module), batch) == [["first"], ["last"]]
