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
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import bayesq
from bayesq.errors import Refused
from bayesq.quant.layout import Layout, obstacle, whole_zeros, words
from bayesq.quant.tensor import QuantizedTensor

WIDTHS = (2, 3, 4, 8)
BLOCK = 32
# Checkpoint formats and what they subtract from the zero points.
FORMATS = {"gptq": 1, "gptq_v2": 0}
# Name of the output layer in language models of transformers.
HEAD = "lm_head"


@dataclass(frozen=True)
class GPTQLayout(Layout):
    """The layout of GPTQ tools.

    Attributes:
        checkpoint_format: a key of FORMATS.
    """

    checkpoint_format: str = "gptq"
    title: ClassVar[str] = "GPTQ"
    shapes: ClassVar[str] = f"whose inputs and outputs are multiples of {BLOCK}"
    file: ClassVar[str | None] = "quantize_config.json"

    def fits(self, tensor: QuantizedTensor) -> bool:
        """Whether inputs and outputs come in whole blocks."""
        rows, columns = tensor.codes.shape
        return rows % BLOCK == 0 and columns % BLOCK == 0

    def buffers(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """One layer's codes, exactly; columns keep the layer's order, so that g_idx does not decrease.

        Raises:
            Refused: there is an `obstacle`, inputs or outputs do not come in whole blocks, or a zero point is 0, which
                the format "gptq" cannot tell from 2**width: readers differ in how they decode -1.
        """
        if reason := obstacle(tensor, WIDTHS):
            raise Refused(reason)
        rows, columns = tensor.codes.shape
        if not self.fits(tensor):
            raise Refused(f"it has {columns} inputs and {rows} outputs, which are not both multiples of {BLOCK}")
        width, zero, less = int(tensor.width[0]), whole_zeros(tensor), FORMATS[self.checkpoint_format]
        if less and not zero.all():
            raise Refused("it has a zero point of 0, which the format gptq cannot hold: use --format gptq_v2")
        return {
            "qweight": words(tensor.codes.numpy().T, width),
            "qzeros": words(zero - np.uint8(less), width).T.contiguous(),
            "scales": tensor.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (tensor.group_size or columns),
        }

    def config(self, tensors: Mapping[str, QuantizedTensor], layers: Sequence[str]) -> dict[str, Any]:
        """Content of quantize_config.json.

        `dynamic` is what GPTQModel reads of layers that differ, `modules_in_block_to_quantize` what transformers and
        vLLM read of layers that are plain.
        """
        widths = {name: int(tensor.width[0]) for name, tensor in tensors.items()}
        (bits, _), *_ = sorted(Counter(widths.values()).items(), key=lambda item: (-item[1], item[0]))
        plain: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in layers if name not in widths}
        others = {f"+:^{re.escape(name)}$": {"bits": width} for name, width in widths.items() if width != bits}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "bits": bits,
            "group_size": next(iter(tensors.values())).group_size or -1,
            "desc_act": False,  # columns are stored in the layer's order, whatever order they were rounded in
            "sym": False,
            "lm_head": HEAD in tensors,
            "true_sequential": False,
            "pack_dtype": "int32",
            "modules_in_block_to_quantize": [list(tensors)],
            "dynamic": {**plain, **others},
            "meta": {"quantizer": [f"bayesq:{bayesq.__version__}"]},
        }
