"""Forward passes of one network over several batches that wait for each other at chosen modules.

What a hook sees there is then the tensors of all batches at once, as if they had gone through the network as one; but
sequences need no padding beyond the longest of their own batch, and between two meetings only one batch's intermediate
activations exist. Modules call one another, so a pass cannot be left half-way and resumed unless it has a thread of
its own. The threads hand the work on in turn: no two run at the same time, and the order never varies.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Semaphore, Thread, get_ident

import torch
from torch import Tensor, nn


class _Left(BaseException):
    """Ends a pass whose companions cannot go on; not an Exception, lest the network catch it."""


class InStep:
    """Passes over `batches`, in step; hooks call `meet`.

    Args:
        batches: module arguments of each batch, at least one.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        self._turn = [Semaphore(0) for _ in batches]
        self._place: dict[int, int] = {}  # of each thread
        self._waiting: list[tuple[str, Tensor]] = []
        self._error: BaseException | None = None
        self._done = Semaphore(0)

    def meet(self, name: str, x: Tensor, together: Callable[[list[Tensor]], None]) -> None:
        """Wait until every pass has come here, then go on in turn.

        Args:
            name: where; the same for all.
            x: this pass's tensor.
            together: called once with the tensors of all passes, in the order of the batches; may write into them.

        Raises:
            ValueError: the batches take different ways through the network.
        """
        place = self._place[get_ident()]
        self._waiting.append((name, x))
        if place == len(self.batches) - 1:
            names, tensors = zip(*self._waiting, strict=True)
            self._waiting.clear()
            if names != (name,) * len(self.batches):
                raise ValueError(f"{name}: not every batch calls it, or not in the same order")
            together(list(tensors))
        if len(self.batches) > 1:
            self._hand_on(place)
            self._turn[place].acquire()
            if self._error is not None:
                raise _Left

    @torch.no_grad()
    def run(self, module: nn.Module) -> None:
        """Take every batch through the module, without gradients.

        Raises:
            Whatever a pass or a meeting raises; the other passes end there.
        """
        if len(self.batches) == 1:
            self._place[get_ident()] = 0
            module(**self.batches[0])
            return
        threads = [Thread(target=self._one, args=(module, place), daemon=True) for place in range(len(self.batches))]
        for thread in threads:
            thread.start()
        self._turn[0].release()
        try:
            self._done.acquire()
        except BaseException as error:  # a signal finds the main thread here
            self._fail(error)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    @torch.no_grad()  # what a thread inherits from no other
    def _one(self, module: nn.Module, place: int) -> None:
        self._place[get_ident()] = place
        self._turn[place].acquire()
        with suppress(_Left):
            try:
                if self._error is not None:
                    raise _Left
                module(**self.batches[place])
                if place < len(self.batches) - 1:
                    self._hand_on(place)
                elif self._waiting:
                    raise ValueError(f"{self._waiting[0][0]}: not every batch calls it, or not in the same order")
                else:
                    self._done.release()
            except Exception as error:
                self._fail(error)

    def _hand_on(self, place: int) -> None:
        self._turn[(place + 1) % len(self.batches)].release()

    def _fail(self, error: BaseException) -> None:
        """End all passes: those that wait, at once, the one that runs when it next waits."""
        if self._error is None:
            self._error = error
        for waiting in (*self._turn, self._done):
            waiting.release()
