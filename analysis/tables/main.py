"""Methods at the paper's budgets, each compared with the strongest variant of the reference method."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import data_free, known, population_of_rows, remarks_of, settings, source_of
from analysis.comparisons import Examples, alike, strongest_baseline, summarise
from analysis.gaps import missing
from analysis.loading import finished, records
from analysis.methods import methods_of, title
from analysis.paper import BUDGETS, CLAIMED_DELTAS, CLAIMED_FOR, PROPOSED, REFERENCE
from analysis.table import GAP, Table, as_number, make_table
from analysis.tables.rivals import RIVAL_COLUMNS, of_rivals, rival_cells, rival_columns, strongest_rivals
from analysis.tables.rows import compared, compared_row, of_scores, of_tests, pick, row_cells, shown_in


def main_table(runs: pd.DataFrame) -> Table:
    """Methods at 3, 3.5 and 4 bits on every workload, each against the strongest GPTQ at the same place.

    A variant has rows if it ran at more than one of the budgets, is the plain method, or is the strongest rival of the
    proposed method. A method without a run on a workload, but with one on another, has a row without numbers. Budgets
    without a result on a workload have no rows, and neither have workloads without a result at these budgets. p values
    are Holm-corrected over all rows; bold is better than GPTQ at 5 %.
    """
    runs = known(runs)
    done = finished(runs)
    done = done[done["bits/target"].isin(BUDGETS)]
    runs = runs[runs["workload"].isin(set(done["workload"]))]
    methods = {name: method for name, method in methods_of(runs).items() if name in set(runs["method"])}
    rows, notes = _rows(runs, done, list(methods))
    table, name = compared(rows, RIVAL_COLUMNS), title(REFERENCE)
    cells = pd.DataFrame(
        {
            **row_cells(table, name),
            **rival_cells(table),
            "paper's Δ": table["paper_delta"].map(lambda value: as_number(value, "+.1f")),
            name: [
                GAP if not isinstance(reference, str) else "this row" if reference == variant else reference
                for reference, variant in zip(table["reference"], table["variant"], strict=True)
            ],
        }
    )
    caption = _caption(table, runs, done, [f"Plain {name}" for name, method in methods.items() if method.data_free])
    return make_table(cells, table, {f"Δ {name}": table["better"]}, caption, [*notes, *remarks_of(runs)])


def _rows(runs: pd.DataFrame, done: pd.DataFrame, methods: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all workloads, and notes about missing variants and runs."""
    means, budgets, examples = summarise(done), sorted(set(done["bits/target"])), Examples()
    rows, notes = [], []
    for workload, members in runs.groupby("workload", sort=True):
        shown, left_out = _variants(members, methods)
        if left_out:
            notes.append(f"{workload}: not shown, as it ran at one of these budgets only: {', '.join(left_out)}.")
        for bits in budgets:
            for variant in shown:
                place = (workload, variant, bits)
                ours = records(pick(done, *place))
                reference = strongest_baseline(done, str(workload), bits, alike(ours[0])) if ours else None
                row, said = compared_row(done, means, place, reference, examples)
                notes += said
                if row.get("method") == PROPOSED:
                    row |= _claim(ours[0]) | rival_columns(done, place, row, examples)
                rows.append(row)
        for variant in shown:
            notes += missing(members, variant, budgets, source_of(runs))
    return rows, notes


def _variants(members: pd.DataFrame, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Variants with rows in the main table, in order, and those for the ablation.

    Args:
        members: runs of one workload.
        methods: methods that always have a row, in order.
    """
    here = members[members["bits/target"].isin(BUDGETS)]
    budgets = here.groupby("variant")["bits/target"].nunique()
    of = dict(zip(here["variant"], here["method"], strict=True))
    shown = {variant for variant in budgets.index if budgets[variant] > 1 or variant == of[variant]}
    shown |= {*methods} - {of[variant] for variant in shown}
    proposed = finished(here[(here["method"] == PROPOSED) & here["variant"].isin(shown)])
    for run in records(proposed.drop_duplicates(["variant", "bits/target"])):
        rivals = strongest_rivals(finished(here[here["bits/target"] == run["bits/target"]]), run)
        shown |= {rival for rival in rivals.values() if rival}
    ordered = sorted(shown, key=lambda variant: (methods.index(of.get(variant, variant)), variant))
    return ordered, sorted(set(budgets.index) - shown)


def _claim(run: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's claim for a run's task at its budget."""
    task, bits = run["config"]["dataset"].get("tasks", [""])[0], run["bits/target"]
    return {"paper_delta": CLAIMED_DELTAS.get(task, {}).get(bits), "paper_workload": CLAIMED_FOR.get(task)}


def _caption(table: pd.DataFrame, runs: pd.DataFrame, done: pd.DataFrame, seedless: Sequence[str]) -> str:
    name, budgets = title(REFERENCE), ", ".join(f"{bits:g}" for bits in sorted(set(done["bits/target"])))
    return (
        f"Methods at {budgets} bits: {population_of_rows(table)}. {of_scores(runs)} Δ {name}: points over the "
        f"strongest {name} (lowest mean KL at this budget with the same distillation and calibration size; "
        f"named in the last column), with 95 % interval (paired bootstrap over examples and seeds). "
        f"{of_rivals(table, done)}{of_tests(table)} "
        f"Bold: better than {name} at 5 %. {data_free(seedless, 'one run of it')}"
        f"Paper's Δ: claimed for {' and '.join(CLAIMED_FOR.values())}, shown beside {title(PROPOSED)} on images and "
        f"text.{settings(shown_in(table, done))}"
    )
