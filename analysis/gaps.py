"""What a figure lacks: runs that others of the same workload have, failed ones, and the commands that fill the gaps."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.loading import UNKNOWN, command_overrides, finished
from bayesq.suite.config import WITHOUT_EFFECT

# Keys that a line for several runs gives values of its own.
SWEPT = ("bits", "seed")
# Groups of keys that make a workload.
WORKLOAD = ("experiment", "model", "dataset", "layers", "calibration", "evaluation")


def gaps(runs: pd.DataFrame, budgets: Iterable[float] = (), source: str | Path = "results") -> list[str]:
    """One line for each variant of each workload that lacks runs, with the command that makes them.

    What is expected of every variant are the budgets that any variant of its workload has, those given, and all the
    seeds of its workload.

    Args:
        runs: finished and failed ones.
        budgets: code bits a weight that are expected besides.
        source: where the runs were read from; the commands write there if it is a folder.
    """
    lines = [
        f"{run['path']}: {run['status']}, {run['error']}" for _, run in runs[runs["workload"] == UNKNOWN].iterrows()
    ]
    for workload, members in runs[runs["workload"] != UNKNOWN].groupby("workload", sort=True):
        done = finished(members)
        expected = sorted({*map(float, members["bits/target"]), *map(float, budgets)})
        seeds = sorted(set(members["seed"].astype(int)))
        for variant, own in members.groupby("variant", sort=False):
            had = {
                (float(bits), int(seed))
                for bits, seed in done[done["variant"] == variant][["bits/target", "seed"]].itertuples(index=False)
            }
            lacking = {bits: tuple(s for s in seeds if (bits, s) not in had) for bits in expected}
            for missing in dict.fromkeys(found for found in lacking.values() if found):
                of = [bits for bits, found in lacking.items() if found == missing]
                what = f"{workload}, {variant}: no run at {_listed(of)} bits with seed {_listed(missing)}"
                lines.append(f"{what}{_failures(own, of)}; `{command(own.iloc[0], of, missing, source)}`")
        copies = int(members["duplicates"].sum())
        if copies:
            lines.append(f"{workload}: {copies} further copies of runs were dropped, the newest finished ones count")
    return lines


def command(run: Mapping[str, Any], budgets: Sequence[float], seeds: Sequence[int], source: str | Path) -> str:
    """The line for the shell that makes runs like this one at some budgets and seeds.

    Args:
        run: a row of `load_runs`.
    """
    swept = [f"bits={_listed(budgets, ',')}", f"seed={_listed(seeds, ',')}"]
    many = ["-m"] if len(budgets) * len(seeds) > 1 else []
    return shlex.join(["python", "run.py", *many, *own_overrides(run), *swept, *_folder(source)])


def own_overrides(run: Mapping[str, Any]) -> list[str]:
    """What a run was started with, without budget, seed and what does not determine the result."""
    return [o for o in command_overrides(run) if _key(o).partition(".")[0] not in (*SWEPT, *WITHOUT_EFFECT)]


def workload_command(run: Mapping[str, Any], overrides: Sequence[str], source: str | Path) -> str:
    """The line for the shell that makes other runs of this one's workload.

    Args:
        run: a row of `load_runs`.
        overrides: what the runs are; several values in one of them make a sweep.
    """
    given = {_key(override) for override in overrides}
    kept = [o for o in own_overrides(run) if _key(o).partition(".")[0] in WORKLOAD and _key(o) not in given]
    many = ["-m"] if any("," in override for override in overrides) else []
    return shlex.join(["python", "run.py", *many, *kept, *overrides, *_folder(source)])


def _folder(source: str | Path) -> list[str]:
    return [] if str(source) == "results" or ":" in str(source) else [f"results_dir={source}"]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _listed(values: Iterable[float], separator: str = ", ") -> str:
    return separator.join(f"{value:g}" for value in values)


def _failures(members: pd.DataFrame, budgets: Sequence[float]) -> str:
    failed = members[(members["status"] != "finished") & members["bits/target"].isin(list(budgets))]
    reasons = list(dict.fromkeys(str(error) for error in failed["error"].dropna())) if "error" in failed else []
    return f" ({len(failed)} failed: {'; '.join(reasons)})" if reasons else ""
