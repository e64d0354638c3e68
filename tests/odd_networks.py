"""Tiny classifiers of vectors [b, l, 6] that use their weights in unusual ways; each gives logits [b, 2]."""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

WIDTH = 6


class Classifier(nn.Module):
    """A body [b, l, 6] -> [b, l, 6], the mean over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).mean(1))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        return self.odd(x)


class KeywordCall(Plain):
    def body(self, x):
        return self.odd(input=x)


class FunctionByKeywords(Plain):
    def body(self, x):
        return F.linear(x, weight=self.odd.weight, bias=self.odd.bias)


class FunctionInWindows(Plain):
    def body(self, x):
        windows = x.reshape(len(x) * 2, -1, WIDTH)
        return F.linear(windows, self.odd.weight, self.odd.bias).reshape(x.shape)


class ProductWithTransposed(Plain):
    def body(self, x):
        return x @ self.odd.weight.T + self.odd.bias


class MatmulFunction(Plain):
    def body(self, x):
        return torch.matmul(x, self.odd.weight.t()) + self.odd.bias


class AddmmFlattened(Plain):
    def body(self, x):
        return torch.addmm(self.odd.bias, x.reshape(-1, WIDTH), self.odd.weight.t()).reshape(x.shape)


class Scaled(nn.Linear):
    """Scales what it reads and what it gives, not its weight."""

    def forward(self, input):
        return 2 * F.linear(input / 3, self.weight, self.bias)


class OwnForward(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Scaled(WIDTH, WIDTH)

    def body(self, x):
        return self.odd(x)


class Loop(Plain):
    def body(self, x):
        for _ in range(3):
            x = torch.tanh(self.odd(x))
        return x


class TwoLengths(Plain):
    """The same layer on all positions and on every second one."""

    def body(self, x):
        return self.odd(x) + self.odd(x[:, ::2]).mean(1, keepdim=True)


class TiedLayers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.odd.weight

    def body(self, x):
        return self.again(torch.tanh(self.odd(x)))


class SharedPositions(Plain):
    """Relative positions: an input without the batch, of as many rows as tests have examples in a batch."""

    def __init__(self, shape: tuple[int, ...] = (4, WIDTH)) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape))

    def body(self, x):
        return x * torch.tanh(self.odd(self.positions)).reshape(-1, WIDTH)[: x.shape[1]]


class ContentAndPositions(SharedPositions):
    """One layer for what differs between examples and for what they share."""

    def body(self, x):
        return self.odd(x) * torch.tanh(self.odd(self.positions)).reshape(-1, WIDTH)[: x.shape[1]]


class PositionsFirst(Plain):
    def body(self, x):
        return self.odd(x.transpose(0, 1)).transpose(0, 1)


class SharedConvolution(Classifier):
    """A convolution over positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Conv2d(3, WIDTH, 1)
        self.register_buffer("positions", torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2))

    def body(self, x):
        return x * torch.tanh(self.odd(self.positions)).flatten(2).transpose(1, 2)


class Conv1D(nn.Module):
    """A Linear whose weight is stored as [inputs, outputs], like GPT-2's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(*x.shape[:-1], self.nf)


class Transposed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Conv1D(WIDTH, WIDTH)

    def body(self, x):
        return self.odd(x)


class Experts(nn.Module):
    """Each token goes to one of the experts, by the sign of its first entries."""

    def __init__(self, num_experts: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = num_experts, transposed
        self.up = nn.Parameter(torch.randn(num_experts, WIDTH, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.reshape(-1, WIDTH), torch.zeros(x.numel() // WIDTH, WIDTH)
        chosen = (flat[:, 0] > 0).long() + (flat[:, 0] > 1).long()
        for k in chosen.unique():
            rows = flat[chosen == k]
            made = rows @ self.up[k] if self.is_transposed else F.linear(rows, self.up[k])
            out = out.index_add(0, (chosen == k).nonzero()[:, 0], made)
        return out.reshape(x.shape)


class Mixture(Classifier):
    def __init__(self, transposed: bool = False, experts: int = 3) -> None:
        super().__init__()
        self.odd = Experts(experts, transposed)

    def body(self, x):
        return self.odd(x)


class SelfAttention(Classifier):
    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.odd = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, bias=bias)

    def body(self, x):
        given = x if self.odd.batch_first else x.transpose(0, 1)
        out = self.odd(given, given, given, need_weights=False)[0]
        return out if self.odd.batch_first else out.transpose(0, 1)


class CrossAttention(SelfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 2, WIDTH))

    def body(self, x):
        return self.odd(self.latent.expand(len(x), -1, -1), x, x)[0]


class AddsInPlace(Plain):
    """Changes the layer's input after the layer has read it, unless told not to."""

    in_place = True

    def body(self, x):
        x = x.clone()
        if not self.in_place:
            return x + torch.tanh(self.odd(x))
        x += torch.tanh(self.odd(x))
        return x


class ActsInPlace(Plain):
    in_place = True

    def body(self, x):
        x = x.clone()
        return self.odd(x) * (F.relu_(x) if self.in_place else F.relu(x))


class Rare(Plain):
    """One layer for all examples, and one that few examples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        return torch.stack([self.rare(one[None])[0] if one[0, 2] > 1.2 else self.odd(one[None])[0] for one in x])


class Checkpointed(Plain):
    """Runs once more in the backward pass."""

    def body(self, x):
        return torch.utils.checkpoint.checkpoint(self.odd, x, use_reentrant=False)


# Networks whose weights take part in another way than as the matrix of a product.
class Normalised(Plain):
    def body(self, x):
        return F.linear(x, F.normalize(self.odd.weight, dim=1), self.odd.bias)


class Concatenated(Plain):
    def body(self, x):
        return F.linear(x, torch.cat([self.odd.weight[:3], self.odd.weight[3:]]), self.odd.bias)


class LeftFactor(Plain):
    def body(self, x):
        return (self.odd.weight @ x.transpose(1, 2)).transpose(1, 2)


class PartOfTheRows(Plain):
    def body(self, x):
        return torch.cat([F.linear(x, self.odd.weight[:2]), x[..., 2:]], -1)


class InNumpy(Plain):
    def body(self, x):
        return x @ torch.from_numpy(self.odd.weight.detach().numpy().T.copy())


class SharedMemory(Plain):
    """Two parameters in one memory, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(WIDTH, WIDTH)
        self.twin.weight = nn.Parameter(self.odd.weight.data)

    def body(self, x):
        return self.twin(x)


class WithoutGradient(Plain):
    def body(self, x):
        with torch.no_grad():
            return self.odd(x)


class ExtraAttention(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True)

    def body(self, x):
        return self.odd(x, x, x)[0]


class ConvolutionByFunction(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Conv2d(1, 1, 3, padding=1)

    def body(self, x):
        return F.conv2d(x[:, None], self.odd.weight, self.odd.bias, padding=1)[:, 0]


def seeded(build) -> nn.Module:
    """The network with weights that make its outputs vary, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().eval()
        for x in module.parameters():
            nn.init.normal_(x, std=0.6)
    return module


def vectors(count: int = 8, length: int = 4, seed: int = 1) -> Tensor:
    """Inputs [count, length, 6]."""
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(seed))
