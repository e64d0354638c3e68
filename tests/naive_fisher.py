"""Dense references for posteriors and calibration statistics: float64, one example and one class at a time.

Nothing here calls the code under test. A layer's weight [g * r, ...] in row-major order is W[g, r, c] in row-major
order, so `flatten` of either gives the same vector.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Dense:
    """Statistics of one layer.

    Attributes:
        fisher: [D, D] E_example E_{y ~ p}[grad gradT] of -log p(y | x) for the flattened weight; for the Gaussian
            likelihood with unit variance E_example[JT J] of the outputs' Jacobian J.
        input_moment: [g, c, c] mean of x xT over (example, position).
        input_magnitude: [g, c] mean of |x| over (example, position).
        gradient_moment: [g, r, r] E_example E_y[sum over positions of d dT], d the gradient of the layer's output.
    """

    fisher: np.ndarray
    input_moment: np.ndarray
    input_magnitude: np.ndarray
    gradient_moment: np.ndarray


def dense_statistics(
    module: nn.Module, name: str, examples: list[dict[str, Tensor]], likelihood: str = "categorical"
) -> Dense:
    """Statistics of the layer `name`; `examples` are inputs of batch size one without any padding."""
    module = copy.deepcopy(module).double().requires_grad_(True)
    layer = module.get_submodule(name)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    rows, columns = layer.weight.shape[0] // groups, layer.weight[0].numel()
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((inputs[0].detach(), output))
        return output.clone()  # an activation in place must not touch what we differentiate

    layer.register_forward_hook(hook)
    fisher = np.zeros((layer.weight.numel(),) * 2)
    moment, magnitude = np.zeros((groups, columns, columns)), np.zeros((groups, columns))
    gradient, positions = np.zeros((groups, rows, rows)), 0
    for inputs in examples:
        seen.clear()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        outputs = module(**inputs)[0]
        targets = outputs if likelihood == "gaussian" else -torch.log_softmax(outputs, 0)
        for x, _ in seen:
            for sample in samples(layer, x):
                positions += 1
                for g in range(groups):
                    moment[g] += np.outer(sample[g], sample[g])
                    magnitude[g] += np.abs(sample[g])
        for target in targets:
            found = torch.autograd.grad(target, [layer.weight, *(output for _, output in seen)], retain_graph=True)
            p = 1.0 if likelihood == "gaussian" else math.exp(-target.item())
            whole = found[0].flatten().numpy()
            fisher += p * np.outer(whole, whole) / len(examples)
            for d in found[1:]:
                d = d[0] if isinstance(layer, nn.Conv2d) else d.reshape(-1, d.shape[-1]).T
                for position in d.reshape(groups, rows, -1).permute(2, 0, 1).numpy():
                    for g in range(groups):
                        gradient[g] += p * np.outer(position[g], position[g]) / len(examples)
    return Dense(fisher, moment / positions, magnitude / positions, gradient)


def samples(layer: nn.Module, x: Tensor) -> list[np.ndarray]:
    """Inputs [g, c] of every position for one example, by slicing windows out of the padded input."""
    if isinstance(layer, nn.Linear):
        return [row.numpy()[None] for row in x.reshape(-1, x.shape[-1])]
    assert isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)
    x = F.pad(x[0], (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    extent = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    found = []
    for i in range(0, x.shape[1] - extent[0] + 1, layer.stride[0]):
        for j in range(0, x.shape[2] - extent[1] + 1, layer.stride[1]):
            window = x[:, i : i + extent[0] : layer.dilation[0], j : j + extent[1] : layer.dilation[1]]
            found.append(window.reshape(layer.groups, -1).numpy())
    return found


class TinyConvNet(nn.Module):
    """Strided and grouped, dilated convolutions, activations in place, and a linear head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2, bias=False)
        self.head = nn.Linear(6, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image), inplace=True)
        x = F.silu(self.grouped(x), inplace=True)
        return self.head(x.mean((2, 3)))


class TinyEncoder(nn.Module):
    """One transformer block with a mask, mean pooling over real tokens, and a linear head."""

    def __init__(self, classes: int = 2, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        score = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        score = score.masked_fill(attention_mask[:, None, :] == 0, -torch.inf)
        x = x + self.out(score.softmax(-1) @ self.value(x))
        x = x + self.down(F.gelu(self.up(x)))
        mask = attention_mask[:, :, None].to(x.dtype)
        return self.head((x * mask).sum(1) / mask.sum(1))


def seeded(module: nn.Module, seed: int = 0, gain: float = 1.5) -> nn.Module:
    """The module in evaluation mode with weights of its own generator, large enough for uneven predictions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            scale = gain / fan_in**0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()
