"""The main table in short."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import data_free, other_seeds, population_of_rows, settings
from analysis.loading import finished, records
from analysis.methods import Method, methods_of
from analysis.metrics import SCALE, is_better
from analysis.paper import PROPOSED, REFERENCE, short_names
from analysis.table import LEVEL, Table, as_delta, as_kl, as_number, as_ratio, make_table
from analysis.tables.rows import ENDS, shown_in

# Marks of variants beside a number, in order of appearance.
MARKS = ("†", "‡", "§", "¶")
NOT_RUN = "not run"


Row = Mapping[str, Any]


def compact_table(main: Table, runs: pd.DataFrame) -> Table:
    """One row per workload and budget of a `main_table`: KL of every method, and BayesQ against the strongest GPTQ.

    A method is shown by its plain variant, else by the one of lowest KL; GPTQ is shown by the one that BayesQ is
    compared with, and BayesQ always by the plain method. A mark names a variant that is not plain. Bold: an interval of
    the KL ratio below 1, or a significantly better score.

    Args:
        main: of these runs.
    """
    numbers, methods = main.numbers, methods_of(runs)
    ran = set(numbers["method"].dropna()) | {REFERENCE, PROPOSED}
    methods = {name: method for name, method in methods.items() if name in ran}
    names = short_names(dict.fromkeys(numbers["workload"]))
    shown_rows: list[Row] = []
    marks: dict[str, str] = {}
    cells, bold = [], []
    for (workload, bits), members in numbers.groupby(["workload", "bits"], sort=False):
        shown = _shown(records(members[members["n"] > 0]), list(methods))
        shown_rows += filter(None, shown.values())
        for row in shown.values():
            if row and row["variant"] != row["method"]:
                marks.setdefault(row["variant"], MARKS[len(marks) % len(MARKS)] * (1 + len(marks) // len(MARKS)))
        kl = {f"KL, {methods[name].title}": _compact_kl(row, marks) for name, row in shown.items()}
        compared, better = _compared(shown[PROPOSED], shown[REFERENCE], methods, _one_metric(numbers))
        cells.append({"": names[str(workload)], "bits": f"{bits:g}", **kl, **compared})
        bold.append(better)
    marked = pd.DataFrame(bold)
    left_out = sorted({row["variant"] for row in records(numbers)} - {*methods, *marks})
    caption = _caption(numbers, names, methods, marks, left_out)
    shown_runs = shown_in(pd.DataFrame(shown_rows, columns=["workload", "variant"]), finished(runs))
    caption += f"{other_seeds(shown_rows, names, methods)}{settings(shown_runs, names)}"
    columns = {str(name): marked[name] for name in marked}
    return make_table(pd.DataFrame(cells), numbers, columns, caption, main.footnotes, False)


def _shown(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Row]:
    """The row that represents each method at a workload and budget; empty if there is none."""
    shown = {method: _lowest(rows, method) for method in methods}
    shown[PROPOSED] = next((row for row in rows if row["variant"] == PROPOSED), {})
    compared = [row for row in rows if row["variant"] == shown[PROPOSED].get("reference")]
    shown[REFERENCE] = compared[0] if compared else shown[REFERENCE]
    return shown


def _lowest(rows: Sequence[Row], method: str) -> Row:
    """The row of a method's plain variant, else that of lowest KL, else nothing."""
    of_method = [row for row in rows if row["method"] == method and not math.isnan(row["kl"])]
    return min(of_method, key=lambda row: (row["variant"] != method, row["kl"], row["variant"]), default={})


def _compared(
    ours: Row, theirs: Row, methods: Mapping[str, Method], metric: str
) -> tuple[dict[str, str], dict[str, bool]]:
    """The cells that compare the proposed method with the reference, and which of them are bold."""
    us, them = methods[PROPOSED].title, methods[REFERENCE].title
    ratio, delta = ([ours.get(f"{name}{end}", math.nan) for end in ENDS] for name in ("kl_ratio", "delta"))
    cells = {
        f"{us} / {them}": as_ratio(*ratio),
        f"{metric}: FP": as_number(SCALE * (ours or theirs).get("fp", math.nan), ".2f"),
        them: as_number(SCALE * theirs.get("score", math.nan), ".2f"),
        us: as_number(SCALE * ours.get("score", math.nan), ".2f"),
        f"{us} − {them}": as_delta(*delta),
    }
    better = is_better(delta[0]) and ours.get("p_holm", math.nan) < LEVEL
    return cells, {f"{us} / {them}": ratio[-1] < 1, f"{us} − {them}": better}


def _caption(
    numbers: pd.DataFrame,
    names: Mapping[str, str],
    methods: Mapping[str, Method],
    marks: Mapping[str, str],
    left_out: Sequence[str],
) -> str:
    us, them = methods[PROPOSED].title, methods[REFERENCE].title
    named = "".join(f" {mark}: {variant}." for variant, mark in marks.items())
    rest = f" Not shown: {', '.join(left_out)}." if left_out else ""
    return (
        "KL to full precision (nats, mean ± sample standard deviation over calibration seeds) of every method, and "
        f"{us} against the strongest {them}: ratio of KL and points of the primary metric (%), with 95 % intervals "
        f"(paired bootstrap over examples and seeds); {population_of_rows(numbers, names)}. "
        f"{data_free([method.title for method in methods.values() if method.data_free])}The strongest {them} has the "
        f"lowest mean KL at this budget over the seeds that the other methods have.{named}{rest} Bold: an interval "
        "below 1; better at 5 % (Holm-corrected over the main table)."
    )


def _compact_kl(row: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    """KL with its variant's mark, without the zero before the point, and without a spread if all runs are equal."""
    if not row:
        return NOT_RUN
    spread = row["kl_std"] if row["kl_std"] > 0 else math.nan
    shown = re.sub(r"(?<!\d)0\.", ".", as_kl(row["kl"], spread))
    return " ".join([shown, marks[row["variant"]]]) if row["variant"] in marks else shown


def _one_metric(numbers: pd.DataFrame) -> str:
    """The metric of all rows, or `score` if they differ."""
    metrics = set(numbers["metric"].dropna())
    return str(*metrics) if len(metrics) == 1 else "score"
