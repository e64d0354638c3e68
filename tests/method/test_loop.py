"""The loop that runs every method: what a method may read, when, and what it must return."""

from dataclasses import replace

import pytest
import torch

from bayesq.budget import Allocation, Budget
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Context, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.loop import quantize_layers
from bayesq.quant.grids import mse_grid, round_affine, zero_code
from bayesq.quant.tensor import QuantizedTensor
from bayesq.uniform import Uniform

COLUMNS = 6


def problem(name: str, rows: int = 4, seed: int = 0) -> LayerProblem:
    weight = torch.randn(1, rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return LayerProblem(name, "Linear", weight, lambda kind: torch.eye(COLUMNS)[None])


class Nearest:
    """The smallest method there is."""

    statistics: frozenset[Statistic] = frozenset()

    def prepare(self, layers, allocate, context):
        return allocate(layers)

    def quantize_layer(self, layer, width, context):
        check_finite(layer)
        weight = stack_groups(layer.weight).double()
        scale, zero = mse_grid(weight, width)
        codes, _ = round_affine(weight, scale, zero, width)
        return QuantizedTensor(codes.to(torch.uint8), width, scale[:, None].half(), zero_code(zero, width)[:, None])


class Prefix:
    """Notes what happens, and gives inputs that tell how many layers were replaced."""

    def __init__(self) -> None:
        self.replaced: list[str] = []

    def take(self, layer: LayerProblem) -> LayerProblem:
        moment = (1.0 + len(self.replaced)) * torch.eye(COLUMNS)[None]
        return replace(layer, weight=2 * layer.weight, prefix_statistic=lambda kind: moment)

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        self.replaced.append(layer.name)
        return replace(tensor, scale=2 * tensor.scale)


def run(method, layers=None, allocate=None, prefix=None):
    layers = layers or [problem("a"), problem("b", seed=1), problem("c", seed=2)]
    allocate = allocate or Allocation(Uniform(), Budget(3, "code"))
    return list(quantize_layers(method, layers, allocate, Context.of_seed(0), prefix))


def test_every_layer_is_rounded_once_in_order():
    assert [layer.name for layer, _ in run(Nearest())] == ["a", "b", "c"]


def test_behind_the_prefix_a_method_reads_inputs_behind_what_is_replaced_so_far_and_rounds_the_target():
    seen, targets = {}, {}

    class Reading(Nearest):
        statistics = frozenset({INPUT_MOMENT})

        def quantize_layer(self, layer, width, context):
            seen[layer.name] = float(layer.input_statistic("input_moment")[0, 0, 0])
            targets[layer.name] = layer.weight
            return super().quantize_layer(layer, width, context)

    prefix = Prefix()
    rounded = run(Reading(), prefix=prefix)
    assert seen == {"a": 1.0, "b": 2.0, "c": 3.0} and prefix.replaced == ["a", "b", "c"]
    for layer, tensor in rounded:  # what is stored is what the prefix made of the rounded target
        assert torch.equal(targets[layer.name], 2 * layer.weight)
        assert float((tensor.dequantize() - 4 * layer.weight).abs().max()) < float(layer.weight.abs().max())


def test_a_method_that_rounds_everything_in_prepare_cannot_read_prefix_inputs():
    class Early(Nearest):
        statistics = frozenset({INPUT_MOMENT})

        def prepare(self, layers, allocate, context):
            self.moments = [layer.input_statistic("input_moment") for layer in layers]
            return allocate(layers)

    with pytest.raises(ValueError, match="layer a: its inputs behind the quantized prefix can only"):
        run(Early(), prefix=Prefix())


def test_inputs_of_another_layer_cannot_be_read():
    class Peeking(Nearest):
        statistics = frozenset({INPUT_MOMENT})

        def prepare(self, layers, allocate, context):
            self.layers = layers
            return allocate(layers)

        def quantize_layer(self, layer, width, context):
            self.layers[2].input_statistic("input_moment")
            return super().quantize_layer(layer, width, context)

    with pytest.raises(ValueError, match="layer c: its inputs behind the quantized prefix"):
        run(Peeking(), prefix=Prefix())


@pytest.mark.parametrize("read", ["statistic", "input_statistic"])
def test_a_statistic_that_was_not_declared_cannot_be_read(read):
    """Nothing prepares it, though a file of another run may lie there."""

    class Undeclared(Nearest):
        def quantize_layer(self, layer, width, context):
            getattr(layer, read)("input_moment")
            return super().quantize_layer(layer, width, context)

    with pytest.raises(ValueError, match=r"Undeclared reads input_moment: add it to Undeclared\.statistics"):
        run(Undeclared())


def test_an_allocator_may_read_what_the_method_does_not():
    class ByMoment:
        statistics = frozenset({INPUT_MOMENT})

        def allocate(self, layers, budget, codebook_bits=0, distortion=None):
            assert all(layer.statistic("input_moment").shape == (1, COLUMNS, COLUMNS) for layer in layers)
            return Uniform().allocate(layers, budget, codebook_bits, distortion)

    assert len(run(Nearest(), allocate=Allocation(ByMoment(), Budget(3, "code")))) == 3


def test_allocate_takes_the_layers_it_is_given():
    class Halves(Nearest):
        def prepare(self, layers, allocate, context):
            first, rest = allocate(layers[:1]), allocate(layers[1:])
            assert set(first) == {"a"} and set(rest) == {"b", "c"}
            return {**first, **rest}

    tensors = {
        layer.name: tensor for layer, tensor in run(Halves(), allocate=Allocation(Uniform(), Budget(8, "stored")))
    }
    assert set(tensors) == {"a", "b", "c"}


WRONG_WIDTHS = {
    "none": lambda widths: None,
    "one missing": lambda widths: {name: width for name, width in widths.items() if name != "b"},
    "too few rows": lambda widths: {**widths, "b": widths["b"][:2]},
}


@pytest.mark.parametrize("widths", WRONG_WIDTHS.values(), ids=WRONG_WIDTHS.keys())
def test_widths_that_do_not_fit_are_refused_before_anything_is_rounded(widths):
    class Wrong(Nearest):
        def prepare(self, layers, allocate, context):
            return widths(allocate(layers))

        def quantize_layer(self, layer, width, context):
            raise AssertionError("rounded")

    with pytest.raises(ValueError, match=r"Wrong\.prepare"):
        run(Wrong())


def test_a_layer_without_a_result_is_refused():
    class Nothing(Nearest):
        def quantize_layer(self, layer, width, context):
            return None

    with pytest.raises(ValueError, match=r"layer a: Nothing\.quantize_layer returned NoneType"):
        run(Nothing())


def test_a_tensor_of_other_widths_than_prepared_is_refused():
    class Wider(Nearest):
        def quantize_layer(self, layer, width, context):
            return super().quantize_layer(layer, width + 1, context)

    with pytest.raises(Refused, match=r"layer a: Wider\.quantize_layer returned other row widths than Wider\.prepare"):
        run(Wider())


def test_a_defect_in_a_method_is_no_refusal():
    class Broken(Nearest):
        def quantize_layer(self, layer, width, context):
            raise ValueError("not enough values to unpack")

    with pytest.raises(ValueError, match="not enough values") as raised:
        run(Broken())
    assert not isinstance(raised.value, Refused)


def test_the_context_draws_the_same_from_the_same_seed():
    first, again, other = (torch.rand(3, generator=Context.of_seed(seed).generator) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("step", ["prepare", "quantize_layer"])
@pytest.mark.parametrize("prefix", [None, Prefix()])
def test_a_weight_that_was_changed_in_place_is_refused(step, prefix):
    class Halving(Nearest):
        def prepare(self, layers, allocate, context):
            if step == "prepare":
                layers[1].weight.mul_(0.5)
            return super().prepare(layers, allocate, context)

        def quantize_layer(self, layer, width, context):
            if layer.name == "b":
                layer.weight.mul_(0.5)
            return super().quantize_layer(layer, width, context)

    with pytest.raises(Refused, match=r"layer b: Halving changed its weight in place; work on a copy"):
        run(Halving(), prefix=prefix)


def test_weights_without_a_version_counter_are_rounded():
    with torch.inference_mode():
        layers = [problem("a")]
    assert layers[0].weight.is_inference() and len(run(Nearest(), layers)) == 1


def test_widths_that_were_changed_in_place_are_refused():
    class Widening(Nearest):
        def quantize_layer(self, layer, width, context):
            return super().quantize_layer(layer, width.fill_(8), context)

    with pytest.raises(Refused, match=r"layer a: Widening\.quantize_layer returned other row widths"):
        run(Widening())


def test_widths_above_the_budget_are_refused():
    class Wide(Nearest):
        def prepare(self, layers, allocate, context):
            return {layer.name: torch.full((layer.rows,), 8, dtype=torch.uint8) for layer in layers}

    layers = [problem("a"), problem("b", seed=1)]
    weights = sum(layer.weight.numel() for layer in layers)
    allocate, context = Allocation(Uniform(), Budget(3, "code")), Context.of_seed(0)
    with pytest.raises(
        Refused, match=r"Wide\.prepare: its widths take 8\.000 bits per weight, and the budget is 3\.000"
    ):
        list(quantize_layers(Wide(), layers, allocate, context, most_bits=3 * weights))
    assert len(list(quantize_layers(Wide(), layers, allocate, context, most_bits=8 * weights))) == 2
    assert len(list(quantize_layers(Nearest(), layers, allocate, context, most_bits=3 * weights))) == 2
