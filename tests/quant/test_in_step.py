"""Passes in step: what a meeting sees, and that no pass is left waiting when one fails."""

import signal
import threading

import pytest
import torch
from torch import Tensor, nn

from bayesq.quant.in_step import InStep


class Steps(nn.Module):
    """x -> 2 x + 1 -> 2 x + 1, as often as asked; every call is a meeting."""

    def __init__(self, meet=lambda name, x: None) -> None:
        super().__init__()
        self.meet, self.running, self.most = meet, 0, 0

    def forward(self, x: Tensor, times: int = 2) -> None:
        for k in range(times):
            self.running += 1
            self.most = max(self.most, self.running)
            x = 2 * x + 1
            self.running -= 1
            self.meet(f"step {k}", x)


def together(batches, on_meeting=lambda name, tensors: None):
    """Run them; the meetings (name, tensors as they came) and the network."""
    step, meetings = InStep(batches), []

    def all_here(name: str, tensors: list[Tensor]) -> None:
        meetings.append((name, [x.clone() for x in tensors]))
        on_meeting(name, tensors)

    network = Steps(lambda name, x: step.meet(name, x, lambda tensors: all_here(name, tensors)))
    step.run(network)
    return meetings, network


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_meeting_sees_all_batches_in_order(count):
    batches = [{"x": torch.full((k + 1,), float(k))} for k in range(count)]
    before = threading.active_count()
    meetings, network = together(batches)
    assert [name for name, _ in meetings] == ["step 0", "step 1"]
    for times, (_, tensors) in enumerate(meetings, start=1):
        assert [len(x) for x in tensors] == list(range(1, count + 1))
        for k, x in enumerate(tensors):
            assert x.tolist() == [2.0**times * k + 2**times - 1] * (k + 1)
    assert network.most == 1 and threading.active_count() == before


@pytest.mark.parametrize("count", [1, 3])
def test_a_meeting_may_write_into_what_passes_go_on_with(count):
    def add(name: str, tensors: list[Tensor]) -> None:
        if name == "step 0":
            for x in tensors:
                x += 100

    meetings, _ = together([{"x": torch.zeros(1)}] * count, add)
    assert [x.item() for x in meetings[1][1]] == [203.0] * count


@pytest.mark.parametrize("count", [1, 3])
def test_there_are_no_gradients(count):
    x = torch.ones(1, requires_grad=True)
    meetings, _ = together([{"x": x}] * count)
    assert not any(tensor.requires_grad for _, tensors in meetings for tensor in tensors)


@pytest.mark.parametrize("times", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 2), (2, 1, 1), (0, 1, 1)])
def test_batches_that_take_different_ways_are_refused(times):
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"step \d: not every batch calls it"):
        together([{"x": torch.zeros(1), "times": count} for count in times])
    assert threading.active_count() == before


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_in_one_pass_ends_all(place):
    before = threading.active_count()
    batches = [{"x": torch.zeros(1)} for _ in range(3)]
    batches[place] = {"x": "no tensor"}
    with pytest.raises(TypeError, match="str"):
        together(batches)
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_in_a_meeting_ends_all(count):
    before = threading.active_count()

    def fail(name: str, _: list[Tensor]) -> None:
        raise MemoryError(name)

    with pytest.raises(MemoryError, match="step 0"):
        together([{"x": torch.zeros(1)}] * count, fail)
    assert threading.active_count() == before


def test_ctrl_c_ends_all():
    before, seen = threading.active_count(), []

    def interrupt(name: str, _: list[Tensor]) -> None:
        seen.append(name)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait(0.2)  # the main thread takes it meanwhile

    with pytest.raises(KeyboardInterrupt):
        together([{"x": torch.zeros(1)}] * 3, interrupt)
    assert seen == ["step 0"] and threading.active_count() == before
