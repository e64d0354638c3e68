"""GLUE: scores of its tasks, their mean over the tasks that were run, and its gain over the best GPTQ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.captions import failed, known, remarks_of, settings, source_of
from analysis.comparisons import (
    BASELINE,
    Examples,
    NotComparedError,
    alike,
    counted,
    is_seedless,
    metrics_of,
    whole_mean,
)
from analysis.gaps import own_overrides, usual_seeds, workload_command
from analysis.loading import UNKNOWN, finished, records
from analysis.paper import CLAIMED_DELTAS, METHODS
from analysis.statistics import holm, mean_std
from analysis.table import GAP, LEVEL, Table, as_delta, as_number, as_p, as_spread, cells_of, make_table

# GLUE's tasks in the order of its leaderboard's columns.
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def has_glue(runs: pd.DataFrame) -> bool:
    """Whether a run of a GLUE task is finished."""
    return any(_task(run) in GLUE_TASKS for run in records(finished(runs[runs["workload"] != UNKNOWN])))


def glue_table(runs: pd.DataFrame) -> Table:
    """GLUE scores times 100: of each task the mean of its metrics, GLUE the mean over the tasks that were run.

    Every cell is a mean over seeds, each task's own. `delta` is to full precision on the same tasks, `Δ GPTQ` to the
    GPTQ of highest score on the tasks that both have, with the same correction, distillation and calibration size.

    Raises:
        ValueError: no run is of a GLUE task.
    """
    runs = known(runs)
    of_glue = runs[[_task(run) in GLUE_TASKS for run in records(runs)]]
    of_glue = of_glue.assign(model=[_model(run) for run in records(of_glue)])
    done = finished(of_glue)
    if not has_glue(runs):
        raise ValueError("no run of a GLUE task")
    of_tasks = records(done)
    scores = pd.DataFrame(
        {
            **{key: list(done[key]) for key in ("model", "variant", "seed")},
            "bits": list(done["bits/target"]),
            "task": [_task(run) for run in of_tasks],
            "q": [_task_score(run, "q") for run in of_tasks],
            "fp": [_task_score(run, "fp") for run in of_tasks],
        }
    )
    index = ["model", "bits", "variant"]
    grouped = scores.groupby([*index, "task"])
    tasks = whole_mean(grouped, ["q", "fp"]).assign(std=grouped["q"].std(), n=grouped.size()).reset_index()
    ran = [task for task in GLUE_TASKS if task in set(tasks["task"])]
    examples, rows, notes, lacking = Examples(), [], [], []
    for key, own in tasks.groupby(index, sort=True):
        by_task = own.set_index("task")
        row: dict[str, Any] = dict(zip(index, key, strict=True))
        for task in ran:
            row[task] = by_task["q"].get(task, math.nan)
            row[f"{task}_std"] = by_task["std"].get(task, math.nan)
        row |= {"GLUE": by_task["q"].mean(), "FP": by_task["fp"].mean(), "n": int(by_task["n"].min())}
        row["seeds"] = counted(by_task["n"])
        row["delta"] = row["GLUE"] - row["FP"]
        against, said = _glue_against(done, tasks, row, by_task["q"], examples)
        row |= against
        notes += said
        row["paper_delta"] = CLAIMED_DELTAS["text"].get(row["bits"]) if row["variant"].startswith("bayesq") else None
        row["missing"] = ", ".join(task for task in GLUE_TASKS if task not in by_task.index)
        rows.append(row)
        lacking.append([task for task in ran if task not in by_task.index])
        notes += _glue_gap(of_glue, row, lacking[-1])
    table = pd.DataFrame(rows)
    table["paper_delta"] = pd.to_numeric(table["paper_delta"])
    table["p_holm"] = holm(table["p"].tolist())
    gain = cells_of(table, "delta_gptq", "delta_gptq_low", "delta_gptq_high", form=_glue_delta)
    cells = pd.DataFrame(
        {
            "model": table["model"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **{
                task: [as_spread(*pair) for pair in zip(table[task], table[f"{task}_std"], strict=True)] for task in ran
            },
            **{name: table[name].map(lambda value: as_number(value, ".2f")) for name in ("GLUE", "FP")},
            "Δ FP": table["delta"].map(lambda value: as_number(value, "+.2f")),
            "Δ GPTQ": gain,
            "p": table["p_holm"].map(as_p),
            "paper's Δ": table["paper_delta"].map(lambda value: as_number(value, "+.1f")),
            "n": table["seeds"],
            "missing": [
                ", ".join(task for task in ran if task in names.split(", ")) or GAP for names in table["missing"]
            ],
        }
    )
    caption = (
        f"GLUE (dev sets): scores times 100, a task's score is the mean of its metrics; means ± sample standard "
        f"deviation over n = {counted(tasks['n'])} seeds. GLUE is the mean over the {len(ran)} of 9 tasks that were "
        "run (a row that misses one of them has the mean of the others), FP the same of the full-precision models. "
        "Δ GPTQ: points over the GPTQ of highest score on the tasks that both have, with the same correction, "
        "distillation and calibration size; 95 % interval and p from a paired bootstrap over examples and seeds within "
        "each task (McNemar's test knows no average of metrics; it stands in the main table, task by task), p "
        "Holm-corrected "
        f"over {int(table['p'].notna().sum())} tests; an interval is left out where a task has no predictions for a "
        f"seed of both. Bold: better than GPTQ at 5 %.{settings(done)}"
    )
    better = (table["p_holm"] < LEVEL) & (table["delta_gptq"] > 0)
    notes += _no_task(of_glue, ran)
    return make_table(
        cells,
        table.drop(columns="seeds"),
        {"Δ GPTQ": better},
        caption,
        [*notes, *failed(of_glue), *remarks_of(of_glue)],
    )


def _task(run: Mapping[str, Any]) -> str | None:
    task: str | None = run["config"]["dataset"].get("task")
    return task


def _model(run: Mapping[str, Any]) -> str:
    """A run's model, with the settings that its workload's name has: other examples are no further seeds of these."""
    base = f"{run['model']} / {run['dataset']} {_task(run)}"
    return f"{run['model']}{str(run['workload']).removeprefix(base)}"


def _task_score(run: Mapping[str, Any], side: str) -> float:
    """Mean of the run's metrics on its task, times 100; `side` is fp or q."""
    return 100 * mean_std([run[f"{side}/{metric}"] for metric in metrics_of(run)])[0]


def _glue_against(
    done: pd.DataFrame, tasks: pd.DataFrame, row: Mapping[str, Any], own: pd.Series, examples: Examples
) -> tuple[dict[str, Any], list[str]]:
    """The gain over the best GPTQ on the tasks that both have, with its interval, which GPTQ it is, and remarks."""
    nothing = dict.fromkeys(("delta_gptq", "delta_gptq_low", "delta_gptq_high", "p"), math.nan)
    here = done[(done["model"] == row["model"]) & (done["bits/target"] == row["bits"])]
    mine = here[here["variant"] == row["variant"]]
    gptq = here[here["method"] == BASELINE]
    like = set(gptq.loc[[alike(run) == alike(records(mine)[0]) for run in records(gptq)], "variant"])
    same = tasks[(tasks["model"] == row["model"]) & (tasks["bits"] == row["bits"])]
    baselines = {
        str(variant): of.set_index("task")["q"]
        for variant, of in same.groupby("variant", sort=True)
        if variant in like and set(own.index) & set(of["task"])
    }
    if not baselines:
        return {**nothing, "reference": None}, []

    def shared(variant: str) -> list[str]:
        return [task for task in own.index if task in baselines[variant].index]

    best = max(baselines, key=lambda variant: (len(shared(variant)), baselines[variant][shared(variant)].mean()))
    if best == row["variant"]:
        return {**nothing, "reference": best}, []
    theirs = here[here["variant"] == best]
    pairs = [tuple(of[[_task(run) == task for run in records(of)]] for of in (theirs, mine)) for task in shared(best)]
    where = f"{row['model']}, {row['variant']} at {row['bits']:g} bits"
    try:
        found, seeds = examples.compare_average(pairs)
    except NotComparedError as reason:
        gain = float((own[shared(best)] - baselines[best][shared(best)]).mean())
        note = f"{where}: no interval of Δ GPTQ ({best}), {reason}."
        return {**nothing, "delta_gptq": gain, "reference": best}, [note]
    notes = []
    for task, (first, second), had in zip(shared(best), pairs, seeds, strict=True):
        lost = {int(seed) for of in (first, second) if not is_seedless(records(of)[0]) for seed in of["seed"]} - {*had}
        if lost:
            over = ", ".join(map(str, had))
            notes.append(
                f"{where}: Δ GPTQ ({best}) is over seed {over} of {task} alone, of which both have predictions."
            )
    return {
        "delta_gptq": 100 * found.value,
        "delta_gptq_low": 100 * found.low,
        "delta_gptq_high": 100 * found.high,
        "p": found.p,
        "reference": best,
    }, notes


def _glue_delta(value: float, low: float, high: float) -> str:
    return as_delta(value / 100, low / 100, high / 100)


def _glue_gap(runs: pd.DataFrame, row: Mapping[str, Any], lacking: Sequence[str]) -> list[str]:
    """The command that makes tasks that a row lacks."""
    if not lacking:
        return []
    same = (runs["model"] == row["model"]) & (runs["variant"] == row["variant"]) & (runs["bits/target"] == row["bits"])
    members = runs[same]
    seeds = ",".join(map(str, sorted(set(members["seed"]))))
    own = [o for o in own_overrides(records(members)[0]) if o.startswith("method.")]
    what = [f"method={members.iloc[0]['method']}", *own, f"bits={row['bits']:g}", f"seed={seeds}"]
    makes = _glue_command(members, lacking, what, source_of(runs))
    return [f"{row['model']}, {row['variant']} at {row['bits']:g} bits: no {', '.join(lacking)}: `{makes}`"]


def _no_task(runs: pd.DataFrame, ran: Sequence[str]) -> list[str]:
    """One line per model about the tasks that no run of GLUE is of."""
    lines, lacking = [], [task for task in GLUE_TASKS if task not in ran]
    for model, members in runs.groupby("model", sort=True):
        what = [f"method={','.join(method for method in METHODS if method in set(members['method']))}"]
        what += [f"bits={','.join(f'{bits:g}' for bits in sorted(set(members['bits/target'])))}"]
        what += [f"seed={','.join(map(str, usual_seeds(members)))}"]
        makes = _glue_command(members, lacking, what, source_of(runs))
        lines.append(f"{model}: no run of {', '.join(lacking)} among these: `{makes}`")
    return lines if lacking else []


def _glue_command(members: pd.DataFrame, tasks: Sequence[str], what: Sequence[str], source: str) -> str:
    """The line for the shell that makes tasks; a checkpoint in a folder named after its task is that of each task."""
    run = records(members)[0]
    kept = [o for o in own_overrides(run) if o.startswith("model.checkpoint=") and Path(o).name == _task(run)]
    checkpoints = [f"{Path(o).parent}/${{dataset.task}}" for o in kept]
    return workload_command(run, [f"dataset.task={','.join(tasks)}", *checkpoints, *what], source)
