"""Which layers share a pass over the examples, and which examples give gradients; no number depends on it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_fisher import TinyConvNet, TinyEncoder, seeded
from tiny_sets import (
    COLLECTED,
    CPU,
    LENGTHS,
    STATISTICS,
    Counting,
    WithIdleLayers,
    images,
    in_memory,
    open_calibration,
    sentences,
)
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.passes import spread
from bayesq.calibration.statistic import families
from bayesq.fisher import FISHER_DIAGONAL, FISHER_EIGENVALUES, GRADIENT_MOMENT, GradientDirections
from bayesq.observer import Observer
from bayesq.quant.layers import quantizable_layers, weight_to_matrix


@pytest.fixture
def module() -> Counting:
    return seeded(Counting())


class Listening(Observer):
    def __init__(self) -> None:
        self.heard: list[tuple[int, int, int]] = []

    def batch_seen(self, batch: int, batches: int, examples: int) -> None:
        self.heard.append((batch, batches, examples))


@pytest.mark.parametrize(("room", "passes"), [(2**29, 1), (1, len(quantizable_layers(Counting())))])
def test_an_observer_hears_of_every_batch_of_every_pass(module, tmp_path, room, passes):
    """Nine examples in batches of two; a statistic that is in the cache takes no pass."""
    calibration, listening = open_calibration(module, tmp_path, images(9), room=room), Listening()
    calibration.observer = listening
    calibration.prepare([INPUT_MOMENT])
    assert listening.heard == [(i, 5, 1 if i == 5 else 2) for i in range(1, 6)] * passes
    calibration.prepare([INPUT_MOMENT])
    assert len(listening.heard) == 5 * passes == module.passes


@pytest.mark.parametrize(
    ("statistics", "inputs", "gradients"),
    [
        ([GradientDirections(16)], 0, 1),
        (COLLECTED, 1, 1),
        ([FISHER_EIGENVALUES], 1, 2),
    ],
)
@pytest.mark.parametrize("gradient_examples", [None, 2])
@pytest.mark.parametrize(("network", "examples"), [(TinyConvNet, images()), (TinyEncoder, sentences(9))])
def test_layers_whose_sums_do_not_fit_take_further_passes_and_keep_their_bits(
    statistics, inputs, gradients, gradient_examples, network, examples, tmp_path
):
    module = seeded(network(5))
    passes = []
    module.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = open_calibration(module, tmp_path / "whole", examples, samples=2, gradient_examples=gradient_examples)
    whole.prepare(statistics)
    passes.clear()
    parts = open_calibration(
        module, tmp_path / "parts", examples, room=1, samples=2, gradient_examples=gradient_examples
    )
    parts.prepare(statistics)
    # 3 batches, of which gradients may need one only; a pass for each layer's inputs and one for its gradients
    assert len(passes) == (3 * inputs + (3 if gradient_examples is None else 1) * gradients) * len(parts.layers)
    for kind in whole.statistics:
        for name in parts.layers:  # the same signs were drawn in every pass
            assert torch.equal(parts.statistic(name, kind), whole.statistic(name, kind)), (kind, name)


@pytest.mark.parametrize("own", [[INPUT_MAGNITUDE, INPUT_MOMENT], [GRADIENT_MOMENT, FISHER_DIAGONAL]])
def test_passes_hold_as_many_layers_as_fit(own, module, tmp_path):
    sizes = {
        name: 4 * sum(math.prod(statistic.shape(*weight_to_matrix(layer).shape)) for statistic in own)
        for name, layer in quantizable_layers(module).items()
    }
    room = sizes["grouped"] + sizes["head"]
    found = open_calibration(module, tmp_path, room=room).passes.plan(families(COLLECTED)[0])
    passes = [layers for layers, taken in found if taken == own]
    assert [name for layers in passes for name in layers] == list(sizes)
    sums = [sum(sizes[name] for name in layers) for layers in passes]
    assert 1 < len(passes) < len(sizes) and max(sums) <= room
    for layers, total in zip(passes[1:], sums, strict=False):  # the next layer had no room in the pass before
        assert total + sizes[next(iter(layers))] > room


def test_what_fits_takes_one_pass_with_inputs_and_gradients(module, tmp_path):
    found = open_calibration(module, tmp_path)
    ((layers, taken),) = found.passes.plan([INPUT_MOMENT, GRADIENT_MOMENT])
    assert list(layers) == list(found.layers) and taken == [INPUT_MOMENT, GRADIENT_MOMENT]


class Sometimes(TinyConvNet):
    """A layer of it runs for dark pictures only."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        return logits + self.dark(image.flatten(1)[:, :6]).sum() if bool((image < 0).all()) else logits


def test_a_layer_that_only_examples_without_gradients_reach_keeps_its_bits_in_passes_of_its_own(tmp_path):
    examples = images(4)
    examples.inputs["image"][0].abs_().neg_()  # the gradients come from the last of the batches
    found = [
        open_calibration(seeded(Sometimes()), tmp_path / str(room), examples, room, batch_size=1, gradient_examples=1)
        for room in (2**29, 1)
    ]
    for opened in found:
        opened.prepare([INPUT_MOMENT, GRADIENT_MOMENT])
        assert not opened.unseen and not opened.statistic("dark", "gradient_moment").any()
        assert torch.equal(opened.statistic("dark", "input_moment"), found[0].statistic("dark", "input_moment"))


@pytest.mark.parametrize("statistics", families(STATISTICS.values()))
def test_gradients_come_from_batches_spread_over_the_set_and_inputs_from_all(statistics, tmp_path):
    """Three of six sentences in batches of one: of the order by falling length, the second, the fourth, the sixth."""
    module, examples = seeded(TinyEncoder(3)), sentences()
    order = [int(batch.index) for batch in examples.batches(1, CPU)]
    chosen = torch.tensor(order[1::2])
    assert LENGTHS[order].tolist() == sorted(LENGTHS.tolist(), reverse=True)
    some = TensorExamples({k: v[chosen] for k, v in examples.inputs.items()}, examples.labels[chosen], LENGTHS[chosen])
    limited = open_calibration(module, tmp_path / "limited", examples, gradient_examples=3, batch_size=1)
    alone, whole = (
        open_calibration(module, tmp_path / folder, given, batch_size=1)
        for folder, given in (("alone", some), ("whole", examples))
    )
    for opened in (limited, alone, whole):
        opened.prepare(statistics)
    for kind in (statistic.name for statistic in statistics):
        if kind == "fisher_eigenvalues":  # A comes from all examples, and with it the basis
            continue
        for name in limited.layers:
            found, other = limited.statistic(name, kind), alone.statistic(name, kind)
            if kind.startswith("input"):
                assert torch.equal(found, whole.statistic(name, kind))
                other = found
            if kind == "gradient_directions":
                found, other = (x.flatten(1).T @ x.flatten(1) for x in (found, other))
            if kind != "gradient_basis":  # only unique where eigenvalues are
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
            if kind == "fisher_diagonal":
                assert not torch.allclose(found, whole.statistic(name, kind), rtol=1e-2)


@given(total=st.integers(1, 60), data=st.data())
def test_batches_are_spread_evenly(total, data):
    count = data.draw(st.integers(1, total))
    marks = spread(count, total)
    assert len(marks) == total and sum(marks) == count and marks[-1]
    ends = [i for i, mark in enumerate(marks) if mark]
    gaps = [b - a for a, b in itertools.pairwise([-1, *ends])]
    assert max(gaps) - min(gaps) <= 1


def test_batches_that_give_no_gradient_run_only_for_the_inputs(module, tmp_path):
    opened = open_calibration(module, tmp_path, images(9), gradient_examples=3)
    opened.prepare([GRADIENT_MOMENT])
    assert module.passes == 2  # of 5 batches
    opened.prepare([GRADIENT_MOMENT, INPUT_MOMENT])
    assert module.passes == 7


def test_more_examples_than_there_are_mean_all(module, tmp_path):
    every = [open_calibration(module, tmp_path, gradient_examples=n) for n in (None, 5, 100)]
    assert len({opened.path(GRADIENT_MOMENT) for opened in every}) == 1
    with pytest.raises(ValueError, match=r"posterior\.examples=0"):
        open_calibration(module, tmp_path, gradient_examples=0)


# ----------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("gradient_examples", [None, 2])
@pytest.mark.parametrize(("network", "examples"), [(TinyConvNet, images()), (TinyEncoder, sentences(9))])
def test_statistics_in_memory_are_those_on_disk(network, examples, gradient_examples, tmp_path):
    module = seeded(network(5))
    options = {"samples": 2, "seed": 3, "gradient_examples": gradient_examples, "draws": "labels"}
    opened = open_calibration(module, tmp_path, examples, **options)
    opened.prepare(STATISTICS.values())
    for room in (2**29, 1):
        found = in_memory(module, STATISTICS.values(), examples, room=room, **options)
        for name in found.layers:
            for kind in STATISTICS:
                # a file's tensors lie elsewhere in memory, and products may choose their order by that
                expected = opened.statistic(name, kind)
                size = 1e-6 * float(expected.abs().max())
                tensor = found.statistic(name, kind)
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=size, msg=f"{kind} of {name}")


class Narrow(TinyConvNet):
    """Runs out of memory with more than two images at a time."""

    def forward(self, image: Tensor) -> Tensor:
        if len(image) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


def test_out_of_memory_batches_are_split():
    found = in_memory(seeded(Narrow()), COLLECTED, images(8), batch_size=4)
    expected = in_memory(seeded(TinyConvNet()), COLLECTED, images(8))
    assert (found.out_of_memory(), expected.out_of_memory()) == (1, 0)
    for name in found.layers:
        for statistic in COLLECTED:
            assert torch.equal(found.statistic(name, statistic.name), expected.statistic(name, statistic.name))


def test_layers_out_of_reach_are_named():
    assert in_memory(seeded(WithIdleLayers()), [INPUT_MOMENT]).unseen == {"unused"}
