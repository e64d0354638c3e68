"""The checkpoint layout of GPTQ tools for one linear layer of R outputs and C inputs, b bits, S column groups.

    qweight  int32 [C b / 32, R]   codes
    qzeros   int32 [S, R b / 32]   zero points; minus one in checkpoint_format "gptq", unchanged in "gptq_v2"
    scales   fp16  [S, R]
    g_idx    int32 [C]             column group of each input
    weight[r, c] = scales[g_idx[c], r] (code[c, r] - zero[g_idx[c], r])

Codes are packed along the inputs, zero points along the outputs, both as one stream of bits, least significant first:
code i takes the bits i b to i b + b - 1 of the stream, bit k of it is bit k mod 32 of word k // 32. For 3 bits a code
may lie across two words. Readers work on blocks of 32 codes, so C and R are multiples of 32.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bayesq
from bayesq.errors import Refused
from bayesq.quant.grids import ZERO_BITS
from bayesq.quant.tensor import QuantizedTensor

WIDTHS = (2, 3, 4, 8)
BLOCK = 32
# Checkpoint formats and what they subtract from the zero points.
FORMATS = {"gptq": 1, "gptq_v2": 0}


def words(values: np.ndarray, width: int) -> Tensor:
    """Unsigned integers [n, m] below 2**width as int32 words [n * width / 32, m]; n is a multiple of 32."""
    bits = (values[:, None, :] >> np.arange(width, dtype=np.uint8)[:, None]) & 1
    packed = np.packbits(bits.reshape(-1, values.shape[1]), axis=0, bitorder="little")
    parts = packed.reshape(-1, 4, values.shape[1]).astype(np.uint32)
    joined = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16 | parts[:, 3] << 24
    return torch.from_numpy(joined.view(np.int32).copy())


def obstacle(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a linear layer's grid, and settings that avoid this; None if it can.

    A zero point of 0 is no obstacle in itself, see `gptq_buffers`.
    """
    widths = tensor.width.unique().tolist()
    if len(widths) > 1:
        different = f"its rows have different widths ({', '.join(map(str, widths))} bits)"
        return f"{different}: choose allocator=uniform with a whole number of bits"
    if widths[0] not in WIDTHS:
        return f"it has {widths[0]} bits: choose bits={', '.join(map(str, WIDTHS))}"
    if not tensor.code.uniform:
        return "its levels are not uniform: choose method=gptq or method=rtn"
    if tensor.overlay is not None:
        return "some of its weights are in fp16 beside the codes: choose method=gptq or method=rtn"
    if tensor.rotation is not None:
        return "its codes are those of rotated weights: choose method=gptq or method=rtn"
    if tensor.column_scale is not None:
        return "it has scales for its inputs: choose method=gptq or method=rtn"
    if bool((tensor.zero % 2 ** (ZERO_BITS - widths[0]) != 0).any()):
        return "its zero points lie between levels: choose method=gptq or method=rtn with distill=false"
    return None


def fits_blocks(tensor: QuantizedTensor) -> bool:
    """Whether inputs and outputs come in whole blocks."""
    rows, columns = tensor.codes.shape
    return rows % BLOCK == 0 and columns % BLOCK == 0


def gptq_buffers(tensor: QuantizedTensor, checkpoint_format: str) -> dict[str, Tensor]:
    """The layout of one layer's codes, exactly; columns keep the layer's order, so that g_idx does not decrease.

    Args:
        checkpoint_format: a key of FORMATS.

    Raises:
        Refused: there is an `obstacle`, inputs or outputs do not come in whole blocks, or a zero point is 0, which
            the format "gptq" cannot tell from 2**width: readers differ in how they decode -1.
    """
    if reason := obstacle(tensor):
        raise Refused(reason)
    rows, columns = tensor.codes.shape
    if not fits_blocks(tensor):
        raise Refused(f"it has {columns} inputs and {rows} outputs, which are not both multiples of {BLOCK}")
    width = int(tensor.width[0])
    zero = tensor.zero.numpy() >> (ZERO_BITS - width)
    if FORMATS[checkpoint_format] and not zero.all():
        raise Refused("it has a zero point of 0, which the format gptq cannot hold: use --format gptq_v2")
    group = torch.arange(columns, dtype=torch.int32) // (tensor.group_size or columns)
    return {
        "qweight": words(tensor.codes.numpy().T, width),
        "qzeros": words(zero - np.uint8(FORMATS[checkpoint_format]), width).T.contiguous(),
        "scales": tensor.scale.T.contiguous(),
        "g_idx": group,
    }


def quantize_config(
    tensors: Mapping[str, QuantizedTensor], layers: Sequence[str], checkpoint_format: str
) -> dict[str, Any]:
    """Content of quantize_config.json.

    Args:
        tensors: of the layers in the layout, by name.
        layers: names of all Linear layers.
        checkpoint_format: a key of FORMATS.
    """
    widths = {name: int(tensor.width[0]) for name, tensor in tensors.items()}
    (bits, _), *_ = sorted(Counter(widths.values()).items(), key=lambda item: (-item[1], item[0]))
    plain: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in layers if name not in widths}
    others = {f"+:^{re.escape(name)}$": {"bits": width} for name, width in widths.items() if width != bits}
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "bits": bits,
        "group_size": next(iter(tensors.values())).group_size or -1,
        "desc_act": False,  # columns are stored in the layer's order, whatever order they were rounded in
        "sym": False,
        "lm_head": False,
        "true_sequential": False,
        "pack_dtype": "int32",
        "dynamic": {**plain, **others},
        "meta": {"quantizer": [f"bayesq:{bayesq.__version__}"]},
    }
