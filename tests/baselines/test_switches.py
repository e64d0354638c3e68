"""SqueezeLLM, LNQ and HQQ with every allocator, kind of inputs, correction and distillation, by `bayesq.quantize`."""

import pytest
import torch
from torch import nn

import bayesq
from bayesq.quant.accounting import stored_bytes


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 5),
    ).eval()
    torch.random.set_rng_state(torch_state)
    return module


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(3)]


def divergence(module: nn.Module, quantized: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        p, q = (torch.cat([each(x) for x in batches]).log_softmax(1) for each in (module, quantized))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize(
    "options",
    [
        {"correction": "moments", "distill": True},
        {"bits": 3.5},
        {"bits": 4, "allocator": "knapsack"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("method", "switches"),
    [("squeezellm", {"sparse": 0.01}), ("lnq", {"groups": 2}), ("hqq", {"group_size": 32})],
)
def test_every_axis_is_taken(method: str, switches: dict, options: dict, network: nn.Module, batches) -> None:
    chosen = {"bits": 3, **options}
    quantized, report = bayesq.quantize(network, batches, method=method, **chosen, **switches)
    kl = divergence(network, quantized, batches)
    assert 0 < kl < 0.2, kl
    tensors = report.packed.tensors
    weights = sum(tensor.codes.numel() for tensor in tensors.values())
    bits = sum(int(tensor.width.sum()) * tensor.codes.shape[1] for tensor in tensors.values())
    assert bits <= chosen["bits"] * weights
    mixed = any(len(tensor.width.unique()) > 1 for tensor in tensors.values())
    assert mixed == (chosen["bits"] == 3.5 or "allocator" in chosen)


@pytest.mark.parametrize("options", [{"inputs": "prefix", "correction": "mean"}, {"inputs": "paired"}], ids=str)
def test_inputs_behind_the_prefix_are_those_of_methods_that_read_inputs(options: dict, network, batches) -> None:
    full, _ = bayesq.quantize(network, batches, bits=3, method="lnq", groups=0)
    behind, _ = bayesq.quantize(network, batches, bits=3, method="lnq", groups=0, **options)
    assert 0 < divergence(network, behind, batches) < 1.1 * divergence(network, full, batches)
    for method in ("squeezellm", "hqq", "lnq"):
        with pytest.raises(ValueError, match=f"inputs={options['inputs']}: this method reads no inputs"):
            bayesq.quantize(network, batches, bits=3, method=method, **options)


@pytest.mark.parametrize("method", ["squeezellm", "lnq"])
def test_the_knapsack_pays_for_tables_and_overlays(method: str, network: nn.Module, batches) -> None:
    """At equal budgets a method with tables stores no more than round to nearest."""
    switches = {"sparse": 0.01} if method == "squeezellm" else {}
    stored = {}
    for name, more in ((method, switches), ("rtn", {})):
        _, report = bayesq.quantize(network, batches, bits=5, method=name, allocator="knapsack", **more)
        stored[name] = sum(map(stored_bytes, report.packed.tensors.values()))
    _, plain = bayesq.quantize(network, batches, bits=5, method="rtn")
    assert stored[method] <= sum(map(stored_bytes, plain.packed.tensors.values()))
    assert stored[method] >= 0.97 * stored["rtn"]
