"""Methods at the paper's budgets, each against the strongest GPTQ."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import (
    known,
    metrics,
    population_of_rows,
    remarks_of,
    settings,
    source_of,
)
from analysis.comparisons import (
    Examples,
    alike,
    strongest_baseline,
    summarise,
)
from analysis.gaps import missing
from analysis.loading import finished, records
from analysis.paper import BUDGETS, CLAIMED_DELTAS, CLAIMED_FOR, METHODS
from analysis.table import (
    GAP,
    Table,
    as_number,
    make_table,
)
from analysis.tables.rows import against, compared, measured, measured_cells, pick, shown_in


def main_table(runs: pd.DataFrame) -> Table:
    """Methods at 3, 3.5 and 4 bits on every workload, each against the strongest GPTQ that was run in its place.

    A variant has rows if it ran at more than one of the budgets, or is the plain method; a method that has no run on a
    workload but on another one is a gap. Budgets that no workload has a result at have no rows, nor have workloads
    without a result at one of these. p values are Holm-corrected over all rows; bold is what is better than GPTQ at
    5 %.
    """
    runs = known(runs)
    done = finished(runs)
    done = done[done["bits/target"].isin(BUDGETS)]
    means = summarise(done)
    runs, budgets = _of_workloads(runs, done), sorted(set(done["bits/target"]))
    methods = [method for method in METHODS if method in set(runs["method"])]
    examples, rows, notes = Examples(), [], []
    for workload, members in runs.groupby("workload", sort=True):
        shown, left_out = _main_variants(members, methods)
        if left_out:
            notes.append(f"{workload}: not shown, as it ran at one of these budgets only: {', '.join(left_out)}.")
        for bits in budgets:
            for variant in shown:
                own = pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **measured(means, own)}
                if not own.empty:
                    reference = strongest_baseline(done, str(workload), bits, alike(records(own)[0]))
                    row["reference"] = reference
                    if reference is not None and reference != variant:
                        where = f"{workload}, {variant} at {bits:g} bits"
                        found, said = against(examples, reference, pick(done, workload, reference, bits), own, where)
                        row |= found
                        notes += said
                    if own.iloc[0]["method"] == "bayesq":
                        row |= _claim(own.iloc[0], bits)
                rows.append(row)
        for variant in shown:
            notes += missing(members, variant, budgets, source_of(runs))
    table = compared(rows, "GPTQ")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **measured_cells(table, "GPTQ"),
            "paper's Δ": table["paper_delta"].map(lambda value: as_number(value, "+.1f")),
            "GPTQ": [
                GAP if not isinstance(name, str) else "this row" if name == own else name
                for name, own in zip(table["reference"], table["variant"], strict=True)
            ],
        }
    )
    caption = (
        f"Methods at {', '.join(f'{bits:g}' for bits in budgets)} bits: {population_of_rows(table)}. "
        f"Score: primary metric ({metrics(runs)}); score and KL to full precision (nats) are mean ± sample standard "
        "deviation over calibration seeds. Δ GPTQ: points over the "
        "strongest GPTQ (lowest mean KL at this budget with the same correction, distillation and calibration size; "
        "named in the last column), with 95 % interval (paired bootstrap over examples and seeds). p: McNemar's exact "
        f"test, where the metric is no accuracy the bootstrap's, Holm-corrected over {int(table['p'].notna().sum())} "
        "tests. Bold: better than GPTQ at 5 %. Plain rtn reads no calibration data: one run of it stands for every "
        f"seed. Paper's Δ: claimed for {' and '.join(CLAIMED_FOR.values())}, shown beside BayesQ on images and text."
        f"{settings(shown_in(table, done))}"
    )
    return make_table(cells, table, {"Δ GPTQ": table["better"]}, caption, [*notes, *remarks_of(runs)])


def _of_workloads(runs: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """The runs of those workloads that `done` has runs of."""
    kept: pd.DataFrame = runs[runs["workload"].isin(set(done["workload"]))]
    return kept


def _main_variants(members: pd.DataFrame, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Variants with rows in the main table, in the order of METHODS, and those that are left to the ablation.

    Args:
        members: runs of one workload.
        methods: that have a row in any case.
    """
    here = members[members["bits/target"].isin(BUDGETS)]
    budgets = here.groupby("variant")["bits/target"].nunique()
    shown = {variant for variant in budgets.index if budgets[variant] > 1 or variant in METHODS}
    of = dict(zip(here["variant"], here["method"], strict=True))
    shown |= {*methods} - {of[variant] for variant in shown}
    order = {method: place for place, method in enumerate(METHODS)}
    place = {variant: order.get(of.get(variant, variant), len(order)) for variant in shown}
    return sorted(shown, key=lambda name: (place[name], name)), sorted(set(budgets.index) - shown)


def _claim(run: Mapping[str, Any] | pd.Series, bits: float) -> dict[str, Any]:
    modality = run["config"]["dataset"].get("modality")
    return {"paper_delta": CLAIMED_DELTAS.get(modality, {}).get(bits), "paper_workload": CLAIMED_FOR.get(modality)}
