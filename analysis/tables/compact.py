"""The main table in short."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import data_free, other_seeds, population_of_rows, settings
from analysis.loading import finished, records
from analysis.methods import Method, default_of, label, methods_of, setting
from analysis.metrics import SCALE, is_better
from analysis.paper import PROPOSED, REFERENCE, short_names
from analysis.table import LEVEL, Table, as_delta, as_kl, as_number, as_ratio, make_table
from analysis.tables.rivals import of_rivals
from analysis.tables.rows import ENDS, shown_in

# Marks of variants beside a number, in order of appearance.
MARKS = ("†", "‡", "§", "¶")
NOT_RUN = "not run"


Row = Mapping[str, Any]


def compact_table(main: Table, runs: pd.DataFrame) -> Table:
    """One row per workload and budget of a `main_table`: KL of every method, and BayesQ against the strongest GPTQ.

    A method is shown by its plain variant, else by the one of lowest KL; GPTQ is shown by the one that BayesQ is
    compared with, and BayesQ always by the plain method. Runs of a rival with another allocator than its default are
    in a separate column, `GPTQ + knapsack`, with the lowest KL. A mark names a variant that the column's head does
    not name. The ratio to the strongest rival is shown if it differs from that GPTQ. Bold: an interval of a KL
    ratio below 1, or a significantly better score.

    Args:
        main: the main table of these runs.
    """
    methods = methods_of(runs)
    ran = set(main.numbers["method"].dropna()) | {REFERENCE, PROPOSED}
    methods = {name: method for name, method in methods.items() if name in ran}
    numbers = main.numbers.assign(column=_columns(main.numbers, runs, methods))
    heads = _heads(numbers, methods)
    names = short_names(dict.fromkeys(numbers["workload"]))
    rivals = bool((numbers["rival"].notna() & (numbers["rival"] != numbers["reference"])).any())
    shown_rows: list[Row] = []
    marks: dict[str, str] = {}
    cells, bold = [], []
    for (workload, bits), members in numbers.groupby(["workload", "bits"], sort=False):
        shown, theirs = _shown(records(members[members["n"] > 0]), heads, methods)
        for row in filter(None, shown.values()):
            shown_rows.append(row)
            if label(row["variant"], methods) != row["column"]:
                marks.setdefault(row["variant"], MARKS[len(marks) % len(MARKS)] * (1 + len(marks) // len(MARKS)))
        kl = {f"KL, {head}": _compact_kl(row, marks) for head, row in shown.items()}
        compared, better = _compared(shown[methods[PROPOSED].title], theirs, methods, _one_metric(numbers), rivals)
        if theirs and theirs["column"] != methods[REFERENCE].title:
            compared[methods[REFERENCE].title] += f" ({theirs['column']})"
        cells.append({"": names[str(workload)], "bits": f"{bits:g}", **kl, **compared})
        bold.append(better)
    marked = pd.DataFrame(bold)
    left_out = sorted({*numbers["variant"]} - {*methods} - {row["variant"] for row in shown_rows})
    caption = _caption(numbers, names, methods, marks, left_out)
    shown_runs = shown_in(pd.DataFrame(shown_rows, columns=["workload", "variant"]), finished(runs))
    caption += (
        f" {of_rivals(numbers[numbers['variant'] == PROPOSED], finished(runs), names)}".rstrip() if rivals else ""
    )
    caption += f"{other_seeds(shown_rows, names, methods)}{settings(shown_runs, names)}"
    columns = {str(name): marked[name] for name in marked}
    return make_table(pd.DataFrame(cells), main.numbers, columns, caption, main.footnotes, False)


def _columns(numbers: pd.DataFrame, runs: pd.DataFrame, methods: Mapping[str, Method]) -> list[str]:
    """The head of each row's column: the method's title, and a rival's allocator if it is not the default."""
    allocators = {
        (run["workload"], run["variant"]): setting(run, "allocator")
        for run in records(finished(runs).drop_duplicates(["workload", "variant"]))
    }
    heads = []
    for row in records(numbers):
        method, allocator = methods.get(row["method"]), allocators.get((row["workload"], row["variant"]))
        name = "" if method is None else method.name
        if method is not None and method.rival and allocator not in (None, default_of(name, "allocator")):
            name += f" allocator={allocator}"
        heads.append(label(name, methods))
    return heads


def _heads(numbers: pd.DataFrame, methods: Mapping[str, Method]) -> list[str]:
    """The heads of all columns: each method, followed by its other allocators."""
    heads = []
    for name, method in methods.items():
        of_method = set(numbers[numbers["method"] == name]["column"])
        heads += [method.title, *sorted(of_method - {method.title})]
    return heads


def _shown(rows: Sequence[Row], heads: Sequence[str], methods: Mapping[str, Method]) -> tuple[dict[str, Row], Row]:
    """The row of each column at a workload and budget, empty if there is none, and that of the compared reference."""
    us, them = methods[PROPOSED].title, methods[REFERENCE].title
    shown = {head: _lowest(rows, head) for head in heads}
    shown[us] = next((row for row in rows if row["variant"] == PROPOSED), {})
    theirs = next((row for row in rows if row["variant"] == shown[us].get("reference")), shown[them])
    if theirs:
        shown[theirs["column"]] = theirs
    return shown, theirs


def _lowest(rows: Sequence[Row], head: str) -> Row:
    """The row of a column's plain method, else that of lowest KL, else nothing."""
    there = [row for row in rows if row["column"] == head and not math.isnan(row["kl"])]
    return min(there, key=lambda row: (row["variant"] != row["method"], row["kl"], row["variant"]), default={})


def _compared(
    ours: Row, theirs: Row, methods: Mapping[str, Method], metric: str, rivals: bool
) -> tuple[dict[str, str], dict[str, bool]]:
    """The cells that compare the proposed method with the reference, and which of them are bold.

    Args:
        rivals: whether there is a column for the strongest rival.
    """
    us, them = methods[PROPOSED].title, methods[REFERENCE].title
    ratio, delta, rival = (
        [ours.get(f"{name}{end}", math.nan) for end in ENDS] for name in ("kl_ratio", "delta", "rival_ratio")
    )
    ratios = {f"{us} / {them}": ratio} | ({f"{us} / strongest rival": rival} if rivals else {})
    cells = {
        **{head: as_ratio(*values) for head, values in ratios.items()},
        f"{metric}: FP": as_number(SCALE * (ours or theirs).get("fp", math.nan), ".2f"),
        them: as_number(SCALE * theirs.get("score", math.nan), ".2f"),
        us: as_number(SCALE * ours.get("score", math.nan), ".2f"),
        f"{us} − {them}": as_delta(*delta),
    }
    better = is_better(delta[0], ours.get("metric")) and ours.get("p_holm", math.nan) < LEVEL
    return cells, {head: values[-1] < 1 for head, values in ratios.items()} | {f"{us} − {them}": better}


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
