"""Moments that are kept layer by layer behind the quantized prefix, seen in passes of the finished network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bayesq
from baselines.rtn import RTN
from bayesq.budget import Budget
from bayesq.errors import Refused
from bayesq.quant.mean_takers import mean_takers
from bayesq.recipe import Recipe
from bayesq.uniform import Uniform

EXAMPLES = 48


class Small(nn.Module):
    """A convolution whose mean a norm takes up, one with a bias, one with neither, and a head."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=affine)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bare = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = torch.relu(self.second(x))
        x = torch.relu(self.bare(x))
        return self.head(x.mean((2, 3)))


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    module = Small(**options)
    with torch.no_grad():
        module.norm.running_mean.uniform_(-0.5, 0.5)
        module.norm.running_var.uniform_(0.5, 2)
    return module.eval()


def images() -> Tensor:
    return torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.3


def outputs(module: nn.Module, name: str) -> Tensor:
    """What the layer gives [n, channels]; behind `first`, less the running mean of the norm that reads it."""
    given: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(lambda _, __, x: given.append(x))
    with torch.no_grad():
        module(images())
    handle.remove()
    x = given[0].transpose(0, 1).flatten(1).T if given[0].dim() == 4 else given[0]
    return x - module.norm.running_mean if name == "first" else x


def quantized(module: nn.Module, **switches) -> tuple[nn.Module, dict]:
    found, report = bayesq.quantize(module, [images()], bits=3, batch_size=16, **switches)
    return found, {row["name"]: row for row in report.layers} | {"fallbacks": report.fallbacks}


@pytest.mark.parametrize("inputs", ["prefix", "paired"])
@pytest.mark.parametrize(
    "method", [{"method": "gptq"}, {"method": "bayesq"}, {"method": "awq"}, {"method": "lnq", "groups": 0}], ids=str
)
def test_means_and_variances_are_those_of_full_precision(method: dict, inputs: str) -> None:
    full = network()
    module, rows = quantized(full, **method, inputs=inputs, correction="moments")
    for name in ("first", "second", "head"):
        expected, found = outputs(full, name), outputs(module, name)
        spread = expected.std(0, unbiased=False)
        torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=0.01 * float(spread.mean()))
        torch.testing.assert_close(found.std(0, unbiased=False), spread, rtol=0.01, atol=1e-3)
    assert rows["fallbacks"]["uncorrected_layers"] == 1  # the convolution that neither bias nor norm follows
    assert rows["bare"]["mean_shift"] > 0 and rows["first"]["mean_shift"] is None


@pytest.mark.parametrize("inputs", ["prefix", "paired"])
def test_the_mean_alone(inputs: str) -> None:
    full = network(affine=False)
    module, rows = quantized(full, method="gptq", inputs=inputs, correction="mean")
    for name in ("first", "second", "head"):
        expected, found = outputs(full, name), outputs(module, name)
        atol = 1e-3 * float(expected.std())
        torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=atol)
    assert rows["second"]["variance_ratio"] is None
    plain, _ = quantized(full, method="gptq", inputs=inputs)
    shift = (outputs(plain, "second").mean(0) - outputs(full, "second").mean(0)).abs().max()
    assert float(shift) > 10 * atol  # without it the mean does move


def test_paired_inputs_say_what_they_did() -> None:
    _, rows = quantized(network(), method="gptq", inputs="paired")
    assert rows["first"]["target_change"] == pytest.approx(0, abs=1e-6)  # nothing is quantized before it
    assert 0 < rows["head"]["target_change"] < 1
    assert rows["fallbacks"]["uncorrected_layers"] == 0


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"method": "rtn", "inputs": "paired"}, "inputs=paired: this method reads no inputs"),
        ({"method": "squeezellm", "inputs": "paired"}, "inputs=paired: this method reads no inputs"),
        (
            {"method": "squeezellm", "allocator": "knapsack", "inputs": "paired"},
            "inputs=paired: this method reads no inputs",
        ),
        (
            {"method": "squeezellm", "allocator": "knapsack", "posterior": "diag", "inputs": "paired"},
            "inputs=paired: this method reads no inputs",
        ),
        ({"method": "gptaq", "inputs": "prefix"}, "inputs=prefix: this method compares both networks' inputs"),
        ({"method": "gptq", "inputs": "both"}, "inputs=both: choose one of full, prefix, paired"),
        ({"method": "gptq", "inputs": "full", "correction": "mean"}, "correction=mean: needs inputs=prefix"),
    ],
)
def test_inputs_that_a_method_cannot_use_are_refused(switches: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        quantized(network(), **switches)


def test_a_method_cannot_choose_its_inputs_by_an_attribute_that_nobody_reads() -> None:
    method = RTN("mse")
    method.inputs = "prefix"
    with pytest.raises(Refused, match=r"RTN\.inputs is not read: write `inputs: prefix` in the method's YAML"):
        Recipe(method, Uniform(), Budget(3, "code"))


def shared_norm() -> nn.Module:
    class Twice(Small):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) + self.norm(torch.zeros(len(image), 8, 1, 1)).mean()

    return Twice().eval()


def in_place() -> nn.Module:
    class Changed(Small):
        def forward(self, image: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(image).mul_(2)))
            return self.head(torch.relu(self.bare(torch.relu(self.second(x)))).mean((2, 3)))

    return Changed().eval()


TAKERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "norm and bias": (network, {"first": "norm", "second": "second", "head": "head"}),
    "a norm that runs twice": (shared_norm, {"second": "second", "head": "head"}),
    "an output that changes in place": (in_place, {"second": "second", "head": "head"}),
}


@pytest.mark.parametrize("case", TAKERS)
def test_what_takes_up_a_layers_mean(case: str) -> None:
    build, expected = TAKERS[case]
    layers = ["first", "second", "bare", "head"]
    assert mean_takers(build(), layers, {"image": images()[:2]}) == expected
