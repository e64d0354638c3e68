"""Collecting leaves the network as it was."""

from dataclasses import dataclass

import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, seeded
from tiny_sets import LENGTHS, collect, images, sentences
from torch import Tensor

from bayesq.batches import Batch
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.likelihood import Tokens
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


@dataclass(frozen=True)
class First(Tokens):
    """What goes backward is the first logit at each position that counts; keeps the masks it was given."""

    masks: list[Tensor]

    def fisher_directions(self, outputs, samples, generator, draws="signs", mask=None):
        self.masks.append(mask)
        return [torch.eye(outputs.shape[-1])[0] * mask.unsqueeze(-1)]


class NextToken(TinyEncoder):
    """Outputs [b, t, V]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.embed(input_ids)))[..., :6])


def test_outputs_may_be_tokens_of_which_padding_does_not_count():
    module, masks = seeded(NextToken(5)), []
    padded = collect(module, sentences(9, trimmed=False), 6, None, [GRADIENT_MOMENT], likelihood=First(masks))
    assert torch.equal(torch.cat(masks), sentences(9, trimmed=False).inputs["attention_mask"].bool())
    alone = collect(module, sentences(), 1, None, [GRADIENT_MOMENT], likelihood=First(masks))
    for name in ("up", "head"):
        torch.testing.assert_close(padded["gradient_moment"][name], alone["gradient_moment"][name])
    expected = torch.zeros(5, 5)  # the gradient at the head is the direction: one for each token that counts
    expected[0, 0] = LENGTHS.sum() / 6
    torch.testing.assert_close(padded["gradient_moment"]["head"][0], expected)
