"""Where the bits go: bits of layers, widths of rows, predicted and achieved risk."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from safetensors import safe_open

from analysis.figures.shared import CODE_BITS, layer_ticks, mean_and_std, method_of, names_height, shown_budgets
from analysis.loading import finished
from analysis.style import GREY, GREY_LINE, Look, drawn, is_narrow, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths
from bayesq.defaults import MIN_BITS
from bayesq.quant.bits import WIDTH_MAP_BITS, from_bits

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
SHADES = {width: matplotlib.colormaps["cividis"](0.97 - 0.95 * i / (len(WIDTHS) - 1)) for i, width in enumerate(WIDTHS)}
# inches of an entry of the legend
KEY = 0.85


def data(layers: pd.DataFrame) -> pd.DataFrame:
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


def width_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Share of each layer's rows at each width: workload, variant, bits, seed, position (forward order), width, share.

    Runs without their packed file (read from W&B, or deleted) give no rows.
    """
    columns = ["workload", "variant", "bits", "seed", "position", "width", "share"]
    rows = []
    for _, run in finished(runs).iterrows():
        if not isinstance(run.get("path"), str | Path):
            continue
        try:
            layers = row_widths(Path(run["path"]) / "quantized.safetensors")
        except FileNotFoundError:
            continue
        for position, widths in enumerate(layers.values()):
            for width, count in zip(*np.unique(widths, return_counts=True), strict=True):
                names = (run["workload"], run["variant"], run["bits/target"], run["seed"])
                rows.append((*names, position, int(width), count / len(widths)))
    return pd.DataFrame(rows, columns=columns)


def row_widths(path: Path) -> dict[str, np.ndarray]:
    """Bits per code of each row [R], by layer in forward order, from a run's quantized.safetensors.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with safe_open(path, framework="numpy") as file:
        (header,) = file.metadata().values()
        facts = json.loads(json.loads(header)["metadata"]["layers"])
        widths = {}
        for name, fact in facts.items():
            stored, rows = file.get_tensor(f"{name}/width"), int(fact["shape"][0])
            if fact["mixed"]:
                bits = np.unpackbits(stored, count=WIDTH_MAP_BITS * rows)
                widths[name] = from_bits(bits, WIDTH_MAP_BITS) + MIN_BITS
            else:
                widths[name] = np.repeat(stored, rows)
    return widths


def main_variant(data: pd.DataFrame, looks: Mapping[str, Look]) -> str:
    """The first variant, a plain one if there is one, of the last method in the order of `looks` that is in `data`."""
    variants = list(present(data, looks))
    method = method_of(pd.DataFrame({"variant": variants}))
    return variants[list(method).index(method.iloc[-1])]


@drawn
def draw(data: pd.DataFrame, row_bits: pd.DataFrame, look: Look, widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """Bits of each layer, widths of its rows, and its risk as predicted and as achieved; one row of panels per budget.

    In a narrow column the three panels of a budget are below one another.

    Args:
        data: rows of one workload and variant of `data`.
        row_bits: rows of `width_frame` for the same; may be empty.
    """
    budgets = shown_budgets(data)
    names = data.drop_duplicates("position").sort_values("position")["name"].tolist()
    figure, axes = _panels(len(budgets), widths.text, names_height(names))
    for row, (bits, (by_layer, by_row, risk)) in enumerate(zip(budgets, axes, strict=True)):
        members = data[data["bits"] == bits].sort_values("position")
        by_layer.axhline(bits, **GREY_LINE)
        by_layer.plot(
            members["position"] + 1, members["bits/code"], **(look.of_line() | {"linewidth": 0.7, "markersize": 2.5})
        )
        by_layer.set_ylabel(f"{bits:g}-bit budget\n{'code bits' if is_narrow(3, widths.text) else CODE_BITS}")
        by_layer.set_ylim(1.5, 8.5)

        _stack(by_row, row_bits[row_bits["bits"] == bits])

        both = members[(members["predicted_risk"] > 0) & (members["achieved_risk"] > 0)]
        ends = both[["predicted_risk", "achieved_risk"]].to_numpy()
        if len(ends):
            risk.plot([ends.min(), ends.max()], [ends.min(), ends.max()], **GREY_LINE)
        risk.plot(
            both["predicted_risk"], both["achieved_risk"], **(look.of_line() | {"linestyle": "none", "markersize": 2.5})
        )
        risk.set_xscale("log")
        risk.set_yscale("log")
        risk.set_ylabel("achieved risk (nats)")
        last = row == len(budgets) - 1
        for plot in (by_layer, by_row):
            layer_ticks(plot, names, labelled=last)
            plot.set_xlabel("layer, in forward order" if last else "")
        risk.set_xlabel("predicted risk (nats)" if last else "")
    patches = [
        Patch(facecolor=shade, edgecolor="black", linewidth=0.3, label=f"{width} bits")
        for width, shade in SHADES.items()
        if width in set(row_bits["width"])
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), int(widths.text / KEY)))
    return figure


def _panels(budgets: int, width: float, below: float) -> tuple[Figure, list[list[Axes]]]:
    """Three axes for each budget, with `below` inches for the names under the last budget's."""
    if not is_narrow(3, width):
        figure, axes = panels(budgets, 3, width, 1.65, width_ratios=(1.15, 1.15, 0.9))
        figure.set_figheight(figure.get_figheight() + below)
        return figure, axes
    figure, column = panels(3 * budgets, 1, width, 1.1)
    figure.set_figheight(figure.get_figheight() + 2 * below)
    plots = [plot for row in column for plot in row]
    return figure, [plots[place : place + 3] for place in range(0, len(plots), 3)]


def _stack(plot: Axes, row_bits: pd.DataFrame) -> None:
    """Bars of the shares of each layer's rows at each width, means over seeds."""
    seeds = max(row_bits["seed"].nunique(), 1)
    shares = row_bits.groupby(["position", "width"])["share"].sum().unstack("width").reindex(columns=WIDTHS) / seeds
    bottom = np.zeros(len(shares))
    for width, shade in SHADES.items():
        share = shares[width].fillna(0).to_numpy()
        some = share > 0
        plot.bar(shares.index[some] + 1, share[some], bottom=bottom[some], width=1.0, color=shade, linewidth=0)
        bottom += share
    plot.set_ylabel("share of rows")
    plot.set_ylim(0, 1)
    plot.grid(visible=False)
    if row_bits.empty:
        plot.text(0.5, 0.5, "no packed file at hand", transform=plot.transAxes, ha="center", color=GREY)


def rank_correlation(data: pd.DataFrame) -> float:
    """Spearman's correlation of predicted and achieved risk over layers; NaN for fewer than two."""
    ranks = data[["predicted_risk", "achieved_risk"]].dropna().rank()
    return float(ranks["predicted_risk"].corr(ranks["achieved_risk"])) if len(ranks) > 1 else math.nan
