"""Quantized weights beside a full-precision network that stays as it is."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bayesq.quant.grids import mse_grid, round_affine, zero_code
from bayesq.quant.layers import groups_of, matrix_to_weight, weight_to_matrix
from bayesq.quant.network import fill, quantized_copy
from bayesq.quant.tensor import QuantizedTensor


class SmallNet(nn.Module):
    """Convolutions, one of them grouped, norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).flatten(1))


def quantize(network: nn.Module, widths: dict[str, int]) -> dict[str, QuantizedTensor]:
    """Nearest rounding on uniform grids."""
    tensors = {}
    for name, bits in widths.items():
        layer = network.get_submodule(name)
        rows = weight_to_matrix(layer).flatten(0, 1)
        width = torch.full((len(rows),), bits, dtype=torch.uint8)
        scale, zero = mse_grid(rows, width)
        codes = round_affine(rows, scale, zero, width)[0].to(torch.uint8)
        stored = scale.half()[:, None], zero_code(zero, width)[:, None]
        tensors[name] = QuantizedTensor(codes, width, *stored, groups=groups_of(layer))
    return tensors


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet().eval().requires_grad_(False)


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_full_precision_network_stays_as_it_is(network):
    before, state = network(IMAGES), copy.deepcopy(network.state_dict())
    tensors = quantize(network, {"conv1": 3, "head": 2})
    changed = {"norm1.bias": network.norm1.bias + 1, "norm2.running_mean": network.norm2.running_mean + 1}
    quantized = quantized_copy(network, tensors, changed)
    overwritten = copy.deepcopy(network)
    fill(overwritten, tensors, changed)
    assert torch.equal(quantized(IMAGES), overwritten(IMAGES)) and not quantized.training
    assert not torch.equal(quantized(IMAGES), before)
    assert torch.equal(network(IMAGES), before)
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())


def test_only_what_is_replaced_takes_memory_again(network):
    tensors = quantize(network, {"conv1": 3, "head": 2})
    quantized = quantized_copy(network, tensors, {"norm1.bias": network.norm1.bias + 1})
    theirs = dict(network.named_parameters())
    own = {name for name, x in quantized.named_parameters() if x.data_ptr() != theirs[name].data_ptr()}
    assert own == {"conv1.weight", "head.weight", "norm1.bias"}
    buffers = dict(network.named_buffers())
    assert all(x.data_ptr() != buffers[name].data_ptr() for name, x in quantized.named_buffers())


class Tied(nn.Module):
    """A layer whose weight another one uses too, and an embedding that shares its table with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.second.weight = self.table.weight, self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(self.table(tokens)))))


def test_shared_weights_stay_shared():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tied().eval().requires_grad_(False)
    tensors = quantize(network, {"second": 3})
    quantized = quantized_copy(network, tensors)
    assert quantized.first.weight is quantized.second.weight is not network.first.weight
    expected = matrix_to_weight(network.second, tensors["second"].dequantize())
    assert torch.equal(quantized.first.weight, expected) and not torch.equal(network.first.weight, expected)
    assert quantized.head.weight is quantized.table.weight is network.table.weight


def test_a_refusal_changes_nothing(network):
    tensors, before = quantize(network, {"conv1": 3}), copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="no parameter absent"):
        quantized_copy(network, tensors, {"absent": torch.zeros(1)})
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
