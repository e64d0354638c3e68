"""Reading and atomic writing of result files, and the settings that distinguish results."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bayesq.files import atomic_path
from bayesq.suite.config import flatten, settings_that_matter
from bayesq.suite.errors import UserError

RESULT_FILE = "result.json"
FAILURE_FILE = "status.json"
QUANTIZED_FILE = "quantized.safetensors"
LAYERS_FILE = "layers.csv"
PREDICTIONS_FILE = "predictions.csv"
LOG_FILE = "run.log"  # of conf/hydra/job_logging
DIFF_FILE = "diff.patch"  # of the code, with wandb.diff=true
OVERRIDES_FILE = ".hydra/overrides.yaml"  # written by Hydra
HYDRA_FILE = ".hydra/hydra.yaml"
# PyYAML's parser in C, if there is one: it reads a folder of runs in a third of the time.
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Keys of a result that hold mappings: its provenance, not its values.
PROVENANCE = ("config", "versions", "host", "git", "source")


def plain(value: Any) -> Any:
    """Mappings, lists, paths, numpy and torch scalars in JSON types, NaN and infinities as None; else TypeError."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    raise TypeError(f"{type(value).__name__} has no place in a result file")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `plain(content)` as indented JSON, atomically."""
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` atomically as CSV with the keys of the first row as header; None becomes an empty cell.

    Raises ValueError if there are no rows, or if a row has a key that the first row lacks.
    """
    if not rows:
        raise ValueError(f"no rows for {path.name}")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with text values; empty if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished_result(run_dir: Path) -> dict[str, Any] | None:
    """The result in `run_dir`; None unless its status is "finished"."""
    result = read_result(run_dir / RESULT_FILE)
    return result if result is not None and result.get("status") == "finished" else None


def recorded_result(run_dir: Path) -> dict[str, Any]:
    """`finished_result`; raises UserError if there is none."""
    result = finished_result(run_dir)
    if result is None:
        raise UserError(f"{run_dir}: there is no result of a finished run: give a folder results/<run_id>")
    return result


def recorded_overrides(run_dir: Path) -> list[str]:
    """The overrides that Hydra recorded in a run's folder, as they were typed; empty if they cannot be read."""
    try:
        content = yaml.load((run_dir / OVERRIDES_FILE).read_text(encoding="utf-8"), YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [str(override).removeprefix("++") for override in content] if isinstance(content, list) else []


def recorded_config_dir(run_dir: Path) -> str | None:
    """The --config-dir of a run's command, as Hydra recorded it; None without one."""
    try:
        content = yaml.load((run_dir / HYDRA_FILE).read_text(encoding="utf-8"), YAML_LOADER)
        sources = content["hydra"]["runtime"]["config_sources"]
        return next((str(each["path"]) for each in sources if each["provider"] == "command-line"), None)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a result that matter, except the seed, as flat keys. Results with equal settings are averaged.

    ImageNet's split depends on the run's seed; runs with different seeds still count as one data set.
    """
    # run_id leaves these keys out at the values that older versions had
    settings = {"codec": "fixed", "rotate": False, **flatten(settings_that_matter(result["config"]))}
    if settings.get("dataset.seed") == settings["seed"]:
        settings["dataset.seed"] = "${seed}"
    return {key.removesuffix(".name"): value for key, value in settings.items() if key != "seed"}


def neutral_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a method's newer switches at which run_id and `settings_of` leave them out, by flat key."""
    return {f"method.{key}": value for key, value in (config["method"].get("neutral") or {}).items()}


def differing_settings(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of `settings_of` that differ between results with the same model, data set, method and budget.

    Settings of a posterior are compared only between results with the same posterior; likewise for the other axes.
    A switch that `settings_of` leaves out has its neutral value.
    """
    results, neutral = list(results), dict[str, dict[str, Any]]()
    for result in results:
        neutral.setdefault(result["config"]["method"]["name"], {}).update(neutral_settings(result["config"]))
    seen: dict[tuple[Any, ...], set[str]] = {}
    for result in results:
        settings = {**neutral[result["config"]["method"]["name"]], **settings_of(result)}
        alike = (result["model"], result["dataset"], result["method"], result["bits/target"])
        for key, value in settings.items():
            axis = key.partition(".")[0]
            choice = None if axis == key else settings.get(axis)
            seen.setdefault((key, *alike, choice), set()).add(json.dumps(value))
    return sorted({key for (key, *_), values in seen.items() if len(values) > 1})
