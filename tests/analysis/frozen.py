"""Results frozen in code: run folders whose numbers never change, small enough to check by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.methods import default_of
from bayesq.suite.results import write_csv, write_json

STAGES = ("calibrate", "posterior", "quantize", "distill")
EXAMPLES = 40
# of EXAMPLES, how many each method gets right at 3, 3.5 and 4 bits; every seed loses one more
CORRECT = {"rtn": (20, 24, 30), "gptq": (26, 30, 33), "awq": (25, 29, 33), "bayesq": (38, 36, 34)}
KL = {"rtn": 0.4, "gptq": 0.2, "awq": 0.3, "bayesq": 0.05}
BUDGETS = (3.0, 3.5, 4.0)


def config(method: str, bits: float, seed: int, model: str, dataset: str, **changes: Any) -> dict[str, Any]:
    """As much of a configuration as tells runs apart; `changes` with dots in their names written as `__`."""
    content: dict[str, Any] = {
        "model": {"name": model, "tasks": ["image classification"]},
        "dataset": {"name": dataset, "tasks": ["image classification"]},
        "method": {"name": method, **({"uses_posterior": True} if method == "bayesq" else {})},
        "posterior": {"name": "kfac"},
        "allocator": "knapsack" if method == "bayesq" else "uniform",
        "bits": bits,
        "seed": seed,
        "calibration": {"examples": 256},
        **({} if "method__sequential" in changes else {"inputs": default_of(method, "inputs")}),
        "correction": default_of(method, "correction"),
        "rotate": method == "bayesq",
        "distill": False,
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return content


def started(folder: Path, overrides: list[str], content: dict[str, Any]) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(content))


def add(
    results: Path,
    method: str,
    bits: float,
    seed: int,
    correct: int | None = None,
    kl: float | None = None,
    seconds: tuple[float, float, float, float] = (1.0, 0.0, 1.0, 0.0),
    name: str | None = None,
    model: str = "resnet",
    dataset: str = "digits",
    error: str | None = None,
    memory: float = 2**30,
    metrics: dict[str, tuple[float, float]] | None = None,
    process: str | None = "",
    **changes: Any,
) -> Path:
    """One run; returns its folder.

    Args:
        correct: so many of EXAMPLES, the first ones of them.
        error: of a run that has failed.
        metrics: full-precision and quantized value of each metric of the task, in place of the accuracy; such a run
            has no predictions.
        process: that made the run; one of its own unless named, None of versions that did not record it.
        changes: of the configuration.
    """
    correct = CORRECT[method][BUDGETS.index(bits)] - seed if correct is None else correct
    kl = KL[method] * 4 ** (3 - bits) * (1 + seed / 10) if kl is None else kl
    content = config(method, bits, seed, model, dataset, **changes)
    marks = "".join(f"-{key}-{value}" for key, value in changes.items())
    folder = results / (name or f"{model}-{dataset}-{method}-{bits:g}-{seed}{marks}")
    overrides = [f"model={model}", f"dataset={dataset}", f"method={method}"]
    overrides += [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    started(folder, [*overrides, f"bits={bits:g}", f"seed={seed}"], content)
    if error is not None:
        write_json(folder / "status.json", {"status": "failed", "error": error, "overrides": overrides})
        return folder
    rows = predictions_of(method, correct, kl)
    result = {
        **result_of(content, metrics or {"accuracy": (1.0, correct / EXAMPLES)}),
        "run_id": folder.name,
        "q/kl_to_fp": float(np.mean([row["kl"] for row in rows])),
        "memory/peak_rss_bytes": memory,
        **({} if process is None else {"memory/process": process or folder.name}),
        **{f"time/{stage}_s": value for stage, value in zip(STAGES, seconds, strict=True)},
    }
    layer = {"name": "stem", "bits/code": bits, "bits/stored": bits + 0.125, "achieved_risk": None}
    write_csv(folder / "layers.csv", [layer])
    if not metrics:
        write_csv(folder / "predictions.csv", rows)
    write_json(folder / "result.json", result)
    return folder


def result_of(content: dict[str, Any], metrics: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """What a result has of its configuration and its metrics, full-precision and quantized."""
    result: dict[str, Any] = {axis: content[axis]["name"] for axis in ("model", "dataset", "method")}
    result |= {
        "status": "finished",
        "seed": content["seed"],
        "primary_metric": next(iter(metrics)),
        "bits/target": content["bits"],
        "bits/code": content["bits"],
        "bits/stored": content["bits"] + 0.125,
        "calibration/examples": content["calibration"]["examples"],
        "evaluation/examples": EXAMPLES,
        "config": content,
        "wandb/error": None,
    }
    for metric, (fp, q) in metrics.items():
        result |= {f"fp/{metric}": fp, f"q/{metric}": q, f"delta/{metric}": q - fp, f"delta/{metric}/ci95": [-1, 1]}
    return result


def predictions_of(method: str, correct: int, kl: float) -> list[dict[str, Any]]:
    """Rows of predictions.csv whose mean KL is `kl`, the first ones correct."""
    rows: list[dict[str, Any]] = []
    for i in range(EXAMPLES):
        label = i % 2
        place = EXAMPLES - i if method == "bayesq" else i + 1
        rows.append({"label": label, "fp_prediction": label, "q_prediction": label if i < correct else 1 - label})
        own = kl * 2 * place / (EXAMPLES + 1)
        rows[-1] |= {"fp_correct": 1, "q_correct": int(i < correct), "kl": own, "id": f"e{i}"}
    return rows


def add_main(results: Path, **options: Any) -> None:
    """Four methods, three budgets, two seeds."""
    for method in CORRECT:
        for bits in BUDGETS:
            for seed in (0, 1):
                add(results, method, bits, seed, **options)


def add_glue(results: Path) -> None:
    """Two tasks by two methods; RTN has only one of them."""
    tasks = {"mrpc": ("accuracy", "f1"), "cola": ("matthews",)}
    scores = {"gptq": 0.5, "bayesq": 0.75, "rtn": 0.25}
    for method, score in scores.items():
        for task, names in tasks.items():
            if (method, task) == ("rtn", "cola"):
                continue
            for seed in (0, 1):
                own = {name: (0.9, score + place / 10 + seed / 100) for place, name in enumerate(names)}
                options = {"dataset__task": task, "dataset__tasks": ["text classification"]}
                add(results, method, 3.0, seed, model="bert", dataset="glue", metrics=own, **options)


def add_ablation(results: Path) -> None:
    """What is switched from the full method at 3 bits."""
    for seed in (0, 1):
        add(results, "bayesq", 3.0, seed, 38 - 4, 0.08, (1.0, 1.0, 2.0, 0.0), allocator="uniform")
        add(results, "bayesq", 3.0, seed, 38 - seed, 0.04, (1.0, 1.0, 2.0, 8.0), distill=True)
        add(results, "bayesq", 3.0, seed, 20, 0.5, calibration__examples=16)
