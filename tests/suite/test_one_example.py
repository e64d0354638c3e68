"""Gradient statistics of one example at a time, in networks that make tokens of a batch norm's output."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.collector import Collector
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.quant.layers import quantizable_layers

PIXELS = 20


class Stem(nn.Module):
    """A convolution, a norm, and a head that reads the norm's pixels in another order than they lie in memory."""

    def __init__(self, norm: nn.Module, tokens: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.tokens = nn.Conv2d(3, 8, 3), norm, tokens
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.tokens(self.norm(self.conv(x)))
        logits: Tensor = self.head(torch.tanh(self.mix(pixels.contiguous()))).mean(1)
        return logits


class ActiveNorm(nn.BatchNorm2d):
    """A norm with its activation inside, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.hardswish(super().forward(x), inplace=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ActiveNorm])
@pytest.mark.parametrize(
    "tokens",
    [
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.transpose(2, 3).flatten(2).transpose(1, 2),
        lambda x: x.permute(0, 2, 3, 1).reshape(len(x), PIXELS, -1),
        lambda x: x.reshape(len(x), -1, PIXELS).permute(0, 2, 1),
    ],
    ids=["transpose", "columns first", "permute", "reshape"],
)
def test_batch_norms_do_not_mix_up_the_gradients_of_one_example(
    norm: type[nn.BatchNorm2d], tokens: Callable[[Tensor], Tensor]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Stem(norm(8), tokens).eval()
        module.norm.running_var.uniform_(0.5, 2)
        examples = TensorExamples({"x": torch.randn(4, 3, 7, 6)}, torch.zeros(4, dtype=torch.int64))
    moments = []
    for batch_size in (1, 4):
        collector = Collector(
            module, quantizable_layers(module), [GRADIENT_MOMENT, FISHER_DIAGONAL], None, torch.Generator()
        )
        for batch in examples.batches(batch_size, "cpu"):
            collector.add(batch)
        moments.append({one.name: dict(collector.finish(one))["conv"] for one in collector.statistics})
    for kind, alone in moments[0].items():
        torch.testing.assert_close(alone, moments[1][kind], rtol=1e-4, atol=1e-9)
