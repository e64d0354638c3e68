"""What a report says, as data: the question, the answer, the main table, layers, commands and remarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.captions import failed, known, metrics, population_of_rows, remarks_of, settings
from analysis.comparisons import KL, summarise
from analysis.gaps import command
from analysis.loading import finished, layer_frame, load_runs, records, require_finished, without_result
from analysis.metrics import SCALE, limits, with_unit
from analysis.paper import workload_title
from analysis.statistics import mean_interval
from analysis.style import Look, looks
from analysis.table import Table
from analysis.tables.main import main_table

QUESTION = (
    "Which post-training quantization method changes a network least at the same number of bits per weight, and how "
    "certain is that over calibration seeds?"
)
# Quantities of layers.csv that a report shows, with their names and units; the first one that was recorded is shown.
LAYER_VALUES = {
    "achieved_risk": "achieved risk (nats)",
    "predicted_risk": "predicted risk (nats)",
    "bits/code": "code bits per weight",
    "relative_error": "relative weight error",
    "bits/stored": "stored bits per weight",
    "seconds": "seconds",
}
ROW = ("workload", "variant", "bits")


@dataclass(frozen=True)
class Content:
    """The content of a report.

    Attributes:
        source: where the runs were read from, and the filters in `where`.
        runs: all runs from `load_runs`; `table`, `layers` and `commands` are of the finished ones.
        table: a row for each workload, variant and budget: n, and the means `score` (in the metric's unit), `kl`
            (nats), `stored` and `code` (bits per weight). `score` and `kl` have `_std` (sample standard
            deviation over seeds) and the ends `_low` and `_high` of the 95 % interval of the mean, NaN for one seed.
        layers: means over seeds by workload, variant, bits, name and position, with the columns of LAYER_VALUES.
        looks: label, color and marker of each variant, in the order of legends.
        caption: of the table.
        answers: for each workload and budget the variant of lowest KL, in words.
        commands: for each workload and variant the shell command that makes its runs.
        remarks: failed, unreadable and duplicate runs, a line each.
        paired: the main table of `python -m analysis --main`, or None if it was not asked for or has no rows.
    """

    source: str
    where: tuple[str, ...]
    runs: pd.DataFrame
    table: pd.DataFrame
    layers: pd.DataFrame
    looks: dict[str, Look]
    caption: str
    answers: list[str]
    commands: list[tuple[str, str, str]]
    remarks: list[str]
    paired: Table | None = None


def content_of(source: str | Path, where: Sequence[str] = (), paired: bool = False) -> Content:
    """Read the runs of a results folder or W&B project and say what they show.

    Args:
        source, where: as for `load_runs`.
        paired: also compare every method with the strongest GPTQ by a paired bootstrap, about 0.2 s for each row.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: no finished run, a filter that fits none, or a W&B project that cannot be read.
    """
    runs = require_finished(load_runs(source, where))
    shown = known(runs)
    table, styles = _table(shown), looks(runs)
    place = {variant: place for place, variant in enumerate(styles)}
    table = table.sort_values([*ROW], key=lambda column: column.map(place) if column.name == "variant" else column)
    compared = main_table(runs) if paired else None
    lines = [line for line in without_result(runs).splitlines() if line]
    return Content(
        source=str(source),
        where=tuple(where),
        runs=runs,
        table=table.reset_index(drop=True),
        layers=_layers(shown),
        looks=styles,
        caption=_caption(table, shown),
        answers=_answers(table, styles),
        commands=_commands(shown, source),
        remarks=[*failed(shown), *remarks_of(shown), *lines],
        paired=None if compared is None or compared.empty else compared,
    )


def interval_text(low: float, high: float, form: str) -> str:
    """`[low, high]`, or nothing without an interval."""
    return "" if pd.isna(low) else f"[{low:{form}}, {high:{form}}]"


def title_of(workload: str) -> str:
    """A workload in one line."""
    return workload_title(workload).replace("\n", ", ")


def _table(shown: pd.DataFrame) -> pd.DataFrame:
    """The rows of `Content.table`, in no particular order."""
    means = summarise(shown)
    done = finished(shown).drop_duplicates("workload").set_index("workload")
    metric = means["workload"].map(done["primary_metric"])
    table = means[[*ROW, "method", "n"]].assign(
        metric=metric,
        examples=means["workload"].map(done["evaluation/examples"]),
        fp=SCALE * means["fp/score"],
        score=SCALE * means["score"],
        score_std=SCALE * means["score/std"],
        kl=means[KL],
        kl_std=means[f"{KL}/std"],
        stored=means["bits/stored"],
        code=means["bits/code"],
    )
    ranges = {"score": [limits(str(name)) for name in metric], "kl": [(0.0, math.inf)] * len(table)}
    for name, of in ranges.items():
        columns = (table[name], table[f"{name}_std"], table["n"])
        ends = [mean_interval(*values) for values in zip(*columns, of, strict=True)]
        table[f"{name}_low"], table[f"{name}_high"] = zip(*ends, strict=True)
    return table


def _layers(shown: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of each layer; NaN where no run of a group recorded the quantity."""
    rows = layer_frame(shown)
    if rows.empty:
        return pd.DataFrame(columns=[*ROW, "position", "name"])
    values = [key for key in LAYER_VALUES if key in rows]
    rows = rows.assign(position=rows.groupby("run_id", sort=False).cumcount())
    rows[values] = rows[values].astype(float)
    grouped = rows.groupby([*ROW, "position", "name"], sort=True)[values]
    return grouped.mean().reset_index()


def _caption(table: pd.DataFrame, shown: pd.DataFrame) -> str:
    return (
        f"{population_of_rows(table)}. Score: primary metric ({metrics(shown)}). Score, KL to full precision (nats), "
        "and stored bits per weight are means over the n calibration seeds; in brackets the 95 % interval of "
        "the mean (Student's t over seeds, cut where a value is impossible), which one seed does not have."
        f"{settings(shown)}"
    )


def _answers(table: pd.DataFrame, styles: dict[str, Look]) -> list[str]:
    """Which variant has the lowest KL at each budget of each workload, and what the next method has."""
    lines = []
    for workload, members in table.dropna(subset="kl").groupby("workload", sort=True):
        best = []
        for bits, rows in members.groupby("bits", sort=True):
            ranked = records(rows.sort_values("kl", kind="stable"))
            others = [row for row in ranked if row["method"] != ranked[0]["method"]]
            first, *second = [f"{styles[row['variant']].label} {row['kl']:.3g}" for row in (ranked[0], *others[:1])]
            best.append(f"{bits:g} bits {first}" + "".join(f" ({text})" for text in second))
        lines.append(f"{title_of(str(workload))}: lowest mean KL (of the next method): {'; '.join(best)}.")
    return lines


def _commands(shown: pd.DataFrame, source: str | Path) -> list[tuple[str, str, str]]:
    """(workload, variant, command) for each variant; budgets with other seeds than the rest have a command each."""
    commands = []
    for (workload, variant), members in finished(shown).groupby(["workload", "variant"], sort=True):
        by_seeds: dict[tuple[int, ...], list[float]] = {}
        for bits, rows in members.groupby("bits/target", sort=True):
            by_seeds.setdefault(tuple(sorted(map(int, rows["seed"]))), []).append(float(str(bits)))
        first = records(members)[0]
        commands += [(str(workload), str(variant), command(first, of, seeds, source)) for seeds, of in by_seeds.items()]
    return commands


def units(table: pd.DataFrame) -> dict[str, str]:
    """The primary metric of each workload with its unit, such as `accuracy (%)`."""
    first = table.drop_duplicates("workload")
    return {str(row["workload"]): with_unit(str(row["metric"])) for row in records(first)}
