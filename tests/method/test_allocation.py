"""Allocation: budgets against the bytes that end up on disk, and what is allowed to each layer."""

import itertools
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_loop import rounded
from torch import Tensor

from baselines.rtn import RTN
from bayesq import uniform
from bayesq.allocation import Knapsack, make_allocator
from bayesq.budget import Budget
from bayesq.codebook import normal_distortion, normal_levels
from bayesq.contract import LayerProblem
from bayesq.knapsack import greedy_knapsack
from bayesq.posterior import Diagonal, Kfac, Posterior, WhiteningStore
from bayesq.quant.accounting import code_bits
from bayesq.quant.codes import Codebook, shared_code
from bayesq.quant.packing import pack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rounding import predicted_risk
from bayesq.uniform import Uniform

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


def store(posterior: Posterior | None = None) -> WhiteningStore:
    """Whitenings of a posterior, made anew for everyone who asks."""
    return WhiteningStore(posterior or Kfac(None, 1000, None, 0.5), memory_limit=0)


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
            if tables and w <= TABLE_WIDTH
        }
        tensors[layer.name] = QuantizedTensor(
            codes=codes.to(torch.uint8),
            width=width,
            scale=torch.ones(layer.rows, 1, dtype=torch.float16),
            zero=torch.zeros(layer.rows, 1, dtype=torch.uint8),
            groups=layer.weight.shape[0],
            code=shared_code(books),
        )
        assert code_bits(tensors[layer.name]) == int(width.sum()) * layer.columns
    return 8 * sum(buffer.numel() * buffer.element_size() for buffer in pack_model(tensors)[0].values())


TABLE_WIDTH = 4  # widest table in `packed_bits`
TABLE_BITS = sum(16 * 2**width for width in range(2, TABLE_WIDTH + 1))


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
    knapsack = Knapsack(store(posterior), block, [8, 2, 3, 4, 5, 6])
    for tables in (False, True):
        found = knapsack.allocate(layers, Budget(bits, "code"), TABLE_BITS if tables else 0)
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
        found = Knapsack(store(), block, [2, 3, 4, 5, 6, 8]).allocate(layers, Budget(bits, "code"))
    except ValueError:  # so small that the width map does not fit beside 2-bit codes
        assert weights(layers) * (bits - 2) < sum(3 * layer.rows + 16 for layer in layers)
        return
    assert packed_bits(layers, found) <= packed_bits(layers, uniform_widths(layers, bits))


@pytest.mark.parametrize("block", ["row", "layer"])
@pytest.mark.parametrize("bits", [3.0, 3.5, 4.25])
def test_a_stored_budget_counts_every_byte(block, bits):
    layers = network(*SHAPES, (1, 40, 64))
    found = Knapsack(store(), block, [2, 3, 4, 5, 6, 8]).allocate(layers, Budget(bits, "stored"), TABLE_BITS)
    stored = packed_bits(layers, found, tables=True)
    assert stored <= bits * weights(layers)
    # and it is used: what is left is padding, a table that no row needs, or less than a step of a layer
    slack = 64 if block == "row" else 40 * 64
    assert stored > bits * weights(layers) - TABLE_BITS - slack - 16 * len(layers)
    wasteful = Knapsack(store(), block, [2, 3]).allocate(layers, Budget(bits, "code"))
    assert spent(layers, wasteful) <= 3 * weights(layers)


@pytest.mark.parametrize("block", ["row", "layer"])
def test_knapsack_uses_its_budget_where_the_predicted_risk_falls_most(block):
    layers = network(*SHAPES)
    posterior, widths = Kfac(None, 1000, None, 0.5), [2, 3, 4, 6]
    found = Knapsack(store(posterior), block, widths).allocate(layers, Budget(4, "code"))
    for layer in layers:
        whitening = posterior.fit(layer).whitening(True, 0.01)
        table = predicted_risk(layer.weight, whitening, [normal_distortion("uniform", w) for w in widths])
        chosen = [widths.index(w) for w in found[layer.name].tolist()]
        expected = sum(float(table[row, k]) for row, k in enumerate(chosen))
        assert layer.notes["predicted_risk"] == pytest.approx(expected, rel=1e-9)
        if block == "layer":
            assert len(set(chosen)) == 1
    # flat allocation at the same widths is no better by the same measure
    flat = 0.0
    for layer in layers:
        whitening = posterior.fit(layer).whitening(True, 0.01)
        flat += float(predicted_risk(layer.weight, whitening, [normal_distortion("uniform", 4)]).sum())
    if block == "row":
        assert sum(layer.notes["predicted_risk"] for layer in layers) < 0.9 * flat


def test_knapsack_is_deterministic_and_prefers_earlier_layers():
    twins = [synthetic(name, 1, 4, 8, seed=3) for name in ("first", "second")]
    knapsack = Knapsack(store(Kfac(None, 1000, None, 1.0)), "layer", [2, 3])
    found = knapsack.allocate(twins, Budget(2.5, "code"))
    assert found["first"].tolist() == [3] * 4 and found["second"].tolist() == [2] * 4
    again = knapsack.allocate([synthetic(name, 1, 4, 8, seed=3) for name in ("first", "second")], Budget(2.5, "code"))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_widths_no_budget_can_pay_are_refused():
    layers = network(*SHAPES)
    for block, bits, widths in (("layer", 3.0, [4, 8]), ("row", 3.9, [4, 8])):
        with pytest.raises(ValueError, match=rf"^bits={bits:g}: .* average 4 bits a weight .budget.count=code"):
            Knapsack(store(), block, widths).allocate(layers, Budget(bits, "code"))
    with pytest.raises(ValueError, match="exceed the budget"):
        Uniform().allocate(layers, Budget(2.0, "stored"))


@pytest.mark.parametrize("block", ["row", "layer"])
@pytest.mark.parametrize("bits", [2.0, 2.0001])
def test_a_budget_of_the_smallest_width_gives_it_to_all_rows(block, bits):
    layers = network(*SHAPES)
    found = Knapsack(store(), block, [2, 3]).allocate(layers, Budget(bits, "code"), 64)
    assert all(torch.equal(found[name], width) for name, width in uniform_widths(layers, 2).items())


# ------------------------------------------------------------------------------------------------------- constraints


class Prepared:
    """A posterior whose whitenings nobody asks for; it only has to see all layers first."""

    statistics: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def prepare(self, layers: list[LayerProblem]) -> None:
        self.seen.append([layer.name for layer in layers])


class GivenCurves(Knapsack):
    """Rows of risk e_r 4**-b, with a layer's e_r in its weights."""

    def predict(self, layer: LayerProblem, distortion: object = None) -> Tensor:
        assert self.whitenings.posterior.seen, "predicted before the posterior was prepared"
        energy = layer.weight.reshape(layer.rows, layer.columns)[:, 0].double()
        return energy[:, None] * 4.0 ** -torch.tensor(self.widths, dtype=torch.float64)


def plain_layers(rows: list[list[int]], columns: list[int]) -> list[LayerProblem]:
    """Layers a, b, ... whose rows have these e_r."""
    return [
        LayerProblem(name, "Linear", torch.tensor(e).float()[None, :, None].expand(1, -1, c), lambda _: pytest.fail())
        for name, e, c in zip("abcdef", rows, columns, strict=False)
    ]


def permitted(name: str, rules: dict) -> list[int]:
    """Widths of a layer by a second reading of the rules."""
    own = [[w] for pattern, w in rules["pinned"].items() if fnmatchcase(name, pattern)]
    own += [ws for pattern, ws in rules["allowed"].items() if fnmatchcase(name, pattern)]
    return sorted(w for w in (own or [rules["widths"]])[0] if w >= (rules["min_width"] or 0))


def holds(width: list[int], own: list[int], rules: dict) -> bool:
    """Whether one layer's row widths keep every rule."""
    size = {"layer": len(width), "group": rules["group_rows"], "row": 1}[rules["block"]]
    tiles = all(len(set(width[i : i + size])) == 1 for i in range(0, len(width), size))
    odd = [width.count(w) % rules["row_multiple"] for w in set(width) if width.count(w) % rules["row_multiple"]]
    return set(width) <= set(own) and tiles and odd in ([], [len(width) % rules["row_multiple"]])


def smallest_average(layers: list[LayerProblem], rules: dict, count: str) -> float:
    """Bits a weight with every layer at its smallest width."""
    bits = 0
    for layer in layers:
        codes = layer.rows * layer.columns * permitted(layer.name, rules)[0]
        bits += codes if count == "code" else 8 * -(-codes // 8) + 24 * layer.rows + 8
    return bits / weights(layers)


names = st.sampled_from(["a", "b", "[ab]", "?", "*", "a*"])
width_lists = st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True)


@st.composite
def constrained(draw, most_layers=4, most_rows=9, most_columns=12) -> tuple[list[LayerProblem], dict]:
    """Layers and rules that leave each of them a width."""
    energies = st.lists(st.integers(0, 1000), min_size=1, max_size=most_rows)
    rows = draw(st.lists(energies, min_size=2, max_size=most_layers))
    layers = plain_layers(rows, [draw(st.integers(1, most_columns)) for _ in rows])
    rules = {
        "block": draw(st.sampled_from(["layer", "row", "group"])),
        "widths": draw(width_lists),
        "group_rows": draw(st.integers(1, 5)),
        "row_multiple": draw(st.integers(1, 4)),
        "min_width": draw(st.none() | st.integers(2, 8)),
        "pinned": draw(st.dictionaries(names, st.integers(2, 8), max_size=2)),
        "allowed": draw(st.dictionaries(names, width_lists, max_size=2)),
    }
    if rules["block"] == "group":
        rules["row_multiple"] = draw(st.sampled_from([m for m in range(1, 5) if rules["group_rows"] % m == 0]))
    if not all(permitted(layer.name, rules) for layer in layers):
        rules["min_width"] = None
    return layers, rules


def constrained_knapsack(rules: dict) -> Knapsack:
    return GivenCurves(store(Prepared()), **rules)


@settings(max_examples=150, deadline=None)
@given(constrained(), st.floats(2, 8), st.sampled_from(["code", "stored"]))
def test_rules_and_budget_hold(case, bits, count):
    layers, rules = case
    bits = bits if count == "code" else bits + 30  # few columns: scales alone may take 24 bits a weight
    try:
        found = constrained_knapsack(rules).allocate(layers, Budget(bits, count))
    except ValueError as error:
        assert smallest_average(layers, rules, count) > bits
        named = re.fullmatch(r"bits=\S+: the smallest .* average (\S+) bits a weight .budget.count=\w+.", str(error))
        assert named is not None
        enough = float(named[1])
        assert enough == pytest.approx(smallest_average(layers, rules, count), abs=0.0011)
        constrained_knapsack(rules).allocate(layers, Budget(enough, count))
        return
    for layer in layers:
        assert holds(found[layer.name].tolist(), permitted(layer.name, rules), rules), (layer.name, found)
    spent_bits = spent(layers, found) if count == "code" else packed_bits(layers, found)
    assert spent_bits <= bits * weights(layers) + 1e-6
    again = constrained_knapsack(rules).allocate(layers, Budget(bits, count))
    assert all(torch.equal(found[name], again[name]) for name in found)


@settings(max_examples=60, deadline=None)
@given(constrained(most_rows=6))
def test_more_bits_never_raise_the_risk_under_constraints(case):
    layers, rules = case
    before = np.inf
    for bits in np.arange(2, 8.25, 0.25):
        try:
            constrained_knapsack(rules).allocate(layers, Budget(float(bits), "code"))
        except ValueError:
            assert before == np.inf
            continue
        after = sum(layer.notes["predicted_risk"] for layer in layers)
        assert after <= before * (1 + 1e-9)
        before = after


@settings(max_examples=100, deadline=None)
@given(constrained(most_layers=2, most_rows=4), st.floats(2, 8))
def test_constrained_allocation_is_within_one_block_of_the_best_of_all_assignments(case, bits):
    """Every assignment of widths to rows that keeps the rules, not only those made of the knapsack's blocks."""
    layers, rules = case
    if rules["block"] == "row":  # where what is left over goes, is the one thing sorting does not decide
        rules["row_multiple"] = next(m for m in (4, 3, 2, 1) if all(layer.rows % m == 0 for layer in layers))
    rules["widths"] = rules["widths"][:3]
    rules["allowed"] = {pattern: own[:3] for pattern, own in rules["allowed"].items()}
    if not all(permitted(layer.name, rules) for layer in layers):
        rules["min_width"] = None
    capacity, best, step = bits * weights(layers), {0: 0.0}, 0.0
    for layer in layers:
        own, energy = permitted(layer.name, rules), layer.weight[0, :, 0].tolist()
        size = {"layer": layer.rows, "group": rules["group_rows"], "row": rules["row_multiple"]}[rules["block"]]
        maps = size < layer.rows and len(own) > 1
        capacity -= 3 * layer.rows + 8 if maps else 8 * (layer.rows * layer.columns % 8 > 0)
        longer: dict[int, float] = {}
        for width in itertools.product(own, repeat=layer.rows):
            if holds(list(width), own, rules):
                risk = sum(e * 4.0**-w for e, w in zip(energy, width, strict=True))
                for bits_before, risk_before in best.items():
                    key = bits_before + sum(width) * layer.columns
                    longer[key] = min(longer.get(key, np.inf), risk_before + risk)
        best = longer
        step = max(step, sum(sorted(energy)[-size:]) * (4.0 ** -own[0] - 4.0 ** -own[-1]))
    feasible = [risk for spent_bits, risk in best.items() if spent_bits <= capacity]
    if feasible:
        constrained_knapsack(rules).allocate(layers, Budget(bits, "code"))
        assert min(feasible) * (1 - 1e-9) <= sum(layer.notes["predicted_risk"] for layer in layers)
        assert sum(layer.notes["predicted_risk"] for layer in layers) <= min(feasible) + step * (1 + 1e-9)


BASE = {
    "block": "row",
    "widths": [2, 3, 4, 6],
    "group_rows": 8,
    "row_multiple": 1,
    "min_width": None,
    "pinned": {},
    "allowed": {},
}


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"block": "group"}),
        ({"block": "group"}, {"block": "layer"}),
        ({"block": "group"}, {"group_rows": 4}),
        ({}, {"row_multiple": 4}),
        ({}, {"min_width": 3}),
        ({}, {"pinned": {"layer0": 5}}),
        ({}, {"allowed": {"layer[01]": [2, 8]}}),
        ({"pinned": {"layer0": 5, "*": 3}}, {"pinned": {"*": 3, "layer0": 5}}),
        ({"allowed": {"layer0": [5], "*": [2, 3]}}, {"allowed": {"*": [2, 3], "layer0": [5]}}),
    ],
    ids=str,
)
def test_every_rule_changes_the_widths_of_a_real_posterior(before, change):
    found = []
    for rules in ({**BASE, **before}, {**BASE, **before, **change}):
        layers = network((1, 33, 27), (2, 8, 36), (1, 20, 40))
        found.append(Knapsack(store(), **rules).allocate(layers, Budget(4, "code")))
        for layer in layers:
            assert holds(found[-1][layer.name].tolist(), permitted(layer.name, rules), rules)
        assert spent(layers, found[-1]) <= 4 * weights(layers)
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_that_share_a_multiple_are_those_of_like_risk():
    (layer, _) = layers = plain_layers([[5, 900, 7, 3, 800, 1, 1000], [1]], [64, 64])
    found = constrained_knapsack({**BASE, "row_multiple": 3, "widths": [2, 4]}).allocate(layers, Budget(3, "code"))
    assert found["a"].tolist() == [2, 4, 2, 2, 4, 2, 4]
    # the remainder is the row that matters least
    rows = torch.tensor([[9.0], [1.0], [5.0], [7.0]])
    assert constrained_knapsack({**BASE, "row_multiple": 3})._blocks(rows).tolist() == [0, 1, 0, 0]
    assert layer.rows % 3 == 1


def test_the_first_matching_pattern_counts_and_pins_come_first():
    layers = plain_layers([[9, 1], [9, 1], [9, 1], [9, 1]], [64] * 4)
    rules = {**BASE, "pinned": {"c": 8, "[cd]": 3}, "allowed": {"[ac]": [4], "a": [5]}}
    knapsack = constrained_knapsack(rules)
    assert knapsack.choices(["a", "b", "c", "d"]) == {"a": [4], "b": [2, 3, 4, 6], "c": [8], "d": [3]}
    assert knapsack.widths == [2, 3, 4, 5, 6, 8]
    found = knapsack.allocate(layers, Budget(5, "code"))
    assert (found["a"].tolist(), found["c"].tolist(), found["d"].tolist()) == ([4, 4], [8, 8], [3, 3])
    numbered = constrained_knapsack({**BASE, "pinned": {0: 8}})
    assert numbered.choices(["0", "1"])["0"] == [8]


def test_rules_without_effect_are_refused():
    layers = plain_layers([[9, 1], [9, 1]], [64] * 2)
    for change, message in (
        ({"pinned": {"a": 4, "conv*": 8}}, "^allocation.pinned: pattern 'conv.' matches no layer"),
        ({"allowed": {"A": [4]}}, "^allocation.allowed: pattern 'A' matches no layer"),
        ({"min_width": 4, "pinned": {"b": 3}}, "^allocation.min_width=4: leaves layer b none"),
    ):
        with pytest.raises(ValueError, match=message):
            constrained_knapsack({**BASE, **change}).allocate(layers, Budget(4, "code"))
    with pytest.raises(ValueError, match=r"^allocation.row_multiple=3: .*group_rows=8"):
        constrained_knapsack({**BASE, "block": "group", "row_multiple": 3})
    with pytest.raises(ValueError, match=r"^allocation.block=column"):
        constrained_knapsack({**BASE, "block": "column"})


def test_ties_of_groups_go_to_the_earlier_layer():
    layers = plain_layers([[5] * 4, [5] * 4], [64, 64])
    rules = {**BASE, "block": "group", "group_rows": 2, "widths": [2, 3]}
    extra = 2 * (3 * 4 + 8) / 512  # what the two width maps take
    for groups, (a, b) in enumerate([([2, 2, 2, 2], [2, 2, 2, 2]), ([3, 3, 2, 2], [2, 2, 2, 2])]):
        found = constrained_knapsack(rules).allocate(layers, Budget(2 + groups / 4 + extra, "code"))
        assert (found["a"].tolist(), found["b"].tolist()) == (a, b)


def test_pinned_layers_store_no_width_map():
    layers = plain_layers([[9] * 8, [9] * 8], [8, 8])
    rules = {**BASE, "pinned": {"*": 4}}
    stored = constrained_knapsack(rules).allocate(layers, Budget(4 + 2 * (8 * 24 + 8) / 128, "stored"))
    assert all(width.tolist() == [4] * 8 for width in stored.values())


def test_kappa_weighs_a_layer():
    layers = plain_layers([[8, 4, 2, 1], [8, 4, 2, 1]], [64, 64])
    knapsack = constrained_knapsack(BASE)
    even = knapsack.allocate(layers, Budget(3.5, "code"))
    alone = [layer.notes["predicted_risk"] for layer in layers]
    assert alone[0] == pytest.approx(sum(e * 4.0**-w for e, w in zip([8, 4, 2, 1], even["a"].tolist(), strict=True)))
    layers[1].notes["kappa"] = 16.0
    weighed = knapsack.allocate(layers, Budget(3.5, "code"))
    assert int(weighed["b"].sum()) > int(even["b"].sum())
    expected = 16 * sum(e * 4.0**-w for e, w in zip([8, 4, 2, 1], weighed["b"].tolist(), strict=True))
    assert layers[1].notes["predicted_risk"] == pytest.approx(expected)
    layers[1].notes["kappa"] = torch.nan
    with pytest.raises(ValueError, match=r"^layer b: a predicted risk is NaN or infinite"):
        knapsack.allocate(layers, Budget(3.5, "code"))


def test_the_posterior_sees_all_layers_once_and_first():
    knapsack = constrained_knapsack(BASE)
    knapsack.allocate(plain_layers([[1], [2], [3]], [64] * 3), Budget(4, "code"))
    assert knapsack.whitenings.posterior.seen == [["a", "b", "c"]]


# ---------------------------------------------------------------------------------------------------------- Budget


def test_budget_counts_codes_or_everything():
    layers = network((1, 4, 10), (2, 3, 5))  # 70 weights in 10 rows
    affine = 10 * 24 + 2 * 8
    assert Budget(3.0, "code").capacity(layers, affine) == 210
    assert Budget(3.0, "code").capacity(layers, affine - 5) == 210  # cheaper formats earn no extra code bits
    assert Budget(3.0, "code").capacity(layers, affine + 30) == 180
    assert Budget(8.0, "stored").capacity(layers, affine) == 560 - affine
    assert 4.35 * 100 < Budget(4.35, "code").capacity(network((1, 10, 10)), 0) == 435


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


def map_bits(layer: LayerProblem) -> int:
    """What a width for every row costs at most beyond one for the layer: 3 bits a row, two paddings for one byte."""
    return 3 * layer.rows + 8


def check_spent(
    layers: list[LayerProblem], found: dict[str, Tensor], low: int, capacity: float, willing: set[str]
) -> None:
    """Widths low and low + 1, one layer mixed at most, and too little left to widen one more row of the willing."""
    mixed = [layer for layer in layers if len(found[layer.name].unique()) > 1]
    assert {int(w) for width in found.values() for w in width.unique()} <= {low, low + 1} and len(mixed) <= 1
    unspent = capacity - spent(layers, found)
    assert unspent >= sum(map(map_bits, mixed)) - 1e-6
    for layer in mixed or layers:
        if layer.name in willing and bool((found[layer.name] == low).any()):
            assert unspent < layer.columns + map_bits(layer)


@pytest.mark.parametrize("name", REALISTIC)
@pytest.mark.parametrize("bits", [2.5, 3.0, 3.1, 3.5, 4.0, 5.5, 8.0])
def test_uniform_meets_the_budget_on_real_layer_sizes(name, bits, monkeypatch):
    random = np.random.default_rng(0)
    monkeypatch.setattr(uniform, "_row_errors", lambda layer, width: errors[layer.name] * 4.0**-width)
    for codebook_bits in [0, 1000] * 5:
        layers = [
            LayerProblem(f"layer{i}", "Linear", torch.zeros(1).expand(1, *shape), lambda _: pytest.fail("not needed"))
            for i, shape in enumerate(REALISTIC[name])
        ]
        errors = {
            layer.name: torch.from_numpy(layer.columns * random.lognormal(0, 2) * random.lognormal(0, 1, layer.rows))
            for layer in layers
        }
        found = Uniform().allocate(layers, Budget(bits, "code"), codebook_bits)
        if bits == int(bits):
            assert all(torch.equal(found[key], width) for key, width in uniform_widths(layers, int(bits)).items())
        else:
            check_spent(layers, found, int(bits), bits * weights(layers) - codebook_bits, set(errors))
            assert bits - 0.01 <= spent(layers, found) / weights(layers) <= bits


def rtn_errors(layers: list[LayerProblem], width: int) -> dict[str, Tensor]:
    """Squared error of every row in what plain rounding stores."""
    done = rounded(RTN("mse"), layers, lambda *_, **__: uniform_widths(layers, width))
    return {
        layer.name: (tensor.dequantize().double() - layer.weight.double()).square().sum(2).flatten()
        for layer, tensor in done
    }


odd_shapes = st.tuples(st.integers(1, 2), st.integers(1, 12), st.sampled_from([1, 5, 8, 9, 16, 24]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(odd_shapes, min_size=1, max_size=5),
    st.integers(2, 7),
    st.integers(0, 99),
    st.sampled_from(["code", "stored"]),
    st.sampled_from([0, 40]),
    st.integers(0, 99),
)
def test_uniform_widens_whole_layers_and_rows_of_one_more(drawn, low, hundredths, count, codebook_bits, seed):
    layers = network(*drawn, seed=seed)
    size, affine = weights(layers), sum(24 * layer.rows + 8 for layer in layers)
    extra = codebook_bits + sum(8 for layer in layers if layer.rows * layer.columns % 8)
    total_bits = (low + hundredths / 100) * size
    promised = total_bits + affine + (extra if count == "stored" else 0)
    budget = Budget(low + hundredths / 100 if count == "code" else promised / size, count)
    found = Uniform().allocate(layers, budget, codebook_bits)
    stored = packed_bits(layers, found) + codebook_bits
    capacity = total_bits - (extra if count == "code" else 0)
    if capacity <= low * size:
        assert all(torch.equal(found[name], width) for name, width in uniform_widths(layers, low).items())
        assert count == "code" or stored <= promised
        return
    assert stored <= promised + 1e-6

    narrow, wide = rtn_errors(layers, low), rtn_errors(layers, low + 1)
    drops = {name: narrow[name] - wide[name] for name in found}
    check_spent(layers, found, low, capacity, {name for name, drop in drops.items() if bool((drop > 0).all())})
    is_wide = {name: width > low for name, width in found.items()}
    for name, drop in drops.items():
        mixed = 0 < int(is_wide[name].sum()) < len(drop)
        assert not mixed or float(drop[is_wide[name]].min()) >= max(0, float(drop[~is_wide[name]].max()))
    risk = torch.stack([torch.stack([narrow[layer.name].sum(), wide[layer.name].sum()]) for layer in layers])
    bits = torch.tensor([[layer.rows * layer.columns * width for width in (low, low + 1)] for layer in layers])
    gained = sum(float(drop[is_wide[name]].sum()) for name, drop in drops.items())
    greedy = greedy_knapsack(risk, bits, capacity)
    least = sum(float(risk[block, k]) for block, k in enumerate(greedy.tolist()))
    assert float(risk[:, 0].sum()) - gained <= least * (1 + 1e-9)


@pytest.mark.parametrize(
    ("energies", "columns", "extra", "expected"),
    [
        # Rows of 64 weights. `a` gains most and does not fit: it gets nine rows, not five beside the whole of `b`.
        ([[10] * 16, [1] * 4], [64, 64], 640, [[1] * 9 + [0] * 7, [0] * 4]),
        # After `a`, `c` is worth more than the next in order, for one row of it.
        ([[10] * 8, [9] * 8, [1, 1, 1, 40, 1, 1, 1, 1]], [64] * 3, 768, [[1] * 8, [0] * 8, [1, 1, 0, 1, 0, 0, 0, 0]]),
        # No row of `a` fits with its width map of 20 bits: whole layers only.
        ([[99] * 4, [1] * 8], [512, 32], 531, [[0] * 4, [1] * 8]),
        ([[99] * 4, [1] * 8], [512, 32], 532, [[1, 0, 0, 0], [0] * 8]),
        # Beside the whole of `b`, which `a` could not have used.
        ([[99] * 4, [1] * 8], [512, 32], 788, [[1, 0, 0, 0], [1] * 8]),
        # A row whose error rises stays narrow.
        ([[9, -1, -2, 9]], [64], 255, [[1, 0, 0, 1]]),
    ],
)  # fmt: skip
def test_uniform_splits_the_layer_where_rows_are_worth_most(energies, columns, extra, expected, monkeypatch):
    layers = plain_layers(energies, columns)
    monkeypatch.setattr(uniform, "_row_errors", lambda layer, width: layer.weight[0, :, 0].double() * 4.0**-width)
    found = Uniform().allocate(layers, Budget(3 + extra / weights(layers), "code"))
    assert [(width - 3).tolist() for width in found.values()] == expected
    again = Uniform().allocate(layers, Budget(3 + extra / weights(layers), "code"))
    assert all(torch.equal(found[name], again[name]) for name in found)


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
    whitenings = store()
    assert isinstance(make_allocator("uniform", None, "row", [2, 3]), Uniform)
    knapsack = make_allocator("knapsack", whitenings, "row", [4, 2])
    assert isinstance(knapsack, Knapsack) and knapsack.statistics == Kfac.statistics
    assert json.dumps(knapsack.widths) == "[2, 4]"
    with pytest.raises(ValueError, match="needs a posterior"):
        make_allocator("knapsack", None, "row", [2, 3])


def test_the_allocator_takes_the_keys_of_the_config():
    rules = {**BASE, "group_rows": 6, "row_multiple": 2, "min_width": 3, "pinned": {"a": 8}, "allowed": {"b": [2, 5]}}
    knapsack = make_allocator("knapsack", store(), **rules)
    assert (knapsack.group_rows, knapsack.row_multiple, knapsack.min_width) == (6, 2, 3)
    assert knapsack.choices(["a", "b", "c"]) == {"a": [8], "b": [5], "c": [3, 4, 6]}
    config = yaml.safe_load((Path(__file__).parents[2] / "conf" / "config.yaml").read_text())
    assert set(config["allocation"]) == set(rules)
