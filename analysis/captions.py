"""Texts of captions and footnotes: numbers of runs and examples, settings, and missing runs."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.comparisons import counted, is_seedless
from analysis.defaults import deviations
from analysis.gaps import command, remarks, why
from analysis.loading import FINISHED, RUNNING, UNKNOWN, WANDB, finished, of_finished_workloads, records
from analysis.methods import Method, label, methods_of
from analysis.metrics import in_words
from analysis.paper import workload_title


def known(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of workloads that have a result; runs of unknown workloads become remarks."""
    shown: pd.DataFrame = of_finished_workloads(runs)
    shown = shown[shown["workload"] != UNKNOWN].copy()
    shown["seed"] = shown["seed"].astype(int)  # unknown workloads have no seed: NaN makes the column float
    shown.attrs["remarks"] = remarks(runs)
    return shown


def remarks_of(runs: pd.DataFrame) -> list[str]:
    """Remarks on all runs: unreadable ones and duplicates.

    Args:
        runs: returned by `known`.
    """
    return list(runs.attrs["remarks"])


def metrics(runs: pd.DataFrame) -> str:
    """The primary metrics of the finished runs, with their units."""
    names = sorted({str(metric) for metric in finished(runs)["primary_metric"].dropna()}) if len(finished(runs)) else []
    return ", ".join(map(in_words, names)) or "none"


def source_of(runs: pd.DataFrame) -> str:
    """Where the runs were read from, for commands."""
    paths = [str(path) for path in runs["path"]]
    if not paths or paths[0].startswith(WANDB):
        return "results"
    return os.path.commonpath([str(Path(path).parent) for path in paths])


def failed(runs: pd.DataFrame) -> list[str]:
    """One line per run without a result, with its command unless it is running."""
    lines = []
    for run in records(runs[runs["status"] != FINISHED]):
        what = f"{run['workload']}, {run['variant']} at {run['bits/target']:g} bits, seed {run['seed']}"
        if run["status"] == RUNNING:
            lines.append(f"{what}, is still running.")
            continue
        makes = command(run, [run["bits/target"]], [int(run["seed"])], source_of(runs))
        lines.append(f"{what}, {why(run)}: `{makes}`")
    return lines


def titled(workload: str) -> str:
    """A workload by the titles of its model and data set, such as `ResNet-56 on CIFAR-10`."""
    return " on ".join(workload_title(workload).split("\n"))


# ------------------------------------------------------------------------------------------------------------ settings


def settings(runs: pd.DataFrame, names: Mapping[str, str] | None = None, without: Iterable[str] = ()) -> str:
    """A sentence with the settings that are neither defaults nor part of a name, by workload; "" if there are none.

    Settings that all variants of a workload share come without a label, those of some variants after their labels.
    Settings that all runs share are in no variant's name, and in a workload's name only if other runs of its model and
    data set differ in them.

    Args:
        names: of workloads, if the table shows other names.
        without: keys that the table or figure shows in another place.
    """
    said = {str(workload): _of_workload(members, without) for workload, members in finished(runs).groupby("workload")}
    shown = {workload: text for workload, text in said.items() if text}
    if not shown:
        return ""
    if len(said) == 1:
        return f" Settings beyond the defaults: {next(iter(shown.values()))}."
    if len(shown) == len(said) and len(set(shown.values())) == 1:
        return f" Settings beyond the defaults, in all workloads: {next(iter(shown.values()))}."
    parts = [f"{(names or {}).get(workload, workload)}: {text}" for workload, text in shown.items()]
    return f" Settings beyond the defaults: {'; '.join(parts)}."


def _of_workload(members: pd.DataFrame, without: Iterable[str]) -> str:
    """Settings of one workload's finished runs, first those that all variants share."""
    methods = methods_of(members)
    by_variant: dict[str, dict[str, str]] = {}
    for variant, of_variant in members.groupby("variant", sort=False):
        run = records(of_variant)[0]
        named = {word.partition("=")[0] for word in f"{run['workload']} {variant}".split(" ")}
        changed = {key: text for key, text in deviations(run).items() if key not in without}
        by_variant[str(variant)] = {
            key: text for key, text in changed.items() if not {key, key.removeprefix("method.")} & named
        }
    first = next(iter(by_variant.values()))
    shared = {
        key: text
        for key, text in first.items()
        if all(of_variant.get(key) == text for of_variant in by_variant.values())
    }
    parts = [f"{key}={text}" for key, text in shared.items()]
    for variant, further in by_variant.items():
        rest = [f"{key}={text}" for key, text in further.items() if key not in shared]
        parts += [f"{label(variant, methods)} {' '.join(rest)}"] if rest else []
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------- population


def seeds(numbers: pd.Series) -> str:
    """`n = 3 seeds`, `n = 2 to 3 seeds`, `n = 1 seed`; points without a run do not count."""
    had = [int(n) for n in numbers if n > 0]
    return f"n = {counted(had)} seed{'' if set(had) == {1} else 's'}"


def population(data: pd.DataFrame, runs: pd.DataFrame, axis: str = "bits") -> str:
    """`n = 3 seeds, 872 test examples`, with the points that have another n.

    Variants that read no calibration data are named once, because they have a single run.

    Args:
        data: with a column n.
        runs: runs of the data, for the number of test examples.
        axis: column that names a point of a variant.
    """
    shown = runs[runs["workload"].isin(data["workload"].unique())]
    done = finished(shown)
    seedless = {
        str(run["variant"]) for run in records(done.drop_duplicates(["workload", "variant"])) if is_seedless(run)
    }
    measured = data[data["n"] > 0]
    counting = measured[~measured["variant"].isin(seedless)]
    usual = int((measured if counting.empty else counting)["n"].mode().iloc[-1])
    several, methods = data["workload"].nunique() > 1, methods_of(runs)
    others: list[str] = []
    single: dict[str, None] = {}
    for (workload, variant, n), points in data[data["n"] != usual].groupby(["workload", "variant", "n"], sort=True):
        if n == 1 and variant in seedless:
            single[label(str(variant), methods)] = None
            continue
        where = f"{workload_title(str(workload))}, ".replace("\n", " ") if several else ""
        values = ", ".join(f"{value:g}" for value in points[axis])
        others.append(f"{where}{label(str(variant), methods)} at {values} {axis}: {n or 'none'}")
    if single:
        others.append(f"{', '.join(single)}: 1, no calibration data read")
    exceptions = f" ({'; '.join(others)})" if others else ""
    return f"n = {usual} seed{'s' if usual != 1 else ''}{exceptions}, {_examples(done)} test examples"


def _examples(done: pd.DataFrame) -> str:
    """Number of test examples, by workload if the numbers differ."""
    sizes = {
        str(name): counted(members["evaluation/examples"]) for name, members in done.groupby("workload", sort=True)
    }
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    return ", ".join(f"{size} ({' '.join(workload_title(name).split())})" for name, size in sizes.items())


def population_of_rows(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> str:
    """The n of a table's rows: seeds, and examples by workload; `names` replaces names of workloads."""
    there = table[table["n"] > 0]
    if there.empty:
        return "no finished run (n = 0)"
    sizes = [
        f"{(names or {}).get(str(workload), workload)} {counted(rows['examples'])}"
        for workload, rows in there.groupby("workload", sort=True)
    ]
    return f"n = {counted(there['n'])} calibration seeds; evaluation examples: {'; '.join(sizes)}"


def other_seeds(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], methods: Mapping[str, Method]) -> str:
    """A sentence on the rows with another n than most, for a table without a column n; "" if there are none.

    Args:
        rows: with workload, bits, method, variant and n; a plain method that reads no calibration data, and is the
            same under every seed, does not count.
    """
    seedless = {name for name, method in methods.items() if method.data_free}
    counting = [row for row in rows if row["variant"] not in seedless and row["n"] > 0]
    numbers = [int(row["n"]) for row in counting]
    usual = max(sorted(set(numbers), reverse=True), key=numbers.count, default=math.nan)
    others: dict[tuple[str, str, int], list[str]] = {}
    for row in counting:
        if row["n"] != usual:
            key = (names[str(row["workload"])], label(str(row["variant"]), methods), int(row["n"]))
            others.setdefault(key, []).append(f"{row['bits']:g}")
    parts = [f"{name}, {variant} at {', '.join(bits)} bits {n}" for (name, variant, n), bits in others.items()]
    return f" Cells of other than {usual} seeds: {'; '.join(parts)}." if parts else ""


def data_free(names: Sequence[str], one_run: str = "one run") -> str:
    """A sentence about the methods of a table that read no calibration data; "" if there are none."""
    verb = "reads" if len(names) == 1 else "read"
    return f"{' and '.join(names)} {verb} no calibration data: {one_run} stands for every seed. " if names else ""
