"""KL against everything that is stored, with the Pareto front."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import bit_curve
from analysis.figures.main_figure import LOSS, is_first, workload_panels
from analysis.figures.shared import KL, STORED_BITS
from analysis.style import GREY, Look, drawn, legend, present
from analysis.venues import DEFAULT_WIDTHS, Widths

STORED = "bits/stored"
# Stored bits that differ by less are one size: two methods at one budget differ by some thousandths.
ALIKE = 0.005
RING: dict[str, Any] = {
    "linestyle": "none", "marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": GREY,
    "markeredgewidth": 0.8, "zorder": 1,
}  # fmt: skip


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """The measured points of `bit_curve.data`, and `front`: no other point of the workload is as small and as good."""
    points = bit_curve.data(runs)
    points = points.dropna(subset=[STORED, LOSS]) if len(points) else points
    fronts = [front(members) for _, members in points.groupby("workload")]
    return points.assign(front=pd.concat(fronts) if fronts else pd.Series(dtype=bool))


def front(points: pd.DataFrame) -> pd.Series:
    """Whether each point is on the front: no point has at most its stored bits and its KL, and less of one of them."""
    bits, loss = points[STORED], points[LOSS]
    better = [
        ((bits <= x + ALIKE) & (loss <= y) & ((bits < x - ALIKE) | (loss < y))).any()
        for x, y in zip(bits, loss, strict=True)
    ]
    return ~pd.Series(better, index=points.index, dtype=bool)


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """KL against stored bits, one panel per workload; the grey line and the rings mark the Pareto front.

    Args:
        data: returned by `data`.
    """
    figure, plots = workload_panels(data, widths, sharey=True)
    for workload, plot in plots.items():
        points = data[(data["workload"] == workload) & (data[LOSS] > 0)]
        best = points[points["front"]].sort_values(STORED)
        plot.step(best[STORED], best[LOSS], where="post", color=GREY, linewidth=0.8, zorder=1)
        plot.plot(best[STORED], best[LOSS], **RING)
        for variant, look in present(points, looks).items():
            own = points[points["variant"] == variant]
            plot.plot(own[STORED], own[LOSS], **(look.of_line() | {"linestyle": "none"}))
        plot.set_yscale("log")
        plot.margins(x=0.12)
        plot.set_xlabel("stored bits" if len(plots) > 2 else STORED_BITS)
        if is_first(plot):
            plot.set_ylabel(KL)
    legend(figure, present(data, looks), further=[Line2D([], [], label="Pareto front", **RING)], lines=False)
    return figure
