"""Signals that a library makes another error of, or drops."""

import signal
from collections.abc import Iterator
from typing import NoReturn

import pytest

from bayesq.suite import cli
from bayesq.suite.cli import Terminated, stop_if_asked, stoppable

KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """SIGINT as a terminal's programs have it: what runs in a shell's background is started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def library(number: signal.Signals) -> NoReturn:
    """Calls back into Python, where a signal arrives, and makes an error of its own of the exception."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None
    pytest.fail("the signal was not heeded")


@pytest.mark.parametrize("number", list(KINDS))
def test_a_signal_that_became_another_error_is_not_lost(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, stoppable():
        with pytest.raises(ValueError, match="shape"):
            library(number)
        stop_if_asked()
        pytest.fail("nothing was raised")
    assert caught.type is KINDS[number]


def test_nothing_is_raised_unless_asked_for() -> None:
    with stoppable():
        stop_if_asked()
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGINT)
    stop_if_asked()  # what an earlier command was asked for is over


def test_handlers_are_put_back_and_a_second_signal_has_its_usual_effect() -> None:
    before = {number: signal.getsignal(number) for number in KINDS}
    with stoppable():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            with pytest.raises(KINDS[number]):
                signal.raise_signal(number)
            assert signal.getsignal(number) is usual
    assert {number: signal.getsignal(number) for number in KINDS} == before


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGINT)
            stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", ["preflight", "_run"])
@pytest.mark.parametrize("error", [ValueError("what a library made of it"), None])
def test_a_command_ends_as_stopped_whatever_became_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str, error: Exception | None
) -> None:
    def interrupted(_: object) -> None:
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        if error is not None:
            raise error

    monkeypatch.setattr(cli, "preflight", lambda _: None)
    monkeypatch.setattr(cli, "_run", lambda _: 0)
    monkeypatch.setattr(cli, step, interrupted)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == cli.TERMINATED
    assert capsys.readouterr().err == "terminated: the same command continues with what is not finished\n"
