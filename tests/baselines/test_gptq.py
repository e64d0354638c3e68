"""GPTQ against the published code's weights and against a column-by-column float64 implementation."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_quant import RULES, FixedWidths, Naive, affine_nearest, moment_of, mse, naive_gptq, problem, row_errors
from rounding_loop import rounded
from safetensors.torch import load_file
from torch import Tensor

from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from bayesq.budget import Allocation, Budget
from bayesq.contract import LayerProblem
from bayesq.quant.accounting import code_bits
from bayesq.quant.feedback import feedback_factor
from bayesq.quant.tensor import QuantizedTensor
from bayesq.uniform import Uniform

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "gptq_reference"
DAMPING = 0.01


def uint8(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no reference weights at {REFERENCE}")
@pytest.mark.parametrize("case", range(12))
def test_the_published_codes_weights_are_reproduced(case: int) -> None:
    settings = json.loads((REFERENCE / "cases.json").read_text())[case]
    tensors = load_file(REFERENCE / "reference.safetensors")
    weight, moment, expected = (tensors[f"{case}.{key}"] for key in "WHQ")
    gptq = GPTQ(
        clip="mse" if settings["mse_clip"] else "minmax",
        act_order=settings["act_order"],
        damping=settings["damp"],
        group_size=None if settings["group_size"] == -1 else settings["group_size"],
        scale_dtype=torch.float32,
    )
    factor = feedback_factor(moment, gptq.damping, gptq.act_order)
    assert bool(factor.dead.any()) == settings["dead_column"]
    width = torch.full((len(weight),), settings["bits"], dtype=torch.uint8)
    _, scale, _, values = gptq.round_layer(weight[None], moment[None], [factor], width)

    size = gptq.group_size or weight.shape[1]
    steps = (values - expected).abs() / scale.repeat_interleave(size, dim=1)[:, : weight.shape[1]]
    differs = steps > 1e-3
    assert float(differs.double().mean()) <= 0.005
    assert float(steps.max()) < 1.01
    error = row_errors((values - weight).numpy(), moment.numpy()).sum()
    scale_of_errors = row_errors(weight.numpy(), moment.numpy()).sum()
    assert error == pytest.approx(settings["error"], rel=1e-3, abs=1e-12 * scale_of_errors)


def naive_matrix(weight: Tensor, moment: Tensor, widths: list[int], clip: str, act_order: bool) -> Naive:
    """One matrix with per-row fp16 grids set from the original weights, dead columns zeroed."""
    w = weight.double().numpy().copy()
    w[:, np.diag(moment.numpy()) == 0] = 0
    grids = [RULES[clip](row, width) for row, width in zip(w, widths, strict=True)]
    return naive_gptq(
        w, moment.numpy(), DAMPING, act_order, lambda entry, r, j: affine_nearest(entry, *grids[r], widths[r])
    )


def check_equal(tensor: QuantizedTensor, naive: list[Naive], weight: Tensor, moments: Tensor) -> None:
    assert np.array_equal(tensor.codes.numpy(), np.concatenate([n.codes for n in naive]))
    for g, found in enumerate(tensor.dequantize().double().numpy()):
        ours = row_errors(found - weight[g].double().numpy(), moments[g].numpy())
        theirs = row_errors(naive[g].values - weight[g].double().numpy(), moments[g].numpy())
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("columns", [1, 16, 30, 140])
def test_codes_equal_the_naive_implementation(columns: int, clip: str, act_order: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(1, 6, columns, generator=generator)
    moments = moment_of(columns, columns + 5, generator)[None]
    widths = [2, 3, 3, 4, 5, 8]
    gptq = GPTQ(clip, act_order, DAMPING, None)
    ((layer, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8(widths)))
    check_equal(tensor, [naive_matrix(weight[0], moments[0], widths, clip, act_order)], weight, moments)
    assert layer.fallbacks == {"dead_columns": 0, "damping_retries": 0}


@pytest.mark.parametrize("act_order", [False, True])
def test_a_grouped_convolution_is_its_groups_one_by_one(act_order: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, 18, generator=generator)
    moments = torch.stack([moment_of(18, 40, generator) for _ in range(3)])
    widths = [2, 3, 4, 5, 3, 3, 3, 3, 8, 2, 2, 4]
    gptq = GPTQ("mse", act_order, DAMPING, None)
    ((_, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8(widths)))
    naive = [naive_matrix(weight[g], moments[g], widths[4 * g : 4 * g + 4], "mse", act_order) for g in range(3)]
    assert tensor.groups == 3
    check_equal(tensor, naive, weight, moments)


def test_a_depthwise_convolution_has_a_matrix_a_channel() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 1, 9, generator=generator)
    moments = torch.stack([moment_of(9, 30, generator) for _ in range(5)])
    ((_, tensor),) = rounded(
        GPTQ("minmax", True, DAMPING, None), [problem(weight, moments)], FixedWidths(layer=uint8([3] * 5))
    )
    check_equal(tensor, [naive_matrix(weight[g], moments[g], [3], "minmax", True) for g in range(5)], weight, moments)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 20])
def test_auto_clip_is_the_better_rule_of_every_row(act_order: bool, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 24, 60, generator=generator)
    moments = torch.stack([moment_of(60, 100, generator) for _ in range(2)])
    errors = {}
    for clip in ("minmax", "mse", "auto"):
        gptq = GPTQ(clip, act_order, DAMPING, group_size)
        ((_, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8([3] * 48)))
        delta = (tensor.dequantize() - weight).double().numpy()
        errors[clip] = np.concatenate([row_errors(delta[g], moments[g].numpy()) for g in range(2)])
    np.testing.assert_allclose(errors["auto"], np.minimum(errors["minmax"], errors["mse"]), rtol=1e-6)
    # neither rule is always the better one, or the choice would not be tested
    assert 0 < (errors["minmax"] < errors["mse"]).sum() < 48


@pytest.mark.parametrize(
    ("shape", "act_order", "group_size"),
    [((1, 6, 40), True, None), ((3, 4, 9), True, None), ((1, 6, 40), True, 16), ((1, 6, 40), False, 16)],
)
def test_the_gain_rule_takes_the_gains_of_feedback(shape, act_order, group_size) -> None:
    """Its grids are those with the least error weighed by the pivots of the moment's own factorization."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    moments = torch.stack([moment_of(shape[2], 3 * shape[2], generator) for _ in range(shape[0])])
    gptq = GPTQ("curvature", act_order, DAMPING, group_size)
    ((_, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8([3] * shape[0] * shape[1])))
    size = group_size or shape[2]
    for g in range(shape[0]):
        a = moments[g].double().numpy()
        order = np.argsort(-a.diagonal(), kind="stable") if act_order else np.arange(shape[2])
        damped = a + DAMPING * a.diagonal().mean() * np.eye(len(a))
        # what is left of a column given all later ones: a Cholesky factor from the last column on
        last_first = order[::-1]
        gain = np.empty(len(a))
        gain[last_first] = np.linalg.cholesky(damped[np.ix_(last_first, last_first)]).diagonal() ** 2
        for r in range(shape[1]):
            # without act-order, the grids of later column groups are set on what feedback has made of the weights
            for s, first in enumerate(range(0, shape[2] if act_order else 1, size)):
                own = slice(first, first + size)
                expected = mse(weight[g, r, own].double().numpy(), 3, gain=gain[own])
                row = g * shape[1] + r
                found = float(tensor.scale[row, s]), float(tensor.zero[row, s]) * 2.0 ** (3 - 8)
                assert found == expected


def naive_column_groups(weight: np.ndarray, moment: np.ndarray, width: int, size: int, act_order: bool) -> Naive:
    """Column groups: with act-order grids from the original weights; otherwise from the weights when a group begins.

    The published code updates lazily in blocks of 128 columns, so a group sees the feedback of earlier blocks only.
    """
    rows, columns = weight.shape
    grids: dict[tuple[int, int], tuple[float, float]] = {}
    starts = range(0, columns, size)

    def set_grids(w: np.ndarray, first: int) -> None:
        for r in range(rows):
            grids[r, first // size] = RULES["minmax"](w[r, first : first + size], width)

    def rounder(entry: float, r: int, j: int) -> tuple[int, float]:
        return affine_nearest(entry, *grids[r, j // size], width)

    if act_order:
        for first in starts:
            set_grids(weight, first)
        return naive_gptq(weight, moment, DAMPING, True, rounder)
    for block in range(0, columns, 128):

        def until_block(entry: float, r: int, j: int, stop: int = block) -> tuple[int, float]:
            return rounder(entry, r, j) if j < stop else (0, entry)  # no error: later columns stay as they are

        current = naive_gptq(weight, moment, DAMPING, False, until_block).target
        for first in starts:
            if block <= first < block + 128:
                set_grids(current, first)
    return naive_gptq(weight, moment, DAMPING, False, rounder)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(50, 16), (200, 64), (150, 100), (12, 40)])
def test_column_groups_equal_the_naive_implementation(columns: int, size: int, act_order: bool) -> None:
    generator = torch.Generator().manual_seed(columns + size)
    weight = torch.randn(1, 4, columns, generator=generator)
    moments = moment_of(columns, 2 * columns, generator)[None]
    gptq = GPTQ("minmax", act_order, DAMPING, size)
    ((_, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8([3] * 4)))
    assert tensor.scale.shape == (4, -(-columns // size))
    naive = naive_column_groups(weight[0].double().numpy(), moments[0].numpy(), 3, size, act_order)
    check_equal(tensor, [naive], weight, moments)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_counted_and_zeroed(act_order: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 3, 20, generator=generator)
    weight[0, :, 3] = 50  # would widen every grid if it counted
    moments = torch.stack([moment_of(20, 60, generator, dead=(3, 19)), moment_of(20, 60, generator, dead=(0,))])
    gptq = GPTQ("minmax", act_order, DAMPING, None)
    ((layer, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8([4] * 6)))
    assert layer.fallbacks["dead_columns"] == 3
    found = tensor.dequantize()
    assert not found[0, :, [3, 19]].any() and not found[1, :, 0].any()
    check_equal(
        tensor, [naive_matrix(weight[g], moments[g], [4] * 3, "minmax", act_order) for g in range(2)], weight, moments
    )


def test_a_singular_moment_is_damped_and_counted() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    moment = x.T @ x - 1e-6 * torch.eye(12, dtype=torch.float64)
    layer = problem(torch.randn(1, 2, 12, generator=generator), moment[None])
    ((layer, tensor),) = rounded(GPTQ("minmax", True, 0.0, None), [layer], FixedWidths(layer=uint8([3, 3])))
    assert layer.fallbacks["damping_retries"] >= 1
    assert bool(torch.isfinite(tensor.dequantize()).all())


def test_fractional_budgets_mix_widths_and_stay_within() -> None:
    generator = torch.Generator().manual_seed(6)
    layers = []
    for k, (rows, columns) in enumerate([(4, 10), (6, 16), (3, 20)]):
        layers.append(
            problem(torch.randn(1, rows, columns, generator=generator), moment_of(columns, 50, generator)[None])
        )
        layers[-1].name = f"layer{k}"
    allocate = Allocation(Uniform(), Budget(3.5, "code"))
    tensors = [tensor for _, tensor in rounded(GPTQ("auto", True, DAMPING, None), layers, allocate)]
    weights = sum(t.codes.numel() for t in tensors)
    assert {int(w) for t in tensors for w in t.width} == {3, 4}
    assert 3 < sum(map(code_bits, tensors)) / weights <= 3.5


def test_rows_of_one_layer_may_have_widths_of_their_own() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(1, 1, 30, generator=generator).expand(1, 4, 30).contiguous()
    moments = moment_of(30, 50, generator)[None]
    gptq = GPTQ("auto", True, DAMPING, None)
    ((_, tensor),) = rounded(gptq, [problem(weight, moments)], FixedWidths(layer=uint8([2, 8, 3, 5])))
    assert tensor.width.tolist() == [2, 8, 3, 5]
    found = row_errors((tensor.dequantize() - weight)[0].double().numpy(), moments[0].numpy())
    assert found[1] < found[3] < found[2] < found[0]


def test_layers_are_asked_for_statistics_one_at_a_time() -> None:
    asked: list[str] = []

    def layer(name: str) -> object:
        made = problem(torch.ones(1, 2, 3), torch.eye(3)[None])
        made.name, made.statistic = name, lambda kind: (asked.append(name), torch.eye(3)[None])[1]
        return made

    found = rounded(
        GPTQ("minmax", True, DAMPING, None, True),
        [layer("a"), layer("b")],
        FixedWidths(a=uint8([3, 3]), b=uint8([3, 3])),
    )
    next(found)
    assert asked == ["a"]  # b's inputs may depend on a's codes
    next(found)
    assert asked == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": "best"}, r"method\.clip=best: choose from minmax, mse, curvature, auto"),
        ({"damping": -0.1}, r"method\.damping=-0\.1"),
        ({"damping": float("nan")}, r"method\.damping=nan"),
        ({"group_size": 0}, r"method\.group_size=0"),
    ],
)
def test_impossible_settings_name_their_key(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQ(**({"clip": "auto", "act_order": True, "damping": 0.01, "group_size": None} | change))


def test_weights_and_moments_that_are_not_finite_are_refused() -> None:
    gptq = GPTQ("auto", True, DAMPING, None)
    with pytest.raises(ValueError, match="layer layer: the weights"):
        list(
            rounded(
                gptq, [problem(torch.full((1, 1, 2), torch.inf), torch.eye(2)[None])], FixedWidths(layer=uint8([3]))
            )
        )
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(
            rounded(
                gptq, [problem(torch.ones(1, 1, 2), torch.full((1, 2, 2), torch.nan))], FixedWidths(layer=uint8([3]))
            )
        )


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("method", [GPTQ, partial(GPTAQ, alpha=1.0)])
def test_symmetric_grids_have_zero_in_the_middle(method, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(1, 4, 10, generator=generator) + 1
    moment = moment_of(10, 40, generator)[None]
    layer = LayerProblem("layer", "Linear", weight, lambda _: moment)
    widths = torch.tensor([2, 3, 4, 8], dtype=torch.uint8)
    made = method(clip="minmax", act_order=True, damping=0.01, group_size=group_size, symmetric=True)
    ((_, tensor),) = rounded(made, [layer], FixedWidths(layer=widths))
    assert bool((tensor.zero == 128).all())
    for s, part in enumerate(weight[0].split(group_size or 10, dim=1)):
        expected = 2 * part.abs().amax(1) / (2.0**widths - 1)
        assert torch.equal(tensor.scale[:, s], expected.half())
