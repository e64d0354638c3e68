"""Networks that must see no padding: their padded batches are taken apart."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bayesq.likelihood import Categorical
from bayesq.proxy import measure_kappa
from bayesq.quant.correction import correct_moments
from bayesq.quant.one_by_one import one_by_one

LENGTHS = [5, 2, 4, 1]


def padded(width: int, side: str = "right") -> dict[str, Tensor]:
    """Sequences of LENGTHS that do not depend on `width`; padding holds numbers that would be noticed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((len(LENGTHS), width, 3), 1e3)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for k, length in enumerate(LENGTHS):
        kept = slice(length) if side == "right" else slice(width - length, None)
        x[k, kept] = torch.randn(length, 3, generator=generator)
        mask[k, kept] = 1
    return {"x": x, "attention_mask": mask, "kind": torch.arange(len(LENGTHS))}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_goes_and_the_rest_stays(side):
    inputs = padded(7, side)
    parts = one_by_one(inputs)
    assert [part["x"].shape for part in parts] == [(1, length, 3) for length in LENGTHS]
    for k, part in enumerate(parts):
        assert torch.equal(part["x"][0], inputs["x"][k][inputs["attention_mask"][k] == 1])
        assert bool(part["attention_mask"].all()) and part["kind"].tolist() == [k]


def test_without_a_mask_nothing_is_padding():
    images = torch.rand(3, 2, 4, 4)
    parts = one_by_one({"image": images})
    assert len(parts) == 3 and torch.equal(torch.cat([part["image"] for part in parts]), images)


class Mean(nn.Module):
    """Reads every position, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, attention_mask: Tensor, kind: Tensor) -> Tensor:
        logits: Tensor = self.b(torch.tanh(self.a(x)).mean(1))
        return logits


def network() -> Mean:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mean().eval()


def rounded(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    return other


@pytest.mark.parametrize("alone", [True, False])
def test_moments_do_not_depend_on_padding(alone):
    full = network()
    narrow, wide = (
        correct_moments(full, rounded(full), ["a", "b"], padded(width, side), alone=alone).tensors
        for width, side in ((5, "right"), (9, "left"))
    )
    same = all(torch.allclose(narrow[name], x, rtol=1e-5, atol=1e-6) for name, x in wide.items())
    assert same == alone  # all in one batch they do


@pytest.mark.parametrize("alone", [True, False])
def test_the_proxy_does_not_depend_on_padding(alone):
    full = network()
    other = rounded(full)

    def measured(width: int) -> dict[str, float]:
        kappa = measure_kappa(
            full,
            ["a", "b"],
            lambda name: getattr(other, name).weight.detach()[None],
            lambda name, _: torch.zeros(getattr(full, name).weight.shape)[None],
            {"a": 1.0, "b": 1.0},
            padded(width),
            0,
            torch.Generator(),
            Categorical(),
            batch_size=2,
            alone=alone,
        )
        return kappa.measured

    narrow, wide = measured(5), measured(9)
    assert (narrow == pytest.approx(wide, rel=1e-5)) == alone
