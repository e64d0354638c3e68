"""Moments of a layer's inputs in two networks in step, against sums over samples in float64."""

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, seeded
from tiny_sets import CPU, images, one_by_one, sentences
from torch import Tensor, nn

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.order import forward_order
from bayesq.calibration.paired import PairedMoments, PairedSums, is_held_out
from bayesq.calibration.prefix import Network, PrefixInputs
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import input_samples, quantizable_layers


def network(module: nn.Module) -> Network:
    layers = quantizable_layers(module)
    return Network(module, layers, find_blocks(module), dict.fromkeys(layers, 1))


def given_to(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> np.ndarray:
    """Input samples [n, g, c] float64 of one example."""
    given: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, x: given.append(x[0].clone()))
    with torch.no_grad():
        module(**inputs)
    handle.remove()
    samples = input_samples(module.get_submodule(name), given[0], 1)  # [1, g, l, c]
    return samples[0].transpose(0, 1).double().numpy()


def naive(full: nn.Module, prefix: nn.Module, name: str, examples: list[dict[str, Tensor]], chosen, centred: bool):
    """M, C and the means of the chosen examples; centred about the means of all."""
    pairs = [(given_to(full, name, one), given_to(prefix, name, one)) for one in examples]
    means = [np.concatenate([pair[k] for pair in pairs]).mean(0) for k in (0, 1)]
    x, y = (np.concatenate([pairs[i][k] for i in chosen]) for k in (0, 1))
    if centred:
        x, y = x - means[0], y - means[1]
    return np.einsum("ngi,ngj->gij", y, y) / len(y), np.einsum("ngi,ngj->gij", x, y) / len(y), *means


def check(found: PairedMoments, expected) -> None:
    moments = (found.prefix, found.cross, found.full_mean, found.prefix_mean)
    for ours, theirs in zip(moments, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("build", "data"), [(TinyConvNet, lambda: images(9)), (TinyEncoder, sentences)])
def test_moments_of_both_networks_are_those_of_single_samples(build, data, centred):
    full, prefix, examples = seeded(build()), seeded(build()), data()
    order = forward_order(full, quantizable_layers(full), next(iter(examples.batches(2, CPU))))
    inputs = PrefixInputs(network(prefix), order, examples, 2, CPU, [INPUT_MOMENT], network(full))
    single, count = one_by_one(examples), len(examples)
    place = [int(i) for batch in examples.batches(2, CPU) for i in batch.index]  # batches may be sorted by length
    held_out = [i for k, i in enumerate(place) if is_held_out(k)]
    for group in order:
        for name in group:
            sums = inputs.paired(name)
            check(sums.moments(centred), naive(full, prefix, name, single, range(count), centred))
            fitted = [i for i in place if i not in held_out]
            for part, chosen in zip(sums.split(centred), (fitted, held_out), strict=True):
                check(part, naive(full, prefix, name, single, chosen, centred))
            with torch.no_grad():  # coarse rounding of what has had its turn
                weight = prefix.get_submodule(name).weight
                weight.copy_(torch.round(2 * weight) / 2)
    assert sums.moments(centred).cross.sub(sums.moments(centred).prefix).abs().max() > 1e-3


def test_layers_that_read_one_tensor_share_its_sums():
    full, prefix = seeded(TinyEncoder()), seeded(TinyEncoder())
    groups = [["query", "key", "value"], ["out"], ["up"], ["down"], ["head"]]
    inputs = PrefixInputs(network(prefix), groups, sentences(), 2, CPU, [INPUT_MOMENT], network(full))
    assert inputs.paired("query") is inputs.paired("value")
    assert inputs.paired("out") is not inputs.paired("up")


def test_a_layer_that_stops_reading_the_shared_tensor_gets_sums_of_its_own():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, image: Tensor) -> Tensor:
            x = image.flatten(1)[:, :6]
            return self.one(x) + self.two(x if float(image[0, 0, 0, 0]) > 0 else 2 * x)

    module, examples = seeded(Fork()), images(6)
    inputs = PrefixInputs(network(module), [["one", "two"]], examples, 1, CPU, [INPUT_MOMENT])
    x = examples.inputs["image"].flatten(1)[:, :6].double()
    scaled = torch.where(examples.inputs["image"][:, 0, 0, 0, None] > 0, x, 2 * x)
    assert not torch.equal(x, scaled)
    for name, given in (("one", x), ("two", scaled)):
        found = inputs.statistic(name, "input_moment")[0].double()
        torch.testing.assert_close(found, given.T @ given / len(given), rtol=1e-5, atol=1e-6)


def test_with_few_examples_nothing_is_held_out():
    sums = PairedSums()
    x = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    sums.add(x, x, torch.tensor([3, 3]), 0)
    fitted, held_out = sums.split(centred=True)
    assert torch.equal(fitted.prefix, held_out.prefix) and torch.equal(fitted.prefix, sums.moments(True).prefix)
