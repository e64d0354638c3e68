"""Missing runs of a table or figure, failed runs, and the commands that make them."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.comparisons import is_seedless
from analysis.defaults import AXES, command_overrides, is_of_the_suite
from analysis.loading import FINISHED, RUNNING, UNKNOWN, finished, of_finished_workloads, records
from analysis.methods import is_data_free, methods_of
from analysis.paper import BUDGETS
from bayesq.suite.config import WITHOUT_EFFECT
from bayesq.suite.results import recorded_config_dir

# Keys that a command for several runs sweeps over.
SWEPT = ("bits", "seed")
# Groups of keys that make a workload.
WORKLOAD = ("experiment", "model", "dataset", "layers", "calibration", "evaluation")


def gaps(runs: pd.DataFrame, budgets: Iterable[float] = (), source: str | Path = "results") -> list[str]:
    """One line for each variant of each workload that lacks runs, with the command that makes them, and `remarks`.

    Each variant should have all budgets of its workload and the given ones, with the seeds of `lacking_seeds`. A
    workload without any result is not shown, so it lacks nothing.

    Args:
        runs: finished and failed runs.
        budgets: further expected code bits per weight.
        source: where the runs were read from; the commands write there if it is a folder.
    """
    lines = []
    shown = of_finished_workloads(runs)
    for _, members in shown[shown["workload"] != UNKNOWN].groupby("workload", sort=True):
        expected = sorted({*map(float, members["bits/target"]), *map(float, budgets)})
        for variant in dict.fromkeys(members["variant"]):
            lines += missing(members, str(variant), expected, source)
    return [*lines, *remarks(runs)]


def missing(members: pd.DataFrame, variant: str, budgets: Iterable[float], source: str | Path) -> list[str]:
    """Lines about the missing runs of a variant at some budgets: the reason, if known, and the command.

    Budgets that lack the same seeds share a line.

    Args:
        members: all runs of one workload, failed ones included.
        variant: one of these runs, or a method without runs.
    """
    of_variant = members[members["variant"] == variant]
    where = f"{members.iloc[0]['workload']}, {variant} at {{}} bits"
    running = of_variant[(of_variant["status"] == RUNNING) & of_variant["bits/target"].isin(list(budgets))]
    lines = []
    for run in records(running):
        at = where.format(f"{run['bits/target']:g}")
        lines.append(f"{at}: seed {int(run['seed'])} is still running.")
    usual = usual_seeds(members)
    lacking = {bits: lacking_seeds(members, variant, bits, usual) for bits in budgets}
    for seeds in dict.fromkeys(lacked for lacked in lacking.values() if lacked):
        of = [bits for bits, lacked in lacking.items() if lacked == seeds]
        if of_variant.empty:
            what = [f"method={variant}", f"bits={_listed(of, ',')}", f"seed={_listed(seeds, ',')}"]
            makes = workload_command(records(members)[0], what, source)
        else:
            makes = command(records(of_variant)[0], of, seeds, source)
        lines.append(
            f"{where.format(_listed(of))}: no result with seed {_listed(seeds)}{_reasons(of_variant, of)}: `{makes}`"
        )
    return lines


def lacking_seeds(members: pd.DataFrame, variant: str, bits: float, usual: Sequence[int]) -> tuple[int, ...]:
    """The missing seeds of a variant at a budget: the usual ones and those of failed runs without a result.

    A run that is still running is not missing. A variant that reads no calibration data needs one run with any seed.
    """
    of_variant = members[members["variant"] == variant]
    cell = of_variant[of_variant["bits/target"] == bits]
    had = {int(seed) for seed in cell[cell["status"].isin([FINISHED, RUNNING])]["seed"]}
    tried = [int(seed) for seed in cell["seed"]]
    if is_seedless(records(of_variant)[0]) if len(of_variant) else is_data_free(variant):
        return () if had else tuple((tried or usual)[:1])
    return tuple(sorted({*usual, *tried} - had))


def usual_seeds(members: pd.DataFrame) -> list[int]:
    """The seeds that every variant of a workload should have: those of at least half of its cells.

    A cell is a variant at a budget; variants that read no calibration data do not count.
    """
    counting = members[[not is_seedless(run) for run in records(members)]]
    grouped = (members if counting.empty else counting).groupby(["variant", "bits/target"])
    cells = [{int(seed) for seed in cell["seed"]} for _, cell in grouped]
    return sorted(seed for seed in set().union(*cells) if 2 * sum(seed in cell for cell in cells) >= len(cells))


def remarks(runs: pd.DataFrame) -> list[str]:
    """Remarks on all runs: unreadable ones, results that are no numbers, and duplicates."""
    unknown = records(runs[runs["workload"] == UNKNOWN])
    lines = [f"{run['path']}: {why(run)}" for run in unknown]
    for run in records(finished(runs)):
        undefined = [name for name in (f"q/{run.get('primary_metric')}", "q/kl_to_fp") if pd.isna(run.get(name))]
        if undefined:
            what = f"{run['workload']}, {run['variant']} at {run['bits/target']:g} bits, seed {run['seed']}"
            lines.append(f"{what}: its {' and '.join(undefined)} is no number; means that it belongs to are left out.")
    dropped = int(runs["duplicates"].sum())
    if dropped:
        lines.append(f"{dropped} duplicate {'run was' if dropped == 1 else 'runs were'} dropped; the newest count.")
    return lines


def why(run: Mapping[str, Any]) -> str:
    """Why a run has no result."""
    return str(run["status"]) if pd.isna(run["error"]) else f"{run['status']}: {run['error']}"


def command(run: Mapping[str, Any], budgets: Sequence[float], seeds: Sequence[int], source: str | Path) -> str:
    """The shell command that makes runs like this one at some budgets and seeds.

    Args:
        run: a row of `load_runs`.
    """
    swept = [f"bits={_listed(budgets, ',')}", f"seed={_listed(seeds, ',')}"]
    many = ["-m"] if len(budgets) * len(seeds) > 1 else []
    chosen = [*run_overrides(run), *swept]
    return shlex.join(["python", "run.py", *many, *_config_dir(run, chosen), *chosen, *_folder(source)])


def run_overrides(run: Mapping[str, Any]) -> list[str]:
    """Overrides of a run, without budget, seed and keys that do not change the result."""
    return [o for o in command_overrides(run) if _key(o).partition(".")[0] not in (*SWEPT, *WITHOUT_EFFECT)]


def main_sweep() -> str:
    """The shell command that runs every method of the suite at the paper's budgets."""
    return f"python run.py -m method={','.join(methods_of())} bits={_listed(BUDGETS, ',')} seed=0,1,2"


def workload_command(run: Mapping[str, Any], overrides: Sequence[str], source: str | Path) -> str:
    """The shell command that makes other runs of this one's workload.

    Args:
        run: a row of `load_runs`.
        overrides: of the other runs; several values in one of them make a sweep.
    """
    given = {_key(override) for override in overrides}
    inherited = [o for o in run_overrides(run) if _key(o).partition(".")[0] in WORKLOAD and _key(o) not in given]
    many = ["-m"] if any("," in override for override in overrides) else []
    chosen = [*inherited, *overrides]
    return shlex.join(["python", "run.py", *many, *_config_dir(run, chosen), *chosen, *_folder(source)])


def _config_dir(run: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The option for choices of which the suite has no YAML file: the folder that the run had, or DIR."""
    choices = [(_key(o), name) for o in overrides for name in o.partition("=")[2].split(",")]
    if all(is_of_the_suite(group, name) for group, name in choices if group in (*AXES, "posterior")):
        return []
    return ["--config-dir", recorded_config_dir(Path(run["path"])) or "DIR"]


def _folder(source: str | Path) -> list[str]:
    return [] if str(source) == "results" or ":" in str(source) else [f"results_dir={source}"]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _listed(values: Iterable[float], separator: str = ", ") -> str:
    return separator.join(f"{value:g}" for value in values)


def _reasons(of_variant: pd.DataFrame, budgets: Sequence[float]) -> str:
    rest = of_variant[~of_variant["status"].isin([FINISHED, RUNNING]) & of_variant["bits/target"].isin(list(budgets))]
    reasons = dict.fromkeys(f"seed {int(run['seed'])} {why(run)}" for run in records(rest))
    return f" ({'; '.join(reasons)})" if reasons else ""
