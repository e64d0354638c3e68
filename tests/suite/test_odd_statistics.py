"""Statistics of weights that networks use in unusual ways: against automatic differentiation, one example at a time."""

from functools import partial

import odd_networks as odd
import pytest
import torch
from odd_networks import seeded, vectors
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.order import forward_order
from bayesq.calibration.prefix import Network, PrefixInputs
from bayesq.fisher import FISHER_DIAGONAL, FISHER_EIGENVALUES, GRADIENT_MOMENT, GradientDirections
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import groups_of, quantizable_layers, same_layer, weight_key, weight_to_matrix
from bayesq.quant.usage import Usage, usage_of

CPU = torch.device("cpu")
NETWORKS = {
    "keywords": odd.FunctionByKeywords,
    "called with keywords": odd.KeywordCall,
    "windows": odd.FunctionInWindows,
    "x @ W.T": odd.ProductWithTransposed,
    "addmm": odd.AddmmFlattened,
    "own forward": odd.OwnForward,
    "loop": odd.Loop,
    "two lengths": odd.TwoLengths,
    "tied": odd.TiedLayers,
    "shared positions": odd.SharedPositions,
    "content and positions": odd.ContentAndPositions,
    "shared convolution": odd.SharedConvolution,
    "positions first": odd.PositionsFirst,
    "adds in place": odd.AddsInPlace,
    "acts in place": odd.ActsInPlace,
    "rare": odd.Rare,
    "checkpointed": odd.Checkpointed,
    "Conv1D": odd.Transposed,
    "experts": odd.Mixture,
    "transposed experts": partial(odd.Mixture, transposed=True),
    "self-attention": odd.SelfAttention,
    "attention, positions first": partial(odd.SelfAttention, batch_first=False, bias=False),
    "cross-attention": odd.CrossAttention,
}
STATISTICS = (INPUT_MOMENT, GRADIENT_MOMENT, FISHER_DIAGONAL, INPUT_MAGNITUDE)


def examples() -> TensorExamples:
    return TensorExamples({"x": vectors(8)}, torch.zeros(8, dtype=torch.long))


def used(module: nn.Module) -> Usage:
    return usage_of(module, quantizable_layers(module), {"x": vectors(8)[:2]}, ({"x": x} for x in vectors(8).split(4)))


def collect(module: nn.Module, batch_size: int, statistics=STATISTICS, **options) -> dict[str, dict[str, Tensor]]:
    """Statistics as a run takes them: example by example where that is needed."""
    found = used(module)
    more = {"overwritten": found.overwritten, **options}
    collector = Collector(module, found.layers, statistics, None, torch.Generator(), **more)
    for batch in examples().batches(1 if found.alone else batch_size, "cpu"):
        collector.add(batch)
    return {statistic.name: dict(collector.finish(statistic)) for statistic in statistics}


def weight_gradients(module: nn.Module, name: str) -> Tensor:
    """[e, k, g, r, c]: of example e, the gradient of v_k logits; sum_k v_k v_kT = diag(p) - p pT of two classes."""
    layer = same_layer(used(module).layers[name], module, name)
    gradients = []
    module.in_place = False  # which automatic differentiation refuses
    for x in vectors(8).split(1):
        logits = module(x)
        p = logits[0].softmax(0).detach()
        direction = p.prod().sqrt() * torch.tensor([1.0, -1.0])
        (gradient,) = torch.autograd.grad(logits[0] @ direction, layer.weight, allow_unused=True)
        stack = torch.zeros_like(layer.weight) if gradient is None else gradient
        matrix = stack.reshape(groups_of(layer), -1, stack.shape[-1]) if stack.dim() < 4 else stack.flatten(1)[None]
        gradients.append(matrix.transpose(1, 2) if getattr(layer, "transposed", False) else matrix)
    return torch.stack(gradients)[:, None]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_fisher_is_that_of_each_examples_weight_gradient(network):
    module = seeded(NETWORKS[network])
    found = collect(module, 4)["fisher_diagonal"]
    for name in found:
        expected = weight_gradients(module, name).square().sum(1).mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
        assert found[name].count_nonzero() > found[name].numel() / 4


@pytest.mark.parametrize("network", ["loop", "two lengths", "experts", "self-attention", "content and positions"])
def test_directions_and_eigenvalues_are_of_the_whole_gradient_too(network):
    module = seeded(NETWORKS[network])
    directions = collect(module, 4, [GradientDirections(8)])["gradient_directions"]
    moments = collect(module, 4)
    bases = {
        name: {f"{of}_basis": torch.linalg.eigh(moments[f"{of}_moment"][name])[1] for of in ("input", "gradient")}
        for name in moments["input_moment"]
    }
    eigenvalues = collect(module, 4, [FISHER_EIGENVALUES], required=bases)["fisher_eigenvalues"]
    for name, basis in bases.items():
        q_g = basis["gradient_basis"]
        gradients = weight_gradients(module, name)[:, 0]  # [e, g, r, c]
        flat, rows = gradients.flatten(1), directions[name].flatten(1)
        torch.testing.assert_close(rows.T @ rows, flat.T @ flat / len(flat), rtol=1e-3, atol=1e-6)
        turned = q_g.transpose(1, 2) @ gradients @ basis["input_basis"]
        torch.testing.assert_close(eigenvalues[name], turned.square().mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_statistics_do_not_depend_on_the_batch_size(network):
    module = seeded(NETWORKS[network])
    one, four, eight = (collect(module, size) for size in (1, 4, 8))
    for kind in one:
        for name, expected in one[kind].items():
            for other in (four, eight):
                assert (other[kind][name] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("network", "count"),
    [("loop", 3), ("tied", 2), ("two lengths", 2), ("keywords", 1), ("own forward", 1), ("Conv1D", 1)],
)
def test_the_input_moment_is_of_all_inputs(network, count):
    """The sums over what F.linear or addmm is given, seen by replacing the function in this test alone."""
    module, given = seeded(NETWORKS[network]), []
    layer = used(module).layers["odd"]

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in (torch.nn.functional.linear, torch.addmm):
                at = 1 if func is torch.addmm else 0
                weight = kwargs.get("weight", args[-1] if func is torch.addmm else args[1] if len(args) > 1 else None)
                if weight is not None and weight.data_ptr() == layer.weight.data_ptr():
                    x = args[at] if len(args) > at else kwargs["input"]
                    given.append(x.detach().reshape(-1, odd.WIDTH))
            return func(*args, **kwargs)

    with Spy(), torch.no_grad():
        module(vectors(8))
    assert len(given) == count
    rows = torch.cat(given).double()
    expected = (rows.T @ rows / len(rows)).float()[None]
    torch.testing.assert_close(collect(module, 8)["input_moment"]["odd"], expected)


def test_experts_have_moments_of_their_own_tokens():
    module = seeded(odd.Mixture)
    tokens = vectors(8).reshape(-1, odd.WIDTH)
    chosen = (tokens[:, 0] > 0).long() + (tokens[:, 0] > 1).long()
    found = collect(module, 8)["input_moment"]["odd.up"]
    for k in range(3):
        rows = tokens[chosen == k]
        assert len(rows) > 1
        torch.testing.assert_close(found[k], rows.T @ rows / len(rows))


def test_an_expert_without_tokens_gets_the_mean_of_all_tokens_and_no_curvature():
    module = seeded(partial(odd.Mixture, experts=4))
    tokens = vectors(8).reshape(-1, odd.WIDTH)
    found = collect(module, 8)
    torch.testing.assert_close(found["input_moment"]["odd.up"][3], tokens.T @ tokens / len(tokens))
    torch.testing.assert_close(found["input_magnitude"]["odd.up"][3], tokens.abs().mean(0))
    assert not found["gradient_moment"]["odd.up"][3].any() and not found["fisher_diagonal"]["odd.up"][3].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_sequential_statistics_are_those_of_all_runs(network):
    """Nothing is quantized, so the inputs behind the quantized prefix are the full-precision ones."""
    module = seeded(NETWORKS[network])
    found, given = used(module), examples()
    groups = forward_order(module, found.layers, next(given.batches(1, CPU)))
    assert sorted(name for group in groups for name in group) == sorted(found.layers)
    size = 1 if found.alone else 4
    expected = collect(module, size, [INPUT_MOMENT])["input_moment"]
    for calls in (found.calls, None):
        network = Network(module, found.layers, find_blocks(module), calls)
        inputs = PrefixInputs(network, groups, given, size, CPU, [INPUT_MOMENT], network)
        for name in found.layers:
            torch.testing.assert_close(inputs.statistic(name, "input_moment"), expected[name])
            paired = inputs.paired(name)
            if paired is not None:  # tokens choose experts anew: those are not paired
                torch.testing.assert_close(paired.moments(centred=False).cross.float(), expected[name])


def test_names_of_weights_are_those_of_the_state_dict():
    for build in NETWORKS.values():
        module = seeded(build)
        for name, layer in used(module).layers.items():
            assert weight_to_matrix(layer).numel() == module.state_dict()[weight_key(name, layer)].numel()


def test_parts_without_a_gradient_have_no_fisher_and_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layer odd runs where no gradient is taken.*layers\.exclude"):
        collect(seeded(odd.WithoutGradient), 4)
    assert collect(seeded(odd.WithoutGradient), 4, [INPUT_MOMENT])["input_moment"]["odd"].any()


def test_an_input_that_a_batch_does_not_divide_is_refused_by_name():
    class Routed(odd.Plain):
        def body(self, x):
            chosen = x.reshape(-1, odd.WIDTH)
            return self.odd(chosen[1:]).mean(0).expand(x.shape)

    module = seeded(Routed)
    collector = Collector(module, quantizable_layers(module), STATISTICS, None, torch.Generator())
    with pytest.raises(ValueError, match=r"layer odd: an input of shape .* set calibration\.batch_size=1"):
        collector.add(next(examples().batches(8, "cpu")))


def test_a_layer_that_few_examples_reach_takes_part():
    found = used(seeded(odd.Rare))
    assert set(found.layers) == {"odd", "rare", "head"} and not found.unreached
    assert "rare" in found.alone and "rare" not in found.calls
