"""Input statistics behind a prefix that is quantized layer by layer."""

import numpy as np
import torch
from naive_fisher import TinyEncoder, dense_statistics, seeded
from tiny_sets import CPU, Counting, images, one_by_one, sentences

from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.order import forward_order
from bayesq.calibration.prefix import Network, PrefixInputs
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import quantizable_layers


def test_sequential_inputs_see_the_replaced_prefix():
    module = seeded(Counting())
    layers = quantizable_layers(module)
    examples = images()
    groups = forward_order(module, layers, next(iter(examples.batches(2, CPU))))
    network = Network(module, layers, find_blocks(module))
    inputs = PrefixInputs(network, groups, examples, 2, CPU, [INPUT_MOMENT, INPUT_MAGNITUDE])
    for group in groups:
        for name in group:
            for kind in ("input_moment", "input_magnitude"):
                dense = dense_statistics(module, name, one_by_one(examples))  # of the module as it is by now
                np.testing.assert_allclose(inputs.statistic(name, kind), getattr(dense, kind), rtol=1e-4, atol=1e-6)
            with torch.no_grad():  # coarse rounding of what has had its turn
                layers[name].weight.copy_(torch.round(2 * layers[name].weight) / 2)
    assert inputs.seconds > 0
    # the last layer's inputs are not those of the original model
    original = dense_statistics(seeded(Counting()), "head", one_by_one(examples)).input_moment
    assert np.abs(inputs.statistic("head", "input_moment").numpy() - original).max() > 0.01 * np.abs(original).max()


def test_sequential_siblings_share_one_pass_that_stops_at_them():
    module = seeded(TinyEncoder())
    calls: dict[str, int] = {}
    for name, layer in quantizable_layers(module).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    groups = [["query", "key", "value"], ["out"], ["up"], ["down"], ["head"]]
    layers = quantizable_layers(module)
    network = Network(module, layers, find_blocks(module), dict.fromkeys(layers, 1))
    inputs = PrefixInputs(network, groups, sentences(), 2, CPU, [INPUT_MOMENT])
    found = [inputs.statistic(name, "input_moment") for name in groups[0]]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert calls == {"query": 3, "key": 3}  # a pass ends before the last of them runs
    expected = dense_statistics(seeded(TinyEncoder()), "query", one_by_one(sentences())).input_moment
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
