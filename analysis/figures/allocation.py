"""Where the bits go: bits of layers, widths of rows, predicted and achieved risk."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.figures.shared import CODE_BITS, mean_and_std, method_of, shown_budgets
from analysis.loading import finished
from analysis.style import DOUBLE, GREY, GREY_LINE, Look, panels, present, style

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


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
    # importing torch takes seconds, and only one of ten pages needs it
    from safetensors import safe_open

    from bayesq.quant.bits import from_bits
    from bayesq.quant.grids import MIN_WIDTH
    from bayesq.quant.packing import WIDTH_MAP_BITS
    from bayesq.tensor_file import HEADER_KEY

    if not path.is_file():
        raise FileNotFoundError(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        facts = json.loads(header["metadata"]["layers"])
        widths = {}
        for name, fact in facts.items():
            stored, rows = file.get_tensor(f"{name}/width"), int(fact["shape"][0])
            if fact["mixed"]:
                bits = np.unpackbits(stored, count=WIDTH_MAP_BITS * rows)
                widths[name] = from_bits(bits, WIDTH_MAP_BITS) + MIN_WIDTH
            else:
                widths[name] = np.repeat(stored, rows)
    return widths


def main_variant(data: pd.DataFrame, looks: Mapping[str, Look]) -> str:
    """The first variant, a plain one if there is one, of the last method in the order of `looks` that is in `data`."""
    variants = list(present(data, looks))
    method = method_of(pd.DataFrame({"variant": variants}))
    return variants[list(method).index(method.iloc[-1])]


@style()
def draw(data: pd.DataFrame, widths: pd.DataFrame, look: Look) -> Figure:
    """Bits of each layer, widths of its rows, and its risk as predicted and as achieved; one row of panels per budget.

    Args:
        data: rows of one workload and variant of `data`.
        widths: rows of `width_frame` for the same; may be empty.
    """
    budgets = shown_budgets(data)
    figure, axes = panels(len(budgets), 3, DOUBLE, 1.65, width_ratios=(1.15, 1.15, 0.9))
    shades = [matplotlib.colormaps["cividis"](0.97 - 0.95 * i / (len(WIDTHS) - 1)) for i in range(len(WIDTHS))]
    for row, (bits, (by_layer, by_row, risk)) in enumerate(zip(budgets, axes, strict=True)):
        members = data[data["bits"] == bits].sort_values("position")
        by_layer.axhline(bits, **GREY_LINE)
        by_layer.plot(
            members["position"] + 1, members["bits/code"], **(look.of_line() | {"linewidth": 0.7, "markersize": 2.5})
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
            risk.plot([ends.min(), ends.max()], [ends.min(), ends.max()], **GREY_LINE)
        risk.plot(
            both["predicted_risk"], both["achieved_risk"], **(look.of_line() | {"linestyle": "none", "markersize": 2.5})
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
