"""What the figures show: for each a function that makes its data from the frames, and one that draws them.

Data frames are tidy and keep one row per drawn point; a point that no run gives is a row of NaN, where lines break.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.comparisons import whole_mean
from analysis.defaults import command_overrides
from analysis.figures import DOUBLE, GREY, SINGLE, Look, legend, look, panels, present, style
from analysis.loading import UNKNOWN, finished, records
from analysis.paper import title
from bayesq.suite.metrics import metric_of
from bayesq.suite.plots import confidence_bins

KL = "KL to full precision (nats)"
CODE_BITS, STORED_BITS = "code bits per weight", "stored bits per weight"


def slug(text: object) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", str(text)).strip("_").lower()


def main_runs(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Runs of the variants that a figure of all methods shows, and a line for each method that has more.

    A method of a workload with more than MOST_VARIANTS of them is shown by its plain variant alone, or by the one with
    the most runs where there is no plain one: an ablation has a page of its own.
    """
    kept, lines = [runs[runs["workload"] == UNKNOWN]], []
    for (workload, method), members in runs.groupby(["workload", "method"], sort=True):
        if workload == UNKNOWN:
            continue
        variants = members["variant"].value_counts(sort=False)
        if len(variants) > MOST_VARIANTS:
            first = min(variants.index, key=lambda variant: (variant != method, -variants[variant], variant))
            lines.append(f"{workload}: of {len(variants)} variants of {method}, only {first} is shown.")
            members = members[members["variant"] == first]
        kept.append(members)
    return pd.concat(kept).sort_index(), lines


MOST_VARIANTS = 3


def mean_and_std(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, `VALUE std` (sample standard deviation, NaN of a single seed) and `n`, one row per group.

    A mean is NaN where one of the seeds has no number.
    """
    groups = frame.groupby(list(by), sort=True)
    means, spread = whole_mean(groups, values), groups[list(values)].std(ddof=1)
    return means.join(spread.add_suffix(" std")).assign(n=groups["seed"].nunique()).reset_index()


def _with_score(runs: pd.DataFrame) -> pd.DataFrame:
    """`score` and `fp score`: the primary metric of the quantized and of the full-precision network, times 100."""
    scores = {
        column: [
            100 * row[f"{prefix}/{row['primary_metric']}"] if isinstance(row["primary_metric"], str) else math.nan
            for _, row in runs.iterrows()
        ]
        for column, prefix in (("score", "q"), ("fp score", "fp"))
    }
    return runs.assign(**scores)


def _complete(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """A row for each variant and each value of `axis` that any variant of its workload has; NaN where none was run."""
    parts = []
    for _, members in table.groupby("workload", sort=True):
        variants = members[["workload", "method", "variant"]].drop_duplicates()
        full = variants.merge(pd.DataFrame({axis: sorted(members[axis].unique())}), how="cross")
        parts.append(full.merge(members, how="left", on=["workload", "method", "variant", axis]))
    whole = pd.concat(parts, ignore_index=True)
    return whole.assign(n=whole["n"].fillna(0).astype(int))


def _errorbar(axes: Axes, x: Any, y: Any, spread: Any, own: Look) -> None:
    """Points, the line between neighbours that were both measured, and bars of one standard deviation over seeds."""
    y, spread = np.asarray(y, dtype=float), np.asarray(spread, dtype=float)
    bars = np.where(np.isfinite(spread) & np.isfinite(y), spread, 0.0)
    axes.plot(x, y, **own.of_line())
    seen = bars > 0
    if seen.any():
        axes.errorbar(
            np.asarray(x, dtype=float)[seen], y[seen], bars[seen], linestyle="none", marker="none", color=own.colour,
            elinewidth=0.8, zorder=2,
        )  # fmt: skip


def _bit_ticks(axes: Axes, budgets: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(budgets)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _bottom_up(data: pd.DataFrame, looks: Mapping[str, Look]) -> list[tuple[str, Look]]:
    """`_present` in the order of drawing: the first method lies on top."""
    return list(reversed(present(data, looks).items()))


def _few_bits(budgets: pd.Series) -> list[float]:
    """Where an axis of bits has its ticks: at the budgets, or at whole numbers where those are many."""
    had = sorted(float(bits) for bits in budgets.unique())
    return had if len(had) < 6 else [float(bits) for bits in range(2, 9)]


def _spans(values: pd.Series, factor: float) -> bool:
    """Whether the largest is more than `factor` times the smallest, and both positive."""
    return bool(values.min() > 0 and values.max() > factor * values.min())


def _few_log_ticks(axes: Axes) -> None:
    """An axis of less than two decades gets its labels at 1, 2 and 5, plainly written."""
    low, high = axes.get_ylim()
    if high / low >= 100:
        return
    ticks = [digit * 10.0**power for power in range(-9, 4) for digit in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# ------------------------------------------------------------------------------------------------ curves against bits

CURVES = ("score", "q/kl_to_fp", "q/nll", "q/ece")


def bit_curve_data(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and deviations over seeds of CURVES by workload, variant and budget, and the bits they took.

    `bits` is the budget; `bits/code` and `bits/stored` what was used, `fp ...` the full-precision network's values.
    """
    done = finished(runs)
    if done.empty:
        return pd.DataFrame(columns=["workload", "method", "variant", "bits", "n"])
    done = _with_score(done).rename(columns={"bits/target": "bits"})
    values = [*CURVES, "bits/code", "bits/stored", "fp score", "fp/nll", "fp/ece"]
    done = done.assign(**{key: np.nan for key in values if key not in done})
    done[values] = done[values].astype(float)
    table = mean_and_std(done, ["workload", "method", "variant", "primary_metric", "bits"], values)
    kept = [name for name in map(str, table) if not (name.startswith(("fp", "bits/")) and name.endswith("std"))]
    table = _complete(table[kept], "bits")
    return table.assign(primary_metric=table.groupby("workload")["primary_metric"].transform("first"))


@style()
def bit_curve(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """Score, KL, NLL and ECE of one workload against code bits (upper row) and stored bits (lower row)."""
    figure, axes = panels(2, 4, DOUBLE, 1.75)
    metric = data["primary_metric"].iloc[0]
    shown = {
        "score": (f"{metric} ({metric_of(metric).unit})", "fp score"),
        "q/kl_to_fp": ("KL (nats)", None),
        "q/nll": ("NLL (nats)", "fp/nll"),
        "q/ece": ("ECE", "fp/ece"),
    }
    for row, (x, x_label) in enumerate((("bits/code", CODE_BITS), ("bits/stored", STORED_BITS))):
        for column, (y, (y_label, reference)) in enumerate(shown.items()):
            plot = axes[row][column]
            for variant, own in _bottom_up(data, looks):
                line = data[data["variant"] == variant]
                # a missing budget stays in its place on the axis, so that the line breaks there
                _errorbar(plot, line[x].fillna(line["bits"]), _positive(line[y], y), line[f"{y} std"], own)
            if reference is not None and data[reference].notna().any():
                plot.axhline(data[reference].mean(), color=GREY, linewidth=0.8, zorder=1)
            if y == "q/kl_to_fp" or (y != "score" and _spans(data[y], 8)):
                plot.set_yscale("log")
                _few_log_ticks(plot)
            plot.set_xlabel(x_label)
            plot.set_ylabel(y_label)
            _bit_ticks(plot, _few_bits(data["bits"]))
    legend(figure, present(data, looks), further=[Line2D([], [], color=GREY, linewidth=0.8, label="full precision")])
    return figure


def _positive(values: pd.Series, key: str) -> pd.Series:
    """Values a logarithmic axis can show; only the KL has one."""
    return values.where(values > 0) if key == "q/kl_to_fp" else values


@style()
def main_figure(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """KL to full precision against the budget, one panel per workload.

    Args:
        data: of `bit_curve_data`.
    """
    workloads = sorted(data["workload"].unique())
    columns = min(len(workloads), 5)
    rows = -(-len(workloads) // columns)
    width = DOUBLE if columns > 2 else SINGLE
    figure, axes = panels(rows, columns, width, 2.0, sharey=True)
    for place, plot in enumerate(plot for row in axes for plot in row):
        if place >= len(workloads):
            plot.set_visible(False)
            continue
        own_data = data[data["workload"] == workloads[place]]
        for variant, own in _bottom_up(own_data, looks):
            line = own_data[own_data["variant"] == variant]
            _errorbar(plot, line["bits"], _positive(line["q/kl_to_fp"], "q/kl_to_fp"), line["q/kl_to_fp std"], own)
        plot.set_yscale("log")
        name = title(workloads[place])
        plot.set_title(name if columns > 1 else name.replace("\n", ", "), linespacing=0.9)
        plot.set_xlabel("code bits" if columns > 2 else CODE_BITS)
        _bit_ticks(plot, sorted(own_data["bits"].unique()))
        plot.margins(x=0.12)
        if place % columns == 0:
            plot.set_ylabel(KL)
    legend(figure, present(data, looks))
    return figure


# -------------------------------------------------------------------------------------------------------- calibration


def calibration_size_data(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and deviations over seeds of the KL and the score by workload, variant, budget and calibration examples.

    Only budgets of a workload that were run with several sizes count.
    """
    done = finished(runs)
    if done.empty:
        return pd.DataFrame(columns=["workload", "method", "variant", "bits", "examples", "n"])
    done = _with_score(done).rename(columns={"bits/target": "bits", "calibration/examples": "examples"})
    done["variant"] = [without(variant, "calibration.examples", "examples") for variant in done["variant"]]
    sizes = done.groupby(["workload", "bits"])["examples"].transform("nunique")
    done = done[sizes > 1]
    if done.empty:
        return done
    values = ["q/kl_to_fp", "score", "fp score"]
    done[values] = done[values].astype(float)
    table = mean_and_std(done, ["workload", "method", "variant", "primary_metric", "bits", "examples"], values)
    parts = [_complete(part, "examples").assign(bits=bits) for bits, part in table.groupby("bits")]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(primary_metric=table.groupby("workload")["primary_metric"].transform("first"))


def method_of(frame: pd.DataFrame) -> pd.Series:
    """The method of each row's variant."""
    return frame["variant"].str.partition(" ")[0]


def without(variant: str, *keys: str) -> str:
    """A variant's name without some of its settings."""
    return " ".join(word for word in variant.split(" ") if word.partition("=")[0] not in keys)


@style()
def calibration_size(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """KL and score of one workload at one budget against the number of calibration examples."""
    figure, axes = panels(1, 2, DOUBLE, 2.0)
    metric = data["primary_metric"].iloc[0]
    shown = (("q/kl_to_fp", KL), ("score", f"{metric} ({metric_of(metric).unit})"))
    sizes = sorted(data["examples"].unique())
    for plot, (key, y_label) in zip(axes[0], shown, strict=True):
        for variant, own in _bottom_up(data, looks):
            line = data[data["variant"] == variant]
            _errorbar(plot, line["examples"], _positive(line[key], key), line[f"{key} std"], own)
        plot.set_xscale("log", base=2)
        _bit_ticks(plot, sizes)
        plot.set_xlabel("calibration examples")
        plot.set_ylabel(y_label)
    axes[0][0].set_yscale("log")
    axes[0][1].axhline(data["fp score"].mean(), color=GREY, linewidth=0.8, zorder=1)
    legend(figure, present(data, looks), further=[Line2D([], [], color=GREY, linewidth=0.8, label="full precision")])
    return figure


# -------------------------------------------------------------------------------------------------------- reliability


def reliability_data(examples: pd.DataFrame) -> pd.DataFrame:
    """Mean confidence, accuracy and share of examples in the bins of the ECE, pooled over seeds.

    One row per workload, variant, budget and bin; `full precision` is a variant of its own at every budget. Regressions
    and runs without recorded confidences give no rows.
    """
    columns = ["workload", "bits", "method", "variant", "confidence", "accuracy", "share", "n"]
    rows: list[tuple[Any, ...]] = []
    if not {"q_confidence", "fp_confidence"} <= set(examples.columns):
        return pd.DataFrame(rows, columns=columns)
    known = examples.assign(method=method_of(examples)).dropna(subset=["q_confidence", "fp_confidence"])
    for (workload, bits), members in known.groupby(["workload", "bits"], sort=True):
        first = members[members["run_id"] == members["run_id"].iloc[0]]
        series = [("", FULL_PRECISION, "fp", first)]
        for (method, variant), own in members.groupby(["method", "variant"], sort=True):
            series.append((str(method), str(variant), "q", own))
        for method, variant, side, own in series:
            found = confidence_bins(
                own[f"{side}_confidence"].to_numpy(dtype=float), own[f"{side}_correct"].to_numpy(dtype=float)
            )
            rows += [(workload, bits, method, variant, c, a, n / len(own), n) for c, a, n in found]
    return pd.DataFrame(rows, columns=columns)


# The accuracy of fewer examples is noise.
LEAST_IN_BIN = 10
FULL_PRECISION = "full precision"
FULL_PRECISION_LOOK = Look(GREY, "x", "-")


@style()
def reliability(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """Accuracy against confidence of one workload, one panel per budget; marker areas are shares of the examples.

    Bins of fewer than LEAST_IN_BIN examples are left out.
    """
    budgets = sorted(data["bits"].unique())
    columns = min(len(budgets), 4)
    rows = -(-len(budgets) // columns)
    figure, axes = panels(rows, columns, DOUBLE if columns > 1 else SINGLE, 2.0, sharex=True, sharey=True)
    places = [plot for row in axes for plot in row]
    data = data[data["n"] >= LEAST_IN_BIN]
    low = math.floor(10 * min(data["confidence"].min(), data["accuracy"].min())) / 10
    for plot in places[len(budgets) :]:
        plot.set_visible(False)
    for place, (plot, bits) in enumerate(zip(places, budgets, strict=False)):
        members = data[data["bits"] == bits]
        plot.plot([low, 1], [low, 1], color="black", linewidth=0.6, linestyle=":", zorder=1)
        for variant, own in [(FULL_PRECISION, FULL_PRECISION_LOOK), *_bottom_up(members, looks)]:
            line = members[members["variant"] == variant]
            plot.plot(line["confidence"], line["accuracy"], color=own.colour, linestyle=own.line, linewidth=0.9)
            face = own.colour if own.marker == "x" else own.face
            edge = None if own.marker == "x" else own.colour
            plot.scatter(
                line["confidence"], line["accuracy"], s=5 + 25 * line["share"], marker=own.marker, c=face,
                linewidths=0.6, zorder=3, clip_on=False, edgecolors=edge,
            )  # fmt: skip
        plot.set_title(f"{bits:g} bits")
        plot.set_xlim(low - 0.02, 1.02)
        plot.set_ylim(low - 0.02, 1.02)
        if place // columns == rows - 1:
            plot.set_xlabel("confidence")
        if place % columns == 0:
            plot.set_ylabel("accuracy")
    perfect = Line2D([], [], color="black", linewidth=0.6, linestyle=":", label="calibrated")
    fp = Line2D([], [], label=FULL_PRECISION, **FULL_PRECISION_LOOK.of_line())
    legend(figure, present(data, looks), further=[fp, perfect], columns=6)
    return figure


# --------------------------------------------------------------------------------------------------------- allocation

# The paper's budgets; where a workload has others, its lowest, middle and highest are shown.
SHOWN_BUDGETS = (3.0, 3.5, 4.0)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def allocation_data(layers: pd.DataFrame) -> pd.DataFrame:
    """Bits and risks of each layer, means over seeds, of the runs that allocate by predicted risk.

    `position` counts layers in forward order. Risks are in nats per example.
    """
    values = ["bits/code", "bits/stored", "predicted_risk", "achieved_risk"]
    if layers.empty or "predicted_risk" not in layers:
        return pd.DataFrame(columns=["workload", "method", "variant", "bits", "position", "name", *values, "n"])
    placed = layers.assign(method=method_of(layers), position=layers.groupby("run_id", sort=False).cumcount())
    placed = placed.dropna(subset=["predicted_risk"])
    placed[values] = placed[values].astype(float)
    table = mean_and_std(placed, ["workload", "method", "variant", "bits", "position", "name"], values)
    return table[["workload", "method", "variant", "bits", "position", "name", *values, "n"]]


def main_variant(data: pd.DataFrame, looks: Mapping[str, Look]) -> str | None:
    """The first variant in the order of `looks`, plain ones first, that has rows in `data`."""
    variants = list(present(data, looks))
    plain = [variant for variant in variants if " " not in variant]
    return next(iter([*plain, *variants]), None)


def shown_budgets(data: pd.DataFrame) -> list[float]:
    """At most three budgets."""
    had = sorted(float(bits) for bits in data["bits"].unique())
    chosen = [bits for bits in had if bits in SHOWN_BUDGETS]
    return chosen or sorted({had[0], had[len(had) // 2], had[-1]})


@style()
def allocation(data: pd.DataFrame, widths: pd.DataFrame, own: Look) -> Figure:
    """Bits of each layer, widths of its rows, and its risk as predicted and as achieved; one row of panels per budget.

    Args:
        data: rows of one workload and variant from `allocation_data`.
        widths: rows of the same from `width_frame`; may be empty.
    """
    budgets = shown_budgets(data)
    figure, axes = panels(len(budgets), 3, DOUBLE, 1.65, width_ratios=(1.15, 1.15, 0.9))
    shades = [matplotlib.colormaps["cividis"](0.97 - 0.95 * i / (len(WIDTHS) - 1)) for i in range(len(WIDTHS))]
    for row, (bits, (by_layer, by_row, risk)) in enumerate(zip(budgets, axes, strict=True)):
        members = data[data["bits"] == bits].sort_values("position")
        by_layer.axhline(bits, color=GREY, linewidth=0.8, zorder=1)
        by_layer.plot(
            members["position"] + 1, members["bits/code"], **(own.of_line() | {"linewidth": 0.7, "markersize": 2.5})
        )
        by_layer.set_ylabel(f"{bits:g}-bit budget\n{CODE_BITS}")
        by_layer.set_ylim(1.5, 8.5)

        chosen = widths[widths["bits"] == bits]
        seeds = max(chosen["seed"].nunique(), 1)
        shares = chosen.groupby(["position", "width"])["share"].sum().unstack("width").reindex(columns=WIDTHS) / seeds
        bottom = np.zeros(len(shares))
        for shade, width in zip(shades, WIDTHS, strict=True):
            share = shares[width].fillna(0).to_numpy()
            by_row.bar(shares.index + 1, share, bottom=bottom, width=1.0, color=shade, linewidth=0)
            bottom += share
        by_row.set_ylabel("share of rows")
        by_row.set_ylim(0, 1)
        by_row.grid(visible=False)
        if chosen.empty:
            by_row.text(0.5, 0.5, "no packed file at hand", transform=by_row.transAxes, ha="center", color=GREY)

        both = members[(members["predicted_risk"] > 0) & (members["achieved_risk"] > 0)]
        ends = both[["predicted_risk", "achieved_risk"]].to_numpy()
        if len(ends):
            risk.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color=GREY, linewidth=0.8, zorder=1)
        risk.plot(
            both["predicted_risk"], both["achieved_risk"], **(own.of_line() | {"linestyle": "none", "markersize": 2.5})
        )
        risk.set_xscale("log")
        risk.set_yscale("log")
        risk.set_ylabel("achieved risk (nats)")
        for plot in (by_layer, by_row):
            plot.set_xlim(0.3, data["position"].max() + 1.7)
            plot.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            plot.set_xlabel("layer, in forward order" if row == len(budgets) - 1 else "")
        risk.set_xlabel("predicted risk (nats)" if row == len(budgets) - 1 else "")
    present = set(widths["width"])
    patches = [
        Patch(facecolor=shade, edgecolor="black", linewidth=0.3, label=f"{width} bits")
        for shade, width in zip(shades, WIDTHS, strict=True)
        if width in present
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure


def rank_correlation(data: pd.DataFrame) -> float:
    """Spearman's correlation of predicted and achieved risk over layers; NaN for fewer than two."""
    ranks = data[["predicted_risk", "achieved_risk"]].dropna().rank()
    return float(ranks["predicted_risk"].corr(ranks["achieved_risk"])) if len(ranks) > 1 else math.nan


# ----------------------------------------------------------------------------------------------------------- ablation


def ablation_data(runs: pd.DataFrame) -> pd.DataFrame:
    """KL of each ablation, means and deviations over seeds, and as a multiple of the full method's.

    Only runs started with `ablation=` and, of runs without, those whose workload and budget have an ablation and that
    are the full method.
    """
    columns = ["workload", "bits", "ablation", "method", "q/kl_to_fp", "q/kl_to_fp std", "n", "multiple"]
    done = finished(runs).rename(columns={"bits/target": "bits"})
    done = done.assign(ablation=pd.Series([ablation_of(run) for run in records(done)], done.index, dtype="object"))
    # a finished run keeps the overrides of the last command that asked for it, which may not have said ablation=full
    for _, own in done.groupby(["workload", "bits"]):
        variants = set(own[own["ablation"] == FULL]["variant"]) or {"bayesq"}
        if own["ablation"].notna().any():
            same = own[own["ablation"].isna() & own["variant"].isin(variants)]
            done.loc[same.index, "ablation"] = FULL
    done = done[done["ablation"].notna()]
    if done.empty:
        return pd.DataFrame(columns=columns)
    done["q/kl_to_fp"] = done["q/kl_to_fp"].astype(float)
    table = mean_and_std(done, ["workload", "bits", "ablation", "method"], ["q/kl_to_fp"])
    full = table[table["ablation"] == FULL].set_index(["workload", "bits"])["q/kl_to_fp"].rename("full")
    table = table.join(full, on=["workload", "bits"])
    table["multiple"] = table["q/kl_to_fp"] / table["full"]
    return table.sort_values(["workload", "bits", "q/kl_to_fp"], ignore_index=True)[columns]


FULL = "full"


def ablation_of(run: Mapping[str, Any]) -> str | None:
    """The file of conf/ablation a run was started with; None where there was none, or no record of it."""
    return next((o.partition("=")[2] for o in command_overrides(run) if o.startswith("ablation=")), None)


@style()
def ablation(data: pd.DataFrame) -> Figure:
    """KL of each ablation of one workload at one budget, smallest first; the line is the full method's."""
    figure, ((plot,),) = panels(1, 1, SINGLE, 0.7 + 0.15 * len(data))
    full = data[data["ablation"] == FULL]["q/kl_to_fp"]
    if not full.empty:
        plot.axvline(full.iloc[0], color=GREY, linewidth=0.8, zorder=1)
    for place, (_, row) in enumerate(data.iterrows()):
        own = look(row["method"], 0 if row["ablation"] == FULL or row["method"] != "bayesq" else 1)
        spread = row["q/kl_to_fp std"]
        if spread > 0:
            plot.errorbar(row["q/kl_to_fp"], place, xerr=spread, color=own.colour, linestyle="none", elinewidth=0.8)
        plot.plot(row["q/kl_to_fp"], place, **(own.of_line() | {"linestyle": "none"}))
    plot.set_yticks(range(len(data)), [str(name).replace("_", " ") for name in data["ablation"]])
    plot.set_ylim(len(data) - 0.4, -0.6)
    plot.set_xscale("log")
    plot.set_xlabel(KL)
    return figure


# -------------------------------------------------------------------------------------------------- rate and distortion

BOUNDS_FILE = "bounds.csv"


def bounds_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Long frame of bounds.csv of all finished runs that have one (`python -m bayesq.suite.bounds`)."""
    parts = []
    for _, run in finished(runs).iterrows():
        path = run.get("path")
        file = Path(path) / BOUNDS_FILE if isinstance(path, str | Path) else None
        if file is None or not file.is_file():
            continue
        rows = pd.read_csv(file)
        names = {"run_id": "run_id", "workload": "workload", "method": "method", "variant": "variant", "seed": "seed"}
        names["bits"] = "bits/target"
        parts.append(rows.assign(position=range(len(rows)), **{column: run[key] for column, key in names.items()}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "workload", "variant"])


GAPS = {"above": "shared_bound_bits", "coding": "bound_bits"}


def rate_distortion_data(bounds: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight above the bound at the achieved risk, of whole networks, means and deviations over seeds.

    `above` is over the bound of the network at its total risk; `coding` over the bounds of its layers at their own
    risks; the difference of the two is what the allocation of bits to layers loses.
    """
    rows = []
    keys = ["workload", "method", "variant", "bits", "seed"]
    for key, members in bounds.groupby(keys, sort=True):
        total = members["weights"].sum()
        used = (members["bits/code"] * members["weights"]).sum() / total
        least = {name: used - (members[column] * members["weights"]).sum() / total for name, column in GAPS.items()}
        rows.append({**dict(zip(keys, key, strict=True)), **least})
    table = mean_and_std(pd.DataFrame(rows), keys[:-1], list(GAPS))
    return _complete(table, "bits")


def layer_gaps(bounds: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight of each layer above its bound at its own risk, means over seeds."""
    table = bounds.assign(coding=bounds["bits/code"] - bounds["bound_bits"])
    return mean_and_std(table, ["workload", "method", "variant", "bits", "position", "name"], ["coding"])


@style()
def rate_distortion(data: pd.DataFrame, layers: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """Bits above the bounds of one workload: of the network, of its layers together, and layer by layer at one budget.

    Args:
        data: of `rate_distortion_data`.
        layers: of `layer_gaps`.
    """
    figure, axes = panels(1, 3, DOUBLE, 2.1, width_ratios=(1, 1, 1.3))
    for plot, (key, name) in zip(
        axes[0],
        (
            ("above", "bits per weight above\nthe network's bound"),
            ("coding", "bits per weight above\nthe layers' bounds"),
        ),
        strict=False,
    ):
        for variant, own in _bottom_up(data, looks):
            line = data[data["variant"] == variant]
            _errorbar(plot, line["bits"], line[key], line[f"{key} std"], own)
        plot.set_ylabel(name)
        plot.set_xlabel(CODE_BITS)
        plot.set_ylim(bottom=min(0.0, float(data[["above", "coding"]].min().min())))
        _bit_ticks(plot, _few_bits(data["bits"]))
    bits = shown_budgets(layers)[0]
    members = layers[layers["bits"] == bits]
    for variant, own in _bottom_up(members, looks):
        line = members[members["variant"] == variant].sort_values("position")
        axes[0][2].plot(line["position"] + 1, line["coding"], **(own.of_line() | {"linewidth": 0.6, "markersize": 2.2}))
    axes[0][2].axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes[0][2].set_title(f"{bits:g}-bit budget")
    axes[0][2].set_ylabel("bits per weight above\nthe layer's bound")
    axes[0][2].set_xlabel("layer, in forward order")
    axes[0][2].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(figure, present(data, looks))
    return figure
