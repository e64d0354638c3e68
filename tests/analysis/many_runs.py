"""Many run folders from a few real ones: the same files with other methods, budgets, seeds and numbers."""

import csv
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

METHODS = ("rtn", "gptq", "awq", "gptaq", "qronos", "adaround", "brecq", "qtip", "lnq", "bayesq")
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0)


def vary(real: Sequence[Path], results: Path, count: int) -> None:
    """Write `count` run folders into `results`, each a real one with another method, budget, seed and other numbers."""
    places = product(range(count), enumerate(METHODS), BUDGETS)
    for number, (seed, (place, method), bits) in zip(range(count), places, strict=False):
        source, draw = real[place % len(real)], np.random.default_rng(number)
        folder = results / f"{number:012x}"
        (folder / ".hydra").mkdir(parents=True)
        result = json.loads((source / "result.json").read_text())
        for key, value in result.items():
            if isinstance(value, float) and key.startswith(("q/", "delta/", "time/")):
                result[key] = value * float(np.exp(0.01 * draw.standard_normal()))
        result |= {"run_id": folder.name, "method": method, "seed": seed, "bits/target": bits, "bits/code": bits}
        result |= {"bits/stored": bits + 0.0625, "q/kl_to_fp": float(4.0**-bits * np.exp(0.1 * draw.standard_normal()))}
        config = result["config"]
        config |= {"bits": bits, "seed": seed, "method": {**config["method"], "name": method}}
        (folder / "result.json").write_text(json.dumps(result))
        with (source / "layers.csv").open() as old, (folder / "layers.csv").open("w") as new:
            rows = list(csv.DictReader(old))
            writer = csv.DictWriter(new, list(rows[0]))
            writer.writeheader()
            writer.writerows(row | {"bits/code": bits + draw.uniform(-0.5, 0.5)} for row in rows)
        overrides = [f"model={result['model']}", f"dataset={result['dataset']}", f"method={method}", f"bits={bits:g}"]
        lines = [f"- {override}\n" for override in (*overrides, f"seed={seed}")]
        (folder / ".hydra/overrides.yaml").write_text("".join(lines))
