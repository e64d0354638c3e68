"""Feedback rounding and its factorization. `pytest -s tests/benchmarks/bench_rounding.py`."""

from functools import partial

import pytest
import torch
from naive_quant import affine_nearest, naive_gptq
from references import TIMER, compare, layer, lazy_block_factor, lazy_block_round, matrix_product

from bayesq.quant.bitshift import BitshiftGrid
from bayesq.quant.codes import Congruential
from bayesq.quant.feedback import feedback_factor, feedback_factors, feedback_round, feedback_round_groups
from bayesq.quant.grids import AffineGrid, CodebookGrid, minmax_grid, mse_grid

DAMPING, WIDTH = 0.01, 4
SHAPES = [(768, 768), (3072, 768), (768, 3072), (512, 4608), (2048, 512)]
DEPTHWISE = [(96, 1, 9), (672, 1, 25), (1152, 1, 25)]  # groups, rows, columns: MobileNet's and EfficientNet's
pytestmark = pytest.mark.benchmark(timer=TIMER)


def grid_of(weight: torch.Tensor) -> AffineGrid:
    width = torch.full((len(weight),), WIDTH)
    scale, zero = minmax_grid(weight.double(), width)
    return AffineGrid(scale[:, None], zero[:, None], width)


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_rounding(benchmark, shape):
    """Given the factor: against lazy blocks in float64 (as we compute) and float32 (as published), and the limit."""
    weight, moment = layer(*shape)
    factor, grid = feedback_factor(moment, DAMPING), grid_of(weight)
    ordered = weight[:, factor.order]
    upper = lazy_block_factor(moment[factor.order][:, factor.order], DAMPING)
    row = (grid.scale[:, 0], grid.zero[:, 0], 2**WIDTH - 1)
    lazy = {
        "lazy blocks float64": partial(lazy_block_round, ordered.double(), upper, *row),
        "lazy blocks float32": partial(lazy_block_round, ordered, upper.float(), *row),
    }
    references = lazy | {"matrix product": matrix_product(*shape)}
    if shape == SHAPES[0]:

        def rounder(entry: float, r: int, j: int) -> tuple[int, float]:
            return affine_nearest(entry, float(grid.scale[r, 0]), float(grid.zero[r, 0]), WIDTH)

        some = weight[:32]
        references["column loop, 32 rows"] = lambda: naive_gptq(some.numpy(), moment.numpy(), DAMPING, True, rounder)
    codes = feedback_round(weight, factor, grid)[0]
    same = codes[:, factor.order].double() == lazy_block_round(ordered.double(), upper, *row)[0]
    assert same.double().mean() > 0.999  # near ties fall either way
    times = compare(benchmark, lambda: feedback_round(weight, factor, grid), references)
    if shape in ((3072, 768), (512, 4608)):
        assert times["lazy blocks float64"] > 2 * times["ours"]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_factor(benchmark, shape):
    """Factorization of the input moment, against that by way of the inverse, and a third of a square product."""
    columns = shape[1]
    _, moment = layer(1, columns)
    square = torch.ones(columns, columns, dtype=torch.float64)
    references = {
        "inverse float64": lambda: lazy_block_factor(moment, DAMPING),
        "inverse float32": lambda: lazy_block_factor(moment.float(), DAMPING),
        "matrix product": lambda: square[: columns // 6] @ square,  # 2 C^2 C/6 = C^3/3 operations
    }
    compare(benchmark, lambda: feedback_factor(moment, DAMPING), references, rounds=3)


@pytest.mark.parametrize("states", [None, 256, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_codebooks(benchmark, shape, states):
    """Rounding on codebooks and trellises, against rounding on affine grids."""
    weight, moment = layer(*shape)
    factor, affine = feedback_factor(moment, DAMPING), grid_of(weight)
    parts = (affine.scale[:, 0], affine.zero[:, 0], affine.width)
    grid = CodebookGrid(*parts, {}) if states is None else BitshiftGrid(*parts, Congruential(states))
    references = {"affine": lambda: feedback_round(weight, factor, affine), "matrix product": matrix_product(*shape)}
    compare(benchmark, lambda: feedback_round(weight, factor, grid), references, rounds=3)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_clip_search(benchmark, shape):
    """The grids' clip search, against rounding."""
    weight, moment = layer(*shape)
    factor, affine = feedback_factor(moment, DAMPING), grid_of(weight)
    rounding = {"rounding": lambda: feedback_round(weight, factor, affine)}
    compare(benchmark, lambda: mse_grid(weight.double(), affine.width), rounding, rounds=3)


@pytest.mark.parametrize("shape", DEPTHWISE, ids=shape_name)
def test_depthwise(benchmark, shape):
    """All groups of a depthwise convolution at once, against group by group."""
    groups, _, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(groups, 4 * columns, columns, generator=generator, dtype=torch.float64)
    moments = x.transpose(1, 2) @ x
    grid = grid_of(weight.flatten(0, 1))

    def one_by_one() -> None:
        for g, factor in enumerate(feedback_factors(moments, DAMPING)):
            feedback_round(weight[g], factor, AffineGrid(grid.scale[g : g + 1], grid.zero[g : g + 1], grid.width[:1]))

    def at_once() -> None:
        feedback_round_groups(weight, feedback_factors(moments, DAMPING), grid)

    compare(benchmark, at_once, {"one by one": one_by_one})
