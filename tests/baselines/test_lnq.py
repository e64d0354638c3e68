"""LNQ against naive loops and enumeration, and its weighted input moment against one example at a time."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, samples, seeded
from naive_quant import FixedWidths, moment_of
from rounding_loop import rounded
from tiny_sets import collect, images, one_by_one, sentences
from torch import Tensor, nn

from baselines.kmeans import in_fp16
from baselines.lnq import LNQ, GuidedMoment, descend, fit_levels, objective
from baselines.squeezellm import SqueezeLLM
from bayesq.contract import LayerProblem
from bayesq.quant.tensor import QuantizedTensor

DAMPING = 0.01


def naive_moment(module: nn.Module, name: str, examples: list[dict[str, Tensor]], groups: int) -> np.ndarray:
    """E[sum over classes y of p(y) sum over positions of mean_{r in J_k} d_r^2 x xT], [g, k, c, c] float64."""
    module = copy.deepcopy(module).double().requires_grad_(True)
    layer = module.get_submodule(name)
    g = layer.groups if isinstance(layer, nn.Conv2d) else 1
    rows, columns = layer.weight.shape[0] // g, layer.weight[0].numel()
    parts = np.array_split(np.arange(rows), min(groups, rows))
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((inputs[0].detach(), output))
        return output.clone()

    layer.register_forward_hook(hook)
    total = np.zeros((g, len(parts), columns, columns))
    for inputs in examples:
        seen.clear()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        log_p = torch.log_softmax(module(**inputs)[0], 0)
        ((x, output),) = seen
        for target in log_p:
            (d,) = torch.autograd.grad(target, output, retain_graph=True)
            d = d[0].reshape(g, rows, -1).permute(2, 0, 1) if d.dim() == 4 else d.reshape(-1, 1, rows)
            for sample, gradient in zip(samples(layer, x), d.numpy(), strict=True):
                for i, (k, part) in itertools.product(range(g), enumerate(parts)):
                    energy = np.square(gradient[i, part]).mean()
                    total[i, k] += math.exp(target.item()) * energy * np.outer(sample[i], sample[i])
    return total / len(examples)


@pytest.mark.parametrize("groups", [1, 2, 100])
@pytest.mark.parametrize(
    ("module", "examples", "names"),
    [(TinyConvNet(3), images(), ["stem", "grouped", "head"]), (TinyEncoder(3), sentences(), ["up", "query", "head"])],
)
def test_the_moment_is_that_of_one_example_at_a_time(module: nn.Module, examples, names, groups: int) -> None:
    module = seeded(module)
    found = collect(module, examples, statistics=[GuidedMoment(groups)])["guided_moment"]
    for name in names:
        expected = naive_moment(module, name, one_by_one(examples), groups)
        assert found[name].shape == expected.shape
        np.testing.assert_allclose(found[name], expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def rows_of(columns: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), moment_of(
        columns, 3 * columns, generator
    )


@pytest.mark.parametrize("count", [4, 8, 32])
def test_levels_are_least_squares_and_keep_their_order(count: int) -> None:
    weight, h = rows_of(40)
    levels = in_fp16(torch.randn(5, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sort(1)[0])
    codes = torch.randint(count, (5, 40), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    fitted, renamed = fit_levels(weight, h, levels, codes)
    assert bool((fitted.diff(dim=1) >= 0).all())
    root = np.linalg.cholesky(h.numpy()).T
    for row in range(5):
        one_hot = np.eye(count)[codes[row].long().numpy()]
        best, *_ = np.linalg.lstsq(root @ one_hot, root @ weight[row].numpy(), rcond=None)
        used = np.flatnonzero(one_hot.any(0))
        value = best[codes[row].long().numpy()]
        np.testing.assert_allclose(fitted[row][renamed[row].long()], value, rtol=2e-3, atol=2e-3)
        assert len(used) == len(renamed[row].unique())


def test_coordinate_descent_is_that_of_a_loop() -> None:
    weight, h = rows_of(12)
    levels = torch.linspace(-2, 2, 6, dtype=torch.float64).expand(5, 6)
    start = torch.randint(6, (5, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = start.clone()
    for _ in range(2):
        for row, i in itertools.product(range(5), range(12)):
            tried = expected[row].repeat(6, 1)
            tried[:, i] = torch.arange(6)
            expected[row] = tried[int(objective(weight[row].expand(6, 12), h, levels[:1].expand(6, 6), tried).argmin())]
    assert torch.equal(descend(weight, h, levels, start, 2), expected)
    assert not torch.equal(start, expected)


def test_the_objective_never_rises_and_ends_below_that_of_kmeans() -> None:
    weight, h = rows_of(60, rows=20)
    objectives = [
        objective(weight, h, *LNQ(4, rounds, sweeps=1, damping=DAMPING).fit(weight, h, 8)) for rounds in (0, 1, 2, 4, 8)
    ]
    for before, after in itertools.pairwise(objectives):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(objectives[-1].sum()) < 0.6 * float(objectives[0].sum())


def least_objective(weight: np.ndarray, h: np.ndarray, count: int) -> float:
    """The least objective of a row over all codes, each with its least squares levels."""
    root, least = np.linalg.cholesky(h).T, np.inf
    for codes in itertools.product(range(count), repeat=len(weight)):
        one_hot = root @ np.eye(count)[list(codes)]
        levels = np.linalg.lstsq(one_hot, root @ weight, rcond=None)[0]
        least = min(least, float(np.square(root @ weight - one_hot @ levels).sum()))
    return least


def test_tiny_rows_reach_the_optimum_of_all_codes_and_levels() -> None:
    """Exactly with uncorrelated inputs. With correlated ones coordinate descent ends in a local optimum at times."""
    weight, _ = rows_of(6, rows=8)
    method, mix = LNQ(4, rounds=4, sweeps=4, damping=0.0), torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    reached = {}
    for share in (0.0, 0.2):
        root = torch.eye(6, dtype=torch.float64) + share * mix
        h = root.T @ root
        found = objective(weight, h, *method.fit(weight, h, 3)).numpy()
        least = np.array([least_objective(row.numpy(), h.numpy(), 3) for row in weight])
        assert bool((found > 0.999 * least).all())  # levels have fp16 precision
        reached[share] = float((found < 1.001 * least).mean())
    assert reached[0.0] == 1
    assert reached[0.2] >= 0.6


def quantize(method, problem: LayerProblem, widths: list[int]) -> QuantizedTensor:
    ((_, tensor),) = rounded(method, [problem], FixedWidths(layer=torch.tensor(widths, dtype=torch.uint8)))
    return tensor


def test_each_row_group_is_rounded_by_its_moment_and_each_row_at_its_width() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 4, 24, generator=generator)
    moments = torch.stack([torch.stack([moment_of(24, 60, generator).float() for _ in range(2)]) for _ in range(2)])
    widths = [2, 3, 3, 4, 2, 2, 5, 8]
    method = LNQ(2, 3, 4, DAMPING)
    found = quantize(method, LayerProblem("layer", "Linear", weight, lambda _: moments), widths).dequantize()
    for g, r in itertools.product(range(2), range(4)):
        h = method.damped(moments[g, r // 2])
        levels, codes = method.fit(weight[g, r, None].double(), h, 2 ** widths[4 * g + r])
        assert torch.equal(found[g, r].double(), levels[0][codes[0].long()])
    unguided = LNQ(0, 3, 4, DAMPING)
    one = LayerProblem("layer", "Linear", weight, {"input_moment": moments[:, 0]}.__getitem__)
    same = LayerProblem("layer", "Linear", weight, {"guided_moment": moments[:, :1]}.__getitem__)
    assert torch.equal(
        quantize(unguided, one, widths).dequantize(), quantize(LNQ(1, 3, 4, DAMPING), same, widths).dequantize()
    )


def test_with_uncorrelated_inputs_it_is_squeezellm() -> None:
    generator = torch.Generator().manual_seed(6)
    weight, energy = torch.randn(1, 3, 30, generator=generator), torch.rand(1, 1, 30, generator=generator)
    widths = [2, 3, 4]
    fisher = LayerProblem("layer", "Linear", weight, lambda _: energy.expand(1, 3, 30))
    guided = LayerProblem("layer", "Linear", weight, lambda _: torch.diag_embed(energy))
    expected = quantize(SqueezeLLM(0, 0), fisher, widths).dequantize()
    torch.testing.assert_close(quantize(LNQ(1, 2, 2, 0.0), guided, widths).dequantize(), expected, rtol=2e-3, atol=1e-3)


def test_a_layer_without_gradients_is_rounded_by_plain_kmeans() -> None:
    weight = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(7))
    without = LayerProblem("layer", "Linear", weight, lambda _: torch.zeros(1, 1, 9, 9))
    plain = LayerProblem("layer", "Linear", weight, lambda _: torch.ones(1, 2, 9))
    expected = quantize(SqueezeLLM(0, 0), plain, [2, 3]).dequantize()
    torch.testing.assert_close(
        quantize(LNQ(1, 1, 1, DAMPING), without, [2, 3]).dequantize(), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("groups", -1, "needs a whole number of at least 0"),
        ("rounds", 0.5, "needs a whole number of at least 0"),
        ("sweeps", 0, "needs a whole number of at least 1"),
        ("damping", -1, "must be 0 or more"),
    ],
)
def test_bad_values_are_refused(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{key}={value}: {message}"):
        LNQ(**{"groups": 4, "rounds": 1, "sweeps": 1, "damping": 0.01, key: value})
