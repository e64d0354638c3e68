"""KL of each ablation against the full method."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.defaults import command_overrides, switches_nothing
from analysis.figures.shared import KL, mean_and_std
from analysis.loading import finished, records
from analysis.methods import methods_of
from analysis.paper import PROPOSED
from analysis.style import GREY_LINE, drawn, look, panels
from analysis.venues import DEFAULT_WIDTHS, Widths

FULL = "full"


def data(runs: pd.DataFrame) -> pd.DataFrame:
    """KL of each ablation, means and deviations over seeds, and as a multiple of the full method's.

    These are runs started with `ablation=`, and runs of the full method at workloads and budgets with an ablation.
    """
    columns = ["workload", "bits", "ablation", "method", "q/kl_to_fp", "q/kl_to_fp std", "n", "multiple"]
    done = finished(runs).rename(columns={"bits/target": "bits"})
    done = done.assign(ablation=pd.Series([ablation_of(run) for run in records(done)], done.index, dtype="object"))
    # a finished run has the overrides of the last command that skipped it, perhaps without ablation=full
    for _, members in done.groupby(["workload", "bits"]):
        variants = set(members[members["ablation"] == FULL]["variant"]) or {PROPOSED}
        if members["ablation"].notna().any():
            same = members[members["ablation"].isna() & members["variant"].isin(variants)]
            done.loc[same.index, "ablation"] = FULL
    done = done[done["ablation"].notna()]
    if done.empty:
        return pd.DataFrame(columns=columns)
    done["q/kl_to_fp"] = done["q/kl_to_fp"].astype(float)
    table = mean_and_std(done, ["workload", "bits", "ablation", "method"], ["q/kl_to_fp"])
    full = table[table["ablation"] == FULL].set_index(["workload", "bits"])["q/kl_to_fp"].rename("full")
    table = table.join(full, on=["workload", "bits"])
    table["multiple"] = table["q/kl_to_fp"] / table["full"]
    return table.sort_values(["workload", "bits", "q/kl_to_fp"], ignore_index=True)[columns]


def ablation_of(run: Mapping[str, Any]) -> str | None:
    """The file of conf/ablation that a run was started with; None if there was none, or it was not recorded.

    An ablation that sets only defaults, such as `inputs_full`, is the full method.
    """
    name = next((o.partition("=")[2] for o in command_overrides(run) if o.startswith("ablation=")), None)
    return FULL if name and run["variant"] == PROPOSED and switches_nothing(name) else name


@drawn
def draw(data: pd.DataFrame, widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """KL of each ablation of one workload at one budget, smallest first; the line is that of the full method."""
    figure, ((plot,),) = panels(1, 1, widths.column, 0.7 + 0.15 * len(data))
    methods = methods_of(data)
    full = data[data["ablation"] == FULL]["q/kl_to_fp"]
    if not full.empty:
        plot.axvline(full.iloc[0], **GREY_LINE)
    for place, (_, row) in enumerate(data.iterrows()):
        line = look(methods[row["method"]], int(row["method"] == PROPOSED and row["ablation"] != FULL))
        spread = row["q/kl_to_fp std"]
        if spread > 0:
            plot.errorbar(row["q/kl_to_fp"], place, xerr=spread, color=line.color, linestyle="none", elinewidth=0.8)
        plot.plot(row["q/kl_to_fp"], place, **(line.of_line() | {"linestyle": "none"}))
    plot.set_yticks(range(len(data)), [str(name).replace("_", " ") for name in data["ablation"]])
    plot.set_ylim(len(data) - 0.4, -0.6)
    plot.set_xscale("log")
    plot.set_xlabel(KL)
    return figure
