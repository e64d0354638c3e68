"""KL and score against the number of calibration examples."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.shared import KL, complete, lines, mean_and_std, ticks, with_score, without
from analysis.loading import finished
from analysis.metrics import with_unit
from analysis.style import GREY_LINE, Look, drawn, full_precision_line, is_narrow, legend, panels, present
from analysis.venues import DEFAULT_WIDTHS, Widths


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and deviations over seeds of the KL and the score by workload, variant, budget and calibration examples.

    Only budgets that were run with several sizes on a workload count.
    """
    done = finished(runs)
    if done.empty:
        return pd.DataFrame(columns=["workload", "method", "variant", "bits", "examples", "n"])
    done = with_score(done).rename(columns={"bits/target": "bits", "calibration/examples": "examples"})
    done["variant"] = [without(variant, "calibration.examples", "examples") for variant in done["variant"]]
    sizes = done.groupby(["workload", "bits"])["examples"].transform("nunique")
    done = done[sizes > 1]
    if done.empty:
        return done
    values = ["q/kl_to_fp", "score", "fp score"]
    done[values] = done[values].astype(float)
    table = mean_and_std(done, ["workload", "method", "variant", "primary_metric", "bits", "examples"], values)
    parts = [complete(part, "examples").assign(bits=bits) for bits, part in table.groupby("bits")]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(primary_metric=table.groupby("workload")["primary_metric"].transform("first"))


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """KL and score of one workload at one budget against the number of calibration examples."""
    figure, axes = panels(*((2, 1) if is_narrow(2, widths.text) else (1, 2)), widths.text, 2.0)
    plots = [plot for row in axes for plot in row]
    metric = data["primary_metric"].iloc[0]
    shown = (("q/kl_to_fp", KL), ("score", with_unit(metric)))
    sizes = sorted(data["examples"].unique())
    for plot, (key, y_label) in zip(plots, shown, strict=True):
        lines(plot, data, looks, "examples", key)
        plot.set_xscale("log", base=2)
        ticks(plot.xaxis, sizes)
        plot.set_xlabel("calibration examples")
        plot.set_ylabel(y_label)
    plots[0].set_yscale("log")
    plots[1].axhline(data["fp score"].mean(), **GREY_LINE)
    legend(figure, present(data, looks), further=[full_precision_line()])
    return figure
