"""Forward passes of one network over several batches that wait for each other at chosen modules.

What a hook sees there is then the tensors of all batches at once, as if they had gone through the network as one. But
sequences need no padding beyond the longest of their own batch, and between two meetings only one small batch's
intermediate activations exist.

Modules call one another, so a pass that is left half-way keeps a stack of its own: a greenlet's. (Threads would do, but
each starts its own pool of workers, and all of them compete.)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn


def meet(name: str, x: Tensor, together: Callable[[list[Tensor]], None]) -> None:
    """Called by hooks in a pass of `run_in_step`: wait until every pass has come here, then go on in turn.

    Args:
        name: where; the same for all.
        x: this pass's tensor.
        together: called once with the tensors of all passes, in the order of the batches; may write into them.
    """
    passes = getcurrent().parent
    assert passes is not None
    passes.switch((name, x, together))


@torch.no_grad()
def run_in_step(module: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Take all batches through a network without gradients, in step wherever its hooks call `meet`.

    Args:
        module: called with each batch's tensors as arguments.
        batches: one at least.

    Raises:
        ValueError: the batches take different ways through the network.
    """

    def go(batch: Mapping[str, Tensor]) -> None:
        module(**batch)

    passes = [greenlet(go) for _ in batches]
    try:
        # An error in a pass is raised here, as if it had been called.
        met = [one.switch(batch) for one, batch in zip(passes, batches, strict=True)]
        while any(met):
            name = next(at for at in met if at)[0]
            if any(at is None or at[0] != name for at in met):
                raise ValueError(f"{name}: not every batch calls it, or not in the same order")
            met[0][2]([x for _, x, _ in met])
            del met  # what the passes have handed over is theirs again
            met = [one.switch() for one in passes]
    finally:
        for one in passes:
            one.throw()  # those that wait end now, and let go of their activations
