"""Weights, activations and curvature no network should have, through every method.

Whatever the numbers, a method either refuses the layer by its name, or returns codes within their widths, usable scales
and finite weights whose risk stays below

    1/2 (sum_rc (|w_rc| + 2**-24) sqrt(P_rc,rc))^2,

what zeros in place of all weights would cost if their errors added up, plus the smallest fp16 step. P is the posterior
precision, for methods without a posterior A of each row (twice the risk then), for RTN the identity.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from damage import report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding_loop import rounded
from tiny_sets import STATISTICS
from torch import Tensor

from baselines.awq import AWQ
from baselines.gptq import GPTQ
from baselines.rtn import RTN
from bayesq.allocation import Knapsack
from bayesq.budget import Allocation, Budget
from bayesq.calibration.inputs import INPUT_BASIS
from bayesq.calibration.statistic import LayerStatistics
from bayesq.contract import LayerProblem
from bayesq.fisher import GRADIENT_BASIS
from bayesq.method import BayesQ
from bayesq.posterior import Diagonal, Ekfac, Kfac, LowRank, Posterior, WhiteningStore
from bayesq.quant.grids import FP16_TINY
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.uniform import Uniform

WIDTHS = (2, 3, 4, 5, 6, 8)
SHAPES = [(1, 1, 1), (1, 1, 7), (1, 7, 1), (1, 5, 6), (1, 9, 20), (3, 1, 9), (2, 4, 9), (1, 2, 33)]
N = 10**9
FINITE_WEIGHTS = (
    *("normal", "zero", "constant", "duplicate rows", "duplicate columns", "1e30", "1e-30", "beyond fp16", "all sizes"),
    *("zero rows", "zero columns", "zeros and ones", "positive", "outlier", "subnormal"),
)
USABLE_MOMENTS = ("normal", "zero", "rank 1", "dead", "duplicate", "1e30", "1e-30", "all sizes", "identity")
BROKEN = ("nan", "inf")


def weights(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    w = torch.randn(shape, generator=generator)
    groups, rows, columns = shape
    some = lambda *size: torch.rand(size, generator=generator) > 0.5  # noqa: E731
    made: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: w,
        "zero": lambda: w * 0,
        "constant": lambda: torch.full(shape, 0.37),
        "duplicate rows": lambda: w[:, :1].expand(shape).clone(),
        "duplicate columns": lambda: w[:, :, :1].expand(shape).clone(),
        "1e30": lambda: w * 1e30,
        "1e-30": lambda: w * 1e-30,
        "subnormal": lambda: w * 1e-42,
        "beyond fp16": lambda: w * 3e5,
        "all sizes": lambda: w * 10.0 ** torch.randint(-12, 12, (groups, rows, 1), generator=generator),
        "zero rows": lambda: w * some(groups, rows, 1),
        "zero columns": lambda: w * some(groups, 1, columns),
        "zeros and ones": lambda: some(*shape).float(),
        "positive": lambda: w.abs() + 1,
        "outlier": lambda: torch.cat([torch.tensor([1e4]), w.flatten()[1:]]).reshape(shape),
        "nan": lambda: torch.cat([w.flatten()[1:], torch.tensor([math.nan])]).reshape(shape),
        "inf": lambda: torch.cat([torch.tensor([-math.inf]), w.flatten()[1:]]).reshape(shape),
    }
    return made[kind]()


def moment(kind: str, groups: int, size: int, generator: torch.Generator) -> Tensor:
    """[g, size, size]."""
    x = torch.randn(groups, size, 2 * size + 1, generator=generator)
    if kind == "rank 1":
        x = x[:, :, :1]
    elif kind == "dead":
        x = x * (torch.rand(groups, size, 1, generator=generator) > 0.5)
    elif kind == "duplicate":
        x = x[:, :1].expand(x.shape)
    elif kind == "all sizes":
        x = x * 10.0 ** torch.randint(-15, 15, (groups, size, 1), generator=generator)
    a = x @ x.transpose(1, 2) / x.shape[2]
    if kind == "identity":
        a = torch.eye(size).expand(groups, size, size).clone()
    elif kind in ("zero", "1e30", "1e-30"):
        a = a * float(kind.replace("zero", "0"))
    elif kind == "indefinite":
        a = 2 * a - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))
    elif kind == "negative":
        a = -a
    elif kind in BROKEN:
        a[..., -1] = float(kind)
    return a


def problem(
    shape: tuple[int, int, int], seed: int, weight: str = "normal", a: str = "normal", g: str = "normal"
) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    groups, rows, columns = shape
    moments = {
        "input_moment": moment(a, groups, columns, generator),
        "gradient_moment": moment(g, groups, rows, generator),
    }
    diagonals = [x.double().diagonal(dim1=-2, dim2=-1) for x in moments.values()]
    fisher = diagonals[1][:, :, None] * diagonals[0][:, None, :]
    directions = torch.randn(16, *shape, generator=generator) * fisher.abs().sqrt() / 5
    statistics = {
        **moments,
        "input_magnitude": diagonals[0].abs().sqrt().float(),
        "fisher_diagonal": fisher.float(),
        "fisher_eigenvalues": fisher.float(),
        "gradient_directions": directions.float(),
    }
    for basis in (INPUT_BASIS, GRADIENT_BASIS):
        of = moments[basis.requires[0].name]
        finite = bool(torch.isfinite(of).all())
        statistics[basis.name] = basis.derive(moments) if finite else torch.full_like(of, math.nan)
    positions = columns if groups == 3 else 9 if groups == 2 else 1
    w = weights(weight, shape, generator)
    read = LayerStatistics("stage.layer", STATISTICS, lambda statistic: statistics[statistic.name])
    return LayerProblem("stage.layer", "Conv2d", w, read, positions)


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "kfac": lambda: Kfac(None, N, None, 0.5),
    "kfac, eigenvalues, prior in G": lambda: Kfac(None, N, None, 0.5, evidence="eigenvalues", prior_share="gradient"),
    "kfac without prior": lambda: Kfac(0.0, N, None, 0.0, prior_share="gradient"),
    "kfac of one example": lambda: Kfac(None, 1, None, 0.5),
    "diag": lambda: Diagonal(None, N, None),
    "ekfac": lambda: Ekfac(None, N, None),
    "lowrank": lambda: LowRank(None, N, None, 16),
}


@dataclass(frozen=True)
class Choice:
    """A method with its switches; `make` gets the whitenings of a posterior, or None."""

    name: str
    posterior: str | None
    make: Callable[[WhiteningStore | None], object]


def choices() -> list[Choice]:
    found = [Choice(f"rtn {clip}", None, lambda _, clip=clip: RTN(clip)) for clip in ("minmax", "mse")]
    found.append(Choice("awq", None, lambda _: AWQ(20, 20, 0.5)))
    for clip, act_order, size in product(("minmax", "mse", "auto"), (True, False), (None, 3, 128)):
        make = lambda _, clip=clip, act_order=act_order, size=size: GPTQ(clip, act_order, 0.01, size, False)  # noqa: E731
        found.append(Choice(f"gptq {clip} act_order={act_order} group_size={size}", None, make))
    found.append(Choice("gptq without damping", None, lambda _: GPTQ("auto", True, 0.0, None, False)))
    for posterior, levels, rounding in product(POSTERIORS, ("trellis", "lloyd", "uniform"), ("feedback", "nearest")):
        make = lambda w, levels=levels, rounding=rounding: BayesQ(w, levels, 256, False, rounding, 2, 0.01)  # noqa: E731
        found.append(Choice(f"bayesq {posterior}, {levels}, {rounding}", posterior, make))
    return found


CHOICES = choices()


def quantized(choice: Choice, layer: LayerProblem, width: int, allocator: str) -> tuple[Tensor, Posterior | None]:
    """The layer's weights [g, r, c] as a file would give them back.

    Raises:
        ValueError: the layer was refused.
    """
    posterior = None if choice.posterior is None else POSTERIORS[choice.posterior]()
    whitenings = None if posterior is None else WhiteningStore(posterior)
    budget = Budget(float(width) if allocator != "knapsack" else max(width, 2.5), "code")
    knapsack = allocator == "knapsack" and whitenings is not None
    allocate = Allocation(Knapsack(whitenings, "row", list(WIDTHS)) if knapsack else Uniform(), budget)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, tensor),) = rounded(choice.make(whitenings), [layer], allocate)  # type: ignore[attr-defined]
    assert bool((tensor.codes.int() < 2 ** tensor.width.int()[:, None]).all())
    assert bool(torch.isfinite(tensor.scale).all()) and bool((tensor.scale > 0).all())
    assert layer.fallbacks.get("damping_retries", 0) >= 0
    again = unpack_model(*pack_model({layer.name: tensor}))[layer.name].dequantize()
    assert torch.equal(again, tensor.dequantize())
    return again, posterior


def usable(layer: LayerProblem, choice: Choice) -> bool:
    """Whether a method has no reason to refuse the layer: weights and the statistics it reads are finite."""
    method = choice.make(None if choice.posterior is None else WhiteningStore(POSTERIORS[choice.posterior]()))
    read = [layer.statistic.load.load(one) for one in method.statistics]  # type: ignore[attr-defined]
    return all(bool(torch.isfinite(x).all()) for x in (layer.weight, *read))


def bound_and_risk(
    layer: LayerProblem, choice: Choice, posterior: Posterior | None, values: Tensor
) -> tuple[float, float]:
    """Half the squared sum of the module's docstring, and the risk."""
    size = layer.weight.double().abs() + FP16_TINY
    delta = values.double() - layer.weight.double()
    if posterior is not None:
        fitted = posterior.fit(layer)
        return 0.5 * float((size * fitted.diagonal().sqrt()).sum()) ** 2, float(fitted.risk(delta).sum())
    a = torch.eye(layer.columns, dtype=torch.float64).expand(len(delta), -1, -1)
    if not choice.name.startswith("rtn"):
        a = layer.statistic("input_moment").double()
    by_row = (size * a.diagonal(dim1=-2, dim2=-1)[:, None].sqrt()).sum(2).square()
    return 0.5 * float(by_row.sum()), 0.5 * float(torch.einsum("grc,gcd,grd->", delta, a, delta))


def attempt(
    choice: Choice, shape: tuple[int, int, int], seed: int, kinds: tuple[str, str, str], width: int, allocator: str
) -> str:
    layer = problem(shape, seed, *kinds)
    try:
        values, posterior = quantized(choice, layer, width, allocator)
    except ValueError as error:
        assert "layer stage.layer" in str(error) and "\n" not in str(error)
        sound = kinds[1] in USABLE_MOMENTS and kinds[2] in USABLE_MOMENTS
        assert not sound or not usable(layer, choice), f"refused for no reason: {error}"
        return "refused by name"
    assert bool(torch.isfinite(values).all())
    assert usable(layer, choice), "accepted what is not finite"
    if {"indefinite", "negative"} & set(kinds):
        return "within codes and scales"
    bound, risk = bound_and_risk(layer, choice, posterior, values)
    assert risk <= bound * (1 + 1e-6), f"{risk:g} exceeds {bound:g}"
    return "within the bound"


CASES = st.tuples(
    st.sampled_from(CHOICES),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.tuples(
        st.sampled_from([*FINITE_WEIGHTS, *BROKEN]),
        st.sampled_from([*USABLE_MOMENTS, "indefinite", "negative", *BROKEN]),
        st.sampled_from([*USABLE_MOMENTS, "indefinite", "negative", *BROKEN]),
    ),
    st.sampled_from(WIDTHS),
    st.sampled_from(["uniform", "knapsack"]),
)


def fuzz(examples: int, seed: int) -> Counter[str]:
    tried: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CASES)
    def each(case: tuple) -> None:
        tried["begun"] += 1
        tried[attempt(*case)] += 1
        tried["begun"] -= 1

    from hypothesis import seed as seeded

    seeded(seed)(each)()
    return tried


@pytest.mark.parametrize("seed", range(2))
def test_hostile_layers_are_refused_by_name_or_rounded_within_bounds(seed: int) -> None:
    report("layers", fuzz(200, seed), 200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_many_hostile_layers_are_refused_by_name_or_rounded_within_bounds(seed: int) -> None:
    report("layers", fuzz(350, seed), 350)
