"""GPTAQ and Qronos: their equations in loops over columns, and GPTQ as their limit."""

import numpy as np
import odd_networks as odd
import pytest
import torch
from naive_quant import RULES, FixedWidths, affine_nearest, damped, moment_of, visiting_order
from rounding_loop import rounded

import bayesq
from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from baselines.qronos import Qronos
from bayesq.contract import LayerProblem
from bayesq.errors import Refused

DAMPING, ROWS = 0.01, 6
WIDTHS = [2, 3, 3, 4, 5, 8]


def layer(columns: int, groups: int = 1, change: float = 0.3) -> tuple[LayerProblem, torch.Tensor, torch.Tensor]:
    """A layer with H and C of inputs x' = x + noise."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(groups, ROWS // groups, columns, generator=generator)
    h = torch.stack([moment_of(columns, columns + 9, generator) for _ in range(groups)])
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64) / columns
    c = h + change * mix @ h
    statistics = {"input_moment": h, "cross_moment": c}
    return LayerProblem("layer", "Linear", weight, statistics.__getitem__, 1), h, c


def codes(method, problem: LayerProblem) -> np.ndarray:
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)
    ((_, tensor),) = rounded(method, [problem], FixedWidths(layer=widths))
    return tensor.codes.numpy()


def settings(act_order: bool, clip: str = "mse") -> dict:
    return {"clip": clip, "act_order": act_order, "damping": DAMPING}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [5, 30, 300])
def test_gptaq_follows_its_equation_column_by_column(columns: int, act_order: bool) -> None:
    problem, h, c = layer(columns)
    order = visiting_order(h[0].numpy(), act_order)
    h0, c0 = (x[0].numpy()[np.ix_(order, order)] for x in (h, c))
    inverse = np.linalg.inv(damped(h[0].numpy(), DAMPING)[np.ix_(order, order)])
    v = np.linalg.cholesky(inverse).T  # VT V = H^-1
    p = np.triu((c0 - h0) @ v.T, 1) @ v
    w = problem.weight[0].double().numpy()[:, order].copy()
    grids = [RULES["mse"](row, width) for row, width in zip(problem.weight[0].double().numpy(), WIDTHS, strict=True)]
    expected = np.zeros(w.shape, int)
    for i in range(columns):
        q = np.zeros(ROWS)
        for r in range(ROWS):
            expected[r, order[i]], q[r] = affine_nearest(float(w[r, i]), *grids[r], WIDTHS[r])
        error, now = (w[:, i] - q) / v[i, i], w[:, i].copy()
        w[:, i + 1 :] += -np.outer(error, v[i, i + 1 :]) + np.outer(now, p[i, i + 1 :])
    found = codes(GPTAQ(**settings(act_order), group_size=None, alpha=1.0), problem)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("clip", ["mse", "auto"])
def test_gptaq_without_drift_is_gptq(groups: int, act_order: bool, clip: str) -> None:
    problem, h, _ = layer(40, groups)
    expected = codes(GPTQ(**settings(act_order, clip), group_size=None), problem)
    if clip == "mse":  # with alpha = 0 the clip rules are still judged by both inputs
        assert np.array_equal(codes(GPTAQ(**settings(act_order, clip), group_size=None, alpha=0.0), problem), expected)
    assert not np.array_equal(codes(GPTAQ(**settings(act_order, clip), group_size=None, alpha=1.0), problem), expected)
    same = LayerProblem("layer", "Linear", problem.weight, lambda kind: h, 1)
    assert np.array_equal(codes(GPTAQ(**settings(act_order, clip), group_size=None, alpha=1.0), same), expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [5, 30])
def test_qronos_first_corrects_and_then_solves_for_the_rest(columns: int, act_order: bool) -> None:
    problem, h, c = layer(columns)
    method = Qronos(**settings(act_order), ridge=1e-6)
    order = visiting_order(h[0].numpy(), act_order)
    h0, c0 = (x[0].numpy()[np.ix_(order, order)] for x in (h, c))
    w = problem.weight[0].double().numpy()[:, order]
    size = 1e-6 * np.linalg.eigvalsh(h0)[-1]
    grids = [RULES["mse"](row, width) for row, width in zip(problem.weight[0].double().numpy(), WIDTHS, strict=True)]
    best = (w @ c0[:, 0] - w[:, 1:] @ h0[1:, 0]) / h0[0, 0]
    first = [affine_nearest(float(best[r]), *grids[r], WIDTHS[r]) for r in range(ROWS)]
    found = codes(method, problem)
    assert found[:, order[0]].tolist() == [code for code, _ in first]
    q = np.array([value for _, value in first])
    rest = np.linalg.solve(
        h0[1:, 1:] + size * np.eye(columns - 1),
        ((w @ (c0 + size * np.eye(columns)))[:, 1:] - np.outer(q, h0[0, 1:])).T,
    ).T
    # GPTQ on the corrected weights, on the grids of the weights as they were
    x, damped_h = np.column_stack([q, rest]), damped(h[0].numpy(), DAMPING)[np.ix_(order, order)]
    v = np.linalg.cholesky(np.linalg.inv(damped_h)).T
    for i in range(columns):
        pairs = [affine_nearest(float(x[r, i]), *grids[r], WIDTHS[r]) for r in range(ROWS)]
        assert found[:, order[i]].tolist() == [code for code, _ in pairs]
        error = (x[:, i] - np.array([value for _, value in pairs])) / v[i, i]
        x[:, i + 1 :] -= np.outer(error, v[i, i + 1 :])


def test_qronos_with_equal_inputs_is_gptq() -> None:
    problem, h, _ = layer(20)
    same = LayerProblem("layer", "Linear", problem.weight, lambda kind: h, 1)
    # with C = H the first column is rounded as it is, and the solution for the rest is what GPTQ's feedback gives
    expected = codes(GPTQ(clip="mse", act_order=True, damping=1e-9, group_size=None), problem)
    assert np.array_equal(codes(Qronos(clip="mse", act_order=True, damping=1e-9, ridge=1e-12), same), expected)


def test_both_lower_the_error_that_gptq_leaves_behind_a_changed_prefix() -> None:
    problem, h, c = layer(60, change=1.0)
    w = problem.weight[0].double()

    def error(method) -> float:
        widths = torch.tensor([3] * ROWS, dtype=torch.uint8)
        ((_, tensor),) = rounded(method, [problem], FixedWidths(layer=widths))
        q = tensor.dequantize()[0].double()
        return float(((q @ h[0] - 2 * w @ c[0]) * q).sum())

    plain = error(GPTQ(**settings(True, "auto"), group_size=None))
    assert error(GPTAQ(**settings(True, "auto"), group_size=None, alpha=1.0)) < plain
    assert error(Qronos(**settings(True, "auto"), ridge=1e-6)) < plain


def test_qronos_counts_what_a_column_did_that_died_behind_the_prefix() -> None:
    """x_2 is alive and x'_2 is dead: its share of W x goes into the other columns, and its weights become zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64) + 1
    prefix = x.clone()
    prefix[:, 2] = 0
    statistics = {"input_moment": (prefix.T @ prefix / 200)[None], "cross_moment": (x.T @ prefix / 200)[None]}
    w = torch.randn(1, ROWS, 5, generator=generator) * torch.tensor([1, 1, 0.2, 1, 1])
    problem = LayerProblem("layer", "Linear", w, statistics.__getitem__, 1)
    widths = torch.full((ROWS,), 8, dtype=torch.uint8)
    ((_, tensor),) = rounded(Qronos(**settings(True, "minmax"), ridge=1e-9), [problem], FixedWidths(layer=widths))
    q, target = tensor.dequantize()[0].double(), w[0].double() @ x.T
    assert not q[:, 2].any()
    least = (target - torch.linalg.lstsq(prefix, target.T).solution.T @ prefix.T).square().sum()
    assert (target - q @ prefix.T).square().sum() < 1.3 * least


class TwoMixtures(odd.Mixture):
    def __init__(self) -> None:
        super().__init__()
        self.first = odd.Experts(3, transposed=False)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.first(x))


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
@pytest.mark.parametrize(
    ("build", "exclude"), [(TwoMixtures, "odd.up,first.up"), (odd.SelfAttention, "odd.in_proj_weight")]
)
def test_stacks_that_cannot_be_paired_are_refused_with_what_to_exclude(build, exclude: str, method: str) -> None:
    module, x = build().eval(), torch.randn(8, 4, odd.WIDTH, generator=torch.Generator().manual_seed(0))
    names = exclude.split(",")
    with pytest.raises(
        Refused, match=rf"^layer ({'|'.join(names)}): this method needs the same samples .* exclude=\[{exclude}\]"
    ):
        bayesq.quantize(module, [x], method=method)
    quantized, _ = bayesq.quantize(module, [x], method=method, exclude=names)
    weight = module.state_dict()[names[0]]
    assert torch.equal(quantized.state_dict()[names[0]], weight)
    assert not torch.equal(quantized.head.weight, module.head.weight)
