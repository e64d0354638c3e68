"""Time and memory as multiples of GPTQ's."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.shared import log_ticks
from analysis.methods import title
from analysis.paper import REFERENCE, workload_title
from analysis.style import GREY_LINE, Look, drawn, is_narrow, legend, panels, present
from analysis.tables.cost import medians_of, run_costs, with_multiples
from analysis.venues import DEFAULT_WIDTHS, Widths


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """Preprocessing seconds and peak memory of every run, and `time x` and `memory x`, as multiples of GPTQ's medians.

    Seconds are those from the loaded model to its codes, distillation included; a workload without GPTQ has no
    multiples. The reference GPTQ is that of `cost_table`.
    """
    costs = run_costs(runs)
    data = with_multiples(costs, medians_of(costs)).assign(
        seconds=lambda table: table["total"], gib=lambda table: table["memory"] / 2**30
    )
    data = data.rename(columns={"total x": "time x"})
    columns = ["workload", "method", "variant", "bits", "seed", "seconds", "gib", "time x", "memory x", "reference"]
    return data[columns]


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """Time and memory as multiples of GPTQ's: medians over budgets and seeds, with smallest and largest.

    Memory has a panel if any run has a multiple of it.
    """
    workloads = sorted(data["workload"].unique(), reverse=True)
    keys = {"time x": f"preprocessing time (multiples of {title(REFERENCE)}'s)"}
    if data["memory x"].notna().any():
        keys["memory x"] = f"peak memory (multiples of {title(REFERENCE)}'s)"
    width = widths.text if len(keys) > 1 else widths.column
    shape = (len(keys), 1) if is_narrow(len(keys), width) else (1, len(keys))
    figure, axes = panels(*shape, width, 0.8 + 0.55 * len(workloads), sharey=True)
    shown = present(data, looks)
    for plot, (key, x_label) in zip((plot for row in axes for plot in row), keys.items(), strict=True):
        plot.axvline(1, **GREY_LINE)
        for number, (variant, look) in enumerate(shown.items()):
            shift = 0.6 * ((number + 0.5) / len(shown) - 0.5)
            for place, workload in enumerate(workloads):
                values = data[(data["variant"] == variant) & (data["workload"] == workload)][key].dropna()
                if values.empty:
                    continue
                plot.plot([values.min(), values.max()], [place - shift] * 2, color=look.color, linewidth=0.8)
                plot.plot(values.median(), place - shift, **(look.of_line() | {"linestyle": "none"}))
        if key == "time x":
            plot.set_xscale("log")
            log_ticks(plot.xaxis, 200, (1,))  # a wider axis has no room for three ticks a decade
        plot.set_xlabel(x_label)
        plot.set_ylim(-0.6, len(workloads) - 0.4)
        plot.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(workloads)), [workload_title(workload) for workload in workloads])
    legend(figure, shown, lines=False)
    return figure
