"""Tables of a paper: methods at several budgets, in full and in short, and what the parts of BayesQ are worth."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.captions import (
    failed,
    known,
    metrics,
    other_seeds,
    population_of_rows,
    remarks_of,
    settings,
    source_of,
)
from analysis.comparisons import (
    BASELINE,
    KL,
    Examples,
    NotComparedError,
    alike,
    is_seedless,
    strongest_baseline,
    summarise,
)
from analysis.gaps import missing, workload_command
from analysis.loading import finished, records
from analysis.paper import BUDGETS, CLAIMED_DELTAS, CLAIMED_FOR, METHODS, NAMES, short_names
from analysis.statistics import holm
from analysis.table import (
    GAP,
    LEVEL,
    Table,
    as_delta,
    as_kl,
    as_number,
    as_p,
    as_ratio,
    as_score,
    cells_of,
    make_table,
)
from bayesq.suite.composition import conf_dir

# ------------------------------------------------------------------------------------------------------- the contents


def overview_table(runs: pd.DataFrame) -> Table:
    """Variants x budgets on every workload: the primary metric and the KL to full precision, means over n seeds."""
    runs = known(runs)
    frame = summarise(runs)
    budgets = sorted(set(runs["bits/target"]))
    rows, notes = [], []
    for (workload, variant), own in runs.groupby(["workload", "variant"], sort=True):
        row = {"workload": workload, "method": variant}
        for bits in budgets:
            found = frame[(frame["workload"] == workload) & (frame["variant"] == variant) & (frame["bits"] == bits)]
            row[f"{bits:g} bit"] = GAP if found.empty else _overview(found.iloc[0])
        rows.append(row)
        notes += failed(own)
    cells = pd.DataFrame(rows, columns=["workload", "method", *(f"{bits:g} bit" for bits in budgets)])
    caption = f"Primary metric ({metrics(runs)}) / KL to full precision in nats, mean over n seeds.{settings(runs)}"
    return make_table(cells, frame, {}, caption, [*notes, *remarks_of(runs)])


def _overview(row: pd.Series) -> str:
    return f"{as_number(100 * row['score'], '.2f')} / {as_kl(row[KL], math.nan)} (n={row['n']})"


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
                own = _pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **_measured(means, own)}
                if not own.empty:
                    reference = strongest_baseline(done, str(workload), bits, alike(records(own)[0]))
                    row["reference"] = reference
                    if reference is not None and reference != variant:
                        where = f"{workload}, {variant} at {bits:g} bits"
                        found, said = _against(examples, reference, _pick(done, workload, reference, bits), own, where)
                        row |= found
                        notes += said
                    if own.iloc[0]["method"] == "bayesq":
                        row |= _claim(own.iloc[0], bits)
                rows.append(row)
        for variant in shown:
            notes += missing(members, variant, budgets, source_of(runs))
    table = _compared(rows, "GPTQ")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **_measured_cells(table, "GPTQ"),
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
        f"{settings(_shown_in(table, done))}"
    )
    return make_table(cells, table, {"Δ GPTQ": table["better"]}, caption, [*notes, *remarks_of(runs)])


def _shown_in(table: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """Those finished runs that a table's rows are of."""
    rows = set(zip(table["workload"], table["variant"], strict=True))
    kept: pd.DataFrame = done.loc[[pair in rows for pair in zip(done["workload"], done["variant"], strict=True)]]
    return kept


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
        f"{settings(_shown_in(pd.DataFrame(counted_rows, columns=['workload', 'variant']), finished(runs)), names)}"
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


def ablation_table(runs: pd.DataFrame) -> Table:
    """Every variant of BayesQ and GPTQ against the full method, at the budgets where a variant of BayesQ ran."""
    runs = known(runs)
    done = finished(runs)
    means, examples, rows, notes = summarise(runs), Examples(), [], []
    full = "bayesq"
    for workload, members in runs.groupby("workload", sort=True):
        own_variants = done[(done["workload"] == workload) & (done["method"] == full) & (done["variant"] != full)]
        if own_variants.empty:
            sweep = [f"ablation={','.join(_ablations(members))}", "bits=3", "seed=0,1,2"]
            makes = workload_command(records(members)[0], sweep, source_of(runs))
            notes.append(f"{workload}: no variant of BayesQ among these runs: `{makes}`")
        for bits in sorted(set(own_variants["bits/target"])):
            here = members[(members["bits/target"] == bits) & members["method"].isin([full, BASELINE])]
            for variant in sorted({full, *here["variant"]}, key=lambda name: (name != full, name)):
                own = _pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **_measured(means, own)}
                if variant != full and not own.empty:
                    row["reference"] = full
                    where = f"{workload}, {variant} at {bits:g} bits"
                    found, said = _against(examples, full, _pick(done, workload, full, bits), own, where)
                    row |= found
                    notes += said
                rows.append(row)
                notes += missing(members, variant, [bits], source_of(runs))
    table = _compared(rows, "full")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "variant": table["variant"],
            **_measured_cells(table, "full"),
        }
    )
    caption = (
        f"Ablation: {population_of_rows(table)}. Every row switches the named settings of the full method (bayesq). "
        f"Score: primary metric ({metrics(runs)}); score and KL to full precision (nats) are mean ± sample standard "
        "deviation over calibration seeds. Δ and the ratio of KL are against the full method, with 95 % intervals "
        "(paired bootstrap over examples and seeds). p: McNemar's exact test, where the metric is no accuracy the "
        "bootstrap's, "
        f"Holm-corrected over {int(table['p'].notna().sum())} tests. Bold: different from the full method at 5 %."
        f"{settings(_shown_in(table, done))}"
    )
    significant = {"Δ full": table["p_holm"] < LEVEL}
    return make_table(cells, table, significant, caption, [*notes, *remarks_of(runs)])


def _ablations(members: pd.DataFrame) -> list[str]:
    """Names of the suite's ablations, without calibration sets larger than the pool of a workload."""
    pool = members.iloc[0]["config"]["dataset"].get("calibration_pool") or math.inf
    names = sorted(path.stem for path in (conf_dir() / "ablation").glob("*.yaml"))
    kept = [name for name in names if not (name.startswith("examples_") and int(name.partition("_")[2]) > pool)]
    return sorted(kept, key=lambda name: name != "full")


# ------------------------------------------------------------------------------------------------------ rows and cells


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


def _pick(runs: pd.DataFrame, workload: Any, variant: str, bits: float) -> pd.DataFrame:
    chosen = (runs["workload"] == workload) & (runs["variant"] == variant) & (runs["bits/target"] == bits)
    picked: pd.DataFrame = runs.loc[chosen]
    return picked


def _measured(means: pd.DataFrame, own: pd.DataFrame) -> dict[str, Any]:
    """Means of a row's runs; n is 0 where there are none."""
    if own.empty:
        return {"n": 0}
    first = own.iloc[0]
    same = (means["workload"] == first["workload"]) & (means["variant"] == first["variant"])
    found = means[same & (means["bits"] == first["bits/target"])].iloc[0]
    values = {"score": "score", "std": "score/std", "fp": "fp/score", "kl": KL, "kl_std": f"{KL}/std"}
    values |= {"bits_code": "bits/code", "bits_stored": "bits/stored"}
    return {
        "method": first["method"],
        "metric": first["primary_metric"],
        "n": int(found["n"]),
        "examples": first.get("evaluation/examples"),
        **{name: found.get(key, math.nan) for name, key in values.items()},
    }


def _against(
    examples: Examples, reference: str, theirs: pd.DataFrame, own: pd.DataFrame, where: str
) -> tuple[dict[str, Any], list[str]]:
    """A row's comparison with its reference, and what there is to say about it.

    Args:
        reference, theirs: variant and runs of the reference.
        own: those of the row.
        where: names the row.
    """
    try:
        found = examples.compare(theirs, own)
    except NotComparedError as reason:
        return {}, [f"{where}: not compared with {reference}, {reason}."]
    row = {
        **{f"delta{end}": getattr(found.delta, name) for end, name in ENDS.items()},
        "p": found.p,
        **{f"kl_ratio{end}": getattr(found.kl_ratio, name) for end, name in ENDS.items()},
        "paired_seeds": len(found.seeds),
        "paired_examples": found.examples,
    }
    parts = []
    had = {int(seed) for side in (theirs, own) if not is_seedless(records(side)[0]) for seed in side["seed"]}
    if had - {*found.seeds}:
        parts.append(f"over seed {', '.join(map(str, found.seeds))} alone, of which both have predictions")
    if found.left_out:
        parts.append(f"without {found.left_out} examples that not all of their runs have")
    for name, interval in (("Δ", found.delta), ("the ratio of KL", found.kl_ratio)):
        if math.isnan(interval.low):
            parts.append(f"no interval of {name}, which some resamples leave undefined")
    return row, [f"{where}: compared with {reference} {'; '.join(parts)}."] if parts else []


ENDS = {"": "value", "_low": "low", "_high": "high"}


def _claim(run: Mapping[str, Any] | pd.Series, bits: float) -> dict[str, Any]:
    task = run["config"]["dataset"].get("tasks", [""])[0]
    return {"paper_delta": CLAIMED_DELTAS.get(task, {}).get(bits), "paper_workload": CLAIMED_FOR.get(task)}


COLUMNS = {
    **dict.fromkeys(("workload", "bits", "variant", "method", "metric"), "object"),
    **dict.fromkeys(("n", "examples", "score", "std", "fp", "kl", "kl_std", "bits_code", "bits_stored"), "float64"),
    "reference": "object",
    **dict.fromkeys(("delta", "delta_low", "delta_high", "p", "p_holm"), "float64"),
    **dict.fromkeys(("kl_ratio", "kl_ratio_low", "kl_ratio_high", "paired_seeds", "paired_examples"), "float64"),
    "paper_delta": "float64",
    "paper_workload": "object",
}


def _compared(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """The rows as a frame with all COLUMNS, corrected p values, and whether a row is `better` than its reference."""
    table = pd.DataFrame([dict(row) for row in rows], columns=list(COLUMNS)).astype(COLUMNS)
    table["p_holm"] = holm(table["p"].tolist())
    return table.assign(better=(table["p_holm"] < LEVEL) & (table["delta"] > 0))


def _measured_cells(table: pd.DataFrame, reference: str) -> dict[str, Any]:
    """The columns of what a row measured and how it stands to its reference."""
    return {
        "n": table["n"].map("{:.0f}".format).replace("0", GAP),
        "score": cells_of(table, "score", "std", form=as_score),
        f"Δ {reference}": cells_of(table, "delta", "delta_low", "delta_high", form=as_delta),
        "p": table["p_holm"].map(as_p),
        "KL": cells_of(table, "kl", "kl_std", form=as_kl),
        f"KL / {reference}'s": cells_of(table, "kl_ratio", "kl_ratio_low", "kl_ratio_high", form=as_ratio),
        "bits stored": table["bits_stored"].map(lambda value: as_number(value, ".3f")),
    }
