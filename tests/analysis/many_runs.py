"""Many run folders from a few real ones: the same files with other budgets, seeds, methods and numbers."""

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

METHODS = ("rtn", "gptq", "awq", "gptaq", "qronos", "adaround", "brecq", "qtip", "lnq", "bayesq")
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0)


def vary(real: Sequence[Path], results: Path, count: int) -> None:
    """Write `count` run folders into `results`, each a real one with another method, budget, seed and other numbers."""
    places = product(range(count), METHODS, BUDGETS)
    for number, (seed, method, bits) in zip(range(count), places, strict=False):
        source, draw = real[number % len(real)], np.random.default_rng(number)
        folder = results / f"{number:012x}"
        folder.mkdir(parents=True)
        result = json.loads((source / "result.json").read_text())
        result |= {"run_id": folder.name, "method": method, "seed": seed, "bits/target": bits, "bits/code": bits}
        result |= {"bits/stored": bits + 0.0625, "q/kl_to_fp": float(4.0**-bits * np.exp(0.1 * draw.standard_normal()))}
        result["q/accuracy"] = result["fp/accuracy"] - 0.01 * float(draw.random())
        config = result["config"]
        config |= {"bits": bits, "seed": seed, "method": {**config["method"], "name": method}}
        (folder / "result.json").write_text(json.dumps(result))
        layers = pd.read_csv(source / "layers.csv")
        layers["bits/code"] = bits + draw.uniform(-0.5, 0.5, len(layers))
        layers.to_csv(folder / "layers.csv", index=False)
        shutil.copytree(source / ".hydra", folder / ".hydra")
        overrides = [f"model={result['model']}", f"dataset={result['dataset']}", f"method={method}", f"bits={bits:g}"]
        (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump([*overrides, f"seed={seed}"]))
