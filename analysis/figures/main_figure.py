"""KL to full precision against the budget, a panel for each workload."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.shared import CODE_BITS, KL, lines, ticks
from analysis.paper import workload_title
from analysis.style import DOUBLE, SINGLE, Look, legend, panels, present, style


@style()
def draw(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """KL to full precision against the budget, one panel per workload.

    Args:
        data: of `bit_curve.data`.
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
        points = data[data["workload"] == workloads[place]]
        lines(plot, points, looks, "bits", "q/kl_to_fp")
        plot.set_yscale("log")
        name = workload_title(workloads[place])
        plot.set_title(name if columns > 1 else name.replace("\n", ", "), linespacing=0.9)
        plot.set_xlabel("code bits" if columns > 2 else CODE_BITS)
        ticks(plot.xaxis, sorted(points["bits"].unique()))
        plot.margins(x=0.12)
        if place % columns == 0:
            plot.set_ylabel(KL)
    legend(figure, present(data, looks))
    return figure
