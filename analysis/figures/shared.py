"""Parts of several figures: means over seeds, shown runs, ticks and error bars."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from analysis.comparisons import whole_mean, with_scores
from analysis.loading import UNKNOWN
from analysis.metrics import SCALE
from analysis.paper import BUDGETS
from analysis.style import Look, present

KL = "KL to full precision (nats)"
CODE_BITS, STORED_BITS = "code bits per weight", "stored bits per weight"
MOST_VARIANTS = 3
# SHARED: axes on which variants share places. DODGE: the part of the distance between two places that the points of all
# variants take up: for each variant, at least, at most.
SHARED, DODGE = ("bits", "bits/code", "examples"), (0.06, 0.3, 0.75)
# of names of layers: points, inches of a character, and inches of a line
NAME_SIZE, NAME_CHARACTER, NAME_LINE = 5.5, 0.042, 0.1


def main_runs(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Runs of the variants that a figure of all methods shows, and a line for each method that has more.

    A method with more than MOST_VARIANTS variants on a workload is shown only by its plain variant, or by the one with
    the most runs if there is no plain one: ablations have a separate page.
    """
    shown, left_out = [runs[runs["workload"] == UNKNOWN]], []
    for (workload, method), members in runs.groupby(["workload", "method"], sort=True):
        if workload == UNKNOWN:
            continue
        variants = members["variant"].value_counts(sort=False)
        if len(variants) > MOST_VARIANTS:
            first = min(variants.index, key=lambda variant: (variant != method, -variants[variant], variant))
            left_out.append(f"{workload}: of {len(variants)} variants of {method}, only {first} is shown.")
            members = members[members["variant"] == first]
        shown.append(members)
    return pd.concat(shown).sort_index(), left_out


def mean_and_std(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, `VALUE std` (sample standard deviation, NaN of a single seed) and `n`, one row per group.

    A mean is NaN where one of the seeds has no number.
    """
    groups = frame.groupby(list(by), sort=True)
    means, spread = whole_mean(groups, values), groups[list(values)].std(ddof=1)
    return means.join(spread.add_suffix(" std")).assign(n=groups["seed"].nunique()).reset_index()


def with_score(runs: pd.DataFrame) -> pd.DataFrame:
    """`score` and `fp score`: the primary metric of the quantized and of the full-precision network, times SCALE."""
    scored = with_scores(runs)
    return runs.assign(score=SCALE * scored["score"], **{"fp score": SCALE * scored["fp/score"]})


def complete(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """A row for each variant and each value of `axis` that any variant of its workload has; NaN where none was run."""
    parts = []
    for _, members in table.groupby("workload", sort=True):
        variants = members[["workload", "method", "variant"]].drop_duplicates()
        full = variants.merge(pd.DataFrame({axis: sorted(members[axis].unique())}), how="cross")
        parts.append(full.merge(members, how="left", on=["workload", "method", "variant", axis]))
    whole = pd.concat(parts, ignore_index=True)
    return whole.assign(n=whole["n"].fillna(0).astype(int))


def method_of(frame: pd.DataFrame) -> pd.Series:
    """The method of each row's variant."""
    return frame["variant"].str.partition(" ")[0]


def without(variant: str, *keys: str) -> str:
    """A variant's name without some of its settings."""
    return " ".join(word for word in variant.split(" ") if word.partition("=")[0] not in keys)


def shown_budgets(data: pd.DataFrame) -> list[float]:
    """The paper's budgets; where a workload has none of them, its lowest, middle and highest."""
    had = sorted(float(bits) for bits in data["bits"].unique())
    chosen = [bits for bits in had if bits in BUDGETS]
    return chosen or sorted({had[0], had[len(had) // 2], had[-1]})


def dodged(places: NDArray[np.float64], number: int, count: int, x: str) -> NDArray[np.float64]:
    """Places of the points of variant `number` of `count`, moved aside so that error bars of a budget do not overlap.

    Only on axes of SHARED; all points of a place are within a part of the smallest distance between places, see DODGE.
    """
    if x not in SHARED:
        return places
    logarithmic = x == "examples"
    scaled = np.log2(places) if logarithmic else places
    steps = np.diff(np.unique(scaled[np.isfinite(scaled)]).round(1))
    step = min([1.0, *steps[steps > 0]])
    each, least, most = DODGE
    part = min(max(each * count, least), most)
    moved: NDArray[np.float64] = scaled + part * step * (number - (count - 1) / 2) / count
    return 2.0**moved if logarithmic else moved


def lines(axes: Axes, data: pd.DataFrame, looks: Mapping[str, Look], x: str, y: str) -> None:
    """A line per variant with bars of one standard deviation over seeds; it breaks where a point was not measured.

    Points of several variants at one budget are side by side, see `dodged`.

    Args:
        data: with the columns x, y and `Y std`; a point without x is at its `bits`. Only positive values of KL are
            drawn, because its axis is logarithmic.
    """
    shown = present(data, looks)
    for number, (variant, look) in enumerate(shown.items()):
        line = data[data["variant"] == variant]
        places = dodged(line[x].fillna(line["bits"]).to_numpy(dtype=float), number, len(shown), x)
        values, spread = (line[key].to_numpy(dtype=float) for key in (y, f"{y} std"))
        values = np.where(values > 0, values, np.nan) if y == "q/kl_to_fp" else values
        axes.plot(places, values, **look.of_line())
        seen = np.isfinite(values) & (spread > 0)
        if seen.any():
            axes.errorbar(
                places[seen], values[seen], spread[seen], linestyle="none", marker="none", color=look.color,
                elinewidth=0.8, zorder=2,
            )  # fmt: skip
    if x == "bits" and data[x].nunique() == 1:  # else the points of one budget would spread over the whole axis
        axes.set_xlim(data[x].iloc[0] - 0.5, data[x].iloc[0] + 0.5)


def ticks(axis: Axis, places: Iterable[float]) -> None:
    """Ticks at these places only, as plain numbers."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_ticks(axis: Axis, wide: float, digits: Sequence[int]) -> None:
    """Ticks at 1, 2 and 5 times powers of ten; only at these `digits` if the largest is `wide` times the smallest.

    Without digits a wide axis does not change.
    """
    low, high = axis.get_view_interval()
    narrow = high < wide * low
    if narrow or digits:
        places = [d * 10.0**power for power in range(-9, 5) for d in ((1, 2, 5) if narrow else digits)]
        ticks(axis, [place for place in places if low <= place <= high])


def few_bits(budgets: pd.Series) -> list[float]:
    """Ticks of an axis of bits: at the budgets, or at whole numbers if there are many budgets."""
    had = sorted(float(bits) for bits in budgets.unique())
    return had if len(had) < 6 else [float(bits) for bits in range(2, 9)]


def short_layers(names: Sequence[str]) -> list[str]:
    """Names of layers without the leading parts that several layers with the same first part share, numbers excepted.

    This is repeated while the names stay different: model.bert.encoder.layer.0.q beside model.bert.pooler and
    model.classifier is 0.q.
    """
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name.split(".")[:-1])
    shared = {
        first: len(list(takewhile(_is_prefix, zip(*parts, strict=False))))
        for first, parts in groups.items()
        if len(parts) > 1
    }
    short = [".".join(name.split(".")[shared.get(name.partition(".")[0], 0) :]) for name in names]
    return short_layers(short) if len(set(short)) == len(names) and short != list(names) else list(names)


def _is_prefix(parts: Sequence[str]) -> bool:
    """Whether all layers have this part of a name, and it is not a number."""
    return len(set(parts)) == 1 and not parts[0].isdigit()


def layer_ticks(axes: Axes, names: Sequence[str], labelled: bool = True) -> None:
    """Ticks with names of layers, which are at 1, 2, ... in forward order; about as many as fit.

    `style.thin_ticks` removes those that still overlap.
    """
    fit = max(axes.bbox.width / axes.figure.dpi / NAME_LINE, 1)
    step = max(round(len(names) / fit), 1)
    shown = range(0, len(names) if labelled else 0, step)
    short = short_layers(names)
    axes.set_xticks([i + 1 for i in shown], [short[i] for i in shown], rotation=90, fontsize=NAME_SIZE)
    axes.set_xlim(0.3, len(names) + 0.7)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=2)


def names_height(names: Sequence[str]) -> float:
    """Inches that the names of `layer_ticks` need below the axes."""
    return NAME_CHARACTER * max(map(len, short_layers(names)), default=0)
