"""Writes the files beside this script: packed by the version before `bayesq.quant.codes`, read by test_old_files.py.

It runs with the code of that version alone (commit f65e455, where codes were fields of QuantizedTensor):

    git worktree add /tmp/before f65e455
    PYTHONPATH=/tmp/before python tests/quant/packed_before_codes/write.py

Each file holds layers of one kind. weights.safetensors holds what that version decoded, as FILE/LAYER, float32.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.suite.config import id_of
from bayesq.suite.packed import Packed, write_packed

FOLDER = Path(__file__).parent
CONFIG = {"bits": 3, "model": {"_target_": "bayesq.suite.models.resnet.SmallResNet", "name": "resnet"}}
random = np.random.default_rng(23)


def layer(rows: int, columns: int, widths: list[int], **options: Any) -> QuantizedTensor:
    width = np.resize(np.array(widths, dtype=np.uint8), rows)
    column_groups = -(-columns // (options.get("group_size") or columns))
    return QuantizedTensor(
        codes=torch.from_numpy(random.integers(0, 2 ** width.astype(int)[:, None], (rows, columns)).astype(np.uint8)),
        width=torch.from_numpy(width),
        scale=torch.from_numpy(random.uniform(0.01, 0.2, (rows, column_groups))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, column_groups)).astype(np.uint8)),
        **options,
    )


def book(name: str, levels: int) -> Codebook:
    return Codebook(name, torch.from_numpy(np.sort(random.normal(3, 3, levels))).half())


def column_scale(groups: int, channels: int) -> torch.Tensor:
    return torch.from_numpy(random.uniform(0.5, 2, (groups, channels))).half()


lloyd = {width: book(f"lloyd/{width}", 2**width) for width in (2, 3)}
trellis = {width: book(f"trellis/{width}", 2 ** (width + 1)) for width in (2, 3)}
FILES = {
    "affine": {
        "one_width": layer(5, 7, [3]),
        "mixed": layer(6, 5, [2, 3, 8, 4, 5, 6, 7]),
        "group_conv": layer(6, 9, [4], groups=3, column_scale=column_scale(3, 3)),
        "column_groups": layer(4, 10, [4, 3], group_size=4, column_scale=column_scale(1, 10)),
    },
    "shared_table": {
        "one_width": layer(4, 9, [3], codebooks={3: lloyd[3]}),
        "mixed": layer(7, 5, [2, 3, 6], groups=7, codebooks=lloyd),
        "column_groups": layer(3, 8, [2], group_size=3, codebooks={2: lloyd[2]}),
    },
    "trellis": {
        "tables": layer(12, 5, [3, 2, 5], trellis=64, codebooks=trellis),
        "uniform": layer(9, 4, [4], trellis=8),
        "group_conv": layer(12, 3, [2, 3], groups=2, trellis=256, codebooks={3: trellis[3]}),
    },
}

if __name__ == "__main__":
    run = {"run_id": id_of(CONFIG, "0"), "bayesq": "0", "config": CONFIG, "network": {"weights": "ab"}}
    weights = {}
    for name, tensors in FILES.items():
        parameters = {"norm.weight": torch.tensor([0.5, 1.5, 2.5]), "norm.count": torch.tensor(4)}
        write_packed(FOLDER / f"{name}.safetensors", Packed(tensors, parameters, run=run))
        weights |= {f"{name}/{key}": tensor.dequantize() for key, tensor in tensors.items()}
    save_file(weights, FOLDER / "weights.safetensors")
