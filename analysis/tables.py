"""Tables of a paper: what they hold, and how they are written as Markdown, CSV and LaTeX."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.comparisons import (
    ALIKE_IN_COST,
    BASELINE,
    KL,
    Comparison,
    Examples,
    alike,
    counted,
    metrics_of,
    strongest_baseline,
    summarise,
    with_scores,
)
from analysis.gaps import command, missing, own_overrides, remarks, usual_seeds, why, workload_command
from analysis.latex import floats
from analysis.loading import FINISHED, UNKNOWN, WANDB, finished, records
from analysis.paper import BUDGETS, CLAIMED_DELTAS, CLAIMED_FOR, METHODS, NAMES, short_names
from analysis.statistics import holm, mean_std
from bayesq.suite.composition import conf_dir
from bayesq.suite.results import unit

__all__ = [
    "Table",
    "ablation_table",
    "compact_table",
    "cost_table",
    "glue_table",
    "has_glue",
    "main_table",
    "overview_table",
    "summarise",
    "write_table",
]

GAP = "-"
LEVEL = 0.05


@dataclass(frozen=True)
class Table:
    """A table as it is shown and as numbers.

    Attributes:
        cells: what is shown, text only; column names are the heads.
        numbers: the same rows unrounded: the columns that name a row, then one column per number.
        bold: of the shape of `cells`, True where a cell is set in bold.
        caption: what is shown, with n.
        footnotes: a line each; those about missing cells name the command that fills them, in backquotes.
        padded: whether the columns of the Markdown are lined up.
    """

    cells: pd.DataFrame
    numbers: pd.DataFrame
    bold: pd.DataFrame
    caption: str
    footnotes: list[str] = field(default_factory=list)
    padded: bool = True

    def markdown(self) -> str:
        """The table with caption and footnotes, in Markdown."""
        escaped = self.cells.map(lambda cell: cell.replace("|", "\\|"))
        shown = escaped.where(~self.bold, "**" + escaped + "**")
        if self.padded:
            table = shown.to_markdown(index=False, disable_numparse=True)
        else:
            lines = [[str(name) for name in shown], ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = ["\n".join(f"* {line}" for line in self.footnotes)] if self.footnotes else []
        return "\n\n".join([self.caption, table, *notes]) + "\n"

    def latex(self, label: str) -> str:
        """The table for booktabs and graphicx, see `floats`."""
        return floats(self.cells, self.bold, self.caption, self.footnotes, label)


def write_table(table: Table, folder: str | Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.csv (every number unrounded) and NAME.tex into `folder`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        ".md": table.markdown(),
        ".csv": table.numbers.to_csv(index=False, lineterminator="\n"),
        ".tex": table.latex(name),
    }
    paths = []
    for ending, content in contents.items():
        paths.append(folder / f"{name}{ending}")
        paths[-1].write_text(content, encoding="utf-8")
    return paths


# ------------------------------------------------------------------------------------------------------- the contents


def overview_table(runs: pd.DataFrame) -> Table:
    """Variants x budgets on every workload: the primary metric and the KL to full precision, means over n seeds."""
    runs = _known(runs)
    frame = summarise(runs)
    budgets = sorted(set(runs["bits/target"]))
    rows, notes = [], []
    for (workload, variant), own in runs.groupby(["workload", "variant"], sort=True):
        row = {"workload": workload, "method": variant}
        for bits in budgets:
            found = frame[(frame["workload"] == workload) & (frame["variant"] == variant) & (frame["bits"] == bits)]
            row[f"{bits:g} bit"] = GAP if found.empty else _overview(found.iloc[0])
        rows.append(row)
        notes += _failed(own)
    cells = pd.DataFrame(rows, columns=["workload", "method", *(f"{bits:g} bit" for bits in budgets)])
    caption = f"Primary metric ({_metrics(runs)}) / KL to full precision in nats, mean over n seeds."
    return _table(cells, frame, {}, caption, [*notes, *_remarks(runs)])


def _overview(row: pd.Series) -> str:
    return f"{100 * row['score']:.2f} / {row[KL]:.4f} (n={row['n']})"


def main_table(runs: pd.DataFrame) -> Table:
    """Methods at 3, 3.5 and 4 bits on every workload, each against the strongest GPTQ that was run in its place.

    A variant has rows if it ran at more than one of the budgets, or is the plain method; a method that has no run on a
    workload is a gap. p values are Holm-corrected over all rows; bold is what is better than GPTQ at 5 %.
    """
    runs = _known(runs)
    done = finished(runs)
    means = summarise(runs[runs["bits/target"].isin(BUDGETS)])
    examples, rows, notes = Examples(), [], []
    for workload, members in runs.groupby("workload", sort=True):
        shown, left_out = _main_variants(members)
        if left_out:
            notes.append(f"{workload}: not shown, as it ran at one of these budgets only: {', '.join(left_out)}.")
        for bits in BUDGETS:
            for variant in shown:
                own = _pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **_measured(means, own)}
                if not own.empty:
                    reference = strongest_baseline(done, str(workload), bits, alike(records(own)[0]))
                    row["reference"] = reference
                    if reference is not None and reference != variant:
                        comparison = examples.compare(_pick(done, workload, reference, bits), own)
                        row |= _against(comparison)
                        notes += _not_compared(comparison, workload, variant, reference, bits)
                    if own.iloc[0]["method"] == "bayesq":
                        row |= _claim(own.iloc[0], bits)
                rows.append(row)
        for variant in shown:
            notes += missing(members, variant, BUDGETS, _source(runs))
    table = _compared(rows, "GPTQ")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **_measured_cells(table, "GPTQ"),
            "paper's Δ": table["paper_delta"].map(lambda value: _number(value, "+.1f")),
            "GPTQ": [
                GAP if not isinstance(name, str) else "this row" if name == own else name
                for name, own in zip(table["reference"], table["variant"], strict=True)
            ],
        }
    )
    caption = (
        f"Methods at 3, 3.5 and 4 bits: {_population(table)}. Score: primary metric ({_metrics(runs)}); score and KL "
        "to full precision (nats) are mean ± sample standard deviation over calibration seeds. Δ GPTQ: points over the "
        "strongest GPTQ (lowest mean KL at this budget with the same correction, distillation and calibration size; "
        "named in the last column), with 95 % interval (paired bootstrap over examples and seeds). p: McNemar's exact "
        f"test, where the metric is no accuracy the bootstrap's, Holm-corrected over {int(table['p'].notna().sum())} "
        "tests. Bold: better than GPTQ at 5 %. Plain rtn reads no calibration data: one run of it stands for every "
        "seed. Paper's Δ: claimed for "
        f"{' and '.join(CLAIMED_FOR.values())}, shown beside BayesQ on images and text."
    )
    return _table(cells, table, {"Δ GPTQ": table["better"]}, caption, [*notes, *_remarks(runs)])


# What names a variant beside a number, in order of appearance.
MARKS = ("†", "‡", "§", "¶")
NOT_RUN = "not run"


def compact_table(main: Table) -> Table:
    """One row per workload and budget of a `main_table`: KL of every method, and BayesQ against the strongest GPTQ.

    A method is shown by its plain variant, where there is none by that of lowest KL, and GPTQ by the one that BayesQ is
    compared with; a mark names a variant that is not the plain one. Of BayesQ the plain method counts. Bold: an
    interval of the KL ratio below 1, a significantly better score.
    """
    numbers = main.numbers
    names = short_names(dict.fromkeys(numbers["workload"]))
    marks: dict[str, str] = {}
    rows, bold = [], []
    for (workload, bits), own in numbers.groupby(["workload", "bits"], sort=False):
        found = records(own[own["n"] > 0])
        shown = {method: _shown(found, method) for method in METHODS}
        bayesq = shown["bayesq"] = next((row for row in found if row["variant"] == "bayesq"), {})
        against = [row for row in found if row["variant"] == bayesq.get("reference")]
        gptq = shown[BASELINE] = against[0] if against else shown[BASELINE]
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
                "BayesQ / GPTQ": _ratio(*ratio),
                f"{_one_metric(numbers)}: FP": _number(100 * (bayesq or gptq).get("fp", math.nan), ".2f"),
                "GPTQ": _number(100 * gptq.get("score", math.nan), ".2f"),
                "BayesQ": _number(100 * bayesq.get("score", math.nan), ".2f"),
                "BayesQ − GPTQ": _delta(*delta),
            }
        )
        bold.append({"BayesQ / GPTQ": ratio[-1] < 1, "BayesQ − GPTQ": better})
    named = "".join(f" {mark}: {variant}." for variant, mark in marks.items())
    left_out = sorted({row["variant"] for row in records(numbers)} - {*METHODS, *marks})
    rest = f" Not shown: {', '.join(left_out)}." if left_out else ""
    caption = (
        "KL to full precision (nats, mean ± sample standard deviation over calibration seeds) of every method, and "
        "BayesQ against the strongest GPTQ: ratio of KL and points of the primary metric (%), with 95 % intervals "
        f"(paired bootstrap over examples and seeds); {_population(numbers, names)}. RTN reads no calibration data: "
        "one run stands for every seed. The strongest GPTQ has the lowest mean KL at this budget over the "
        f"seeds that the other methods have.{named}{rest} Bold: an interval below 1; better at 5 % "
        "(Holm-corrected over the main table)."
    )
    marked = pd.DataFrame(bold)
    return _table(
        pd.DataFrame(rows), numbers, {str(name): marked[name] for name in marked}, caption, main.footnotes, False
    )


def _shown(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """The row of a method's plain variant, else that of lowest KL, else nothing."""
    own = [row for row in rows if row["method"] == method]
    return min(own, key=lambda row: (row["variant"] != method, row["kl"], row["variant"]), default={})


def _compact_kl(row: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    """KL without the zeros before the point, nor a spread of runs that are all the same; with its variant's mark."""
    if not row:
        return NOT_RUN
    spread = row["kl_std"] if row["kl_std"] > 0 else math.nan
    shown = re.sub(r"(?<!\d)0\.", ".", _kl(row["kl"], spread))
    return " ".join([shown, marks[row["variant"]]]) if row["variant"] in marks else shown


def _one_metric(numbers: pd.DataFrame) -> str:
    """The metric of all rows, `score` where they differ."""
    metrics = set(numbers["metric"].dropna())
    return str(*metrics) if len(metrics) == 1 else "score"


def ablation_table(runs: pd.DataFrame) -> Table:
    """Every variant of BayesQ and GPTQ against the full method, at the budgets where a variant of BayesQ ran."""
    runs = _known(runs)
    done = finished(runs)
    means, examples, rows, notes = summarise(runs), Examples(), [], []
    full = "bayesq"
    for workload, members in runs.groupby("workload", sort=True):
        own_variants = members[(members["method"] == full) & (members["variant"] != full)]
        if own_variants.empty:
            sweep = [f"ablation={','.join(_ablations(members))}", "bits=3", "seed=0,1,2"]
            makes = workload_command(records(members)[0], sweep, _source(runs))
            notes.append(f"{workload}: no variant of BayesQ was run: `{makes}`")
        for bits in sorted(set(own_variants["bits/target"])):
            here = members[(members["bits/target"] == bits) & members["method"].isin([full, BASELINE])]
            for variant in sorted({full, *here["variant"]}, key=lambda name: (name != full, name)):
                own = _pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **_measured(means, own)}
                if variant != full and not own.empty:
                    row["reference"] = full
                    comparison = examples.compare(_pick(done, workload, full, bits), own)
                    row |= _against(comparison)
                    notes += _not_compared(comparison, workload, variant, full, bits)
                rows.append(row)
                notes += missing(members, variant, [bits], _source(runs))
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
        f"Ablation: {_population(table)}. Every row switches the named settings of the full method (bayesq). Score: "
        f"primary metric ({_metrics(runs)}); score and KL to full precision (nats) are mean ± sample standard "
        "deviation over calibration seeds. Δ and the ratio of KL are against the full method, with 95 % intervals "
        "(paired bootstrap over examples and seeds). p: McNemar's exact test, where the metric is no accuracy the "
        "bootstrap's, "
        f"Holm-corrected over {int(table['p'].notna().sum())} tests. Bold: different from the full method at 5 %."
    )
    significant = {"Δ full": table["p_holm"] < LEVEL}
    return _table(cells, table, significant, caption, [*notes, *_remarks(runs)])


def _ablations(members: pd.DataFrame) -> list[str]:
    """Names of the suite's ablations, without calibration sets larger than the pool of a workload."""
    pool = members.iloc[0]["config"]["dataset"].get("calibration_pool") or math.inf
    names = sorted(path.stem for path in (conf_dir() / "ablation").glob("*.yaml"))
    kept = [name for name in names if not (name.startswith("examples_") and int(name.partition("_")[2]) > pool)]
    return sorted(kept, key=lambda name: name != "full")


STAGES = ("calibrate", "posterior", "quantize", "distill")


def cost_table(runs: pd.DataFrame) -> Table:
    """Seconds from the loaded model to its codes and peak memory, medians over seeds, and as multiples of GPTQ's.

    Statistics count what they cost when they were computed, so runs that are to be compared need caches of their own.
    `quantize x` is all but distillation; multiples are of the fastest undistilled GPTQ on the same workload, budget and
    calibration size.
    """
    runs = _known(runs)
    done = with_scores(finished(runs))
    seconds = pd.DataFrame({stage: done.get(f"time/{stage}_s", 0.0) for stage in STAGES}).astype("float64").fillna(0.0)
    frame = done[["workload", "bits", "variant", "method"]].assign(
        **seconds,
        without=seconds[list(STAGES[:-1])].sum(axis=1),
        total=seconds.sum(axis=1),
        memory=pd.to_numeric(done.get("memory/peak_rss_bytes", math.nan)),
    )
    frame["size"] = ["/".join(alike(run, ALIKE_IN_COST)) for run in records(done)]
    names = ["workload", "bits", "variant", "size"]
    grouped = frame.groupby([*names, "method"])
    table = grouped.median().assign(n=grouped.size()).reset_index()
    plain = table[(table["method"] == BASELINE) & (table["distill"] == 0)]
    fastest = plain.sort_values(["total", "variant"]).drop_duplicates(["workload", "bits", "size"])
    fastest = fastest.rename(columns={"total": "base", "memory": "base memory", "variant": "reference"})
    same = ["workload", "bits", "size"]
    table = table.merge(fastest[[*same, "base", "base memory", "reference"]], "left", same)
    table["quantize x"], table["total x"] = table["without"] / table["base"], table["total"] / table["base"]
    table["memory x"] = table["memory"] / table["base memory"]
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **{f"{stage} s": table[stage].map(lambda value: _number(value, ".2f")) for stage in STAGES},
            **{
                f"{name} ×": table[f"{name} x"].map(lambda value: _number(value, ".2f"))
                for name in ("quantize", "total", "memory")
            },
            "peak MiB": (table["memory"] / 2**20).map(lambda value: _number(value, ".0f")),
            "n": table["n"].map(str),
        }
    )
    notes = []
    for workload, members in runs.groupby("workload", sort=True):
        for bits in sorted(set(members["bits/target"])):
            if fastest[(fastest["workload"] == workload) & (fastest["bits"] == bits)].empty:
                seeds = ",".join(str(seed) for seed in usual_seeds(members))
                what = ["method=gptq", f"bits={bits:g}", f"seed={seeds}"]
                makes = workload_command(records(members)[0], what, _source(runs))
                notes.append(f"{workload} at {bits:g} bits: no GPTQ to compare with: `{makes}`")
    caption = (
        f"Cost: medians over n = {counted(table['n'])} seeds. Seconds of the stages from the loaded model to its "
        "codes, statistics counted at what they took when they were computed; × are multiples of the fastest "
        "undistilled GPTQ on the same workload, budget and calibration size, quantize × "
        "without distillation. Peak memory is the process's, which grows over the runs of a sweep in one process."
    )
    columns = ["method", *STAGES, "quantize x", "total x", "memory", "memory x", "n", "reference"]
    return _table(cells, table[[*names[:-1], *columns]], {}, caption, [*notes, *_failed(runs), *_remarks(runs)])


# GLUE's tasks in the order of its leaderboard's columns.
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def has_glue(runs: pd.DataFrame) -> bool:
    """Whether a run of a GLUE task is finished."""
    return any(_task(run) in GLUE_TASKS for run in records(finished(_known(runs))))


def glue_table(runs: pd.DataFrame) -> Table:
    """GLUE scores times 100: of each task the mean of its metrics, GLUE the mean over the tasks that were run.

    Every cell is a mean over seeds, each task's own. `delta` is to full precision on the same tasks, `Δ GPTQ` to the
    GPTQ of highest score on the tasks that both have, with the same correction, distillation and calibration size.

    Raises:
        ValueError: no run is of a GLUE task.
    """
    runs = _known(runs)
    of_glue = runs[[_task(run) in GLUE_TASKS for run in records(runs)]]
    done = finished(of_glue)
    if not has_glue(runs):
        raise ValueError("no run of a GLUE task")
    of_tasks = records(done)
    scores = pd.DataFrame(
        {
            **{key: list(done[key]) for key in ("model", "variant", "seed")},
            "bits": list(done["bits/target"]),
            "task": [_task(run) for run in of_tasks],
            "q": [_task_score(run, "q") for run in of_tasks],
            "fp": [_task_score(run, "fp") for run in of_tasks],
        }
    )
    index = ["model", "bits", "variant"]
    tasks = scores.groupby([*index, "task"]).agg(q=("q", "mean"), std=("q", "std"), fp=("fp", "mean"), n=("q", "size"))
    tasks = tasks.reset_index()
    ran = [task for task in GLUE_TASKS if task in set(tasks["task"])]
    examples, rows, notes, lacking = Examples(), [], [], []
    for key, own in tasks.groupby(index, sort=True):
        by_task = own.set_index("task")
        row: dict[str, Any] = dict(zip(index, key, strict=True))
        for task in ran:
            row[task] = by_task["q"].get(task, math.nan)
            row[f"{task}_std"] = by_task["std"].get(task, math.nan)
        row |= {"GLUE": by_task["q"].mean(), "FP": by_task["fp"].mean(), "n": int(by_task["n"].min())}
        row["delta"] = row["GLUE"] - row["FP"]
        row |= _glue_against(done, tasks, row, by_task["q"], examples)
        row["paper_delta"] = CLAIMED_DELTAS["text"].get(row["bits"]) if row["variant"].startswith("bayesq") else None
        row["missing"] = ", ".join(task for task in GLUE_TASKS if task not in by_task.index)
        rows.append(row)
        lacking.append([task for task in ran if task not in by_task.index])
        notes += _glue_gap(of_glue, row, lacking[-1])
    table = pd.DataFrame(rows)
    table["paper_delta"] = pd.to_numeric(table["paper_delta"])
    table["p_holm"] = holm(table["p"].tolist())
    gain = _cells(table, "delta_gptq", "delta_gptq_low", "delta_gptq_high", form=_glue_delta)
    cells = pd.DataFrame(
        {
            "model": table["model"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **{task: [_spread(*pair) for pair in zip(table[task], table[f"{task}_std"], strict=True)] for task in ran},
            **{name: table[name].map(lambda value: _number(value, ".2f")) for name in ("GLUE", "FP")},
            "Δ FP": table["delta"].map(lambda value: _number(value, "+.2f")),
            "Δ GPTQ": gain,
            "p": table["p_holm"].map(_p),
            "paper's Δ": table["paper_delta"].map(lambda value: _number(value, "+.1f")),
            "n": table["n"].map(str),
            "missing": [
                ", ".join(task for task in ran if task in names.split(", ")) or GAP for names in table["missing"]
            ],
        }
    )
    caption = (
        f"GLUE (dev sets): scores times 100, a task's score is the mean of its metrics; means ± sample standard "
        f"deviation over n = {counted(tasks['n'])} seeds. GLUE is the mean over the {len(ran)} of 9 tasks that were "
        "run (a row that misses one of them has the mean of the others), FP the same of the full-precision models. "
        "Δ GPTQ: points over the GPTQ of highest score on the tasks that both have, with the same correction, "
        "distillation and calibration size; 95 % interval and p from a paired bootstrap over examples and seeds within "
        "each task (McNemar's test knows no average of metrics; it stands in the main table, task by task), p "
        "Holm-corrected "
        f"over {int(table['p'].notna().sum())} tests; an interval is left out where a task has no predictions for a "
        "seed of both. Bold: better than GPTQ at 5 %."
    )
    better = (table["p_holm"] < LEVEL) & (table["delta_gptq"] > 0)
    notes += _no_task(of_glue, ran)
    return _table(cells, table, {"Δ GPTQ": better}, caption, [*notes, *_failed(of_glue), *_remarks(of_glue)])


# ------------------------------------------------------------------------------------------------------ rows and cells


def _known(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs whose workload is known; what the others are is a footnote."""
    known: pd.DataFrame = runs[runs["workload"] != UNKNOWN].copy()
    known["seed"] = known["seed"].astype(int)  # where a workload is unknown so is the seed, and NaN made all floats
    known.attrs["remarks"] = remarks(runs)
    return known


def _main_variants(members: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Variants with rows in the main table, in the order of METHODS, and those that are left to the ablation."""
    here = members[members["bits/target"].isin(BUDGETS)]
    budgets = here.groupby("variant")["bits/target"].nunique()
    shown = {variant for variant in budgets.index if budgets[variant] > 1 or variant in METHODS}
    methods = dict(zip(here["variant"], here["method"], strict=True))
    shown |= {method for method in METHODS if method not in {methods[variant] for variant in shown}}
    order = {method: place for place, method in enumerate(METHODS)}
    place = {variant: order.get(methods.get(variant, variant), len(order)) for variant in shown}
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


def _against(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {}
    delta, ratio = comparison.delta, comparison.kl_ratio
    return {
        "delta": delta.value,
        "delta_low": delta.low,
        "delta_high": delta.high,
        "p": comparison.p,
        "kl_ratio": ratio.value,
        "kl_ratio_low": ratio.low,
        "kl_ratio_high": ratio.high,
        "paired_seeds": comparison.seeds,
        "paired_examples": comparison.examples,
    }


def _not_compared(comparison: Comparison | None, workload: Any, variant: str, reference: str, bits: float) -> list[str]:
    """The line about a comparison that could not be made."""
    if comparison is not None:
        return []
    why = "no seed for which both have a result with its predictions.csv"
    return [f"{workload}, {variant} at {bits:g} bits: not compared with {reference}, {why}."]


def _claim(run: Mapping[str, Any] | pd.Series, bits: float) -> dict[str, Any]:
    modality = run["config"]["dataset"].get("modality")
    return {"paper_delta": CLAIMED_DELTAS.get(modality, {}).get(bits), "paper_workload": CLAIMED_FOR.get(modality)}


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


def _table(
    cells: pd.DataFrame,
    numbers: pd.DataFrame,
    bold: Mapping[str, pd.Series],
    caption: str,
    footnotes: Iterable[str],
    padded: bool = True,
) -> Table:
    marks = pd.DataFrame(False, index=cells.index, columns=cells.columns)
    for column, where in bold.items():
        marks[column] = where.astype(bool)
    notes = list(dict.fromkeys(footnotes))
    numbers = numbers.drop(columns="better", errors="ignore")
    return Table(cells.astype("object"), numbers, marks, caption, notes, padded)


def _cells(table: pd.DataFrame, *columns: str, form: Any) -> list[str]:
    return [form(*values) for values in zip(*(table[column] for column in columns), strict=True)]


def _measured_cells(table: pd.DataFrame, reference: str) -> dict[str, Any]:
    """The columns of what a row measured and how it stands to its reference."""
    return {
        "n": table["n"].map("{:.0f}".format).replace("0", GAP),
        "score": _cells(table, "score", "std", form=_score),
        f"Δ {reference}": _cells(table, "delta", "delta_low", "delta_high", form=_delta),
        "p": table["p_holm"].map(_p),
        "KL": _cells(table, "kl", "kl_std", form=_kl),
        f"KL / {reference}'s": _cells(table, "kl_ratio", "kl_ratio_low", "kl_ratio_high", form=_ratio),
        "bits stored": table["bits_stored"].map(lambda value: _number(value, ".3f")),
    }


def _number(value: Any, form: str) -> str:
    return GAP if value is None or math.isnan(value) else format(value, form)


def _points(fraction: float) -> str:
    """A difference in points with its sign; what rounds to 0 has none of its own."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


def _spread(mean: float, std: float, form: str = ".2f") -> str:
    if math.isnan(mean):
        return GAP
    return format(mean, form) if math.isnan(std) else f"{mean:{form}} ± {std:{form}}"


def _score(mean: float, std: float) -> str:
    return _spread(100 * mean, 100 * std)


def _kl(mean: float, std: float) -> str:
    """Four decimals, more where these would leave fewer than two digits."""
    digits = 1 - math.floor(math.log10(mean)) if mean > 0 else 4
    return _spread(mean, std, f".{max(digits, 4)}f")


def _delta(value: float, low: float, high: float) -> str:
    return GAP if math.isnan(value) else f"{_points(value)} [{_points(low)}, {_points(high)}]"


def _ratio(value: float, low: float, high: float) -> str:
    return GAP if math.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _p(value: float) -> str:
    if math.isnan(value):
        return GAP
    return "<0.001" if value < 0.001 else f"{value:.3f}"


# ----------------------------------------------------------------------------------------------- captions and footnotes


def _population(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> str:
    """n of a table's rows: seeds, and examples by workload, under other names where some are given."""
    there = table[table["n"] > 0]
    if there.empty:
        return "no finished run (n = 0)"
    sizes = [
        f"{(names or {}).get(str(workload), workload)} {counted(own['examples'])}"
        for workload, own in there.groupby("workload", sort=True)
    ]
    return f"n = {counted(there['n'])} calibration seeds; evaluation examples: {'; '.join(sizes)}"


def _metrics(runs: pd.DataFrame) -> str:
    found = sorted({str(metric) for metric in finished(runs)["primary_metric"].dropna()}) if len(finished(runs)) else []
    return ", ".join(f"{metric} {'in %' if unit(metric) == '%' else 'times 100'}" for metric in found) or "none"


def _source(runs: pd.DataFrame) -> str:
    """Where the runs were read from, for commands."""
    paths = [str(path) for path in runs["path"]]
    if not paths or paths[0].startswith(WANDB):
        return "results"
    return os.path.commonpath([str(Path(path).parent) for path in paths])


def _failed(runs: pd.DataFrame) -> list[str]:
    """One line per run without a result, with its command."""
    lines = []
    for run in records(runs[runs["status"] != FINISHED]):
        makes = command(run, [run["bits/target"]], [int(run["seed"])], _source(runs))
        what = f"{run['workload']}, {run['variant']} at {run['bits/target']:g} bits, seed {run['seed']}"
        lines.append(f"{what}, {why(run)}: `{makes}`")
    return lines


def _remarks(runs: pd.DataFrame) -> list[str]:
    """What is wrong with the runs as a whole: unreadable ones and duplicates."""
    return list(runs.attrs["remarks"])


# ---------------------------------------------------------------------------------------------------------------- GLUE


def _task(run: Mapping[str, Any]) -> str | None:
    task: str | None = run["config"]["dataset"].get("task")
    return task


def _task_score(run: Mapping[str, Any], side: str) -> float:
    """Mean of the run's metrics on its task, times 100; `side` is fp or q."""
    return 100 * mean_std([run[f"{side}/{metric}"] for metric in metrics_of(run)])[0]


def _glue_against(
    done: pd.DataFrame, tasks: pd.DataFrame, row: Mapping[str, Any], own: pd.Series, examples: Examples
) -> dict[str, Any]:
    """The gain over the best GPTQ on the tasks that both have, with its interval, and which GPTQ it is."""
    nothing = dict.fromkeys(("delta_gptq", "delta_gptq_low", "delta_gptq_high", "p"), math.nan)
    here = done[(done["model"] == row["model"]) & (done["bits/target"] == row["bits"])]
    mine = here[here["variant"] == row["variant"]]
    gptq = here[here["method"] == BASELINE]
    like = set(gptq.loc[[alike(run) == alike(records(mine)[0]) for run in records(gptq)], "variant"])
    same = tasks[(tasks["model"] == row["model"]) & (tasks["bits"] == row["bits"])]
    baselines = {
        str(variant): of.set_index("task")["q"]
        for variant, of in same.groupby("variant", sort=True)
        if variant in like and set(own.index) & set(of["task"])
    }
    if not baselines:
        return {**nothing, "reference": None}

    def shared(variant: str) -> list[str]:
        return [task for task in own.index if task in baselines[variant].index]

    best = max(baselines, key=lambda variant: (len(shared(variant)), baselines[variant][shared(variant)].mean()))
    if best == row["variant"]:
        return {**nothing, "reference": best}
    gain = float((own[shared(best)] - baselines[best][shared(best)]).mean())
    theirs = here[here["variant"] == best]
    pairs = [tuple(of[[_task(run) == task for run in records(of)]] for of in (theirs, mine)) for task in shared(best)]
    found = examples.compare_average(pairs)
    if found is None:
        return {**nothing, "delta_gptq": gain, "reference": best}
    low, high = 100 * found.low, 100 * found.high
    return {
        "delta_gptq": 100 * found.value,
        "delta_gptq_low": low,
        "delta_gptq_high": high,
        "p": found.p,
        "reference": best,
    }


def _glue_delta(value: float, low: float, high: float) -> str:
    return _number(value, "+.2f") if math.isnan(low) else _delta(value / 100, low / 100, high / 100)


def _glue_gap(runs: pd.DataFrame, row: Mapping[str, Any], lacking: Sequence[str]) -> list[str]:
    """The command that makes tasks that a row lacks."""
    if not lacking:
        return []
    same = (runs["model"] == row["model"]) & (runs["variant"] == row["variant"]) & (runs["bits/target"] == row["bits"])
    members = runs[same]
    seeds = ",".join(map(str, sorted(set(members["seed"]))))
    own = [o for o in own_overrides(records(members)[0]) if o.startswith("method.")]
    what = [f"method={members.iloc[0]['method']}", *own, f"bits={row['bits']:g}", f"seed={seeds}"]
    makes = _glue_command(members, lacking, what, _source(runs))
    return [f"{row['model']}, {row['variant']} at {row['bits']:g} bits: no {', '.join(lacking)}: `{makes}`"]


def _no_task(runs: pd.DataFrame, ran: Sequence[str]) -> list[str]:
    """One line per model about the tasks that no run of GLUE is of."""
    lines, lacking = [], [task for task in GLUE_TASKS if task not in ran]
    for model, members in runs.groupby("model", sort=True):
        what = [f"method={','.join(method for method in METHODS if method in set(members['method']))}"]
        what += [f"bits={','.join(f'{bits:g}' for bits in sorted(set(members['bits/target'])))}"]
        what += [f"seed={','.join(map(str, usual_seeds(members)))}"]
        makes = _glue_command(members, lacking, what, _source(runs))
        lines.append(f"{model}: no run of {', '.join(lacking)}: `{makes}`")
    return lines if lacking else []


def _glue_command(members: pd.DataFrame, tasks: Sequence[str], what: Sequence[str], source: str) -> str:
    """The line for the shell that makes tasks; a checkpoint in a folder named after its task is that of each task."""
    run = records(members)[0]
    kept = [o for o in own_overrides(run) if o.startswith("model.checkpoint=") and Path(o).name == _task(run)]
    checkpoints = [f"{Path(o).parent}/${{dataset.task}}" for o in kept]
    return workload_command(run, [f"dataset.task={','.join(tasks)}", *checkpoints, *what], source)
