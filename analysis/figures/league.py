"""Mean ranks of settings with Nemenyi's critical difference."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.ranks import alike_groups, critical_difference, ranks
from analysis.style import GREY, Look, drawn
from analysis.tables.league import League
from analysis.venues import DEFAULT_WIDTHS, Widths

# Distance of the bars of alike settings, and of the first row from them, in rows.
BAR = 0.35


def data(league: League) -> pd.DataFrame:
    """Mean rank of every ranked setting, best first, with the number of settings and blocks and the difference.

    `variant` is the setting.
    """
    blocks, settings = league.ranked.shape
    mean = ranks(league.ranked).mean().sort_values(kind="stable")
    difference = critical_difference(settings, blocks) if settings > 1 and blocks else float("nan")
    table = pd.DataFrame({"variant": mean.index.astype("object"), "mean rank": mean.to_numpy()})
    return table.assign(settings=settings, blocks=blocks, **{"critical difference": difference})


@drawn
def draw(data: pd.DataFrame, looks: Mapping[str, Look], widths: Widths = DEFAULT_WIDTHS) -> Figure:
    """A row for each setting, its mean rank, and bars that connect settings without a significant difference."""
    mean = data.set_index("variant")["mean rank"]
    difference, settings = float(data["critical difference"].iloc[0]), len(data)
    groups = alike_groups(mean, difference)
    top = -BAR * (len(groups) + 2)
    figure = Figure(figsize=(widths[0], 0.8 + 0.2 * (settings - top)))
    plot = figure.subplots()
    for row, (variant, rank) in enumerate(mean.items()):
        look = looks[str(variant)]
        plot.plot([rank, rank], [top + BAR, row], color=GREY, linewidth=0.4, zorder=1)
        plot.plot(rank, row, **(look.of_line() | {"linestyle": "none"}))
    for place, group in enumerate(groups):
        height = -BAR * (place + 1)
        plot.plot(
            [mean[group].min(), mean[group].max()], [height] * 2, color="black", linewidth=2.2, solid_capstyle="butt"
        )
    plot.plot([1, 1 + difference], [top] * 2, color=GREY, linewidth=1, marker="|", markersize=5)
    plot.text(1 + difference / 2, top - 0.15, f"CD = {difference:.2f}", ha="center", va="bottom", fontsize="small")
    plot.set_yticks(range(settings), [looks[str(variant)].label for variant in mean.index])
    plot.set_ylim(settings - 0.5, top - 1)
    plot.set_xlim(0.8, max(settings, 1 + difference) + 0.2)
    plot.set_xlabel("mean rank by KL (1 is the lowest)")
    plot.grid(axis="y", visible=False)
    return figure
