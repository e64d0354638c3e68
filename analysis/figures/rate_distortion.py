"""Bits above the Gaussian rate-distortion bound."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.shared import (
    CODE_BITS,
    complete,
    few_bits,
    layer_ticks,
    lines,
    mean_and_std,
    names_height,
    shown_budgets,
    ticks,
)
from analysis.loading import finished
from analysis.style import GREY_LINE, Look, drawn, is_narrow, legend, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths

BOUNDS_FILE = "bounds.csv"
GAPS = {"above": "shared_bound_bits", "coding": "bound_bits"}


def bounds_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Long frame of bounds.csv of all finished runs that have one (`python -m analysis.bounds`)."""
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


def data(bounds: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight above the bound at the achieved risk, of whole networks, means and deviations over seeds.

    `above` is over the bound of the network at its total risk; `coding` over the bounds of its layers at their
    risks; their difference is the loss by the allocation of bits to layers.
    """
    rows = []
    keys = ["workload", "method", "variant", "bits", "seed"]
    for key, members in bounds.groupby(keys, sort=True):
        total = members["weights"].sum()
        used = (members["bits/code"] * members["weights"]).sum() / total
        least = {name: used - (members[column] * members["weights"]).sum() / total for name, column in GAPS.items()}
        rows.append({**dict(zip(keys, key, strict=True)), **least})
    table = mean_and_std(pd.DataFrame(rows), keys[:-1], list(GAPS))
    return complete(table, "bits")


def layer_gaps(bounds: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight of each layer above its bound at its risk, means over seeds."""
    table = bounds.assign(coding=bounds["bits/code"] - bounds["bound_bits"])
    return mean_and_std(table, ["workload", "method", "variant", "bits", "position", "name"], ["coding"])


@drawn
def draw(
    data: pd.DataFrame, layers: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS
) -> Figure:
    """Bits above the bounds of one workload: of the network, of its layers together, and layer by layer at one budget.

    Args:
        data: returned by `data`.
        layers: returned by `layer_gaps`.
    """
    bits = shown_budgets(layers)[0]
    members = layers[layers["bits"] == bits]
    by_name = members.drop_duplicates("position").sort_values("position")["name"].tolist()
    height = 2.1 + names_height(by_name)
    if is_narrow(3, widths.text):
        figure, axes = panels(3, 1, widths.text, 1.8, height_ratios=(1, 1, height / 2.1))
    else:
        figure, axes = panels(1, 3, widths.text, height, width_ratios=(1, 1, 1.3))
    plots = [plot for row in axes for plot in row]
    names = {
        "above": "bits per weight above\nthe network's bound",
        "coding": "bits per weight above\nthe layers' bounds",
    }
    for plot, (key, name) in zip(plots, names.items(), strict=False):
        lines(plot, data, looks, "bits", key)
        plot.set_ylabel(name)
        plot.set_xlabel(CODE_BITS)
        plot.set_ylim(bottom=min(0.0, float(data[["above", "coding"]].min().min())))
        ticks(plot.xaxis, few_bits(data["bits"]))
    for variant, look in present(members, looks).items():
        line = members[members["variant"] == variant].sort_values("position")
        plots[2].plot(line["position"] + 1, line["coding"], **(look.of_line() | {"linewidth": 0.6, "markersize": 2.2}))
    plots[2].axhline(0, **GREY_LINE)
    plots[2].set_title(f"{bits:g}-bit budget")
    plots[2].set_ylabel("bits per weight above\nthe layer's bound")
    plots[2].set_xlabel("layer, in forward order")
    layer_ticks(plots[2], by_name)
    legend(figure, present(data, looks))
    return figure
