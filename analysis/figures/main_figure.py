"""KL to full precision, or the score, against the budget, a panel for each workload."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.shared import CODE_BITS, KL, lines, ticks
from analysis.metrics import with_unit
from analysis.paper import workload_title
from analysis.style import GREY_LINE, Look, drawn, full_precision_line, legend, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths

LOSS, SCORE = "q/kl_to_fp", "score"
# inches of a panel with its title
PANEL = 1.35


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS, y: str = LOSS) -> Figure:
    """KL to full precision (y=LOSS) or the primary metric (y=SCORE) against the budget, one panel per workload.

    Args:
        data: returned by `bit_curve.data`.
    """
    figure, plots = workload_panels(data, widths, sharey=y == LOSS)
    metrics = {name: points["primary_metric"].iloc[0] for name, points in data.groupby("workload")}
    for place, (workload, plot) in enumerate(plots.items()):
        points = data[data["workload"] == workload]
        lines(plot, points, looks, "bits", y)
        plot.set_xlabel("code bits" if len(plots) > 2 else CODE_BITS)
        ticks(plot.xaxis, sorted(points["bits"].unique()))
        plot.margins(x=0.12)
        if y == LOSS:
            plot.set_yscale("log")
        else:
            plot.axhline(points["fp score"].mean(), **GREY_LINE)
        if place == 0 or is_first(plot) or (y == SCORE and len(set(metrics.values())) > 1):
            plot.set_ylabel(KL if y == LOSS else with_unit(metrics[workload]))
    legend(figure, present(data, looks), further=[full_precision_line()] if y == SCORE else [])
    return figure


def is_first(plot: Axes) -> bool:
    """Whether a panel is the first of its row."""
    place = plot.get_subplotspec()
    return place is not None and place.is_first_col()


def workload_panels(data: pd.DataFrame, widths: Widths, sharey: bool) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a titled panel for each workload of `data`."""
    workloads = sorted(data["workload"].unique())
    width = widths.text if len(workloads) > 2 else widths.column
    columns = min(len(workloads), int(width / PANEL))
    rows = -(-len(workloads) // columns)
    figure, axes = panels(rows, columns, width, 2.0, sharey=sharey)
    plots = [plot for row in axes for plot in row]
    for plot in plots[len(workloads) :]:
        plot.set_visible(False)
    for plot, workload in zip(plots, workloads, strict=False):
        name = workload_title(workload)
        plot.set_title(name if columns > 1 else name.replace("\n", ", "), linespacing=0.9)
    return figure, dict(zip(workloads, plots, strict=False))
