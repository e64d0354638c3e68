"""Score, KL, NLL and ECE against bits."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.shared import (
    complete,
    few_bits,
    lines,
    log_ticks,
    mean_and_std,
    ticks,
    with_score,
)
from analysis.loading import finished
from analysis.metrics import with_unit
from analysis.style import GREY_LINE, Look, drawn, full_precision_line, legend, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths

# inches; narrower figures have two columns
NARROW = 5.0
CURVES = ("score", "q/kl_to_fp", "q/nll", "q/ece")


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and deviations over seeds of CURVES by workload, variant and budget, and the bits used.

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
    columns = [name for name in map(str, table) if not (name.startswith(("fp", "bits/")) and name.endswith("std"))]
    table = complete(table[columns], "bits")
    return table.assign(primary_metric=table.groupby("workload")["primary_metric"].transform("first"))


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """Score, KL, NLL and ECE of one workload against code bits (upper row) and stored bits (lower row).

    In a narrow column these are the left and the right column.
    """
    narrow = widths.text < NARROW
    figure, axes = panels(4, 2, widths.text, 1.6) if narrow else panels(2, 4, widths.text, 1.75)
    metric = data["primary_metric"].iloc[0]
    shown = {
        "score": (with_unit(metric), "fp score"),
        "q/kl_to_fp": ("KL (nats)", None),
        "q/nll": ("NLL (nats)", "fp/nll"),
        "q/ece": ("ECE", "fp/ece"),
    }
    for row, (x, x_label) in enumerate((("bits/code", "code bits"), ("bits/stored", "stored bits"))):
        for column, (y, (y_label, reference)) in enumerate(shown.items()):
            plot = axes[column][row] if narrow else axes[row][column]
            lines(plot, data, looks, x, y)
            if reference is not None and data[reference].notna().any():
                plot.axhline(data[reference].mean(), **GREY_LINE)
            if y == "q/kl_to_fp" or (y != "score" and _spans(data[y], 8)):
                plot.set_yscale("log")
                log_ticks(plot.yaxis, 100, ())
            plot.set_xlabel(x_label)
            plot.set_ylabel(y_label)
            ticks(plot.xaxis, few_bits(data["bits"]))
    legend(figure, present(data, looks), further=[full_precision_line()])
    return figure


def _spans(values: pd.Series, factor: float) -> bool:
    """Whether all values are positive, and the largest is more than `factor` times the smallest."""
    return bool(values.min() > 0 and values.max() > factor * values.min())
