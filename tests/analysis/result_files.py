"""A small results folder as runs leave it, made by code: the numbers are invented, the files are whole."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.methods import default_of
from bayesq.suite.results import write_csv, write_json

EXAMPLES = 60
LAYERS = 4
# (model, data set, task): what the README's figure shows
WORKLOADS = (
    ("minilm", "movie_snippets", None),
    ("cifar_resnet56", "cifar10", None),
    ("efficientnet_lite0", "imagenet", None),
    ("minilm", "glue", "sst2"),
    ("minilm", "glue", "mrpc"),
)
# KL at 3 bits
LOSSES = {"rtn": 0.5, "gptq": 0.08, "awq": 0.3, "bayesq": 0.02}


def add_run(
    folder: Path,
    model: str = "resnet",
    dataset: str = "digits",
    task: str | None = None,
    method: str = "bayesq",
    bits: float = 3.0,
    seed: int = 0,
    kl: float | None = None,
    failed: str | None = None,
    ablation: str | None = None,
    examples: int = 256,
    options: Sequence[str] = (),
    run_id: str | None = None,
) -> Path:
    """Write the files of one run; returns its folder.

    Args:
        kl: of the run; None = invented.
        failed: the error of a run that has no result.
        options: overrides of the method, such as `sequential=false`.
    """
    name = (
        run_id or f"{model[:4]}{(task or dataset)[:4]}{method}{bits:g}s{seed}{ablation or ''}{examples}{len(options)}"
    )
    path = folder / name
    overrides = [f"model={model}", f"dataset={dataset}", *([f"dataset.task={task}"] if task else [])]
    overrides += [f"ablation={ablation}"] if ablation else []
    overrides += [f"method={method}", *(f"method.{option}" for option in options), f"bits={bits:g}", f"seed={seed}"]
    overrides += [f"calibration.examples={examples}"] if examples != 256 else []
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
    settings = {"sequential": True} if method == "gptq" else {}
    settings |= {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    config = {
        "model": {"name": model},
        "dataset": {"name": dataset, "task": task},
        "method": {"name": method, **settings, **({"uses_posterior": True} if method == "bayesq" else {})},
        "posterior": {"name": "kfac"},
        "ablated": ablation or "full",
        "allocator": "knapsack" if method == "bayesq" else "uniform",
        "correction": default_of(method, "correction"),
        **({} if "sequential" in settings else {"inputs": default_of(method, "inputs")}),
        "rotate": method == "bayesq",
        "bits": bits,
        "seed": seed,
        "calibration": {"examples": examples},
    }
    (path / ".hydra/config.yaml").write_text(yaml.safe_dump(config))
    if failed is not None:
        write_json(path / "status.json", {"status": "failed", "error": failed, "overrides": overrides, "run_id": name})
        return path
    draw = np.random.default_rng(hash_of(name))
    loss = kl if kl is not None else LOSSES[method] * 4 ** (3 - bits) * (1 + 0.1 * draw.standard_normal())
    predictions = predictions_of(draw, loss)
    write_csv(path / "predictions.csv", predictions)
    write_tables(path, bits, loss, risky=method == "bayesq")
    write_json(path / "result.json", {"run_id": name, **result_of(config, predictions, loss, folder)})
    return path


def predictions_of(draw: np.random.Generator, loss: float) -> list[dict[str, Any]]:
    """Rows of predictions.csv, every one of this KL; about 0.9 of them are right."""
    rows: list[dict[str, Any]] = [
        {
            "label": int(label),
            "fp_prediction": int(label) if draw.random() < 0.9 else 1 - int(label),
            "q_prediction": int(label) if draw.random() < 0.88 else 1 - int(label),
            "kl": loss,
            "fp_confidence": 0.5 + 0.5 * draw.random(),
            "q_confidence": 0.5 + 0.5 * draw.random(),
            "id": f"example{i}",
        }
        for i, label in enumerate(draw.integers(0, 2, EXAMPLES))
    ]
    for row in rows:
        row["fp_correct"] = int(row["fp_prediction"] == row["label"])
        row["q_correct"] = int(row["q_prediction"] == row["label"])
    return rows


def write_tables(path: Path, bits: float, loss: float, risky: bool) -> None:
    """layers.csv and bounds.csv; `risky` runs have predicted their risk."""
    layers = [
        {
            "name": f"layer{i}",
            "kind": "Linear",
            "shape": "1x8x16",
            "bits/code": bits,
            "bits/stored": bits + 0.25,
            "predicted_risk": loss / (i + 1) if risky else None,
            "achieved_risk": loss / (i + 1) ** 1.1 if risky else None,
            "kappa": 1.0,
            "prior_precision": 1.0 if risky else None,
            "effective_parameters": 10.0 if risky else None,
            "seconds": 0.1,
        }
        for i in range(LAYERS)
    ]
    bounds = [
        {
            "name": f"layer{i}",
            "weights": 128,
            "bits/code": bits,
            "risk": loss / (i + 1),
            "bound_bits": max(0.0, bits + 0.5 * math.log2(loss)),
            "shared_bound_bits": max(0.0, bits + 0.5 * math.log2(loss) - 0.1),
        }
        for i in range(LAYERS)
    ]
    write_csv(path / "layers.csv", layers)
    write_csv(path / "bounds.csv", bounds)


def result_of(config: dict[str, Any], predictions: list[dict[str, Any]], loss: float, folder: Path) -> dict[str, Any]:
    """The content of result.json without the run id."""
    scores = {side: float(np.mean([row[f"{side}_correct"] for row in predictions])) for side in ("fp", "q")}
    model, method, bits = config["model"]["name"], config["method"]["name"], config["bits"]
    risky = method == "bayesq"
    return {
        "status": "finished",
        "model": model,
        "dataset": config["dataset"]["name"],
        "method": method,
        "posterior": "kfac" if risky else "none",
        "allocator": config["allocator"],
        "correction": config["correction"],
        "seed": config["seed"],
        "primary_metric": "accuracy",
        "bits/target": bits,
        "bits/code": bits,
        "bits/stored": bits + 0.25,
        "bytes/packed": 1000,
        "bytes/fp32": 10000,
        "fp/accuracy": scores["fp"],
        "q/accuracy": scores["q"],
        "delta/accuracy": scores["q"] - scores["fp"],
        "delta/accuracy/ci95": [scores["q"] - scores["fp"] - 0.02, scores["q"] - scores["fp"] + 0.02],
        "q/kl_to_fp": loss,
        "q/agreement": 0.9,
        "q/nll": 0.3 + loss,
        "q/ece": 0.05,
        "fp/nll": 0.3,
        "fp/ece": 0.04,
        "risk/rank_correlation": 1.0 if risky else None,
        **{f"time/{stage}_s": 1.0 for stage in ("calibrate", "posterior", "quantize", "distill", "evaluate", "total")},
        "time/distill_s": 0.0,
        "memory/peak_rss_bytes": 2**30 if risky else 2**29,
        "memory/process": f"{model}{config}",
        "memory/peak_device_bytes": 0,
        "calibration/examples": config["calibration"]["examples"],
        "evaluation/examples": EXAMPLES,
        "fallback/dead_columns": 0,
        "config": config,
        "versions": {"bayesq": "0.0"},
        "host": {"name": "somewhere", "directory": str(folder)},
        "git": {"commit": "0" * 40, "dirty": False},
        "source": {"weights": f"{model}{config['dataset']['task']}"},
    }


def hash_of(text: str) -> int:
    """The same number in every process."""
    return zlib.crc32(text.encode())


def paper(folder: Path, seeds: Sequence[int] = (0, 1)) -> None:
    """The main sweep: five workloads, four methods, three budgets."""
    for model, dataset, task in WORKLOADS:
        for method in LOSSES:
            for bits in (3.0, 3.5, 4.0):
                for seed in seeds:
                    add_run(folder, model, dataset, task, method, bits, seed)
