"""Accuracy against confidence."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.shared import method_of
from analysis.style import GREY, PANEL, Look, drawn, legend, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths
from bayesq.suite.plots import confidence_bins

# With fewer examples the accuracy is mostly noise.
LEAST_IN_BIN = 10
FULL_PRECISION = "full precision"
FULL_PRECISION_LOOK = Look(FULL_PRECISION, GREY, "x", "-")


def data(examples: pd.DataFrame) -> pd.DataFrame:
    """Mean confidence, accuracy and share of examples in the bins of the ECE, pooled over seeds.

    One row per workload, variant, budget and bin; `full precision` counts as a variant at every budget. Regressions
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
        for (method, variant), predicted in members.groupby(["method", "variant"], sort=True):
            series.append((str(method), str(variant), "q", predicted))
        for method, variant, side, predicted in series:
            bins = confidence_bins(
                predicted[f"{side}_confidence"].to_numpy(dtype=float),
                predicted[f"{side}_correct"].to_numpy(dtype=float),
            )
            rows += [(workload, bits, method, variant, c, a, n / len(predicted), n) for c, a, n in bins]
    return pd.DataFrame(rows, columns=columns)


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """Accuracy against confidence of one workload, one panel per budget; marker areas are shares of the examples.

    Bins of fewer than LEAST_IN_BIN examples are left out.
    """
    budgets = sorted(data["bits"].unique())
    width = widths.text if len(budgets) > 1 else widths.column
    columns = min(len(budgets), max(int(width / PANEL), 1))
    rows = -(-len(budgets) // columns)
    figure, axes = panels(rows, columns, width, 2.0, sharex=True, sharey=True)
    places = [plot for row in axes for plot in row]
    data = data[data["n"] >= LEAST_IN_BIN]
    low = math.floor(10 * min(data["confidence"].min(), data["accuracy"].min())) / 10
    for plot in places[len(budgets) :]:
        plot.set_visible(False)
    for place, (plot, bits) in enumerate(zip(places, budgets, strict=False)):
        members = data[data["bits"] == bits]
        plot.plot([low, 1], [low, 1], color="black", linewidth=0.6, linestyle=":", zorder=1)
        for variant, look in [(FULL_PRECISION, FULL_PRECISION_LOOK), *present(members, looks).items()]:
            line = members[members["variant"] == variant]
            plot.plot(line["confidence"], line["accuracy"], color=look.color, linestyle=look.line, linewidth=0.9)
            face = look.color if look.marker == "x" else look.face
            edge = None if look.marker == "x" else look.color
            plot.scatter(
                line["confidence"], line["accuracy"], s=5 + 25 * line["share"], marker=look.marker, c=face,
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
    fp = Line2D([], [], label=FULL_PRECISION_LOOK.label, **FULL_PRECISION_LOOK.of_line())
    legend(figure, present(data, looks), further=[fp, perfect], columns=6)
    return figure
