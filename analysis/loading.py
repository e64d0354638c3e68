"""Results as data frames: one row per run, per layer or per example, from a folder or from a W&B project."""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from analysis.defaults import AXES, NOT_NAMED, named_deviations, unchanged_values
from analysis.selection import select
from bayesq.suite.composition import COMPOSITION_ERRORS
from bayesq.suite.config import resolved, show
from bayesq.suite.errors import UserError
from bayesq.suite.labels import model_label
from bayesq.suite.results import (
    FAILURE_FILE,
    LAYERS_FILE,
    PREDICTIONS_FILE,
    RESULT_FILE,
    differing_settings,
    read_result,
    recorded_overrides,
    settings_of,
)
from bayesq.suite.status import state_of, was_started
from bayesq.suite.tracking import LAYERS_KEY, MACHINE
from bayesq.suite.wandb_history import HISTORY

log = logging.getLogger(__name__)

WANDB = "wandb:"
CONFIG_FILE = ".hydra/config.yaml"
# Parts of a configuration that make a workload; other settings make variants of a method.
WORKLOAD_AXES = ("model", "dataset", "evaluation")
UNKNOWN = "unknown"
FINISHED, RUNNING = "finished", "running"
# Columns that every frame of runs has, in front.
FIRST = ("run_id", "status", "workload", "variant", "model", "dataset", "method", "bits/target", "seed")
PROCESS, OWN_MEMORY = "memory/process", "memory/own_process"
LAST = (OWN_MEMORY, "error", "duplicates", "path", "overrides")
# What a result must have to be read, and columns that a frame has even if all its results lack them.
NEEDED = ("model", "dataset", "method", "bits/target", "seed", "config")
READ = ("primary_metric", "q/kl_to_fp", "bits/code", "bits/stored", "evaluation/examples")
# Checksums of the files that make a workload, in a result's `source`.
FILES = {
    "dataset": ("sha256", "names_sha256"),
    "model": ("checkpoint_sha256", "adapter_sha256", "gguf_sha256"),
}
# A column that a run's table must have, because a file may hold anything.
COLUMN = {LAYERS_FILE: "name", PREDICTIONS_FILE: "kl"}
# Columns of `runs` that are repeated in every row of the long frames.
BESIDE = {"run_id": "run_id", "workload": "workload", "variant": "variant", "bits/target": "bits", "seed": "seed"}


def load_runs(source: str | Path, where: Sequence[str] = ()) -> pd.DataFrame:
    """One row per run that was ever started in `source`, one column per key of result.json.

    Accuracies are fractions, KL is in nats, sizes are bits per quantized weight; `config`, `versions`, `host` and
    `git` hold mappings. Further columns: `workload` (model, data set and task), `variant` (the method and those of its
    settings that differ among this workload's runs and are not the default), `status` (finished, failed, running or
    missing: begun, but without a result), `error` (why there is no result), `path` (folder, or that of the W&B run),
    `overrides` (of the command, if recorded) and `duplicates` (number of dropped runs with the same run id, or with the
    same settings and seed: the newest finished one counts).
    `memory/own_process` is True if the run's process made no other run of the source; otherwise the peak memory may be
    that of another run. The frame's `attrs` have `source` and `where`.

    Args:
        source: a results folder, a folder of results folders, or `wandb:ENTITY/PROJECT`.
        where: filters such as `method=bayesq,gptq`, see `analysis.selection`. Names depend on the selected runs.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: the W&B project cannot be read, or a filter fits no run.
    """
    loaded = _from_wandb(str(source)) if str(source).startswith(WANDB) else _from_folder(Path(source))
    _tell_processes_apart(loaded)
    loaded = _without_duplicates(loaded, ("run_id",))
    _name(loaded)
    loaded = _without_duplicates(loaded, ("workload", "variant", "bits/target", "seed"))
    if where:
        loaded = select(loaded, where)
        _name(loaded)
    columns = dict.fromkeys(key for run in loaded for key in run if key not in (*FIRST, *LAST, "time"))
    if any(run["status"] == FINISHED for run in loaded):
        columns |= dict.fromkeys(READ)
    frame = pd.DataFrame(loaded, columns=[*FIRST, *columns, *LAST])
    frame.attrs |= {"source": str(source), "where": tuple(where)}
    return frame


def layer_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers.csv of the finished runs, with run_id, workload, variant, bits and seed beside them."""
    return _long(runs, LAYERS_FILE)


def example_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of predictions.csv of the finished runs, with run_id, workload, variant, bits, seed and row beside them.

    `row` is the place of the example in the evaluation set, `id` its name.
    """
    return _long(runs, PREDICTIONS_FILE)


def of_finished_workloads(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of workloads that have a result, and of runs whose workload is unknown.

    Workloads without a finished run have nothing to show; `bayesq.suite.status` lists their runs.
    """
    workloads = {*finished(runs)["workload"], UNKNOWN}
    return runs[runs["workload"].isin(list(workloads))]


def without_result(runs: pd.DataFrame) -> str:
    """A line that names the workloads that `of_finished_workloads` leaves out; "" if there are none."""
    left_out = sorted(set(runs["workload"]) - set(of_finished_workloads(runs)["workload"]))
    return f"not shown, as no run of it is finished: {'; '.join(left_out)}\n" if left_out else ""


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that have a result."""
    return runs[runs["status"] == FINISHED]


def require_finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs; UserError if none of them has a result."""
    if finished(runs).empty:
        source = runs.attrs["source"]
        raise UserError(f"no finished run in {source}: start some with python run.py, or name another folder")
    return runs


def records(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame of runs as mappings."""
    names, rows = [str(key) for key in runs], runs.astype(object).to_numpy().tolist()  # to_dict takes much longer
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_table(run: Mapping[str, Any], file: str) -> pd.DataFrame | None:
    """A run's layers.csv or predictions.csv; None, with a line in the log, if it cannot be read."""
    if str(run["path"]).startswith(WANDB):
        return _wandb_table(run, file)
    path = Path(run["path"]) / file
    try:
        table = _read_csv(path)
        if COLUMN.get(file, table.columns[0]) not in table:
            raise ValueError(f"no column {COLUMN[file]}")
        return table
    except (OSError, ValueError) as error:
        log.warning("%s: not readable (%s)", path, str(error).splitlines()[0])
        return None


def _read_csv(file: Path | IO[str]) -> pd.DataFrame:
    return pd.read_csv(file, dtype={"id": str, "name": str})


# ------------------------------------------------------------------------------------------------------- a folder


def _from_folder(source: Path) -> list[dict[str, Any]]:
    """Every run below a results folder, or below the folders in it, by path."""
    if not source.is_dir():
        raise FileNotFoundError(f"no results folder {source}")
    return [_read_run(folder) for folder in _run_folders(source)]


def _run_folders(source: Path, deeper: bool = True) -> Iterator[Path]:
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and path.name != "wandb"):
        if was_started(folder):
            yield folder
        elif deeper:
            yield from _run_folders(folder, deeper=False)


def _read_run(folder: Path) -> dict[str, Any]:
    """The record of a run's folder; a run without a readable result gets its names from the recorded config."""
    overrides = recorded_overrides(folder)
    place = {"path": str(folder), "overrides": overrides, "time": _modified(folder)}
    result = read_result(folder / RESULT_FILE)
    for file, content in ((RESULT_FILE, result), (FAILURE_FILE, read_result(folder / FAILURE_FILE))):
        if content is None and (folder / file).exists():
            log.warning("%s: not readable as JSON", folder / file)
    done = result is not None and result.get("status") == FINISHED
    lacking = [key for key in NEEDED if result.get(key) is None] if result is not None and done else []
    if result is not None and done and not lacking and isinstance(result["config"], Mapping):
        return {"run_id": folder.name, **result, "error": None, **place}
    run = state_of(folder, overrides)
    config = _recorded_config(folder) or (result or {}).get("config")
    if done:
        error = f"{RESULT_FILE} has no {', '.join(lacking) or 'settings under config'}"
        log.warning("%s: %s", folder, error)
        return {"run_id": folder.name, "status": "missing", **_names(config), "error": error, **place}
    return {"run_id": run.run_id, "status": run.state, **_names(config), "error": run.reason or None, **place}


def _modified(folder: Path) -> float:
    files = [folder / name for name in (RESULT_FILE, FAILURE_FILE)]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _recorded_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that Hydra wrote when the run was started, or None."""
    try:
        cfg = OmegaConf.load(folder / CONFIG_FILE)
        return resolved(cfg) if isinstance(cfg, DictConfig) else None
    except FileNotFoundError:
        return None
    except (OSError, UserError, *COMPOSITION_ERRORS):
        log.warning("%s: not readable as a configuration", folder / CONFIG_FILE)
        return None


def _names(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of result.json that follow from a configuration; none if a part of it is missing."""
    try:
        assert config is not None
        names = {axis: config[axis]["name"] for axis in AXES} | {"model": model_label(config)}
        return {**names, "bits/target": float(config["bits"]), "seed": config["seed"], "config": dict(config)}
    except (AssertionError, KeyError, TypeError, ValueError):
        return {}


# ------------------------------------------------------------------------------------------------------------ W&B

# Keys of a result that may be null, which W&B leaves out.
NULLABLE = ("risk/rank_correlation", "q/agreement", "q/ece", "fp/ece")
WANDB_STATES = {"running": RUNNING, "pending": RUNNING, "failed": "failed"}


def _from_wandb(source: str) -> list[dict[str, Any]]:
    """Every run of a project: its summary has the keys of result.json, its config those of the configuration."""
    import wandb

    project = source.removeprefix(WANDB)
    if project.count("/") != 1:
        raise UserError(f"{source}: needs {WANDB}ENTITY/PROJECT")
    try:
        return [_wandb_record(run, project) for run in wandb.Api().runs(project, per_page=200, lazy=False)]
    except (wandb.Error, ValueError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def _wandb_record(run: Any, project: str) -> dict[str, Any]:
    summary = {key: value for key, value in dict(run.summary_metrics).items() if not key.startswith("_")}
    place = {"path": f"{WANDB}{project}/{run.id}", "overrides": [], "time": run.created_at}
    if summary.get("status") == FINISHED:
        # tables and plots are files, not values
        values = {key: value for key, value in summary.items() if not (isinstance(value, Mapping) and "_type" in value)}
        values = {key: value for key, value in values.items() if not key.startswith(HISTORY)}
        values["bits/target"] = float(values["bits/target"])
        config = _nested(run.config)
        # values come last, because the summary of W&B runs of earlier versions has these mappings
        made = {**{key: config.pop(key) for key in MACHINE if key in config}, "config": config}
        return {**dict.fromkeys(NULLABLE), **made, **values, "wandb/error": None, "error": None, **place}
    state = WANDB_STATES.get(run.state, "missing")
    error = f"W&B calls it {run.state}; the reason is in the run's own folder"
    return {"run_id": run.id, "status": state, **_names(_nested(run.config)), "error": error, **place}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested configuration from W&B's keys, which are joined by slashes; an axis gets its name under `name`."""
    config: dict[str, Any] = {}
    for key, value in flat.items():
        if key == "ablation" or key.startswith("_"):  # the name of a preset, and the client's own keys
            continue
        *parents, last = key.split("/")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if last in (*AXES, "posterior") and not parents:
            config.setdefault(last, {})["name"] = value
        else:
            inner[last] = value
    return config


def _wandb_table(run: Mapping[str, Any], name: str) -> pd.DataFrame | None:
    """Layers from the table of the W&B run, predictions from its file; None, with a line in the log, without them."""
    import wandb

    try:
        remote = wandb.Api().run(str(run["path"]).removeprefix(WANDB))
        path = name
        if name == LAYERS_FILE:
            reference = remote.summary_metrics.get(LAYERS_KEY)
            path = reference.get("path", "") if isinstance(reference, Mapping) else ""
        file = next(iter(remote.files([path])), None) if path else None
        if file is None:
            log.warning("%s: W&B has no %s of it", run["path"], name)
            return None
        with tempfile.TemporaryDirectory() as folder, file.download(folder, replace=True) as table:
            if name == LAYERS_FILE:
                content = json.load(table)
                return pd.DataFrame(content["data"], columns=content["columns"])
            return _read_csv(table)
    except (wandb.Error, OSError, ValueError) as error:
        log.warning("%s: its %s is not readable (%s)", run["path"], name, " ".join(str(error).split()))
        return None


# -------------------------------------------------------------------------------------------------- names and order


def _without_duplicates(records: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One record for each value of `keys`, in order of the run ids: the newest finished one, else the newest.

    Records that lack a key have no duplicate.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for place, record in enumerate(records):
        key = tuple(record.get(name, f"none {place}") for name in keys)
        groups.setdefault(key, []).append(record)
    chosen = []
    for alike in groups.values():
        best = max(alike, key=lambda record: (record["status"] == FINISHED, record["time"], record["path"]))
        dropped = len(alike) - 1 + sum(record.get("duplicates", 0) for record in alike)
        chosen.append({**best, "duplicates": dropped})
    return sorted(chosen, key=lambda record: record["run_id"])


def _tell_processes_apart(records: Sequence[dict[str, Any]]) -> None:
    """Set OWN_MEMORY of every record: whether the run's process is known and computed no other run."""
    processes = Counter(record.get(PROCESS) for record in records if record["status"] == FINISHED)
    for record in records:
        process = record.get(PROCESS)
        record[OWN_MEMORY] = record["status"] == FINISHED and process is not None and processes[process] == 1


def _name(records: Sequence[dict[str, Any]]) -> None:
    """Set `workload` and `variant` of every record."""
    named: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        record["workload"] = record["variant"] = UNKNOWN
        if isinstance(record.get("config"), Mapping):
            task = record["config"]["dataset"].get("task")
            named.setdefault((record["model"], record["dataset"], task), []).append(record)
    for (model, dataset, task), members in named.items():
        base = f"{model} / {dataset}" + (f" {task}" if task else "")
        settings = [settings_of(record) for record in members]
        keys = [key for key in _separating(members, method=None) if key.split(".")[0] in WORKLOAD_AXES]
        for record, chosen in zip(members, settings, strict=True):
            shown = [f"{key}={show(chosen[key])}" for key in keys if chosen.get(key) is not None]
            record["workload"] = " ".join([base, *shown])
        by_place: dict[tuple[str, str], list[int]] = {}
        for place, record in enumerate(members):
            by_place.setdefault((record["workload"], record["method"]), []).append(place)
        for (_, method), places in by_place.items():
            alike = [members[i] for i in places]
            keys = [key for key in _separating(alike) if key.split(".")[0] not in WORKLOAD_AXES]
            unchanged = unchanged_values(alike, [settings[i] for i in places])
            for i, run in zip(places, alike, strict=True):
                run["variant"] = " ".join([method, *named_deviations(run["config"], settings[i], keys, unchanged)])
    _tell_files_apart(records)


def _tell_files_apart(records: Sequence[dict[str, Any]]) -> None:
    """Add a checksum to the workloads of runs that read different files under one name, because a user edited one."""
    for part, keys in FILES.items():
        for key in keys:
            had: dict[str, set[str]] = {}
            sums = [str(((record.get("source") or {}).get(part) or {}).get(key) or "") for record in records]
            for record, checksum in zip(records, sums, strict=True):
                had.setdefault(record["workload"], set()).update({checksum} - {""})
            for record, checksum in zip(records, sums, strict=True):
                if checksum and len(had[record["workload"]]) > 1:
                    record["workload"] += f" {part}.{key}={checksum[:8]}"


def _separating(records: Sequence[Mapping[str, Any]], **same: Any) -> list[str]:
    """`differing_settings` except for the budget and the keys of `same`."""
    alike = [{**record, "bits/target": None, **same} for record in records]
    return [key for key in differing_settings(alike) if key != "bits" and key not in AXES and key not in NOT_NAMED]


# ------------------------------------------------------------------------------------------------------ long frames


def _long(runs: pd.DataFrame, file: str) -> pd.DataFrame:
    had = [(run, table) for run in records(finished(runs)) if (table := read_table(run, file)) is not None]
    if not had:
        return pd.DataFrame(columns=[*BESIDE.values()])
    rows = pd.concat([table for _, table in had], ignore_index=True)
    sizes = [len(table) for _, table in had]
    beside = {name: np.repeat([run[column] for run, _ in had], sizes) for column, name in BESIDE.items()}
    if file == PREDICTIONS_FILE:
        beside["row"] = np.concatenate([np.arange(size) for size in sizes])
    return pd.concat([pd.DataFrame(beside), rows], axis=1)
