"""Methods in rotated columns against the same methods on layers that were rotated before, by dense products."""

from dataclasses import replace

import pytest
import torch
from rounding_loop import rounded as through_the_loop
from test_method import Allocator, bayesq_with, layer, network
from torch import Tensor

import bayesq
from bayesq.budget import Budget
from bayesq.contract import Context, LayerProblem
from bayesq.defaults import construct, settings
from bayesq.entropy import StreamAllocation
from bayesq.errors import Refused
from bayesq.posterior import Diagonal, Ekfac
from bayesq.quant.rotation import SEED_BYTES, Rotation
from bayesq.rotated import STORED_BITS, RotatedColumns
from bayesq.uniform import Uniform

METHODS = {
    "bayesq": bayesq_with,
    **{name: lambda name=name: construct(settings("method", name)) for name in ("gptq", "gptaq", "hqq", "rtn")},
}


def turn(rotation: Rotation, columns: int) -> Tensor:
    """R, dense."""
    return rotation.columns(torch.eye(columns, dtype=torch.float64)[None])[0].T


def with_cross(one: LayerProblem) -> LayerProblem:
    """The layer with a cross moment that is not symmetric."""
    noise = torch.randn(one.weight.shape[0], one.columns, one.columns, generator=torch.Generator().manual_seed(7))
    cross = one.statistic("input_moment") @ (torch.eye(one.columns) + 0.01 * noise)
    load = one.statistic
    return replace(one, statistic=lambda kind: cross if kind == "cross_moment" else load(kind))


def by_hand(one: LayerProblem, rotation: Rotation) -> LayerProblem:
    """The layer that a user would rotate: dense products in float64."""
    right = turn(rotation, one.columns)
    statistics = {"gradient_moment": one.statistic("gradient_moment")}
    for kind in ("input_moment", "cross_moment"):
        statistics[kind] = (right @ one.statistic(kind).double() @ right.T).float()
    weight = (one.weight.double() @ right.T).float()
    return LayerProblem(one.name, one.kind, weight, statistics.__getitem__, one.positions_per_channel)


@pytest.mark.parametrize("name", METHODS)
def test_codes_are_those_of_a_layer_that_was_rotated_before(name):
    layers = [with_cross(one) for one in network()]
    tensors = [tensor for _, tensor in through_the_loop(RotatedColumns(METHODS[name]()), layers, Allocator())]
    turned = [by_hand(one, tensor.rotation) for one, tensor in zip(layers, tensors, strict=True)]
    expected = [tensor for _, tensor in through_the_loop(METHODS[name](), turned, Allocator())]
    assert len({tensor.rotation.seed for tensor in tensors}) == len(layers)
    for one, tensor, plain in zip(layers, tensors, expected, strict=True):
        assert not tensor.rotation.both and plain.rotation is None
        same = (tensor.codes == plain.codes).double().mean()
        assert same > 0.95, one.name  # float32 products in another order move a code now and then
        values = replace(tensor, rotation=None).dequantize().double() @ turn(tensor.rotation, one.columns)
        torch.testing.assert_close(tensor.dequantize().double(), values, rtol=1e-4, atol=1e-5)


def test_an_allocator_sees_the_rotated_layers():
    """With all statistics, and its whitenings serve the rounding; layers of before have others in the same store."""
    method, other, plain = bayesq_with(), bayesq_with(), Allocator()
    layers, seen = network(), []

    def allocate(rotated, *arguments):
        for one, original in zip(rotated, layers, strict=True):
            method.whitenings.whitening(original, True, 0.01)
            seen.append(method.whitenings.whitening(one, True, 0.01))
            assert torch.equal(one.weight, one.rotation.forward(original.weight.double()).float())
            assert torch.equal(one.statistic("fisher_diagonal"), original.statistic("fisher_diagonal"))
        return plain(rotated, *arguments)

    method.whitenings.memory_limit = other.whitenings.memory_limit = 2**30
    found = [tensor for _, tensor in through_the_loop(RotatedColumns(method), layers, allocate)]
    expected = [tensor for _, tensor in through_the_loop(RotatedColumns(other), network(), Allocator())]
    assert all(torch.equal(one.codes, two.codes) for one, two in zip(found, expected, strict=True))
    kept = set(map(id, method.whitenings._in_memory.values()))
    assert len(kept) == 2 * len(layers) and {id(one) for one in seen} <= kept


@pytest.mark.parametrize("name", ["bayesq", "gptq"])
def test_errors_cost_less_where_columns_differ(name):
    """The D_c of a layer whose inputs have very unequal energies: their mean falls towards their geometric mean."""
    energies = torch.diag_embed(10 ** torch.linspace(-2, 0, 48))[None]
    one = layer("body", "Linear", (1, 40, 48), 0)
    gradients = one.statistic("gradient_moment")
    uneven = replace(one, statistic=lambda kind: energies if kind == "input_moment" else gradients)
    risks = []
    for method in (METHODS[name](), RotatedColumns(METHODS[name]())):
        ((_, tensor),) = through_the_loop(method, [uneven], Allocator([3]))
        delta = tensor.dequantize().double() - one.weight.double()
        risks.append(float(((delta @ energies[0].double()) * delta).sum()))
    assert risks[1] < 0.85 * risks[0]


def test_seeds_count_as_codebooks_do():
    plain, rotated = Allocator(), Allocator()
    list(through_the_loop(bayesq_with(), network(), plain))
    list(through_the_loop(RotatedColumns(bayesq_with()), network(), rotated))
    assert rotated.codebook_bits - plain.codebook_bits == STORED_BITS * len(network()) == 8 * (SEED_BYTES + 1) * 4


def test_a_streams_budget_pays_for_the_seeds():
    asked = []

    class Stream:
        def steps(self, layers):
            return {}

        def capacity(self, layers, overhead, scales=0):
            asked.append((overhead, scales))
            return 1.0

    class Reading:
        statistics = frozenset()

        def prepare(self, layers, allocate, context):
            context.stream.capacity(layers, 5, 2)
            return {}

    context = replace(Context.of_seed(0), stream=Stream())
    RotatedColumns(Reading()).prepare(network(), Allocator(), context)
    assert asked == [(5 + 4 * STORED_BITS, 2)]


def test_the_steps_of_a_stream_are_those_of_rotated_layers():
    """Which have all statistics of the originals."""
    layers, seen = network(), []

    class Steps(Uniform):
        def steps(self, layers):
            seen.extend(layers)
            return {}

    class Reading:
        statistics = frozenset()

        def prepare(self, layers, allocate, context):
            context.stream.steps([replace(one, statistic={}.__getitem__) for one in layers])
            return {}

    stream = StreamAllocation(Steps(), Budget(3, "code"), {one.name: one for one in layers})
    context = replace(Context.of_seed(0), stream=stream)
    RotatedColumns(Reading()).prepare(layers, Allocator(), context)
    for one, original in zip(seen, layers, strict=True):
        assert torch.equal(one.weight, one.rotation.forward(original.weight.double()).float())
        moment = one.rotation.moment(original.statistic("input_moment").double()).float()
        assert torch.equal(one.statistic("input_moment"), moment)
        assert torch.equal(one.statistic("gradient_moment"), original.statistic("gradient_moment"))


def test_statistics_without_a_rotated_form_are_refused():
    for posterior in (Diagonal(1.0, 1000, None), Ekfac(1.0, 1000, None)):
        with pytest.raises(Refused, match=r"rotate=true: this method reads \w+, which has no rotated form"):
            RotatedColumns(bayesq_with(posterior))
    with pytest.raises(Refused, match=r"rotate=true: this allocator reads fisher_diagonal, .*; choose rotate=false"):
        RotatedColumns(METHODS["gptq"](), Diagonal(1.0, 1000, None).statistics)
    with pytest.raises(Refused, match=r"reads fisher_diagonal, .*; choose rotate=false"):
        RotatedColumns(construct(settings("method", "squeezellm")))
    with pytest.raises(Refused, match=r"reads input_magnitude, .*; choose rotate=false"):
        RotatedColumns(construct(settings("method", "awq")))
    with pytest.raises(Refused, match=r"this method rotates both sides by itself; choose rotate=false"):
        RotatedColumns(construct(settings("method", "qtip")))


def test_the_library_has_the_switch():
    torch.manual_seed(0)
    network, x = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5)).eval(), []
    x = [torch.randn(16, 24) @ torch.diag(10 ** torch.linspace(-1, 0, 24)) for _ in range(4)]
    plain, _ = bayesq.quantize(network, x, bits=3, method="gptq")
    turned, report = bayesq.quantize(network, x, bits=3, method="gptq", rotate=True)
    distinct = [max(len(row.unique()) for row in one[0].weight) for one in (plain, turned)]
    assert distinct[0] <= 8 and distinct[1] > 20
    assert all(not tensor.rotation.both for tensor in report.packed.tensors.values())


@pytest.mark.parametrize("method", ["rtn", "gptq", "watersic", "bayesq"])
def test_entropy_codes_of_rotated_columns(method):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 40)).eval()
    scales = torch.diag(10 ** torch.linspace(-1, 0, 24))
    x = [torch.randn(16, 24) @ scales for _ in range(8)]
    for batch in x:
        batch[:, 3] = 0  # a dead column
    given = {"bits": 4, "method": method, "codec": "entropy", "inputs": "full", "correction": "none"}
    turned, report = bayesq.quantize(network, x, **given, rotate=True)
    assert all(tensor.rotation is not None for tensor in report.packed.tensors.values())
    assert report.code_bits <= 4
    reach = torch.cat(x)
    assert (turned(reach) - network(reach)).norm() < 0.2 * network(reach).norm()
