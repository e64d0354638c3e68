"""HQQ against a loop over rows and entries, and against the package hqq."""

import math

import numpy as np
import pytest
import torch
from naive_quant import FixedWidths, problem, range_grid
from rounding_loop import rounded

from baselines.hqq import HQQ
from bayesq.contract import LayerProblem
from bayesq.quant.accounting import stored_bytes
from bayesq.quant.tensor import QuantizedTensor

SETTINGS = {"norm": 0.7, "beta": 10.0, "growth": 1.01, "steps": 20, "fit_scale": False, "group_size": None}


def quantize(layer: LayerProblem, widths: list[int], **changes: object) -> QuantizedTensor:
    method = HQQ(**{**SETTINGS, **changes})
    ((_, tensor),) = rounded(method, [layer], FixedWidths(layer=torch.tensor(widths, dtype=torch.uint8)))
    return tensor


def naive_fit(
    row: np.ndarray, width: int, norm: float, beta: float, steps: int, fit_scale: bool
) -> tuple[float, list[int]]:
    """Least cost of a row over the steps, with 8-bit zero points, and its codes."""
    top, unit = 2**width - 1, 2.0 ** (width - 8)
    scale, _ = range_grid(min(0.0, row.min()), max(0.0, row.max()), width)
    zero = -min(0.0, float(row.min())) / scale
    least, best = math.inf, []
    for step in range(steps + 1):
        kept = min(max(round(zero / unit), 0), 255) * unit
        codes = [min(max(round(float(w) / scale + kept), 0), top) for w in row]
        cost = sum(abs(w - scale * (k - kept)) ** norm for w, k in zip(row, codes, strict=True))
        if cost < least:
            least, best = cost, codes
        codes = [min(max(round(float(w) / scale + zero), 0), top) for w in row]
        targets = []
        for w, k in zip(row, codes, strict=True):
            x = w - scale * (k - zero)
            shrunk = max(abs(x) - abs(x) ** (norm - 1) / (beta * 1.01**step), 0.0) if x else 0.0
            targets.append(w - math.copysign(shrunk, x))
        zero = sum(k - t / scale for k, t in zip(codes, targets, strict=True)) / len(row)
        if fit_scale:
            levels = [k - zero for k in codes]
            fitted = sum(a * t for a, t in zip(levels, targets, strict=True)) / sum(a * a for a in levels)
            scale = float(np.float16(fitted)) if fitted > 0 else scale
    return least, best


@pytest.mark.parametrize("fit_scale", [False, True])
@pytest.mark.parametrize(("norm", "beta", "size"), [(0.7, 10.0, 1.0), (0.5, 100.0, 0.1), (1.0, 300.0, 0.05)])
def test_every_row_has_the_best_step_of_the_equations(norm: float, beta: float, size: float, fit_scale: bool) -> None:
    weight = size * torch.randn(2, 3, 31, generator=torch.Generator().manual_seed(0)) ** 3
    widths = [2, 3, 4, 3, 8, 2]
    tensor = quantize(problem(weight, torch.eye(31)), widths, norm=norm, beta=beta, fit_scale=fit_scale)
    error = (tensor.dequantize() - weight).double().abs().pow(norm).sum(-1).flatten()
    for i, width in enumerate(widths):
        least, codes = naive_fit(weight[i // 3, i % 3].double().numpy(), width, norm, beta, 20, fit_scale)
        assert float(error[i]) == pytest.approx(least, rel=1e-4)
        assert tensor.codes[i].tolist() == codes


@pytest.mark.parametrize("group_size", [4, 7, 40])
def test_column_groups_are_fitted_apart_and_their_scales_are_counted(group_size: int) -> None:
    weight = torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(1))
    widths = [3] * 4
    tensor = quantize(problem(weight, torch.eye(30)), widths, group_size=group_size)
    groups = -(-30 // group_size)
    assert stored_bytes(tensor) - stored_bytes(quantize(problem(weight, torch.eye(30)), widths)) == 4 * 3 * (groups - 1)
    parts = [quantize(problem(part, torch.eye(part.shape[2])), widths) for part in weight.split(group_size, 2)]
    assert torch.equal(tensor.dequantize(), torch.cat([part.dequantize() for part in parts], 2))


@pytest.mark.parametrize("size", [0.05, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_those_of_the_package(bits: int, size: float) -> None:
    optimize = pytest.importorskip("hqq.core.optimize", reason="needs pip install -c constraints.txt -e '.[test]'")
    weight = size * torch.randn(6, 64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    iterates = list(HQQ(**SETTINGS).iterates(weight, torch.full((6,), bits)))
    options = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "tol": 0.0, "early_stop": False, "scale_gridsearch": False}
    scale, zero = iterates[0]
    for step in (2, 7, 20):
        _, _, theirs = optimize.optimize_weights_proximal_v2(
            weight,
            1 / scale[:, None],
            zero[:, None],
            [0, 2**bits - 1],
            1,
            "cpu",
            torch.float64,
            options | {"iters": step},
        )
        torch.testing.assert_close(iterates[step][1][:, None], theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_the_error_is_no_larger_than_that_of_the_package(bits: int, group_size: int | None) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize", reason="needs pip install -c constraints.txt -e '.[test]'")
    weight = 0.05 * torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(bits)) ** 3
    codes, meta = quantizer.Quantizer.quantize(
        weight[0], bits, group_size=group_size or 64, axis=1, bitpack=False, device="cpu"
    )
    shape = (-1, group_size or 64)
    theirs = ((codes.reshape(shape) - meta["zero"]) * meta["scale"]).reshape(weight.shape)
    ours = quantize(problem(weight, torch.eye(64)), [bits] * 32, group_size=group_size).dequantize()
    error, error_of_theirs = ((w - weight).abs().pow(0.7).sum() for w in (ours, theirs))
    assert error <= 1.002 * error_of_theirs  # their zero points have 16 bits or more, ours 8


def test_rows_of_zeros_stay_zero() -> None:
    assert not quantize(problem(torch.zeros(1, 2, 5), torch.eye(5)), [2, 8]).dequantize().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 0}, r"method\.norm=0: must be above 0 and at most 1"),
        ({"beta": 0}, r"method\.beta=0: must be above 0"),
        ({"growth": 0.5}, r"method\.growth=0\.5: must be at least 1"),
        ({"steps": -1}, r"method\.steps=-1: needs a whole number"),
        ({"group_size": 0}, r"method\.group_size=0: must be at least 1"),
    ],
)
def test_bad_values_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQQ(**{**SETTINGS, **change})
