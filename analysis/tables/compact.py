"""The main table in short."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import (
    other_seeds,
    population_of_rows,
    settings,
)
from analysis.comparisons import (
    BASELINE,
)
from analysis.loading import finished, records
from analysis.paper import METHODS, NAMES, short_names
from analysis.table import (
    LEVEL,
    Table,
    as_delta,
    as_kl,
    as_number,
    as_ratio,
    make_table,
)
from analysis.tables.rows import shown_in

# What names a variant beside a number, in order of appearance.
MARKS = ("†", "‡", "§", "¶")
NOT_RUN = "not run"


def compact_table(main: Table, runs: pd.DataFrame) -> Table:
    """One row per workload and budget of a `main_table`: KL of every method, and BayesQ against the strongest GPTQ.

    A method that has a row is shown by its plain variant, where there is none by that of lowest KL, and GPTQ by the one
    that BayesQ is compared with; a mark names a variant that is not the plain one. Of BayesQ the plain method counts.
    Bold: an interval of the KL ratio below 1, a significantly better score.

    Args:
        main: of these runs.
    """
    numbers = main.numbers
    ran = set(numbers["method"].dropna()) | {BASELINE, "bayesq"}
    counted_rows: list[Mapping[str, Any]] = []
    names = short_names(dict.fromkeys(numbers["workload"]))
    marks: dict[str, str] = {}
    rows, bold = [], []
    for (workload, bits), own in numbers.groupby(["workload", "bits"], sort=False):
        found = records(own[own["n"] > 0])
        shown = {method: _shown(found, method) for method in METHODS if method in ran}
        bayesq = shown["bayesq"] = next((row for row in found if row["variant"] == "bayesq"), {})
        against = [row for row in found if row["variant"] == bayesq.get("reference")]
        gptq = shown[BASELINE] = against[0] if against else shown[BASELINE]
        counted_rows += filter(None, shown.values())
        for row in shown.values():
            if row and row["variant"] != row["method"]:
                marks.setdefault(row["variant"], MARKS[len(marks) % len(MARKS)] * (1 + len(marks) // len(MARKS)))
        ratio, delta = (
            [bayesq.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high")] for name in ("kl_ratio", "delta")
        )
        better = delta[0] > 0 and bayesq.get("p_holm", math.nan) < LEVEL
        rows.append(
            {
                "": names[str(workload)],
                "bits": f"{bits:g}",
                **{f"KL, {NAMES[method]}": _compact_kl(row, marks) for method, row in shown.items()},
                "BayesQ / GPTQ": as_ratio(*ratio),
                f"{_one_metric(numbers)}: FP": as_number(100 * (bayesq or gptq).get("fp", math.nan), ".2f"),
                "GPTQ": as_number(100 * gptq.get("score", math.nan), ".2f"),
                "BayesQ": as_number(100 * bayesq.get("score", math.nan), ".2f"),
                "BayesQ − GPTQ": as_delta(*delta),
            }
        )
        bold.append({"BayesQ / GPTQ": ratio[-1] < 1, "BayesQ − GPTQ": better})
    named = "".join(f" {mark}: {variant}." for variant, mark in marks.items())
    left_out = sorted({row["variant"] for row in records(numbers)} - {*METHODS, *marks})
    rest = f" Not shown: {', '.join(left_out)}." if left_out else ""
    caption = (
        "KL to full precision (nats, mean ± sample standard deviation over calibration seeds) of every method, and "
        "BayesQ against the strongest GPTQ: ratio of KL and points of the primary metric (%), with 95 % intervals "
        f"(paired bootstrap over examples and seeds); {population_of_rows(numbers, names)}. "
        "RTN reads no calibration data: one run stands for every seed. The strongest GPTQ has the lowest mean KL at "
        f"this budget over the seeds that the other methods have.{named}{rest} Bold: an interval below 1; better at 5 "
        f"% (Holm-corrected over the main table).{other_seeds(counted_rows, names)}"
        f"{settings(shown_in(pd.DataFrame(counted_rows, columns=['workload', 'variant']), finished(runs)), names)}"
    )
    marked = pd.DataFrame(bold)
    return make_table(
        pd.DataFrame(rows), numbers, {str(name): marked[name] for name in marked}, caption, main.footnotes, False
    )


def _shown(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """The row of a method's plain variant, else that of lowest KL, else nothing."""
    own = [row for row in rows if row["method"] == method and not math.isnan(row["kl"])]
    return min(own, key=lambda row: (row["variant"] != method, row["kl"], row["variant"]), default={})


def _compact_kl(row: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    """KL without the zeros before the point, nor a spread of runs that are all the same; with its variant's mark."""
    if not row:
        return NOT_RUN
    spread = row["kl_std"] if row["kl_std"] > 0 else math.nan
    shown = re.sub(r"(?<!\d)0\.", ".", as_kl(row["kl"], spread))
    return " ".join([shown, marks[row["variant"]]]) if row["variant"] in marks else shown


def _one_metric(numbers: pd.DataFrame) -> str:
    """The metric of all rows, `score` where they differ."""
    metrics = set(numbers["metric"].dropna())
    return str(*metrics) if len(metrics) == 1 else "score"
