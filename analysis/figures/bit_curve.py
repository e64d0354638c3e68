"""Score, KL, NLL and ECE against bits."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures.shared import (
    CODE_BITS,
    STORED_BITS,
    bit_ticks,
    complete,
    errorbar,
    few_bits,
    mean_and_std,
    positive,
    with_score,
)
from analysis.loading import finished
from analysis.metrics import with_unit
from analysis.style import DOUBLE, GREY, Look, legend, panels, present, style

CURVES = ("score", "q/kl_to_fp", "q/nll", "q/ece")


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and deviations over seeds of CURVES by workload, variant and budget, and the bits they took.

    `bits` is the budget; `bits/code` and `bits/stored` what was used, `fp ...` the full-precision network's values.
    """
    done = finished(runs)
    if done.empty:
        return pd.DataFrame(columns=["workload", "method", "variant", "bits", "n"])
    done = with_score(done).rename(columns={"bits/target": "bits"})
    values = [*CURVES, "bits/code", "bits/stored", "fp score", "fp/nll", "fp/ece"]
    done = done.assign(**{key: np.nan for key in values if key not in done})
    done[values] = done[values].astype(float)
    table = mean_and_std(done, ["workload", "method", "variant", "primary_metric", "bits"], values)
    kept = [name for name in map(str, table) if not (name.startswith(("fp", "bits/")) and name.endswith("std"))]
    table = complete(table[kept], "bits")
    return table.assign(primary_metric=table.groupby("workload")["primary_metric"].transform("first"))


@style()
def draw(data: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """Score, KL, NLL and ECE of one workload against code bits (upper row) and stored bits (lower row)."""
    figure, axes = panels(2, 4, DOUBLE, 1.75)
    metric = data["primary_metric"].iloc[0]
    shown = {
        "score": (with_unit(metric), "fp score"),
        "q/kl_to_fp": ("KL (nats)", None),
        "q/nll": ("NLL (nats)", "fp/nll"),
        "q/ece": ("ECE", "fp/ece"),
    }
    for row, (x, x_label) in enumerate((("bits/code", CODE_BITS), ("bits/stored", STORED_BITS))):
        for column, (y, (y_label, reference)) in enumerate(shown.items()):
            plot = axes[row][column]
            for variant, own in present(data, looks).items():
                line = data[data["variant"] == variant]
                # a missing budget stays in its place on the axis, so that the line breaks there
                errorbar(plot, line[x].fillna(line["bits"]), positive(line[y], y), line[f"{y} std"], own)
            if reference is not None and data[reference].notna().any():
                plot.axhline(data[reference].mean(), color=GREY, linewidth=0.8, zorder=1)
            if y == "q/kl_to_fp" or (y != "score" and _spans(data[y], 8)):
                plot.set_yscale("log")
                _few_log_ticks(plot)
            plot.set_xlabel(x_label)
            plot.set_ylabel(y_label)
            bit_ticks(plot, few_bits(data["bits"]))
    legend(figure, present(data, looks), further=[Line2D([], [], color=GREY, linewidth=0.8, label="full precision")])
    return figure


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
