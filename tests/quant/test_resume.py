"""Passes in step: what a meeting sees, and that no pass is left waiting when one fails."""

import signal

import pytest
import torch
from bayesq.quant.in_step import meet, run_in_step
from torch import Tensor, nn


class Steps(nn.Module):
    """x -> 2 x + 1, as often as asked, with a meeting after each.

    Attributes:
        begun, ended: passes.
        meetings: names, and the tensors as they came.
    """

    def __init__(self, on_meeting=lambda name, tensors: None) -> None:
        super().__init__()
        self.on_meeting, self.meetings = on_meeting, []
        self.begun = self.ended = 0

    def forward(self, x: Tensor, times: int = 2) -> None:
        self.begun += 1
        try:
            for k in range(times):
                x = 2 * x + 1
                meet(f"step {k}", x, lambda tensors, k=k: self.all_here(f"step {k}", tensors))
        finally:
            self.ended += 1

    def all_here(self, name: str, tensors: list[Tensor]) -> None:
        self.meetings.append((name, [x.clone() for x in tensors]))
        self.on_meeting(name, tensors)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_meeting_sees_all_batches_in_order(count):
    network = Steps()
    run_in_step(network, [{"x": torch.full((k + 1,), float(k))} for k in range(count)])
    assert [name for name, _ in network.meetings] == ["step 0", "step 1"]
    for times, (_, tensors) in enumerate(network.meetings, start=1):
        assert [len(x) for x in tensors] == list(range(1, count + 1))
        for k, x in enumerate(tensors):
            assert x.tolist() == [2.0**times * k + 2**times - 1] * (k + 1)
    assert network.ended == network.begun == count


@pytest.mark.parametrize("count", [1, 3])
def test_a_meeting_may_write_into_what_passes_go_on_with(count):
    def add(name: str, tensors: list[Tensor]) -> None:
        if name == "step 0":
            for x in tensors:
                x += 100

    network = Steps(add)
    run_in_step(network, [{"x": torch.zeros(1)}] * count)
    assert [x.item() for x in network.meetings[1][1]] == [203.0] * count


@pytest.mark.parametrize("count", [1, 3])
def test_there_are_no_gradients(count):
    network = Steps()
    run_in_step(network, [{"x": torch.ones(1, requires_grad=True)}] * count)
    assert not any(x.requires_grad for _, tensors in network.meetings for x in tensors)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("times", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 2), (2, 1, 1), (0, 1, 1)])
def test_batches_that_take_different_ways_are_refused(times):
    network = Steps()
    with pytest.raises(ValueError, match=r"step \d: not every batch calls it"):
        run_in_step(network, [{"x": torch.zeros(1), "times": count} for count in times])
    assert network.ended == network.begun == 3


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_in_one_pass_ends_all(place):
    network = Steps()
    batches = [{"x": torch.zeros(1)} for _ in range(3)]
    batches[place] = {"x": "no tensor"}
    with pytest.raises(TypeError, match="str"):
        run_in_step(network, batches)
    assert network.ended == network.begun == place + 1


def interrupt(name: str, _: list[Tensor]) -> None:
    signal.raise_signal(signal.SIGINT)


def fail(name: str, _: list[Tensor]) -> None:
    raise MemoryError(name)


@pytest.mark.parametrize(("on_meeting", "error"), [(fail, MemoryError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("count", [1, 3])
def test_an_error_in_a_meeting_ends_all(count, on_meeting, error):
    network = Steps(on_meeting)
    with pytest.raises(error):
        run_in_step(network, [{"x": torch.zeros(1)}] * count)
    assert [name for name, _ in network.meetings] == ["step 0"]
    assert network.ended == network.begun == count
