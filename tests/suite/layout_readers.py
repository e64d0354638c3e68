"""Naive readers of exported folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def codes_in(words: list[int], width: int, count: int) -> list[int]:
    """A stream of int32 words as one number, least significant word first, cut into codes of `width` bits."""
    stream = sum((word % 2**32) << (32 * k) for k, word in enumerate(words))
    return [(stream >> (width * i)) % 2**width for i in range(count)]


def read_gptq(folder: Path) -> dict[str, Tensor]:
    """A state dict as the format's documentation has it read, one number after the other, weights rounded to fp16."""
    said = json.loads((folder / "quantize_config.json").read_text())
    assert (said["quant_method"], said["desc_act"], said["pack_dtype"]) == ("gptq", False, "int32")
    tensors = load_file(folder / "model.safetensors")
    found = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        width = said["dynamic"].get(f"+:^{name.replace('.', chr(92) + '.')}$", {}).get("bits", said["bits"])
        qweight, qzeros, scales, g_idx = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))
        inputs, outputs = len(g_idx), qweight.shape[1]
        assert qweight.dtype == qzeros.dtype == g_idx.dtype == torch.int32 and scales.dtype == torch.float16
        size = inputs if said["group_size"] == -1 else said["group_size"]
        assert g_idx.tolist() == [c // size for c in range(inputs)]
        plus = {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]
        zeros = [[z + plus for z in codes_in(row, width, outputs)] for row in qzeros.tolist()]
        weight = torch.empty(outputs, inputs, dtype=torch.float64)
        for r, column in enumerate(qweight.T.tolist()):
            for c, code in enumerate(codes_in(column, width, inputs)):
                g = int(g_idx[c])
                weight[r, c] = float(scales[g, r]) * (code - zeros[g][r])
        assert f"{name}.weight" not in found
        found[f"{name}.weight"] = weight.half()
    return found
