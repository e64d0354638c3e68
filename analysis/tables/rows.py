"""Rows and cells of several tables: the results of a variant, and its comparison with a reference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import metrics
from analysis.comparisons import KL, Examples, NotComparedError, is_seedless
from analysis.loading import records
from analysis.metrics import is_better
from analysis.statistics import holm
from analysis.table import GAP, LEVEL, as_delta, as_kl, as_number, as_p, as_ratio, as_score, cells_of

COLUMNS = {
    **dict.fromkeys(("workload", "bits", "variant", "method", "metric"), "object"),
    **dict.fromkeys(("n", "examples", "score", "std", "fp", "kl", "kl_std", "bits_code", "bits_stored"), "float64"),
    "reference": "object",
    **dict.fromkeys(("delta", "delta_low", "delta_high", "p", "p_holm"), "float64"),
    **dict.fromkeys(("kl_ratio", "kl_ratio_low", "kl_ratio_high", "paired_seeds", "paired_examples"), "float64"),
    "paper_delta": "float64",
    "paper_workload": "object",
}
ENDS = {"": "value", "_low": "low", "_high": "high"}


def pick(runs: pd.DataFrame, workload: Any, variant: str, bits: float) -> pd.DataFrame:
    """The runs of one variant of a workload at a budget, one for each seed."""
    chosen = (runs["workload"] == workload) & (runs["variant"] == variant) & (runs["bits/target"] == bits)
    picked: pd.DataFrame = runs.loc[chosen]
    return picked


def compared_row(
    done: pd.DataFrame, means: pd.DataFrame, place: tuple[Any, str, float], reference: str | None, examples: Examples
) -> tuple[dict[str, Any], list[str]]:
    """The results of a variant, its comparison with a reference, and remarks on the comparison.

    Args:
        done: finished runs.
        means: `summarise` of them.
        place: workload, variant and budget.
        reference: another variant there, the variant itself, or None.
    """
    workload, variant, bits = place
    ours = pick(done, *place)
    row = {"workload": workload, "bits": bits, "variant": variant, **_measured(means, ours)}
    if ours.empty or reference is None:
        return row, []
    row["reference"] = reference
    if reference == variant:
        return row, []
    where = f"{workload}, {variant} at {bits:g} bits"
    comparison, notes = _against(examples, reference, pick(done, workload, reference, bits), ours, where)
    return row | comparison, notes


def _measured(means: pd.DataFrame, ours: pd.DataFrame) -> dict[str, Any]:
    """Means of a row's runs; n is 0 without runs."""
    if ours.empty:
        return {"n": 0}
    first = ours.iloc[0]
    same = (means["workload"] == first["workload"]) & (means["variant"] == first["variant"])
    mean = means[same & (means["bits"] == first["bits/target"])].iloc[0]
    values = {"score": "score", "std": "score/std", "fp": "fp/score", "kl": KL, "kl_std": f"{KL}/std"}
    values |= {"bits_code": "bits/code", "bits_stored": "bits/stored"}
    return {
        "method": first["method"],
        "metric": first["primary_metric"],
        "n": int(mean["n"]),
        "examples": first.get("evaluation/examples"),
        **{name: mean.get(key, math.nan) for name, key in values.items()},
    }


def _against(
    examples: Examples, reference: str, theirs: pd.DataFrame, ours: pd.DataFrame, where: str
) -> tuple[dict[str, Any], list[str]]:
    """A row's comparison with its reference, and remarks on it.

    Args:
        reference, theirs: variant and runs of the reference.
        ours: those of the row.
        where: names the row.
    """
    try:
        comparison = examples.compare(theirs, ours)
    except NotComparedError as reason:
        return {}, [f"{where}: not compared with {reference}, {reason}."]
    row = {
        **{f"delta{end}": getattr(comparison.delta, name) for end, name in ENDS.items()},
        "p": comparison.p,
        **{f"kl_ratio{end}": getattr(comparison.kl_ratio, name) for end, name in ENDS.items()},
        "paired_seeds": len(comparison.seeds),
        "paired_examples": comparison.examples,
    }
    parts = []
    had = {int(seed) for side in (theirs, ours) if not is_seedless(records(side)[0]) for seed in side["seed"]}
    if had - {*comparison.seeds}:
        parts.append(f"over seed {', '.join(map(str, comparison.seeds))} alone, of which both have predictions")
    if comparison.left_out:
        parts.append(f"without {comparison.left_out} examples that not all of their runs have")
    for name, interval in (("Δ", comparison.delta), ("the ratio of KL", comparison.kl_ratio)):
        if math.isnan(interval.low):
            parts.append(f"no interval of {name}, which some resamples leave undefined")
    return row, [f"{where}: compared with {reference} {'; '.join(parts)}."] if parts else []


def kl_ratio_to(examples: Examples, theirs: pd.DataFrame, ours: pd.DataFrame) -> list[float]:
    """The ratio of KL of our runs to theirs with its interval, NaN if they cannot be compared."""
    try:
        interval = examples.compare(theirs, ours).kl_ratio
    except NotComparedError:
        return [math.nan] * len(ENDS)
    return [getattr(interval, name) for name in ENDS.values()]


def compared(rows: Sequence[Mapping[str, Any]], more: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The rows as a frame with all COLUMNS, corrected p values, and whether a row is `better` than its reference.

    Args:
        more: further columns with their types.
    """
    columns = {**COLUMNS, **(more or {})}
    table = pd.DataFrame([dict(row) for row in rows], columns=list(columns)).astype(columns)
    table["p_holm"] = holm(table["p"].tolist())
    improved = [is_better(delta, metric) for delta, metric in zip(table["delta"], table["metric"], strict=True)]
    return table.assign(better=(table["p_holm"] < LEVEL) & pd.Series(improved, table.index, dtype=bool))


def row_cells(table: pd.DataFrame, reference: str, head: str = "method") -> dict[str, Any]:
    """The columns of a row's names, its results and its comparison with the reference.

    Args:
        reference: its name in the heads.
        head: of the column of variants.
    """
    return {
        "workload": table["workload"],
        "bits": table["bits"].map("{:g}".format),
        head: table["variant"],
        "n": table["n"].map("{:.0f}".format).replace("0", GAP),
        "score": cells_of(table, "score", "std", form=as_score),
        f"Δ {reference}": cells_of(table, "delta", "delta_low", "delta_high", form=as_delta),
        "p": table["p_holm"].map(as_p),
        "KL": cells_of(table, "kl", "kl_std", form=as_kl),
        f"KL / {reference}'s": cells_of(table, "kl_ratio", "kl_ratio_low", "kl_ratio_high", form=as_ratio),
        "bits stored": table["bits_stored"].map(lambda value: as_number(value, ".3f")),
    }


def shown_in(table: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of a table's rows."""
    rows = set(zip(table["workload"], table["variant"], strict=True))
    shown: pd.DataFrame = done.loc[[pair in rows for pair in zip(done["workload"], done["variant"], strict=True)]]
    return shown


def of_scores(runs: pd.DataFrame) -> str:
    """A caption's sentences about scores and KL."""
    return (
        f"Score: primary metric ({metrics(runs)}); score and KL to full precision (nats) are mean ± sample standard "
        "deviation over calibration seeds."
    )


def of_tests(table: pd.DataFrame) -> str:
    """A caption's sentence about p values."""
    return (
        "p: McNemar's exact test, where the metric is no accuracy the bootstrap's, Holm-corrected over "
        f"{int(table['p'].notna().sum())} tests."
    )
