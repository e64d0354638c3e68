"""Moment correction against a float64 reference that runs the whole network again for every norm and layer."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from bayesq.quant.correction import correct_moments


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Convolutions and norms of every kind the suite's networks have: grouped, with a bias, in-place ReLU, timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), BatchNormAct2d(8, inplace=True)
        self.point, self.norm3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.pre = nn.Conv2d(8, 8, 1, bias=False)
        self.norm4 = nn.BatchNorm2d(8, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        y = self.norm3(self.point(self.norm2(self.grouped(x))))
        x = self.relu(x + y * self.gate(x).sigmoid())
        x = self.norm4(self.relu(self.pre(x)))
        return self.head(x.mean((2, 3)))


LAYERS = ("stem", "grouped", "point", "gate", "pre", "unused", "head")
# in forward order; True: the norm reads the layer's output, so the layer's own bias stays
ORDER = ("norm1", "norm2", "norm3", "gate", "norm4", "head")


def residual(seed: int = 0) -> Residual:
    network = Residual().eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.dtype == torch.float32:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.3)
            if module.affine:
                module.weight.data.abs_().add_(0.3)
    return network


def spoiled(network: nn.Module, layers: tuple[str, ...], amount: float = 0.25) -> nn.Module:
    copied = copy.deepcopy(network)
    for k, name in enumerate(layers):
        weight = copied.get_submodule(name).weight
        weight.data += amount * weight.std() * normal(*weight.shape, seed=100 + k) + 0.1 * amount * weight.std()
    return copied


def seen(network: nn.Module, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """Input of a BatchNorm, output of any other module, channels last and flattened."""
    kept = []
    module = network.get_submodule(name)
    if isinstance(module, nn.BatchNorm2d):
        handle = module.register_forward_pre_hook(lambda _, x: kept.append(x[0].clone()))
    else:
        handle = module.register_forward_hook(lambda _, x, y: kept.append(y.clone()))
    with torch.no_grad():
        network(**inputs)
    handle.remove()
    x = kept[0]
    return (x.movedim(1, -1) if x.dim() == 4 else x).reshape(-1, x.shape[1 if x.dim() == 4 else -1])


class Affine(nn.Module):
    """The correction as an explicit map in front of the norm."""

    def __init__(self, inner: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.inner, self.scale, self.shift = inner, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale[:, None, None] + self.shift[:, None, None])


def naive(full: nn.Module, quantized: nn.Module, order: tuple[str, ...], inputs: dict[str, Tensor]) -> nn.Module:
    """The same correction in float64, one whole pass for each step and nothing folded into a norm."""
    full, quantized = copy.deepcopy(full).double(), copy.deepcopy(quantized).double()
    inputs = {name: x.double() for name, x in inputs.items()}
    for name in order:
        target, now = seen(full, name, inputs), seen(quantized, name, inputs)
        module = quantized.get_submodule(name)
        if isinstance(module, nn.BatchNorm2d):
            scale = (target.var(0, unbiased=False) / now.var(0, unbiased=False)).clamp(0.25, 4).sqrt()
            setattr(quantized, name, Affine(module, scale, target.mean(0) - scale * now.mean(0)))
        else:
            module.bias.data += target.mean(0) - now.mean(0)
    return quantized


@pytest.mark.parametrize("amount", [0.05, 0.3, 3.0])
def test_one_pass_equals_the_sequential_reference(amount):
    full = residual()
    quantized = spoiled(full, LAYERS, amount)
    inputs = {"x": normal(32, 3, 6, 6, seed=1)}
    expected = naive(full, quantized, ORDER, inputs)
    before = copy.deepcopy(quantized.state_dict())
    correction = correct_moments(full, quantized, LAYERS, inputs)
    held_out = normal(16, 3, 6, 6, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(quantized(held_out), expected(held_out.double()).float(), rtol=1e-4, atol=1e-4)
    affine = {f"norm{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias")}
    statistics = {"norm4.running_mean", "norm4.running_var"}
    assert correction.tensors.keys() == affine | statistics | {"gate.bias", "head.bias"}
    # an activation lies between pre and the norm after it, and pre has no bias
    assert correction.uncorrected == ("pre", "unused")
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, correction.tensors.get(name, before[name]))


def test_moments_match_afterwards_and_outputs_come_closer():
    full = residual()
    quantized = spoiled(full, LAYERS)
    inputs = {"x": normal(64, 3, 6, 6, seed=1)}
    held_out = normal(64, 3, 6, 6, seed=3)
    with torch.no_grad():
        error = (quantized(held_out) - full(held_out)).square().mean()
        correct_moments(full, quantized, LAYERS, inputs)
        corrected_error = (quantized(held_out) - full(held_out)).square().mean()
    assert corrected_error < 0.7 * error
    # the head's output is the last thing matched
    torch.testing.assert_close(seen(quantized, "head", inputs).mean(0), seen(full, "head", inputs).mean(0))
    # what norm3 hands on has the moments it has in the full network
    outputs = []
    for network in (full, quantized):
        handle = network.norm3.register_forward_hook(lambda _, x, y: outputs.append(y.clone()))
        with torch.no_grad():
            network(**inputs)
        handle.remove()
    for moment in (torch.mean, torch.var):
        torch.testing.assert_close(moment(outputs[1], (0, 2, 3)), moment(outputs[0], (0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_an_unquantized_copy_is_left_as_it_is():
    full = residual()
    correction = correct_moments(full, copy.deepcopy(full), LAYERS, {"x": normal(16, 3, 6, 6, seed=1)})
    assert correction.tensors == {}


def test_constant_channels_keep_their_variance_and_ratios_are_bounded():
    full = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).eval()
    quantized = copy.deepcopy(full)
    scale = torch.tensor([0.0, 1e-3, 1e3, 1.0])
    quantized[0].weight.data *= scale[:, None, None, None]
    correct_moments(full, quantized, ["0"], {"input": normal(16, 2, 5, 5, seed=0)})
    torch.testing.assert_close(quantized[1].weight.data, torch.tensor([1.0, 2.0, 0.5, 1.0]))


class Text(nn.Module):
    """Token mixing that keeps padding out, a LayerNorm, a shared layer and a head on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.inner, self.shared, self.outer = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 6)
        self.position = nn.Linear(1, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1], dtype=torch.float32)[:, None]
        x = self.embedding(input_ids) + self.position(steps / 9)
        y = self.shared(torch.relu(self.shared(torch.tanh(self.inner(x)))))
        x = self.norm(x + self.outer(y))
        weight = attention_mask.to(x.dtype) / attention_mask.sum(1, keepdim=True)
        return self.head((weight[..., None] * x).sum(1))


TEXT_LAYERS = ("position", "inner", "shared", "outer", "head")


def text_inputs(padding: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 20, (24, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(2, 10, (24, 1), generator=generator)).long()
    ids = torch.where(mask.bool(), ids, padding)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("together", [5, 32])
def test_text_is_corrected_through_biases_on_real_tokens_only(together, monkeypatch):
    monkeypatch.setattr("bayesq.quant.correction.PART_EXAMPLES", together)
    torch.manual_seed(0)
    full = Text().eval()
    corrections = []
    for padding in (0, 7):
        quantized = spoiled(full, TEXT_LAYERS, 0.5)
        corrections.append(correct_moments(full, quantized, TEXT_LAYERS, text_inputs(padding)))
        assert corrections[-1].tensors.keys() == {f"{name}.bias" for name in ("position", "inner", "outer", "head")}
        assert corrections[-1].uncorrected == ("shared",)
        keep = text_inputs(padding)["attention_mask"].reshape(-1).bool()
        for name in ("inner", "outer"):
            values = [seen(network, name, text_inputs(padding))[keep].mean(0) for network in (full, quantized)]
            torch.testing.assert_close(*values)
        values = [seen(network, "head", text_inputs(padding)).mean(0) for network in (full, quantized)]
        torch.testing.assert_close(*values)
    for name, tensor in corrections[0].tensors.items():
        torch.testing.assert_close(tensor, corrections[1].tensors[name], msg=f"{name} depends on the padding")


def test_sequences_go_through_without_the_padding_of_longer_ones(monkeypatch):
    monkeypatch.setattr("bayesq.quant.correction.PART_EXAMPLES", 5)
    torch.manual_seed(0)
    full, inputs, shapes = Text().eval(), text_inputs(0), []
    quantized = spoiled(full, TEXT_LAYERS)
    for network in (full, quantized):
        network.register_forward_pre_hook(
            lambda module, _, given: shapes.append(given["input_ids"].shape), with_kwargs=True
        )
    correct_moments(full, quantized, TEXT_LAYERS, inputs)
    lengths = sorted(inputs["attention_mask"].sum(1).tolist(), reverse=True)
    expected = [(len(lengths[k : k + 5]), lengths[k]) for k in range(0, 24, 5)]
    assert {tuple(shape) for shape in shapes} == set(expected)  # passes begin anew after each correction
    # in front of the tokens padding stays, since nothing says that it could be left out
    shapes.clear()
    flipped = {name: x.flip(1) for name, x in inputs.items()}
    correct_moments(full, copy.deepcopy(full), TEXT_LAYERS, flipped)
    assert {shape[1] for shape in shapes} == {9}


def test_memory_is_bounded_by_evenly_spaced_examples():
    full = residual()
    inputs = {"x": normal(30, 3, 6, 6, seed=1)}
    results = []
    for given in (inputs, {"x": inputs["x"][::3]}):
        quantized = spoiled(full, LAYERS)
        results.append(correct_moments(full, quantized, LAYERS, given, max_examples=10).tensors)
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-6)


def test_parts_do_not_change_the_moments(monkeypatch):
    full, inputs = residual(), {"x": normal(10, 3, 6, 6, seed=1)}
    results = []
    for examples, elements in ((10, 2**23), (10, 1), (4, 2**23), (1, 1)):
        monkeypatch.setattr("bayesq.quant.correction.PART_EXAMPLES", examples)
        monkeypatch.setattr("bayesq.quant.correction.PART_ELEMENTS", elements)
        results.append(correct_moments(full, spoiled(full, LAYERS), LAYERS, inputs).tensors)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_it_refuses_what_it_cannot_correct():
    full = residual()
    inputs = {"x": normal(4, 3, 6, 6, seed=1)}
    with pytest.raises(ValueError, match="eval mode"):
        correct_moments(full, copy.deepcopy(full).train(), LAYERS, inputs)
    with pytest.raises(ValueError, match="nowhere is not part of the network"):
        correct_moments(full, copy.deepcopy(full), ["nowhere"], inputs)
    with pytest.raises(ValueError, match="no example"):
        correct_moments(full, copy.deepcopy(full), LAYERS, {"x": inputs["x"][:0]})


@pytest.mark.parametrize("kind", ["scaled", "shared bias"])
def test_a_bias_that_does_not_move_the_mean_one_for_one_is_left_alone(kind):
    class Scaled(nn.Linear):
        def forward(self, input):
            return 4 * nn.functional.linear(input / 4, self.weight, self.bias)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Scaled(5, 5) if kind == "scaled" else nn.Linear(5, 5)
            self.second = nn.Linear(5, 5)
            if kind == "shared bias":
                self.second.bias = self.first.bias

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full = Net().eval()
    rounded = copy.deepcopy(full)
    with torch.no_grad():
        rounded.first.weight.mul_(8).round_().div_(8)
    found = correct_moments(full, rounded, ["first", "second"], {"x": normal(16, 5, seed=1)})
    assert "first" in found.uncorrected and "first.bias" not in found.tensors
    assert ("second" in found.uncorrected) == (kind == "shared bias")
