"""SqueezeLLM against enumeration over codes and a naive choice of the fp16 weights."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from naive_quant import FixedWidths
from rounding_loop import rounded
from torch import Tensor

from baselines.row_tables import row_level_bits, table_distortion
from baselines.squeezellm import SqueezeLLM
from bayesq.budget import Allocation, Budget
from bayesq.codebook import normal_distortion
from bayesq.contract import LayerProblem
from bayesq.quant.accounting import stored_bytes
from bayesq.quant.tensor import QuantizedTensor
from bayesq.uniform import Uniform


def layer(groups: int, rows: int, columns: int, seed: int = 0) -> tuple[LayerProblem, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=generator)
    fisher = torch.randn(groups, rows, columns, generator=generator).mul(2).exp()
    return LayerProblem("layer", "Linear", weight, {"fisher_diagonal": fisher}.__getitem__), weight, fisher


def quantize(problem: LayerProblem, widths: list[int], sparse: float = 0.0, sensitive: float = 0.25) -> QuantizedTensor:
    method = SqueezeLLM(sparse, sensitive)
    ((_, tensor),) = rounded(method, [problem], FixedWidths(layer=torch.tensor(widths, dtype=torch.uint8)))
    return tensor


def least_error(w: np.ndarray, h: np.ndarray, count: int) -> float:
    """The least weighted squared error of all assignments of the weights to `count` levels."""
    least = np.inf
    for codes in itertools.product(range(count), repeat=len(w)):
        chosen = [np.array(codes) == k for k in set(codes)]
        total = sum((h[c] * np.square(w[c] - (h[c] * w[c]).sum() / h[c].sum())).sum() for c in chosen)
        least = min(least, total)
    return least


def test_every_row_has_the_optimal_table_for_its_fisher() -> None:
    problem, weight, fisher = layer(2, 2, 6)
    error = (fisher * (quantize(problem, [2] * 4).dequantize() - weight).square()).sum(-1)
    for g, r in itertools.product(range(2), range(2)):
        least = least_error(weight[g, r].double().numpy(), fisher[g, r].double().numpy(), 4)
        assert float(error[g, r]) == pytest.approx(least, rel=2e-2, abs=1e-6)  # levels have fp16 precision


def test_sensitive_weights_and_outliers_stay_in_fp16_and_move_no_level() -> None:
    problem, weight, fisher = layer(2, 3, 20)
    tensor = quantize(problem, [2, 3] * 3, sparse=0.1, sensitive=0.25)
    w, f = weight.reshape(6, 20), fisher.reshape(6, 20)
    by_fisher = sorted(range(120), key=lambda i: -float(f.flatten()[i]))[:3]
    by_size = [i for i in sorted(range(120), key=lambda i: -abs(float(w.flatten()[i]))) if i not in by_fisher][:9]
    assert (tensor.overlay.row * 20 + tensor.overlay.column).tolist() == sorted(by_fisher + by_size)
    found = tensor.dequantize().reshape(6, 20)
    for i in by_fisher + by_size:
        assert float(found.flatten()[i]) == float(w.flatten()[i].half())
    rest = torch.ones(120, dtype=torch.bool)
    rest[by_fisher + by_size] = False
    rest = rest.reshape(6, 20)
    for r, width in enumerate([2, 3] * 3):
        part = LayerProblem("layer", "Linear", w[r, rest[r]][None, None], lambda _, r=r: f[r, rest[r]][None, None])
        # the overlay's weights have no curvature; the floor of the others differs by their share of the row's mean
        torch.testing.assert_close(
            found[r, rest[r]], quantize(part, [width]).dequantize().flatten(), rtol=2e-3, atol=1e-4
        )


def test_the_overlay_and_the_tables_are_counted() -> None:
    problem, _, _ = layer(1, 8, 100)
    asked: dict[str, object] = {}

    def allocate(layers, codebook_bits, distortion, row_bits) -> dict[str, Tensor]:
        asked.update(overlay=codebook_bits, tables=sum(problem.rows * row_bits(one, 3) for one in layers))
        return {"layer": torch.full((8,), 3, dtype=torch.uint8)}

    ((_, tensor),) = rounded(SqueezeLLM(0.02, 0.25), [problem], allocate)
    plain_layer = 8 + 8 * (3 * 100 + 24)  # a byte for the width, codes, and an affine row's scale and zero point
    assert 8 * stored_bytes(tensor) == plain_layer + asked["overlay"] + asked["tables"]
    assert asked["tables"] == 8 * (16 * 8 - 24)
    ((_, without),) = rounded(SqueezeLLM(0.0, 0.25), [problem], allocate)
    assert asked["overlay"] == 0
    assert without.overlay is None


@pytest.mark.parametrize("bits", [3.2, 3.9, 4.6, 5.3])
def test_a_uniform_budget_of_stored_bits_pays_for_tables_and_overlays(bits: float) -> None:
    layers = [layer(1, rows, columns)[0] for rows, columns in ((8, 100), (5, 333), (20, 64))]
    layers = [replace(problem, name=f"layer{k}") for k, problem in enumerate(layers)]
    stored = [
        sum(8 * stored_bytes(t) for _, t in rounded(SqueezeLLM(sparse, 0.25), layers, Allocation(Uniform(), budget)))
        for budget in (Budget(bits, "stored"), Budget(bits + 0.3, "stored"))
        for sparse in (0.0, 0.01)
    ]
    weights = sum(problem.weight.numel() for problem in layers)
    for total, limit in zip(stored, (bits, bits, bits + 0.3, bits + 0.3), strict=True):
        assert 0.9 * limit * weights <= total <= limit * weights


def test_the_distortion_tends_to_that_of_lloyd_max_levels() -> None:
    wide, narrow = layer(1, 1, 4000)[0], layer(1, 1, 100)[0]
    for width in (2, 3, 4):
        assert table_distortion(wide, width) == pytest.approx(normal_distortion("lloyd", width), rel=0.07)
        assert table_distortion(narrow, width) < table_distortion(wide, width)
    assert table_distortion(narrow, 8) == 0
    assert row_level_bits(narrow, 4) == 16 * 16 - 24


def test_rows_and_columns_without_a_gradient_are_rounded_to_their_own_levels() -> None:
    weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.5, 9.0, 9.0, 0.5]]])
    fisher = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]])
    problem = LayerProblem("layer", "Linear", weight, lambda _: fisher)
    assert torch.equal(quantize(problem, [2, 2]).dequantize(), weight)


@pytest.mark.parametrize("key", ["sparse", "sensitive"])
def test_bad_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{key}=1\.5: needs a share from 0 to 1"):
        SqueezeLLM(**{"sparse": 0.0, "sensitive": 0.1, key: 1.5})
