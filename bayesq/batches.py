"""Batches of calibration examples, as the library reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch: `module(**inputs)` gives logits [b, classes].

    `labels` [b] lie on the device of the inputs. `index` [b] int64, on the CPU, holds each example's position
    in the split, because batches need not come in the split's order.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def split(self, size: int) -> Iterator["Batch"]:
        """The same examples in batches of at most `size`."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch({name: x[part] for name, x in self.inputs.items()}, self.labels[part], self.index[part])
