"""What checkpoint layouts of other tools have in common: affine codes of linear layers, with one width per layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes import EntropyCode
from bayesq.quant.grids import ZERO_BITS
from bayesq.quant.tensor import QuantizedTensor


class Layout(ABC):
    """A checkpoint layout of linear layers.

    Attributes:
        title: what the layout is called.
        shapes: which layers it holds, as the end of "Linear layers ...".
        file: name of a file that repeats the configuration; None: it is in config.json only.
    """

    title: ClassVar[str]
    shapes: ClassVar[str]
    file: ClassVar[str | None] = None

    @abstractmethod
    def fits(self, tensor: QuantizedTensor) -> bool:
        """Whether it holds a layer of this shape; other layers stay plain weights."""

    @abstractmethod
    def buffers(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """What takes the place of a layer's weight, by name.

        Raises:
            Refused: the layout cannot hold the layer; the text says why, and which settings it can.
        """

    @abstractmethod
    def config(self, tensors: Mapping[str, QuantizedTensor], layers: Sequence[str]) -> dict[str, Any]:
        """The entry quantization_config of config.json.

        Args:
            tensors: of the layers in the layout, by name.
            layers: names of all Linear layers.
        """


def words(values: np.ndarray, width: int) -> Tensor:
    """Unsigned integers [n, m] below 2**width as int32 words [ceil(n width / 32), m], one stream of bits per column.

    Value i takes the bits i width to i width + width - 1 of the stream; bit k of it is bit k mod 32 of word k // 32.
    """
    bits = (values[:, None, :] >> np.arange(width, dtype=np.uint8)[:, None]) & 1
    packed = np.packbits(bits.reshape(-1, values.shape[1]), axis=0, bitorder="little")
    packed = np.pad(packed, ((0, -len(packed) % 4), (0, 0)))
    parts = packed.reshape(-1, 4, values.shape[1]).astype(np.uint32)
    joined = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16 | parts[:, 3] << 24
    return torch.from_numpy(joined.view(np.int32).copy())


def whole_zeros(tensor: QuantizedTensor) -> np.ndarray:
    """Zero points uint8 [R, S] in levels, of a layer for which `obstacle` is None."""
    zero: np.ndarray = tensor.zero.numpy() >> (ZERO_BITS - int(tensor.width[0]))
    return zero


def obstacle(tensor: QuantizedTensor, allowed: Sequence[int]) -> str | None:
    """Why a layout for these widths cannot hold a linear layer's grid, and settings that avoid this; None if it can."""
    if isinstance(tensor.code, EntropyCode):
        return "its codes are entropy coded: choose method=gptq or method=rtn with codec=fixed"
    if not tensor.code.uniform:
        return "its levels are not uniform: choose method=gptq or method=rtn"
    if tensor.overlay is not None:
        return "some of its weights are in fp16 beside the codes: choose method=gptq or method=rtn"
    if tensor.rotation is not None:
        return "its codes are those of rotated weights: choose method=gptq or method=rtn with rotate=false"
    if tensor.column_scale is not None:
        return "it has scales for its inputs: choose method=gptq or method=rtn"
    widths = tensor.width.unique().tolist()
    if len(widths) > 1:
        different = f"its rows have different widths ({', '.join(map(str, widths))} bits)"
        return f"{different}: choose allocator=uniform with a whole number of bits"
    if widths[0] not in allowed:
        return f"it has {widths[0]} bits: choose bits={', '.join(map(str, allowed))}"
    if bool((tensor.zero % 2 ** (ZERO_BITS - widths[0]) != 0).any()):
        return "its zero points lie between levels: choose method=gptq or method=rtn with distill=false"
    return None
