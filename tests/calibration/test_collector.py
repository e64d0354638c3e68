"""Collecting leaves the network as it was."""

import pytest
import torch
from naive_fisher import TinyConvNet, seeded
from tiny_sets import collect, images

from bayesq.batches import Batch
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.quant.layers import quantizable_layers
from bayesq.suite.models.base import state_checksum


def test_collecting_leaves_no_trace():
    module = seeded(TinyConvNet())
    module.stem.weight.requires_grad_(False)
    flags = [p.requires_grad for p in module.parameters()]
    before, random = state_checksum(module), torch.get_rng_state()
    logits = module(images().inputs["image"])
    collect(module, images(), samples=2)
    assert [p.requires_grad for p in module.parameters()] == flags == [False, *[True] * 4]
    assert torch.equal(torch.get_rng_state(), random)
    assert state_checksum(module) == before and all(p.grad is None for p in module.parameters())
    assert not module.stem._forward_hooks
    assert torch.equal(module(images().inputs["image"]), logits)


def test_a_failing_pass_leaves_no_trace_either():
    module = seeded(TinyConvNet())
    collector = Collector(module, quantizable_layers(module), [FISHER_DIAGONAL], None, torch.Generator())
    with pytest.raises(RuntimeError):
        collector.add(Batch({"image": torch.zeros(1, 5, 6, 6)}, torch.zeros(1).long(), torch.zeros(1).long()))
    assert all(p.requires_grad for p in module.parameters()) and not module.stem._forward_hooks


def test_sums_are_handed_over_once():
    collector = Collector(seeded(TinyConvNet()), {}, [INPUT_MOMENT], None, torch.Generator())
    assert dict(collector.finish(INPUT_MOMENT)) == {} and collector.unseen == []
    for statistic in (INPUT_MOMENT, GRADIENT_MOMENT):
        with pytest.raises(ValueError, match=f"{statistic.name} was not collected, or"):
            collector.finish(statistic)
