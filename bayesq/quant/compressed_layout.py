"""The layout pack-quantized of compressed-tensors, for a linear layer of R outputs, C inputs, b bits, S column groups.

    weight_packed      int32 [R, ceil(C b / 32)]   codes, one stream of bits per row
    weight_scale       float [R, S]
    weight_zero_point  int32 [ceil(R b / 32), S]   zero points, one stream of bits per column group
    weight_shape       int64 [2]                   R, C
    weight[r, c] = weight_scale[r, s] (code[r, c] - zero[r, s]),   s the column group of c

Readers subtract 2**(b - 1) from codes and zero points alike, which changes no weight. Without zero points, all of them
are 2**(b - 1). Streams are those of `words`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.grids import ZERO_BITS
from bayesq.quant.layout import Layout, obstacle, whole_zeros, words
from bayesq.quant.tensor import QuantizedTensor

# For other widths, the stream depends on the version of the package.
WIDTHS = (4, 8)
# The zero point 2**(b - 1) as QuantizedTensor stores it, for every b.
MIDDLE = 2 ** (ZERO_BITS - 1)


@dataclass(frozen=True)
class CompressedLayout(Layout):
    """The layout of compressed-tensors.

    Attributes:
        symmetric: every zero point is 2**(b - 1), and none is written.
        dtype: of the scales, float16 or float32; readers compute the weights in it, so float32 gives them exactly.
    """

    symmetric: bool = False
    dtype: str = "float16"
    title: ClassVar[str] = "compressed-tensors"
    shapes: ClassVar[str] = "whose inputs come in whole groups of method.group_size"

    @classmethod
    def of(cls, tensors: Iterable[QuantizedTensor], dtype: str) -> Self:
        """The layout for these layers, without zero points if all of them are in the middle."""
        return cls(all(bool((tensor.zero == MIDDLE).all()) for tensor in tensors), dtype)

    def fits(self, tensor: QuantizedTensor) -> bool:
        """Whether the inputs come in whole groups."""
        return tensor.codes.shape[1] % (tensor.group_size or 1) == 0

    def buffers(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """One layer's codes, exactly.

        Raises:
            Refused: there is an `obstacle`, or the inputs do not come in whole groups.
        """
        if reason := obstacle(tensor, WIDTHS):
            raise Refused(reason)
        if not self.fits(tensor):
            raise Refused(f"its {tensor.codes.shape[1]} inputs do not come in whole groups of {tensor.group_size}")
        width = int(tensor.width[0])
        zero = {} if self.symmetric else {"weight_zero_point": words(whole_zeros(tensor), width)}
        return {
            "weight_packed": words(tensor.codes.numpy().T, width).T.contiguous(),
            "weight_scale": tensor.scale.to(getattr(torch, self.dtype)),
            "weight_shape": torch.tensor(tensor.codes.shape),
            **zero,
        }

    def config(self, tensors: Mapping[str, QuantizedTensor], layers: Sequence[str]) -> dict[str, Any]:
        """One group of layers for each width; `ignore` lists the plain ones."""
        widths: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            widths.setdefault(int(tensor.width[0]), []).append(name)
        group_size = next(iter(tensors.values())).group_size
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{k}": {
                    "targets": ["Linear"] if len(widths) == 1 else names,
                    "weights": {
                        "num_bits": width,
                        "type": "int",
                        "symmetric": self.symmetric,
                        "strategy": "channel" if group_size is None else "group",
                        "group_size": group_size,
                        "dynamic": False,
                    },
                }
                for k, (width, names) in enumerate(sorted(widths.items()))
            },
            "ignore": [name for name in layers if name not in tensors],
        }
