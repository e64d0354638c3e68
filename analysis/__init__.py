"""Read what runs left behind into data frames and tables."""

from pathlib import Path
from typing import Any

import pandas as pd

from bayesq.suite.results import differing_settings, load_results, settings_of


def load_runs(source: str | Path) -> pd.DataFrame:
    """One row per finished run below `source` (a results folder), one column per key of result.json.

    Accuracies are fractions, KL is in nats, sizes are bits per quantized weight; `config`, `versions`, `host` and
    `git` hold mappings.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}")
    return pd.DataFrame(load_results(folder))


def main_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods x bit budgets: the primary metric in percent and the KL to full precision, means over n seeds.

    The index is (model, dataset, method) and every setting that separates runs of one method and budget, so that only
    runs which differ in nothing but the seed are averaged; the columns are the budgets. A cell reads
    `79.12 / 0.0123 (n=3)` and is empty where there is no run.
    """
    records = _records(runs)
    names, labels = _settings(records)
    table = labels.assign(score=[run[f"q/{run['primary_metric']}"] for run in records], kl=list(runs["q/kl_to_fp"]))
    means = table.groupby([*names, "bits"]).agg(score=("score", "mean"), kl=("kl", "mean"), n=("score", "size"))
    cells = [f"{100 * score:.2f} / {kl:.4f} (n={n})" for score, kl, n in means.itertuples(index=False, name=None)]
    return pd.Series(cells, index=means.index).unstack("bits").fillna("")


# A run of these is what the others' cost is a multiple of.
BASELINE = "gptq"
STAGES = ("calibrate", "posterior", "quantize", "distill")


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Seconds from the loaded model to its codes, medians over n seeds, and as multiples of GPTQ's.

    Statistics count what they cost when they were computed, so runs that are to be compared need caches of their own.
    The columns are the stages, `quantize x` (all but distillation) and `total x`: multiples of the fastest undistilled
    GPTQ on the same workload and budget, empty where there is none. The index is that of `main_table` and the budget.
    """
    names, labels = _settings(_records(runs))
    index = [*names, "bits"]
    seconds = pd.DataFrame({stage: list(runs[f"time/{stage}_s"]) for stage in STAGES})
    seconds["without"] = seconds[list(STAGES[:-1])].sum(axis=1)
    seconds["total"] = seconds["without"] + seconds["distill"]
    grouped = pd.concat([labels, seconds], axis=1).groupby(index)
    table = grouped.median().assign(n=grouped.size()).reset_index()
    workload = [name for name in index if name == "bits" or name.split(".")[0] in ("model", "dataset", "calibration")]
    plain = table[(table["method"] == BASELINE) & (table["distill"] == 0)]
    table = table.join(plain.groupby(workload)["total"].min().rename("baseline"), on=workload)
    table["quantize x"], table["total x"] = table["without"] / table["baseline"], table["total"] / table["baseline"]
    return table.set_index(index)[[*STAGES, "quantize x", "total x", "n"]]


# What GLUE is, in the order of its leaderboard's columns.
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
# Settings that differ from task to task by nature: which checkpoint, and where from.
PER_TASK = ("dataset.task", "model.checkpoint", "model.label_order", "model.revision")


def glue_table(runs: pd.DataFrame) -> pd.DataFrame:
    """GLUE scores: means over the tasks, of each task the mean of its metrics, times 100.

    Every cell is a mean over seeds, each task's own. The index is that of `main_table` without what differs from task
    to task, and the budget. The columns are the tasks that were run, `GLUE` (the mean of those), `FP` (the same of the
    full-precision models), `delta`, `n` (seeds; of the task with the fewest) and `missing` (tasks without a run: such
    a score is no GLUE score yet).

    Raises:
        ValueError: no run is of a GLUE task.
    """
    records = [run for run in _records(runs) if run["config"]["dataset"].get("task") in GLUE_TASKS]
    if not records:
        raise ValueError("no run of a GLUE task")
    names, labels = _settings(records, PER_TASK)
    scores = labels.assign(
        task=[run["config"]["dataset"]["task"] for run in records],
        q=[_task_score(run, "q") for run in records],
        fp=[_task_score(run, "fp") for run in records],
    )
    index = [*names, "bits"]
    tasks = scores.groupby([*index, "task"]).agg(q=("q", "mean"), fp=("fp", "mean"), n=("q", "size")).reset_index()
    ran = [task for task in GLUE_TASKS if task in set(tasks["task"])]
    table = tasks.pivot(index=index, columns="task", values="q")[ran]
    whole = tasks.groupby(index)
    table = table.assign(GLUE=whole["q"].mean(), FP=whole["fp"].mean())
    table["delta"], table["n"] = table["GLUE"] - table["FP"], whole["n"].min()
    present = whole["task"].agg(set)
    missing = [", ".join(task for task in GLUE_TASKS if task not in present[key]) for key in table.index]
    return table.assign(missing=missing).rename_axis(columns=None)


def _task_score(run: dict[str, Any], side: str) -> float:
    """Mean of the run's metrics on its task, times 100; `side` is fp or q."""
    metrics = [key.split("/")[1] for key in run if key.startswith("delta/") and key.count("/") == 1]
    # a frame has the metrics of all its runs in every row
    values = [run[f"{side}/{metric}"] for metric in metrics if not pd.isna(run[f"delta/{metric}"])]
    return 100 * sum(values) / len(values)


def _records(runs: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in runs.to_dict("records")]


def _settings(records: list[dict[str, Any]], without: tuple[str, ...] = ()) -> tuple[list[str], pd.DataFrame]:
    """Names of what separates runs besides budget and seed, and one row of it per run, the budget in `bits`.

    Args:
        without: settings that separate nothing.
    """
    differing = [key for key in differing_settings(records) if key not in without]
    settings = [settings_of(record) for record in records]
    table = pd.DataFrame(
        {
            **{key: [record[key] for record in records] for key in ("model", "dataset", "method")},
            **{key: ["-" if key not in own else str(own[key]) for own in settings] for key in differing},
            "bits": [record["bits/target"] for record in records],
        }
    )
    return ["model", "dataset", "method", *differing], table
