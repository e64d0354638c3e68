"""What only a run's packed file tells: the width of every row."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.loading import finished


def row_widths(path: Path) -> dict[str, np.ndarray]:
    """Bits per code of each row [R], by layer in forward order, from a run's quantized.safetensors.

    Raises:
        FileNotFoundError: there is no such file.
    """
    # torch takes seconds to import, and one page of ten needs it
    from safetensors import safe_open

    from bayesq.quant.packing import row_widths as widths_of
    from bayesq.tensor_file import HEADER_KEY

    if not path.is_file():
        raise FileNotFoundError(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        layers = json.loads(header["metadata"]["layers"])
        return {
            name: widths_of(file.get_tensor(f"{name}/width"), facts["shape"][0], facts["mixed"])
            for name, facts in layers.items()
        }


def width_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Share of each layer's rows at each width: workload, variant, bits, seed, position (forward order), width, share.

    Runs whose packed file is not at hand (read from W&B, or deleted) give no rows.
    """
    columns = ["workload", "variant", "bits", "seed", "position", "width", "share"]
    rows = []
    for _, run in finished(runs).iterrows():
        if not isinstance(run.get("path"), str | Path):
            continue
        try:
            by_layer = row_widths(Path(run["path"]) / "quantized.safetensors")
        except FileNotFoundError:
            continue
        for position, widths in enumerate(by_layer.values()):
            for width, count in zip(*np.unique(widths, return_counts=True), strict=True):
                labels = (run["workload"], run["variant"], run["bits/target"], run["seed"])
                rows.append((*labels, position, int(width), count / len(widths)))
    return pd.DataFrame(rows, columns=columns)
