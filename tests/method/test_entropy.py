"""codec=entropy: streams within the budget, steps from the allocators, and what a trellis gains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_method import bayesq_with, network

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from bayesq.allocation import Knapsack
from bayesq.budget import Allocator, Budget
from bayesq.contract import Context, LayerProblem, Method
from bayesq.entropy import RateClasses, StreamAllocation, StreamPlan, SymbolSums, row_rate
from bayesq.entropy_rounding import CodedRounds
from bayesq.errors import Refused
from bayesq.ilp import ilp_knapsack
from bayesq.loop import quantize_layers
from bayesq.posterior import Kfac, WhiteningStore
from bayesq.quant.accounting import buffer_bytes, code_bits
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.recipe import Recipe
from bayesq.uniform import Uniform


def store() -> WhiteningStore:
    return WhiteningStore(Kfac(1.0, 1000, None, 0.1), memory_limit=0)


def methods() -> dict[str, tuple[Method, Allocator]]:
    """Methods with their default allocators."""
    knapsack = Knapsack(store(), "row", (2, 3, 4))
    return {
        "trellis": (bayesq_with(), knapsack),
        "scalar": (bayesq_with(levels="lloyd"), knapsack),
        "nearest": (bayesq_with(rounding="nearest"), knapsack),
        "gptq": (GPTQ("mse", True, 0.01, None), Uniform()),
        "rtn": (RTN("mse"), Uniform()),
        "gptq by risk": (GPTQ("mse", True, 0.01, None), knapsack),
    }


def coded(name: str, bits: float, layers: list[LayerProblem], count: str = "code") -> dict[str, QuantizedTensor]:
    method, allocator = methods()[name]
    stream = StreamAllocation(allocator, Budget(bits, count), {layer.name: layer for layer in layers})

    def allocate(*_: object, **__: object) -> dict[str, torch.Tensor]:
        raise AssertionError("widths are not allocated")

    context = replace(Context.of_seed(0), stream=stream)
    return {layer.name: tensor for layer, tensor in quantize_layers(method, layers, allocate, context)}


def risk(tensors: dict[str, QuantizedTensor], layers: list[LayerProblem]) -> float:
    posterior = store()
    return sum(float(posterior.fit(one).risk(tensors[one.name].dequantize() - one.weight).sum()) for one in layers)


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("bits", [1, 1.7, 3, 5, 8])
def test_streams_fit_the_budget_and_use_it(name: str, bits: float) -> None:
    layers = network(rows=120)
    tensors = coded(name, bits, layers)
    weights = sum(layer.weight.numel() for layer in layers)
    taken = sum(map(code_bits, tensors.values())) / weights
    assert taken <= bits
    if bits <= 5:
        # a small network pays for its tables in stream bits, and the layers' last words are not full
        buffers, header = pack_model(tensors)
        assert 8 * buffer_bytes(buffers) / weights > bits
        again = unpack_model(buffers, header)
        assert all(torch.equal(again[key].dequantize(), tensors[key].dequantize()) for key in tensors)
        assert taken > bits - 0.45


def test_a_budget_of_stored_bits_counts_the_tables() -> None:
    layers = network(rows=120)
    tensors = coded("trellis", 3, layers, "stored")
    buffers, _ = pack_model(tensors)
    weights = sum(layer.weight.numel() for layer in layers)
    assert 2.8 < 8 * buffer_bytes(buffers) / weights <= 3


def test_the_trellis_has_less_risk_than_scalar_codes_and_gptq_more() -> None:
    """At 3 bits; the trellis gains 1 dB and more on normal weights."""
    layers = network(rows=240)
    trellis, scalar, gptq = (risk(coded(name, 3, layers), layers) for name in ("trellis", "scalar", "gptq"))
    assert trellis < 0.92 * scalar and scalar < gptq


def test_the_same_problem_gives_the_same_codes() -> None:
    one, other = (coded("trellis", 2.5, network()) for _ in range(2))
    assert all(torch.equal(one[key].codes, other[key].codes) for key in one)


def test_steps_follow_from_the_allocator() -> None:
    layers = network()
    for name, step in Uniform().steps(layers).items():
        weight = next(layer.weight for layer in layers if layer.name == name)
        torch.testing.assert_close(step, weight.double().square().mean().sqrt().expand(len(step)))
    posterior = store()
    steps = Knapsack(posterior, "row", (2, 3)).steps(layers)
    products = []
    for layer in layers:
        whitening = posterior.whitening(layer, True, 0.01)
        mean = (whitening.row_curvature[:, :, None] * whitening.column_curvature).mean(-1).flatten()
        products.append(steps[layer.name].square() * mean)
    together = torch.cat(products)
    torch.testing.assert_close(together, together[:1].expand(len(together)))


def test_plans_never_exceed_the_capacity() -> None:
    """Layers whose streams are longer than planned by up to 30 %."""
    layers = network()
    plan = StreamPlan.of({layer.name: 3.0 * layer.weight.numel() for layer in layers}, 1e4)
    total = 0
    for k, layer in enumerate(layers):
        weights = layer.weight.numel()

        def attempt(factor: float, weights: int = weights, k: int = k) -> tuple[int, int]:
            bits = int(plan.planned[layer.name] * (1 + 0.1 * k) - weights * 0.9 * np.log2(factor))  # noqa: B023
            return bits, bits

        total += plan.fit(layer, attempt)
    assert 0.99e4 < total <= 1e4


def test_a_stream_that_no_step_makes_short_enough_is_refused_with_the_remedy() -> None:
    """More bits help where the tables take the budget; else, with equally frequent symbols, other bits may do."""
    layer = network()[0]
    weights = layer.weight.numel()
    for planned, stream, remedy in (
        (-9.0, 99, "99 bits, and the budget leaves 0 beside the code tables; raise bits, or choose codec=fixed"),
        (6.0 * weights, 7 * weights, "choose other bits, higher or lower, or choose codec=fixed"),
        (6.0 * weights, 900 * weights, "choose other bits, higher or lower"),  # was an overflow
    ):
        with pytest.raises(Refused, match=f"layer {layer.name}: its shortest stream has .*{remedy}"):
            StreamPlan({layer.name: planned}, 0.0).fit(layer, lambda _, bits=stream: (0.0, bits))  # type: ignore[misc]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_first_factor_is_that_of_the_steps_it_scales(bits: float) -> None:
    """Normal rows then take about the budget, for the steps between equal slopes and equal bits."""
    layers = network(rows=120)
    stream = StreamAllocation(methods()["trellis"][1], Budget(bits, "code"), {layer.name: layer for layer in layers})
    rounds = CodedRounds(stream, True)
    rounds.start(layers)
    taken = 0.0
    for layer in layers:
        rows = rounds.rows[layer.name]
        taken += layer.columns * float(row_rate(rows.spread / (rows.step * rounds.factor)).sum())
    assert taken == pytest.approx(stream.capacity(layers, 0))


def test_a_layer_of_few_bits_keeps_half_of_them_in_the_plan() -> None:
    layers = network(rows=120)
    stream = StreamAllocation(Uniform(), Budget(2, "code"), {layer.name: layer for layer in layers})
    rounds = CodedRounds(stream, True)
    rounds.start(layers)
    bits = {layer.name: round((3.5 if k else 0.2) * layer.weight.numel()) for k, layer in enumerate(layers)}
    sums = SymbolSums.empty(rounds.classes.count)
    sums.counts[..., 128] = 1
    rounds.finish_round(layers, bits, sums)
    share = rounds.plan.planned[layers[0].name] / sum(rounds.plan.planned.values())
    assert share > 0.4 * bits[layers[0].name] / sum(bits.values())


def test_neighbouring_classes_share_a_table_where_this_saves_bits() -> None:
    random = np.random.default_rng(0)
    for counts, expected in (((300, 300), 1), ((30000, 30000), 2)):
        sums = SymbolSums.empty(3)
        for k, count in zip((0, 2), counts, strict=True):
            codes = 128 + torch.from_numpy(random.normal(0, 3 + k, (1, count)).round()).clamp(-120, 120).to(torch.uint8)
            one = torch.ones(1, count, dtype=torch.float64)
            sums.add(codes, np.zeros((1, count), np.uint8), torch.tensor([k]), codes - 128.0, one)
        tables, table = sums.tables()
        assert tables.classes == expected
        assert table.tolist() == ([0, 0, 0] if expected == 1 else [0, 0, 1])


def test_rate_classes_cover_all_rows() -> None:
    ratios = [torch.tensor([0.0, 0.2, 1.0]), torch.tensor([30.0])]
    classes = RateClasses.covering(ratios)
    assert classes.count <= 16 and classes.of(torch.cat(ratios)).tolist() == sorted(
        classes.of(torch.cat(ratios)).tolist()
    )
    assert classes.normal_tables().classes == classes.count


def test_methods_without_entropy_coded_form_are_refused() -> None:
    class Other:
        statistics = frozenset()

    with pytest.raises(Refused, match="codec=entropy: this method has no entropy-coded form"):
        Recipe(Other(), Uniform(), Budget(3, "code"), codec="entropy")  # type: ignore[arg-type]
    ilp = Knapsack(store(), "row", (2, 3), solve=ilp_knapsack)
    with pytest.raises(Refused, match=r"allocator=ilp: .*choose allocator=knapsack"):
        Recipe(RTN("mse"), ilp, Budget(3, "code"), codec="entropy")
    with pytest.raises(Refused, match="codec=huffman: choose one of fixed, entropy"):
        Recipe(Other(), Uniform(), Budget(3, "code"), codec="huffman")  # type: ignore[arg-type]
