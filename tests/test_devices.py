"""No step mixes devices: a language model on a simulated second device, from statistics to rounding.

Moment correction after rounding (inputs=full) is left out: it replaces tensors by placeholders that the simulation does
not follow.
"""

import pytest
import torch
from simulated_device import is_marked, mark, place, simulated_device
from tiny_lm import LLAMA, VOCABULARY
from torch import Tensor, nn

import bayesq

MIXTURES = {
    "product": lambda x, y: x @ y,
    "sum in place": lambda x, y: y.add_(x),
    "list": lambda x, y: torch.cat([x, y]),
    "layer": lambda x, y: nn.functional.linear(x, y),
    "index": lambda x, y: y[x > 0],
    "numpy": lambda x, y: x.numpy(),
    "result": lambda x, y: (x + 1).T.reshape(-1)[:4] * y[0],
    "moved away": lambda x, y: x * x.cpu(),
    "made there": lambda x, y: torch.zeros(4, 4, device="cuda") + y,
    "hook": lambda x, y: _gradient(x, lambda gradient: gradient * y),
}
ALLOWED = {
    "number": lambda x, y: x * y.sum(),
    "index of the CPU": lambda x, y: x[y[0] > 0],
    "copy": lambda x, y: x.copy_(y),
    "moved there": lambda x, y: x @ y.to(x.device),
    "moved back": lambda x, y: x.cpu().numpy() + y.numpy(),
    "hook": lambda x, y: _gradient(x, lambda gradient: gradient * y.to(gradient.device)),
}


def _gradient(x: Tensor, hook) -> None:
    leaf = x.clone().requires_grad_()
    leaf.register_hook(hook)
    (leaf * 2).sum().backward()


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_noticed(name: str) -> None:
    x, y = mark(torch.ones(4, 4)), torch.ones(4, 4)
    with simulated_device(), pytest.raises(RuntimeError, match="device"):
        MIXTURES[name](x, y)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows_passes(name: str) -> None:
    x, y = mark(torch.ones(4, 4)), torch.ones(4, 4)
    with simulated_device():
        ALLOWED[name](x, y)
    assert is_marked(x) and not is_marked(y)


def llama() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from bayesq.suite.models.causal_lm import LM_OPTIONS, NextTokens

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **LLAMA)
    return NextTokens(AutoModelForCausalLM.from_config(config, **LM_OPTIONS)).eval()


def windows(count: int) -> list[dict[str, Tensor]]:
    drawn = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in drawn.split(4)]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "bayesq", "inputs": "paired", "correction": "moments"},
        {"method": "bayesq", "inputs": "full", "correction": "none", "posterior": "ekfac"},
        {"method": "gptq", "inputs": "prefix"},
    ],
    ids=str,
)
def test_statistics_factors_and_rounding_stay_on_their_devices(options: dict) -> None:
    """The same codes as on the CPU: the values are real."""
    expected, _ = bayesq.quantize(llama(), windows(16), bits=3, exclude=["*lm_head"], **options)
    module = place(llama())
    with simulated_device() as device:
        quantized, _ = bayesq.quantize(module, windows(16), bits=3, exclude=["*lm_head"], **options)
    assert device.calls > 1000
    assert all(is_marked(x) for x in quantized.parameters())
    assert all(map(torch.equal, quantized.state_dict().values(), expected.state_dict().values()))
