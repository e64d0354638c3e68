"""The gain of each part of the proposed method: each of its variants against the full method."""

import math
from typing import Any

import pandas as pd

from analysis.captions import known, population_of_rows, remarks_of, settings, source_of
from analysis.comparisons import Examples, summarise
from analysis.gaps import missing, workload_command
from analysis.loading import finished, records
from analysis.methods import title
from analysis.paper import PROPOSED, REFERENCE
from analysis.table import LEVEL, Table, make_table
from analysis.tables.rows import compared, compared_row, of_scores, of_tests, row_cells, shown_in
from bayesq.defaults import conf_dir


def ablation_table(runs: pd.DataFrame) -> Table:
    """Every variant of BayesQ and GPTQ against the full method, at the budgets where a variant of BayesQ ran."""
    runs = known(runs)
    rows, notes = _rows(runs)
    table = compared(rows)
    caption = (
        f"Ablation: {population_of_rows(table)}. Every row switches the named settings of the full method "
        f"({PROPOSED}). {of_scores(runs)} Δ and the ratio of KL are against the full method, with 95 % intervals "
        f"(paired bootstrap over examples and seeds). {of_tests(table)} Bold: different from the full method at 5 %."
        f"{no_gain(table)}{settings(shown_in(table, finished(runs)))}"
    )
    significant = {"Δ full": table["p_holm"] < LEVEL}
    cells = pd.DataFrame(row_cells(table, "full", "variant"))
    return make_table(cells, table, significant, caption, [*notes, *remarks_of(runs)])


def no_gain(table: pd.DataFrame) -> str:
    """A caption's sentence with the variants of the full method whose KL is not higher; "" if there are none."""
    variants = table[(table["method"] == PROPOSED) & (table["variant"] != PROPOSED)]
    several = len(table.groupby(["workload", "bits"])) > 1
    by_place: dict[str, list[str]] = {}
    for row in records(variants[variants["kl_ratio_low"] <= 1]):
        where = f"{row['workload']} at {row['bits']:g} bits: " if several else ""
        lower = " (lower KL)" if row["kl_ratio_high"] < 1 else ""
        by_place.setdefault(where, []).append(f"{row['variant'].removeprefix(PROPOSED).strip()}{lower}")
    if not by_place:
        return ""
    listed = "; ".join(f"{where}{', '.join(names)}" for where, names in by_place.items())
    return f" No gain measured (the interval of the ratio includes 1 or is below it) over {listed}."


def _rows(runs: pd.DataFrame) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all workloads, and notes about missing variants and runs."""
    done, means, examples, rows, notes = finished(runs), summarise(runs), Examples(), [], []
    for workload, members in runs.groupby("workload", sort=True):
        ours = done[(done["workload"] == workload) & (done["method"] == PROPOSED) & (done["variant"] != PROPOSED)]
        if ours.empty:
            sweep = [f"ablation={','.join(_ablations(members))}", "bits=3", "seed=0,1,2"]
            makes = workload_command(records(members)[0], sweep, source_of(runs))
            notes.append(f"{workload}: no variant of {title(PROPOSED)} among these runs: `{makes}`")
        for bits in sorted(set(ours["bits/target"])):
            here = members[(members["bits/target"] == bits) & members["method"].isin([PROPOSED, REFERENCE])]
            for variant in sorted({PROPOSED, *here["variant"]}, key=lambda name: (name != PROPOSED, name)):
                reference = None if variant == PROPOSED else PROPOSED
                row, said = compared_row(done, means, (workload, variant, bits), reference, examples)
                rows.append(row)
                notes += [*said, *missing(members, variant, [bits], source_of(runs))]
    return rows, notes


def _ablations(members: pd.DataFrame) -> list[str]:
    """Names of the suite's ablations, without calibration sets larger than the pool of a workload."""
    pool = members.iloc[0]["config"]["dataset"].get("calibration_pool") or math.inf
    names = sorted(path.stem for path in (conf_dir() / "ablation").glob("*.yaml"))
    usable = [name for name in names if not (name.startswith("examples_") and int(name.partition("_")[2]) > pool)]
    return sorted(usable, key=lambda name: name != "full")
