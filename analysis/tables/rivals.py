"""The strongest rival of a run, and the combinations of rival, allocator and inputs that were not run.

Rivals are the methods whose YAML has `display.rival`: the values of `inputs` that the method has as a rival.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.comparisons import ALIKE, Examples, alike, strongest_of
from analysis.loading import records
from analysis.methods import Method, default_of, label, methods_of, setting
from analysis.paper import PROPOSED
from analysis.table import as_ratio, cells_of
from analysis.tables.rows import ENDS, kl_ratio_to, pick

ALLOCATORS = ("uniform", "knapsack")
# Settings that name a rival, and those that a run shares with its equal rivals.
NAMED = ("allocator", "inputs", "correction")
EQUAL = (*ALIKE, "inputs", "correction", "rotate")
# The columns of each kind of rival, and what notes call it.
KINDS = {"rival": (ALIKE, "strongest rival"), "equal_rival": (EQUAL, "equal rival")}
RIVAL_COLUMNS = {
    f"{kind}{column}": "float64" if column else "object"
    for kind in KINDS
    for column in ("", *(f"_ratio{end}" for end in ENDS))
}


def rival_columns(
    done: pd.DataFrame, place: tuple[Any, str, float], row: Mapping[str, Any], examples: Examples
) -> dict[str, Any]:
    """The strongest rivals of a variant, and its ratios of KL to them.

    Args:
        done: finished runs.
        place: workload, variant and budget, with a run.
        row: the variant's row; its ratio to the reference is not computed again.
    """
    workload, _, bits = place
    ours, there = pick(done, *place), _at(done, workload, bits)
    columns: dict[str, Any] = {}
    for kind, rival in strongest_rivals(there, records(ours)[0]).items():
        if rival is None:
            continue
        if rival == row.get("reference"):
            ratio = [row.get(f"kl_ratio{end}", math.nan) for end in ENDS]
        else:
            ratio = kl_ratio_to(examples, pick(done, workload, rival, bits), ours)
        columns |= {kind: rival, **{f"{kind}_ratio{end}": value for end, value in zip(ENDS, ratio, strict=True)}}
    return columns


def of_rivals(numbers: pd.DataFrame, done: pd.DataFrame, names: Mapping[str, str] | None = None) -> str:
    """A caption's sentences that name the rivals of the proposed method, and the combinations that were not run.

    Args:
        numbers: those of the main table.
        done: finished runs.
        names: of workloads, if the table shows other names.
    """
    methods = methods_of(done)
    budgets: dict[tuple[str, str], list[str]] = {}
    for row in records(numbers[(numbers["method"] == PROPOSED) & (numbers["n"] > 0)]):
        place = (row["workload"], row["variant"], row["bits"])
        run, there = records(pick(done, *place))[0], _at(done, row["workload"], row["bits"])
        parts = []
        for kind, (_, words) in KINDS.items():
            theirs = records(there[there["variant"] == row[kind]])
            parts.append(f"{words}: {_described(theirs[0], methods) if theirs else 'none was run'}")
        missing = _not_run(there, run, methods)
        parts += [f"not run: {', '.join(missing)}"] if missing else []
        where = f"{label(row['variant'], methods)}, {(names or {}).get(row['workload'], row['workload'])}"
        budgets.setdefault((where, "; ".join(parts)), []).append(f"{row['bits']:g}")
    rivals = ", ".join(method.title for method in methods_of().values() if method.rival)
    listed = "".join(f" {where} at {', '.join(bits)} bits: {text}." for (where, text), bits in budgets.items())
    return (
        f"Strongest rival: the lowest mean KL of {rivals} with any allocator, inputs, correction and rotation, but the "
        "same distillation and calibration size; equal rival: of these the strongest with the same inputs, correction "
        "and rotation."
        f"{listed} "
    )


def strongest_rivals(there: pd.DataFrame, run: Mapping[str, Any]) -> dict[str, str | None]:
    """The variant of each kind of rival of a run, None if none was run.

    Args:
        there: finished runs of its workload and budget.
    """
    rivals = [name for name, method in methods_of(there).items() if method.rival]
    return {kind: strongest_of(rivals, there, alike(run, keys), keys) for kind, (keys, _) in KINDS.items()}


def rival_cells(table: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of the ratios of KL to both kinds of rival."""
    heads = {"KL / strongest rival's": "rival", "KL / equal rival's": "equal_rival"}
    return {
        head: cells_of(table, *(f"{kind}_ratio{end}" for end in ENDS), form=as_ratio) for head, kind in heads.items()
    }


def _at(done: pd.DataFrame, workload: str, bits: float) -> pd.DataFrame:
    there: pd.DataFrame = done[(done["workload"] == workload) & (done["bits/target"] == bits)]
    return there


def _described(run: Mapping[str, Any], methods: Mapping[str, Method]) -> str:
    settings = ", ".join(f"{key}={setting(run, key)}" for key in NAMED)
    settings += ", rotated" if run["config"].get("rotate") else ""
    return f"{methods[run['method']].title} ({settings})"


def _not_run(there: pd.DataFrame, run: Mapping[str, Any], methods: Mapping[str, Method]) -> list[str]:
    """Combinations without a run under the same conditions; correction is free, but not for inputs of the run itself.

    Args:
        there: finished runs of the workload and budget.
        run: that the rivals are compared with.
    """
    inputs_of_run, correction = setting(run, "inputs"), setting(run, "correction")
    others = [other for other in records(there) if alike(other) == alike(run)]
    ran = {(other["method"], *(setting(other, key) for key in NAMED)) for other in others}
    ran_with_any = {key[:3] for key in ran}
    missing = []
    for name, method in methods.items():
        if method.rival and all(key[0] != name for key in ran):
            missing.append(method.title)
            continue
        for inputs in method.rival:
            for allocator in ALLOCATORS:
                if inputs == inputs_of_run and (name, allocator, inputs, correction) not in ran:
                    missing.append(_combination(name, (allocator, inputs, correction), methods))
                elif (name, allocator, inputs) not in ran_with_any:
                    missing.append(_combination(name, (allocator, inputs), methods))
    return missing


def _combination(name: str, values: tuple[str, ...], methods: Mapping[str, Method]) -> str:
    """A combination as `label` shows it: `GPTQ + knapsack`."""
    settings = [f"{key}={value}" for key, value in zip(NAMED, values, strict=False) if value != default_of(name, key)]
    return label(" ".join([name, *settings]), methods)
