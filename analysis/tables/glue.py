"""GLUE: scores of its tasks, their mean over the tasks that were run, and its gain over the best GPTQ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.captions import failed, known, remarks_of, settings, source_of
from analysis.comparisons import Examples, NotComparedError, alike, counted, is_seedless, metrics_of, whole_mean
from analysis.gaps import run_overrides, usual_seeds, workload_command
from analysis.loading import UNKNOWN, finished, records
from analysis.methods import methods_of, title
from analysis.metrics import SCALE
from analysis.paper import CLAIMED_DELTAS, PROPOSED, REFERENCE
from analysis.statistics import holm, mean_std
from analysis.table import GAP, LEVEL, Table, as_delta, as_number, as_p, as_spread, cells_of, make_table

INDEX = ["model", "bits", "variant"]
# The column of points over the reference.
GAIN = f"delta_{REFERENCE}"
# GLUE's tasks in the order of its leaderboard's columns.
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def has_glue(runs: pd.DataFrame) -> bool:
    """Whether a run of a GLUE task is finished."""
    return any(_task(run) in GLUE_TASKS for run in records(finished(runs[runs["workload"] != UNKNOWN])))


def glue_table(runs: pd.DataFrame) -> Table:
    """GLUE scores times 100: for a task the mean of its metrics, GLUE is the mean over the tasks that were run.

    Every cell is a mean over the seeds of its task. `delta` is to full precision on the same tasks, `Δ GPTQ` to the
    GPTQ of highest score on the tasks that both have, with the same distillation and calibration size.

    Raises:
        ValueError: no run is of a GLUE task.
    """
    runs = known(runs)
    of_glue = runs[[_task(run) in GLUE_TASKS for run in records(runs)]]
    of_glue = of_glue.assign(model=[_model(run) for run in records(of_glue)])
    done = finished(of_glue)
    if not has_glue(runs):
        raise ValueError("no run of a GLUE task")
    tasks = _task_means(done)
    ran = [task for task in GLUE_TASKS if task in set(tasks["task"])]
    table, notes = _rows(of_glue, tasks, ran)
    better = (table["p_holm"] < LEVEL) & (table[GAIN] > 0)
    notes += [*_no_task(of_glue, ran), *failed(of_glue), *remarks_of(of_glue)]
    bold = {f"Δ {title(REFERENCE)}": better}
    return make_table(_cells(table, ran), table.drop(columns="seeds"), bold, _caption(table, tasks, ran, done), notes)


def _task_means(done: pd.DataFrame) -> pd.DataFrame:
    """Scores `q` and `fp` of every model, budget, variant and task, means over seeds, with `std` and `n`."""
    runs = records(done)
    scores = pd.DataFrame(
        {
            **{key: list(done[key]) for key in ("model", "variant", "seed")},
            "bits": list(done["bits/target"]),
            "task": [_task(run) for run in runs],
            "q": [_task_score(run, "q") for run in runs],
            "fp": [_task_score(run, "fp") for run in runs],
        }
    )
    grouped = scores.groupby([*INDEX, "task"])
    return whole_mean(grouped, ["q", "fp"]).assign(std=grouped["q"].std(), n=grouped.size()).reset_index()


def _rows(runs: pd.DataFrame, tasks: pd.DataFrame, ran: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows as numbers, and notes about missing intervals and tasks."""
    done, examples, rows, notes = finished(runs), Examples(), [], []
    for key, members in tasks.groupby(INDEX, sort=True):
        by_task = members.set_index("task")
        row: dict[str, Any] = dict(zip(INDEX, key, strict=True))
        for task in ran:
            row[task] = by_task["q"].get(task, math.nan)
            row[f"{task}_std"] = by_task["std"].get(task, math.nan)
        row |= {"GLUE": by_task["q"].mean(), "FP": by_task["fp"].mean(), "n": int(by_task["n"].min())}
        row["seeds"] = counted(by_task["n"])
        row["delta"] = row["GLUE"] - row["FP"]
        gain, said = _gain(done, tasks, row, by_task["q"], examples)
        proposed = row["variant"].partition(" ")[0] == PROPOSED
        row |= {
            **gain,
            "paper_delta": CLAIMED_DELTAS["text classification"].get(row["bits"], math.nan) if proposed else math.nan,
        }
        row["missing"] = ", ".join(task for task in GLUE_TASKS if task not in by_task.index)
        rows.append(row)
        notes += [*said, *_lacking(runs, row, [task for task in ran if task not in by_task.index])]
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].tolist())
    return table, notes


def _cells(table: pd.DataFrame, ran: Sequence[str]) -> pd.DataFrame:
    missing = [", ".join(task for task in ran if task in names.split(", ")) or GAP for names in table["missing"]]
    return pd.DataFrame(
        {
            "model": table["model"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **{task: cells_of(table, task, f"{task}_std", form=as_spread) for task in ran},
            **{name: table[name].map(lambda value: as_number(value, ".2f")) for name in ("GLUE", "FP")},
            "Δ FP": table["delta"].map(lambda value: as_number(value, "+.2f")),
            f"Δ {title(REFERENCE)}": cells_of(table, GAIN, f"{GAIN}_low", f"{GAIN}_high", form=_as_gain),
            "p": table["p_holm"].map(as_p),
            "paper's Δ": table["paper_delta"].map(lambda value: as_number(value, "+.1f")),
            "n": table["seeds"],
            "missing": missing,
        }
    )


def _caption(table: pd.DataFrame, tasks: pd.DataFrame, ran: Sequence[str], done: pd.DataFrame) -> str:
    name = title(REFERENCE)
    return (
        f"GLUE (dev sets): scores times 100, a task's score is the mean of its metrics; means ± sample standard "
        f"deviation over n = {counted(tasks['n'])} seeds. GLUE is the mean over the {len(ran)} of {len(GLUE_TASKS)} "
        "tasks that were run (a row that misses one of them has the mean of the others), FP the same of the "
        f"full-precision models. Δ {name}: points over the {name} of highest score on the tasks that both have, with "
        "the same distillation and calibration size; 95 % interval and p from a paired bootstrap over "
        "examples and seeds within each task (McNemar's test does not apply to averages; the main table has it task by "
        f"task), p Holm-corrected over {int(table['p'].notna().sum())} tests; an interval is left out where a "
        f"task has no predictions for a seed of both. Bold: better than {name} at 5 %.{settings(done)}"
    )


def _task(run: Mapping[str, Any]) -> str | None:
    task: str | None = run["config"]["dataset"].get("task")
    return task


def _model(run: Mapping[str, Any]) -> str:
    """A run's model with the settings in its workload's name, because runs with other settings are no further seeds."""
    base = f"{run['model']} / {run['dataset']} {_task(run)}"
    return f"{run['model']}{str(run['workload']).removeprefix(base)}"


def _task_score(run: Mapping[str, Any], side: str) -> float:
    """Mean of the run's metrics on its task, times 100; `side` is fp or q."""
    return SCALE * mean_std([run[f"{side}/{metric}"] for metric in metrics_of(run)])[0]


def _gain(
    done: pd.DataFrame, tasks: pd.DataFrame, row: Mapping[str, Any], scores: pd.Series, examples: Examples
) -> tuple[dict[str, Any], list[str]]:
    """The gain over the best reference on the common tasks, with its interval, its variant, and remarks.

    Args:
        done: finished runs of GLUE.
        tasks: returned by `_task_means`.
        row: names the variant.
        scores: those of the variant, by task.
    """
    nothing: dict[str, Any] = dict.fromkeys((GAIN, f"{GAIN}_low", f"{GAIN}_high", "p"), math.nan)
    here = done[(done["model"] == row["model"]) & (done["bits/target"] == row["bits"])]
    ours = here[here["variant"] == row["variant"]]
    best, shared, theirs_by_task = _best_reference(here, ours, tasks, scores)
    if best is None or best == row["variant"]:
        return {**nothing, "reference": best}, []
    theirs = here[here["variant"] == best]
    pairs = [tuple(of[[_task(run) == task for run in records(of)]] for of in (theirs, ours)) for task in shared]
    where, what = f"{row['model']}, {row['variant']} at {row['bits']:g} bits", f"Δ {title(REFERENCE)} ({best})"
    try:
        difference, seeds = examples.compare_average(pairs)
    except NotComparedError as reason:
        gain = float((scores[shared] - theirs_by_task[shared]).mean())
        return {**nothing, GAIN: gain, "reference": best}, [f"{where}: no interval of {what}, {reason}."]
    notes = []
    for task, pair, had in zip(shared, pairs, seeds, strict=True):
        if {int(seed) for of in pair if not is_seedless(records(of)[0]) for seed in of["seed"]} - {*had}:
            over = ", ".join(map(str, had))
            notes.append(f"{where}: {what} is over seed {over} of {task} alone, of which both have predictions.")
    interval = zip(("", "_low", "_high"), (difference.value, difference.low, difference.high), strict=True)
    return {**{f"{GAIN}{end}": SCALE * value for end, value in interval}, "p": difference.p, "reference": best}, notes


def _best_reference(
    here: pd.DataFrame, ours: pd.DataFrame, tasks: pd.DataFrame, by_task: pd.Series
) -> tuple[str | None, list[str], pd.Series]:
    """The reference's variant of highest score on the tasks common with a row, these tasks, and its scores.

    Args:
        here: finished runs of the row's model and budget.
        ours: those of the row.
        tasks: returned by `_task_means`.
        by_task: the row's scores.
    """
    conditions, first = alike(records(ours)[0]), records(ours)[0]
    candidates = here[here["method"] == REFERENCE]
    like = set(candidates.loc[[alike(run) == conditions for run in records(candidates)], "variant"])
    same = tasks[(tasks["model"] == first["model"]) & (tasks["bits"] == first["bits/target"])]
    options: list[tuple[str, list[str], pd.Series]] = []
    for variant, of in same[same["variant"].isin(like)].groupby("variant", sort=True):
        scores = of.set_index("task")["q"]
        options.append((str(variant), [task for task in by_task.index if task in scores.index], scores))
    shared = [candidate for candidate in options if candidate[1]]
    return max(shared, key=lambda best: (len(best[1]), best[2][best[1]].mean()), default=(None, [], pd.Series()))


def _as_gain(value: float, low: float, high: float) -> str:
    return as_delta(value / SCALE, low / SCALE, high / SCALE)


def _lacking(runs: pd.DataFrame, row: Mapping[str, Any], lacking: Sequence[str]) -> list[str]:
    """The command that runs the missing tasks of a row."""
    if not lacking:
        return []
    same = (runs["model"] == row["model"]) & (runs["variant"] == row["variant"]) & (runs["bits/target"] == row["bits"])
    members = runs[same]
    seeds = ",".join(map(str, sorted(set(members["seed"]))))
    options = [o for o in run_overrides(records(members)[0]) if o.startswith("method.")]
    what = [f"method={members.iloc[0]['method']}", *options, f"bits={row['bits']:g}", f"seed={seeds}"]
    makes = _command(members, lacking, what, source_of(runs))
    return [f"{row['model']}, {row['variant']} at {row['bits']:g} bits: no {', '.join(lacking)}: `{makes}`"]


def _no_task(runs: pd.DataFrame, ran: Sequence[str]) -> list[str]:
    """One line per model about the tasks of GLUE without a run."""
    lines, lacking = [], [task for task in GLUE_TASKS if task not in ran]
    for model, members in runs.groupby("model", sort=True):
        what = [f"method={','.join(method for method in methods_of(runs) if method in set(members['method']))}"]
        what += [f"bits={','.join(f'{bits:g}' for bits in sorted(set(members['bits/target'])))}"]
        what += [f"seed={','.join(map(str, usual_seeds(members)))}"]
        makes = _command(members, lacking, what, source_of(runs))
        lines.append(f"{model}: no run of {', '.join(lacking)} among these: `{makes}`")
    return lines if lacking else []


def _command(members: pd.DataFrame, tasks: Sequence[str], what: Sequence[str], source: str) -> str:
    """The shell command that runs tasks; a checkpoint in a folder named after its task becomes one per task."""
    run = records(members)[0]
    inherited = [o for o in run_overrides(run) if o.startswith("model.checkpoint=") and Path(o).name == _task(run)]
    checkpoints = [f"{Path(o).parent}/${{dataset.task}}" for o in inherited]
    return workload_command(run, [f"dataset.task={','.join(tasks)}", *checkpoints, *what], source)
