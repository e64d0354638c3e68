"""BayesQ from statistics to QuantizedTensors on small layers whose Fisher is known."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rounding_loop import rounded as through_the_loop
from torch import Tensor

import bayesq.method
from bayesq import codebook
from bayesq.contract import LayerProblem, stack_groups
from bayesq.method import BayesQ
from bayesq.posterior import Diagonal, Kfac, Posterior, WhiteningStore
from bayesq.quant.codes import Codebook, Congruential, SharedTable
from bayesq.quant.grids import mse_grid
from bayesq.quant.packing import CODEBOOK_PREFIX, pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rounding import Rounded, first_rows, refit_rows

SETTINGS = {
    "levels": "trellis",
    "states": 256,
    "posterior_noise": False,
    "rounding": "feedback",
    "refits": 1,
    "damping": 0.01,
}
WIDTHS = (2, 3, 4, 5)


def bayesq_with(posterior: Posterior | None = None, **changes: object) -> BayesQ:
    store = WhiteningStore(posterior or Kfac(1.0, 1000, None, 0.1), memory_limit=0)
    return BayesQ(whitenings=store, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def moment(groups: int, size: int, generator: torch.Generator) -> Tensor:
    """Second moments [g, size, size] of correlated variables of unequal energy."""
    mix = torch.randn(groups, size, size, generator=generator) / size**0.5
    x = torch.randn(groups, size, 3 * size, generator=generator)
    x = (mix @ x + 0.5 * x) * (0.2 + torch.rand(groups, size, 1, generator=generator))
    return x @ x.transpose(1, 2) / x.shape[2]


def layer(name: str, kind: str, shape: tuple[int, int, int], seed: int, positions: int = 1) -> LayerProblem:
    groups, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    spread = 0.3 + torch.rand(groups, rows, 1, generator=generator)
    weight = spread * torch.randn(shape, generator=generator)
    statistics = {
        "input_moment": moment(groups, columns, generator),
        "gradient_moment": 0.1 * moment(groups, rows, generator),
        "fisher_diagonal": torch.rand(shape, generator=generator) ** 2,
    }
    statistics["input_magnitude"] = statistics["input_moment"].diagonal(dim1=1, dim2=2).sqrt()
    return LayerProblem(name, kind, weight, statistics.__getitem__, positions)


def network(seed: int = 0, rows: int = 40) -> list[LayerProblem]:
    """A wide layer, a depthwise convolution (one row a group), a grouped one, and a head of two rows."""
    return [
        layer("body", "Linear", (1, rows, 48), seed),
        layer("depthwise", "Conv2d", (12, 1, 9), seed + 1, positions=9),
        layer("grouped", "Conv2d", (2, 5, 18), seed + 2, positions=9),
        layer("head", "Linear", (1, 2, 40), seed + 3),
    ]


class Allocator:
    """Hands every row one of the widths in turn, remembers what it was told, and asks for some widths' distortion."""

    def __init__(self, widths: Sequence[int] = WIDTHS, ask: Sequence[int] = ()) -> None:
        self.widths, self.ask = widths, ask
        self.codebook_bits = -1
        self.distortions: dict[tuple[str, int], float] = {}

    def __call__(self, layers, codebook_bits=0, distortion=None, **_) -> dict[str, Tensor]:
        self.codebook_bits = codebook_bits
        self.distortions = {(one.name, w): distortion(one, w) for one in layers for w in self.ask}
        return {one.name: torch.tensor((list(self.widths) * one.rows)[: one.rows], dtype=torch.uint8) for one in layers}


@pytest.fixture(autouse=True)
def quick_designs(monkeypatch):
    """Codebooks designed on few atoms: 2 or more to a level at the widths used here."""
    monkeypatch.setattr(codebook, "ATOMS", 128)


@pytest.fixture
def cheap_tables(monkeypatch):
    """Tables of levels in networks as small as these."""
    monkeypatch.setattr(codebook, "TABLE_COST", 10.0)


@pytest.fixture
def roundings(monkeypatch) -> list[Rounded]:
    """Every rounding of a layer, in order."""
    found: list[Rounded] = []
    plain = bayesq.method.round_layer

    def recorded(*arguments):
        found.append(plain(*arguments))
        return found[-1]

    monkeypatch.setattr(bayesq.method, "round_layer", recorded)
    return found


def achieved_risk(method: BayesQ, layers: list[LayerProblem], widths: Sequence[int]) -> float:
    total = 0.0
    for one, tensor in through_the_loop(method, layers, Allocator(widths)):
        delta = tensor.dequantize().double() - one.weight.double()
        total += float(method.whitenings.fit(one).risk(delta).sum())
    return total


KINDS = {
    "trellis": {},
    "trellis without refits": {"refits": 0},
    "trellis, more refits": {"refits": 3, "states": 1024},
    "trellis to nearest": {"rounding": "nearest"},
    "lloyd": {"levels": "lloyd"},
    "lloyd with noise": {"levels": "lloyd", "posterior_noise": True},
    "uniform": {"levels": "uniform", "refits": 2},
    "uniform without refits": {"levels": "uniform", "refits": 0},
    "diagonal": {"posterior": Diagonal(1.0, 1000, None)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tables", [True, False])
def test_tensors_stand_for_what_was_rounded(kind, tables, roundings, monkeypatch):
    monkeypatch.setattr(codebook, "TABLE_COST", 10.0 if tables else 0.0)
    layers, allocator = network(), Allocator()
    method = bayesq_with(**KINDS[kind])
    result = list(through_the_loop(method, layers, allocator))
    assert [one.name for one, _ in result] == [one.name for one in layers]
    assert len(roundings) == len(layers) * (method.refits + 1)
    for (one, tensor), rounded in zip(result, roundings[-len(layers) :], strict=True):
        groups, rows, columns = one.weight.shape
        assert tensor.groups == groups and tensor.codes.shape == (groups * rows, columns)
        assert torch.equal(tensor.width, allocator([one])[one.name])
        expected = rounded.values.reshape(one.weight.shape)
        np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        # a trellis runs down the rows of a group: columns of 1 and 2 rows have scalar codes, those of 5 few states
        states = tensor.code.states if isinstance(tensor.code, Congruential) else None
        few = {1: None, 2: None, 5: 256}.get(rows, method.states)
        assert states == (few if method.levels == "trellis" else None)
        assert one.fallbacks["damping_retries"] == 0
    # rounding sees what is stored: nothing is far off
    body = result[0]
    assert float((body[1].dequantize() - body[0].weight).square().mean()) < 0.2 * float(body[0].weight.var())


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_gives_the_same_weights(kind, cheap_tables):
    result = {one.name: tensor for one, tensor in through_the_loop(bayesq_with(**KINDS[kind]), network(), Allocator())}
    found = unpack_model(*pack_model(result))
    assert all(torch.equal(found[name].dequantize(), tensor.dequantize()) for name, tensor in result.items())


def tables(tensor: QuantizedTensor) -> dict[int, Codebook]:
    """The shared tables of a layer by width."""
    return dict(tensor.code.tables) if isinstance(tensor.code, SharedTable) else {}


def stored_table_bits(tensors: dict[str, QuantizedTensor]) -> int:
    buffers, _ = pack_model(tensors)
    return sum(8 * b.numel() * b.element_size() for name, b in buffers.items() if name.startswith(CODEBOOK_PREFIX))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 6), (3,), (2, 7)])
def test_the_allocator_hears_of_all_tables_that_are_stored(kind, widths, cheap_tables):
    allocator, method = Allocator(widths), bayesq_with(**KINDS[kind])
    tensors = {one.name: tensor for one, tensor in through_the_loop(method, network(), allocator)}
    stored = stored_table_bits(tensors)
    designed = method.levels == "lloyd" and method.refits > 0
    assert stored == (sum(16 * 2**w for w in widths if w <= 6) if designed else 0)
    assert stored <= allocator.codebook_bits
    if len(widths) == 5:
        assert stored == allocator.codebook_bits


@pytest.mark.parametrize(("levels", "allowed"), [("trellis", set()), ("lloyd", {2, 3, 4}), ("uniform", set())])
def test_tables_are_for_widths_that_can_pay_for_them(levels, allowed):
    """About 75,000 weights: 2 ln 2 bits a weight of a table of 2**k levels fall below 0.005 up to 16 levels."""
    layers = [layer("body", "Linear", (1, 260, 288), 5), layer("head", "Linear", (1, 2, 40), 6)]
    allocator, method = Allocator((2, 3, 4, 5, 6)), bayesq_with(levels=levels)
    tensors = {one.name: tensor for one, tensor in through_the_loop(method, layers, allocator)}
    assert set(tables(tensors["body"])) == allowed
    assert set(tables(tensors["head"])) == allowed & {2, 3}
    assert stored_table_bits(tensors) == allocator.codebook_bits > 0 or not allowed
    for width, book in tables(tensors["body"]).items():
        assert book.name == f"{levels}/{width}" and bool((book.levels.diff() > 0).all())


def test_one_table_serves_all_layers(cheap_tables):
    tensors = [tensor for _, tensor in through_the_loop(bayesq_with(levels="lloyd"), network(), Allocator())]
    body, _, grouped, _ = (tables(tensor) for tensor in tensors)
    assert set(body) == set(grouped) == set(WIDTHS)
    assert all(torch.equal(body[w].levels, grouped[w].levels) for w in WIDTHS)


def met_in_level_units(method: BayesQ, one: LayerProblem, rounded: Rounded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a layer of one group met, on its refitted grid; what an error of a level unit costs there; that grid."""
    posterior = method.whitenings.fit(one)
    columns = conditional(damped(posterior.input_factor[0], method.damping))
    scale, zero = refit_rows(rounded, columns.expand_as(rounded.target))
    cost = posterior.gradient_factor[0].diagonal()[:, None] * columns * scale[:, None].square()
    return rounded.target / scale[:, None] + zero[:, None], cost, scale, zero


def damped(a: Tensor, fraction: float) -> Tensor:
    return a + fraction * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)


def test_the_step_of_uniform_levels_is_folded_into_the_grids(roundings):
    """About the middle of the codes, and by as much as suits what the first rounding met best."""
    one = layer("body", "Linear", (1, 40, 48), 32)
    method = bayesq_with(levels="uniform")
    ((_, tensor),) = through_the_loop(method, [one], Allocator((2, 3)))
    units, cost, scale, zero = met_in_level_units(method, one, roundings[0])
    for w in (2, 3):
        rows, centre = tensor.width == w, (2**w - 1) / 2
        steps = tensor.scale[rows, 0].double() / scale[rows]
        step = float(steps.median())
        torch.testing.assert_close(steps, steps.median().expand(len(steps)), rtol=1e-3, atol=0)  # fp16
        assert abs(step - 1) > 1.5e-3
        # the middle of the codes stands for the same weight as before; zeros are stored in steps of 2**(w - 8)
        middle = tensor.scale[rows, 0].double() * (centre - tensor.zero[rows, 0].double() * 2.0 ** (w - 8))
        expected = scale[rows] * (centre - zero[rows])
        assert bool(((middle - expected).abs() <= scale[rows] * 1.1 * 2.0 ** (w - 9)).all())

        def distortion(h: float, rows: Tensor = rows, centre: float = centre, w: int = w) -> float:
            levels = centre + (torch.arange(2**w).double() - centre) * h
            return float((cost[rows] * (units[rows, :, None] - levels).square().amin(2)).sum())

        assert distortion(step) < 1.003 * min(distortion(h) for h in np.geomspace(0.5, 2, 200))


def test_the_allocator_is_told_the_distortion_of_each_layers_codes(cheap_tables):
    """Weights of unit variance: less than scalar codes where a trellis runs; more bits, less distortion."""
    told = {}
    for levels in ("trellis", "lloyd", "uniform"):
        allocator = Allocator(ask=range(2, 9))
        list(through_the_loop(bayesq_with(levels=levels), network(), allocator))
        told[levels] = allocator.distortions
        for name in ("body", "depthwise", "grouped", "head"):
            found = [told[levels][name, w] for w in range(2, 9)]
            assert all(wider < narrower / 1.5 for narrower, wider in itertools.pairwise(found))
    # Max (1960): the best levels, and the best uniform ones
    for w, best, uniform in ((2, 0.1175, 0.1188), (3, 0.03454, 0.03744), (4, 0.009497, 0.01154)):
        for name, factor in (("body", 0.65), ("grouped", 1.02)):  # columns of 40 and 5 rows
            assert 2.0 ** (-2 * w) < told["trellis"][name, w] < factor * best
        for name in ("depthwise", "head"):
            assert told["trellis"][name, w] == pytest.approx(uniform, rel=2e-3)
        assert told["lloyd"]["head", w] == pytest.approx(best, rel=2e-3)
        assert told["uniform"]["body", w] == pytest.approx(uniform, rel=2e-3)


def test_the_distortion_it_tells_is_about_what_normal_weights_get(cheap_tables):
    """E[(w - w_hat)^2] gain summed: risk over 1/2 sum gain var(w), for weights that are normal in every row.

    All rows and all columns cost much the same: where few columns cost most, a row's grid fits itself to those, and
    where few rows do, the trellis' paths serve those first; both do better than told.
    """
    one, generator = layer("body", "Linear", (1, 200, 192), 7), torch.Generator().manual_seed(8)
    one.statistic("gradient_moment")[0] = torch.diag(
        (0.5 + torch.rand(200, generator=generator)) / one.weight[0].var(1)
    )
    one.statistic("input_moment")[0] = torch.diag(0.5 + torch.rand(192, generator=generator)) + 0.5
    for levels, width in (("trellis", 2), ("trellis", 3), ("lloyd", 3), ("uniform", 3)):
        allocator, method = Allocator((width,), ask=(width,)), bayesq_with(levels=levels, damping=0.0, refits=4)
        ((_, tensor),) = through_the_loop(method, [one], allocator)
        posterior = method.whitenings.fit(one)
        gain = posterior.gradient_factor[0].diagonal()[:, None] * conditional(posterior.input_factor[0])
        scale = 0.5 * float((gain * one.weight[0].double().var(1, unbiased=False, keepdim=True)).sum())
        risk = float(posterior.risk(tensor.dequantize().double() - one.weight.double()).sum())
        assert risk / scale == pytest.approx(allocator.distortions["body", width], rel=0.1)


def conditional(a: Tensor) -> Tensor:
    """[c] what A leaves of each column once all columns of less energy have adapted: Schur complements."""
    order = a.diagonal().argsort(descending=True)
    left = a[order][:, order].flip(0, 1)
    return torch.linalg.cholesky(left).diagonal().flip(0).square()[order.argsort()]


def median_ratio(one: dict[str, object], other: dict[str, object], widths: Sequence[int], rows: int = 40) -> float:
    """Achieved risk of one setting over another's, the median of several random networks."""
    ratios = []
    for seed in range(5):
        layers = network(100 * seed, rows)
        ratios.append(
            achieved_risk(bayesq_with(**one), layers, widths) / achieved_risk(bayesq_with(**other), layers, widths)
        )
    return float(np.median(ratios))


@pytest.mark.parametrize("widths", [(2,), (3,), (2, 3, 4)])
def test_trellis_beats_lloyd_and_lloyd_beats_uniform(widths, cheap_tables):
    assert median_ratio({"levels": "trellis", "states": 1024}, {"levels": "lloyd"}, widths) < 0.75
    assert median_ratio({"levels": "lloyd"}, {"levels": "uniform"}, widths) < 0.99


@pytest.mark.parametrize("levels", ["trellis", "lloyd", "uniform"])
@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_refitting_pays(levels, rounding, cheap_tables):
    settings = {"levels": levels, "rounding": rounding}
    assert median_ratio({**settings, "refits": 1}, {**settings, "refits": 0}, (3, 2)) < 1.0


@pytest.mark.parametrize("levels", ["trellis", "lloyd"])
def test_first_grids_fit_the_levels(levels, cheap_tables, roundings):
    """On a trellis and for tables of 3 bits and more by `first_rows`, weighed by the curvature; else affine ranges."""
    layers, method = network(), bayesq_with(levels=levels)
    list(through_the_loop(method, layers, Allocator()))
    for one, first in zip(layers, roundings, strict=False):
        weight, few = stack_groups(one.weight).double(), one.weight.shape[1] < 4
        a = method.whitenings.fit(one).input_factor
        damped = a + 0.01 * torch.diag_embed(a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(a.shape[:2]))
        curvature = torch.stack([conditional(x) for x in damped])[:, None].expand(one.weight.shape)
        w = first.width.double()
        spread = {2: 1.12 * 2, 3: 1.16, 4: 1.2 / 2, 5: 1.24 / 4}  # of levels 2**(3 - w) apart, 1.04 + .04 w wide
        steps = spread if levels == "trellis" else {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881}  # Max (1960)
        unit = torch.tensor([steps[bits] for bits in first.width.tolist()], dtype=torch.float64)
        centre = (2**w - 1) / 2 if levels == "lloyd" else 2 ** (w - 1)
        scale, zero = first_rows(weight, stack_groups(curvature), first.width, unit, centre)
        affine_scale, affine_zero = mse_grid(weight, first.width, steps=bayesq.method.FIRST_GRID_STEPS)
        affine = torch.full_like(first.width, few, dtype=torch.bool) if levels == "trellis" else first.width == 2
        expected = torch.where(affine, affine_scale, scale)
        torch.testing.assert_close(first.scale, expected, rtol=2e-3, atol=0)  # a scale is stored in fp16
        shift = (first.zero - torch.where(affine, affine_zero, zero)).abs()
        assert bool((shift <= 2.0 ** (w - 9) + 2e-3 * 2 ** (w - 1)).all())


def test_without_refits_scalar_rows_keep_their_first_grid():
    layers = network()
    for one, tensor in through_the_loop(bayesq_with(levels="lloyd", refits=0), layers, Allocator()):
        scale, zero = mse_grid(stack_groups(one.weight).double(), tensor.width)
        assert torch.equal(tensor.scale[:, 0].double(), scale) and not tables(tensor)
        assert tensor.zero[:, 0].tolist() == [
            int(z) << (8 - w) for z, w in zip(zero.tolist(), tensor.width.tolist(), strict=True)
        ]


@pytest.mark.parametrize("levels", ["trellis", "lloyd"])
def test_the_same_problem_gives_the_same_codes(levels, cheap_tables):
    one, two = ([t for _, t in through_the_loop(bayesq_with(levels=levels), network(), Allocator())] for _ in range(2))
    assert all(torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) for a, b in zip(one, two, strict=True))


def test_weights_no_grid_can_hold_are_refused_before_anything_is_allocated():
    layers, allocator = network(), Allocator()
    layers[2].weight[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="layer grouped"):
        next(iter(through_the_loop(bayesq_with(), layers, allocator)))
    assert allocator.codebook_bits == -1


REFUSED = {
    "levels": ({"levels": "cubic"}, r"method\.levels=cubic: choose one of trellis, lloyd, uniform"),
    "rounding": ({"rounding": "up"}, r"method\.rounding=up: choose one of feedback, nearest"),
    "states": ({"states": 12}, r"method\.states=12: choose one of 256, 1024, 4096"),
    "states for scalar levels": ({"states": 0, "levels": "lloyd"}, r"method\.states=0"),
    "negative refits": ({"refits": -1}, r"method\.refits=-1"),
    "half refits": ({"refits": 1.5}, r"method\.refits=1\.5"),
    "damping": ({"damping": -0.1}, r"method\.damping=-0\.1"),
    "damping that is no number": ({"damping": float("nan")}, r"method\.damping=nan"),
    "noise on a trellis": ({"posterior_noise": True}, r"method\.posterior_noise=true: .*method\.levels=uniform"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_sense_are_refused_by_name(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        bayesq_with(**changes)
