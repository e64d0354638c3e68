"""Allocation: the knapsack against exact optima, and budgets against the bytes that end up on disk."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesq import allocation
from bayesq.allocation import Budget, Knapsack, Uniform, greedy_knapsack, lower_hull, make_allocator
from bayesq.codebook import level_kind, lloyd_table_bits, normal_levels
from bayesq.posterior import Diagonal, Kfac
from bayesq.quant.accounting import code_bits
from bayesq.quant.method import LayerProblem
from bayesq.quant.packing import pack_model
from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.rounding import predicted_risk
from bayesq.whitening import whitening

# -------------------------------------------------------------------------------------------------------- the knapsack


@st.composite
def knapsacks(draw) -> tuple[Tensor, Tensor, int]:
    """Integer costs; risks of any shape, ties and rises included; a capacity that at least the cheapest widths fit."""
    blocks, widths = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    steps = st.lists(st.integers(1, 6), min_size=widths, max_size=widths)
    bits = np.cumsum([draw(steps) for _ in range(blocks)], axis=1)
    falling = draw(st.booleans())
    drops = st.lists(st.integers(0 if falling else -5, 12), min_size=widths, max_size=widths)
    risk = 50 - np.cumsum([draw(drops) for _ in range(blocks)], axis=1)
    scale = draw(st.sampled_from([1.0, 1e-9, 0.1]))
    least = int(bits[:, 0].sum())
    capacity = draw(st.integers(least, int(bits[:, -1].sum()) + 3))
    return torch.from_numpy(risk * scale), torch.from_numpy(bits).double(), capacity


def total(table: Tensor, choice: Tensor) -> float:
    return sum(float(table[block, k]) for block, k in enumerate(choice.tolist()))


def exact(risk: Tensor, bits: Tensor, capacity: int) -> float:
    """Least risk within an integer capacity, by dynamic programming over the bits spent."""
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    for r, b in zip(risk.tolist(), bits.tolist(), strict=True):
        longer = np.full(capacity + 1, np.inf)
        for cost, value in zip(b, r, strict=True):
            shift = int(cost)
            if shift <= capacity:
                longer[shift:] = np.minimum(longer[shift:], best[: capacity + 1 - shift] + value)
        best = longer
    return float(best.min())


def largest_step(risk: Tensor, bits: Tensor) -> float:
    """Largest decrease between neighbours of a block's hull."""
    hulls = [brute_hull(r, b) for r, b in zip(risk.tolist(), bits.tolist(), strict=True)]
    drops = [risk[k, i] - risk[k, j] for k, hull in enumerate(hulls) for i, j in itertools.pairwise(hull)]
    return max(map(float, drops), default=0.0)


def brute_hull(risk: list[float], bits: list[float]) -> list[int]:
    """Vertices of the decreasing part of the lower hull: points no pair of others lies below or on, and that pay."""
    vertices = []
    for k in range(len(risk)):
        if any(risk[i] <= risk[k] for i in range(k)):
            continue
        below = False
        for i in range(k):
            for j in range(k + 1, len(risk)):
                share = (bits[k] - bits[i]) / (bits[j] - bits[i])
                below |= (1 - share) * risk[i] + share * risk[j] <= risk[k] + 1e-12 * abs(risk[k])
        if not below:
            vertices.append(k)
    return vertices


@given(knapsacks())
def test_lower_hull_is_the_convex_hull(case):
    risk, bits, _ = case
    risk = risk.round(decimals=0)  # integers: whether three points are collinear is then exact
    hulls = lower_hull(risk.numpy(), bits.numpy())
    assert hulls == [brute_hull(r, b) for r, b in zip(risk.tolist(), bits.tolist(), strict=True)]


@settings(max_examples=300)
@given(knapsacks())
def test_greedy_is_feasible_and_within_one_step_of_the_optimum(case):
    risk, bits, capacity = case
    choice = greedy_knapsack(risk, bits, capacity)
    assert total(bits, choice) <= capacity
    optimum, tolerance = exact(risk, bits, capacity), 1e-9 * float(risk.abs().max() + 1e-12)
    assert optimum - tolerance <= total(risk, choice) <= optimum + largest_step(risk, bits) + tolerance
    assert torch.equal(choice, greedy_knapsack(risk, bits, capacity))


@settings(max_examples=200)
@given(knapsacks())
def test_a_larger_budget_never_raises_the_risk(case):
    risk, bits, _ = case
    least, most = int(bits[:, 0].sum()), int(bits[:, -1].sum())
    risks = [total(risk, greedy_knapsack(risk, bits, capacity)) for capacity in range(least, most + 1)]
    assert all(after <= before + 1e-9 * abs(before) for before, after in itertools.pairwise(risks))
    assert risks[-1] == pytest.approx(float(risk.min(1).values.sum()))


def test_unlimited_capacity_buys_every_decrease_and_no_rise():
    risk = torch.tensor([[5.0, 3.0, 4.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    bits = torch.tensor([[2.0, 3.0, 4.0]]).expand(3, -1)
    assert greedy_knapsack(risk, bits, 1e9).tolist() == [1, 2, 0]


def test_ties_go_to_the_earlier_block():
    risk = torch.tensor([[4.0, 2.0]]).expand(5, -1)
    bits = torch.tensor([[2.0, 3.0]]).expand(5, -1)
    for extra in range(6):
        assert greedy_knapsack(risk, bits, 10 + extra).tolist() == [1] * extra + [0] * (5 - extra)


def test_what_does_not_fit_leaves_room_for_smaller_steps():
    risk = torch.tensor([[100.0, 0.0], [3.0, 1.0], [2.0, 1.0]])
    bits = torch.tensor([[2.0, 12.0], [2.0, 4.0], [2.0, 3.0]])
    assert greedy_knapsack(risk, bits, 9).tolist() == [0, 1, 1]
    assert greedy_knapsack(risk, bits, 16).tolist() == [1, 0, 0]  # one bit short of two steps, and the third left out
    assert greedy_knapsack(risk, bits, 17).tolist() == [1, 0, 1]


def test_infeasible_or_undefined_problems_are_refused():
    risk, bits = torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0, 8.0]])
    with pytest.raises(ValueError, match="need 4 bits, the budget has 3"):
        greedy_knapsack(risk, bits, 3)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            greedy_knapsack(torch.tensor([[bad, 1.0]]), bits, 100)


# ---------------------------------------------------------------------------------------------------- layers, budgets


def synthetic(name: str, groups: int, rows: int, columns: int, seed: int) -> LayerProblem:
    """A layer with uneven rows, correlated inputs and a random gradient moment."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(groups, rows, 1, generator=generator))
    x = torch.randn(groups, columns, columns + 8, generator=generator) + torch.randn(
        groups, 1, columns + 8, generator=generator
    )
    d = torch.randn(groups, rows, 2 * rows, generator=generator) * torch.exp(
        torch.randn(groups, rows, 1, generator=generator)
    )
    statistics = {
        "input_moment": x @ x.transpose(1, 2) / x.shape[2],
        "gradient_moment": 0.01 * d @ d.transpose(1, 2) / d.shape[2],
        "fisher_diagonal": torch.rand(groups, rows, columns, generator=generator) ** 4,
    }
    weight = spread * torch.randn(groups, rows, columns, generator=generator) / columns**0.5
    return LayerProblem(name, "Conv2d", weight, statistics.__getitem__)


def network(*shapes: tuple[int, int, int], seed: int = 0) -> list[LayerProblem]:
    return [synthetic(f"layer{i}", *shape, seed=100 * seed + i) for i, shape in enumerate(shapes)]


SHAPES = [(1, 16, 27), (2, 8, 36), (1, 10, 16), (1, 33, 7), (3, 1, 9), (1, 5, 40)]


def packed_bits(layers: list[LayerProblem], widths: dict[str, Tensor], tables: bool = False) -> int:
    """Bits of all buffers on disk for random codes of these widths."""
    tensors = {}
    for layer in layers:
        width = widths[layer.name]
        assert width.dtype == torch.uint8 and width.shape == (layer.rows,)
        generator = torch.Generator().manual_seed(layer.rows)
        codes = torch.rand(layer.rows, layer.columns, generator=generator) * 2.0 ** width[:, None]
        books = {
            w: Codebook(f"lloyd/{w}", normal_levels("lloyd", w).to(torch.float16))
            for w in width.unique().tolist()
            if tables and level_kind(w) == "lloyd"
        }
        tensors[layer.name] = QuantizedTensor(
            codes=codes.to(torch.uint8),
            width=width,
            scale=torch.ones(layer.rows, 1, dtype=torch.float16),
            zero=torch.zeros(layer.rows, 1, dtype=torch.uint8),
            groups=layer.weight.shape[0],
            codebooks=books,
        )
        assert code_bits(tensors[layer.name]) == int(width.sum()) * layer.columns
    return 8 * sum(buffer.numel() * buffer.element_size() for buffer in pack_model(tensors)[0].values())


def spent(layers: list[LayerProblem], widths: dict[str, Tensor]) -> int:
    return sum(int(widths[layer.name].sum()) * layer.columns for layer in layers)


def weights(layers: list[LayerProblem]) -> int:
    return sum(layer.rows * layer.columns for layer in layers)


def uniform_widths(layers: list[LayerProblem], width: int) -> dict[str, Tensor]:
    return {layer.name: torch.full((layer.rows,), width, dtype=torch.uint8) for layer in layers}


@pytest.mark.parametrize("block", ["row", "layer"])
@pytest.mark.parametrize("posterior", [Kfac(None, 1000, None, 0.5), Diagonal(None, 1000, None)], ids=["kfac", "diag"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_the_knapsack_never_stores_more_than_the_plain_affine_layers(block, posterior, bits):
    layers = network(*SHAPES)
    knapsack = Knapsack(posterior, block, [8, 2, 3, 4, 5, 6])
    for tables in (False, True):
        found = knapsack.allocate(layers, Budget(bits, "code"), lloyd_table_bits() if tables else 0)
        assert packed_bits(layers, found, tables) <= packed_bits(layers, uniform_widths(layers, bits))
        assert spent(layers, found) <= bits * weights(layers)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 13))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=6),
    st.sampled_from([3, 4, 5]),
    st.sampled_from(["row", "layer"]),
    st.integers(0, 99),
)
def test_no_odd_shape_stores_more_than_the_plain_affine_layers(drawn, bits, block, seed):
    layers = network(*drawn, seed=seed)
    try:
        found = Knapsack(Kfac(None, 1000, None, 0.5), block, [2, 3, 4, 5, 6, 8]).allocate(layers, Budget(bits, "code"))
    except ValueError:  # so small that the width map does not fit beside 2-bit codes
        assert weights(layers) * (bits - 2) < sum(3 * layer.rows + 16 for layer in layers)
        return
    assert packed_bits(layers, found) <= packed_bits(layers, uniform_widths(layers, bits))


@pytest.mark.parametrize("block", ["row", "layer"])
@pytest.mark.parametrize("bits", [3.0, 3.5, 4.25])
def test_a_stored_budget_counts_every_byte(block, bits):
    layers = network(*SHAPES, (1, 40, 64))
    found = Knapsack(Kfac(None, 1000, None, 0.5), block, [2, 3, 4, 5, 6, 8]).allocate(
        layers, Budget(bits, "stored"), lloyd_table_bits()
    )
    stored = packed_bits(layers, found, tables=True)
    assert stored <= bits * weights(layers)
    # and it is used: what is left is padding, a table that no row needs, or less than a step of a layer
    slack = 64 if block == "row" else 40 * 64
    assert stored > bits * weights(layers) - lloyd_table_bits() - slack - 16 * len(layers)
    wasteful = Knapsack(Kfac(None, 1000, None, 0.5), block, [2, 3]).allocate(layers, Budget(bits, "code"))
    assert spent(layers, wasteful) <= 3 * weights(layers)


@pytest.mark.parametrize("block", ["row", "layer"])
def test_knapsack_uses_its_budget_where_the_predicted_risk_falls_most(block):
    layers = network(*SHAPES)
    posterior, widths = Kfac(None, 1000, None, 0.5), [2, 3, 4, 6]
    found = Knapsack(posterior, block, widths).allocate(layers, Budget(4, "code"))
    for layer in layers:
        geometry = whitening(posterior.fit(layer), True, 0.01)
        table = predicted_risk(layer.weight, geometry, widths, [level_kind(w) for w in widths])
        chosen = [widths.index(w) for w in found[layer.name].tolist()]
        expected = sum(float(table[row, k]) for row, k in enumerate(chosen))
        assert layer.notes["predicted_risk"] == pytest.approx(expected, rel=1e-9)
        if block == "layer":
            assert len(set(chosen)) == 1
    # flat allocation at the same widths is no better by the same measure
    flat = 0.0
    for layer in layers:
        geometry = whitening(posterior.fit(layer), True, 0.01)
        flat += float(predicted_risk(layer.weight, geometry, [4], ["lloyd"]).sum())
    if block == "row":
        assert sum(layer.notes["predicted_risk"] for layer in layers) < 0.9 * flat


def test_knapsack_is_deterministic_and_prefers_earlier_layers():
    twins = [synthetic(name, 1, 4, 8, seed=3) for name in ("first", "second")]
    knapsack = Knapsack(Kfac(None, 1000, None, 1.0), "layer", [2, 3])
    found = knapsack.allocate(twins, Budget(2.5, "code"))
    assert found["first"].tolist() == [3] * 4 and found["second"].tolist() == [2] * 4
    again = knapsack.allocate([synthetic(name, 1, 4, 8, seed=3) for name in ("first", "second")], Budget(2.5, "code"))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_widths_no_budget_can_pay_are_refused():
    layers = network(*SHAPES)
    for block, bits, widths in (("layer", 3.0, [4, 8]), ("row", 3.9, [4, 8])):
        with pytest.raises(ValueError, match="the budget has"):
            Knapsack(Kfac(None, 1000, None, 0.5), block, widths).allocate(layers, Budget(bits, "code"))
    with pytest.raises(ValueError, match="exceed the budget"):
        Uniform().allocate(layers, Budget(2.0, "stored"))


@pytest.mark.parametrize("block", ["row", "layer"])
@pytest.mark.parametrize("bits", [2.0, 2.0001])
def test_a_budget_of_the_smallest_width_gives_it_to_all_rows(block, bits):
    layers = network(*SHAPES)
    found = Knapsack(Kfac(None, 1000, None, 0.5), block, [2, 3]).allocate(layers, Budget(bits, "code"), 64)
    assert all(torch.equal(found[name], width) for name, width in uniform_widths(layers, 2).items())


# ---------------------------------------------------------------------------------------------------------- Budget


def test_budget_counts_codes_or_everything():
    layers = network((1, 4, 10), (2, 3, 5))  # 70 weights in 10 rows
    affine = 10 * 24 + 2 * 8
    assert Budget(3.0, "code").capacity(layers, affine) == 210
    assert Budget(3.0, "code").capacity(layers, affine - 5) == 210  # cheaper formats earn no extra code bits
    assert Budget(3.0, "code").capacity(layers, affine + 30) == 180
    assert Budget(8.0, "stored").capacity(layers, affine) == 560 - affine


# --------------------------------------------------------------------------------------------------------- Uniform


def resnet_cifar(depth: int) -> list[tuple[int, int]]:
    shapes, blocks = [(16, 27)], (depth - 2) // 6
    for stage, width in enumerate((16, 32, 64)):
        for block in range(blocks):
            shapes += [(width, 9 * (width // 2 if stage and not block else width)), (width, 9 * width)]
    return [*shapes, (10, 64)]


def resnet50() -> list[tuple[int, int]]:
    shapes, channels = [(64, 147)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels), (width, 9 * width), (4 * width, width)]
            shapes += [(4 * width, channels)] if block == 0 else []
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def bert(width: int, depth: int, classes: int) -> list[tuple[int, int]]:
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * depth + [(classes, width)]


REALISTIC = {
    "minilm": bert(384, 6, 2),
    "bert-base": [*bert(768, 12, 2), (768, 768)],
    "resnet20": resnet_cifar(20),
    "resnet56": resnet_cifar(56),
    "resnet50": resnet50(),
}


@pytest.mark.parametrize("name", REALISTIC)
@pytest.mark.parametrize("bits", [2.5, 3.0, 3.5, 4.0, 5.5, 8.0])
def test_uniform_meets_the_budget_on_real_layer_sizes(name, bits, monkeypatch):
    random = np.random.default_rng(0)
    monkeypatch.setattr(allocation, "_rounding_error", lambda layer, width: errors[layer.name] * 4.0**-width)
    for _ in range(20):
        layers = [
            LayerProblem(f"layer{i}", "Linear", torch.zeros(1).expand(1, *shape), lambda _: pytest.fail("not needed"))
            for i, shape in enumerate(REALISTIC[name])
        ]
        errors = {layer.name: layer.weight.numel() * random.lognormal(0, 2) for layer in layers}
        found = Uniform().allocate(layers, Budget(bits, "code"), codebook_bits=10_000)
        average = spent(layers, found) / weights(layers)
        assert bits - 0.01 <= average <= bits
        used = {int(w) for width in found.values() for w in width.unique()}
        assert used == ({int(bits)} if bits == int(bits) else {int(bits), int(bits) + 1})
        assert all(len(width.unique()) == 1 for width in found.values())


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=7),
    st.integers(0, 60),
    st.integers(0, 8),
)
def test_uniform_fills_within_the_slack_at_least_risk(blocks, room, slack):
    """Against all 2**B choices."""
    size, drop = (torch.tensor(column) for column in zip(*blocks, strict=True))
    bits, risk = torch.stack([2 * size, 3 * size], 1), torch.stack([drop + 0.5, torch.full_like(drop, 0.5)], 1).double()
    capacity = int(bits[:, 0].sum()) + room
    choice = allocation._fill(risk, bits, capacity, slack)
    spent, met = total(bits, choice), total(risk, choice)
    assert spent <= capacity
    every = [torch.tensor(c) for c in itertools.product((0, 1), repeat=len(blocks))]
    feasible = [(total(bits, c), total(risk, c)) for c in every if total(bits, c) <= capacity]
    filled = [risk for bits, risk in feasible if bits >= capacity - slack]
    if filled:
        assert spent >= capacity - slack and met <= min(filled) + largest_step(risk, bits)
    elif not torch.equal(choice, greedy_knapsack(risk, bits, capacity)):
        assert spent == max(bits for bits, _ in feasible)


def test_uniform_gives_the_wider_codes_to_the_layers_that_need_them():
    layers = network((1, 8, 16), (1, 8, 16), (1, 8, 16), (1, 8, 16))
    for layer, spread in zip(layers, (1.0, 5.0, 0.2, 3.0), strict=True):
        layer.weight = spread * layer.weight / layer.weight.std()
    found = Uniform().allocate(layers, Budget(3.5, "code"))
    assert [int(found[layer.name][0]) for layer in layers] == [3, 4, 3, 4]


def test_uniform_counts_stored_bits():
    layers = network((1, 40, 64), (1, 40, 64), (1, 8, 16))
    found = Uniform().allocate(layers, Budget(4.0, "stored"))
    assert 3.0 < spent(layers, found) / weights(layers) < 4.0
    assert packed_bits(layers, found) <= 4.0 * weights(layers)


# ------------------------------------------------------------------------------------------------------------ choice


def test_allocators_by_name():
    posterior = Kfac(None, 1000, None, 0.5)
    assert isinstance(make_allocator("uniform", None, "row", [2, 3]), Uniform)
    knapsack = make_allocator("knapsack", posterior, "row", [4, 2])
    assert isinstance(knapsack, Knapsack) and knapsack.statistics == posterior.statistics
    assert json.dumps(knapsack.widths) == "[2, 4]"
    with pytest.raises(ValueError, match="needs a posterior"):
        make_allocator("knapsack", None, "row", [2, 3])
