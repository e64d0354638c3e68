"""Look of all figures: style, looks of variants, legends, labels that do not overlap."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import NullFormatter

from analysis.loading import UNKNOWN
from analysis.methods import Method, label, methods_of

P = ParamSpec("P")

STYLE_FILE = Path(__file__).with_name("bayesq.mplstyle")


# least width in inches of a panel beside others
PANEL = 1.7
# points that are free between two tick labels
TICK_GAP = 1.5
GREY = "#6e6e6e"
# line of full precision, a budget or another value to compare with
GREY_LINE: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "zorder": 1}


# Size in points and dashes for each marker; a square or a diamond looks larger than a circle of the same width.
MARKERS: dict[str, tuple[float, Any]] = {
    "o": (4.0, "-"),
    "s": (3.6, (0, (5, 1.5))),
    "^": (4.2, (0, (4, 1.2, 1, 1.2))),
    "D": (3.2, (0, (1, 1.2))),
    "v": (4.2, (0, (7, 1.5, 1, 1.5, 1, 1.5))),
    "P": (4.0, (0, (2, 1))),
    "X": (4.0, (0, (8, 2))),
    "d": (4.2, (0, (1, 2.4))),
    "<": (4.2, (0, (3, 1.2, 3, 3))),
    ">": (4.2, (0, (6, 1.2, 2, 1.2))),
    "H": (4.2, (0, (3, 1.2, 1, 1.2, 1, 1.2, 1, 1.2))),
    "*": (4.6, (0, (10, 1.5, 2, 1.5))),
}
OTHER_MARKER = (4.0, (0, (3, 1, 1, 1)))
# Dashes and colored halves of the markers of a method's second, third ... variant; the second is hollow.
VARIANT_LINES: tuple[Any, ...] = ((0, (3, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))
HALVES = ("left", "bottom", "right", "top")


@dataclass(frozen=True)
class Look:
    """Style of a variant; variants of a method share color and marker.

    Attributes:
        variant: 0 for the plain variant, else which of the further ones.
    """

    label: str
    color: str
    marker: str
    line: Any
    variant: int = 0

    @property
    def face(self) -> str:
        """Color inside the marker."""
        return "white" if self.variant else self.color

    def of_line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        half = self.variant > 1
        return {
            "color": self.color,
            "marker": self.marker,
            "fillstyle": HALVES[(self.variant - 2) % len(HALVES)] if half else "full",
            "linestyle": self.line,
            "markersize": MARKERS.get(self.marker, OTHER_MARKER)[0],
            "markerfacecolor": self.color if half else self.face,
            "markerfacecoloralt": "white",
            "markeredgecolor": self.color,
        }


def look(method: Method, variant: int = 0, label: str | None = None) -> Look:
    """Style of a method's plain variant, or of a further one: the same color and marker, hollow or half filled,
    with other lines.

    Args:
        label: in legends; the method's title without it.
    """
    line = VARIANT_LINES[(variant - 1) % len(VARIANT_LINES)] if variant else MARKERS.get(method.marker, OTHER_MARKER)[1]
    return Look(label or method.title, method.color, method.marker, line, variant)


def looks(runs: pd.DataFrame) -> dict[str, Look]:
    """The look of every variant in a frame of runs, in the order of their methods; plain variants come first.

    Args:
        runs: all runs of a source, so that a variant looks the same in all figures.
    """
    known = runs[runs["variant"] != UNKNOWN]
    methods = methods_of(known)
    order = list(methods)
    pairs = known[["method", "variant"]].drop_duplicates().itertuples(index=False, name=None)
    by_variant: dict[str, Look] = {}
    seen: Counter[str] = Counter()
    for method, variant in sorted(pairs, key=lambda pair: (order.index(pair[0]), pair[1] != pair[0], pair[1])):
        by_variant[variant] = look(methods[method], seen[method], label(variant, methods))
        seen[method] += 1
    return by_variant


def present(data: pd.DataFrame, looks: Mapping[str, Look]) -> dict[str, Look]:
    """Looks of the variants in `data`, in the order of `looks`."""
    variants = set(data["variant"])
    return {variant: look for variant, look in looks.items() if variant in variants}


@contextmanager
def style() -> Iterator[None]:
    """The shipped style, without the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.style.use(STYLE_FILE)
        yield


def drawn(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator of functions that draw a figure: in the shipped style, laid out, without labels that overlap."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            lay_out(figure)
        return figure

    return styled


def lay_out(figure: Figure) -> None:
    """Thin the ticks, then fix the layout, so that files of every resolution have the same one."""
    engine = figure.get_layout_engine()
    assert engine is not None, "the style has a layout"
    engine.execute(figure)
    thinned = [thin_ticks(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    if any(thinned):
        engine.execute(figure)
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)  # "none" would leave a placeholder, with which every file is drawn twice


def thin_ticks(axis: Axis) -> bool:
    """Leave only every second, third ... tick of an axis, until no two labels overlap; returns whether it did.

    The figure must have a layout.
    """
    low, high = sorted(axis.get_view_interval())
    axes = axis.axes
    labels = [text for text in (*axis.get_majorticklabels(), *axis.get_minorticklabels()) if text.get_text()]
    places = {text: text.get_position()[axis is axes.yaxis] for text in labels if text.get_visible()}
    shown = sorted((text for text in places if low <= places[text] <= high), key=lambda text: places[text])
    figure = axes.get_figure(root=True)
    if figure is None or not axes.get_visible() or len(shown) < 2:
        return False
    gap = TICK_GAP * figure.dpi / 72
    boxes = [text.get_window_extent().padded(gap / 2) for text in shown]

    def overlap(step: int) -> bool:
        some = boxes[::step]
        return any(one.overlaps(other) for one, other in itertools.pairwise(some))

    step = next(step for step in range(1, len(boxes) + 1) if not overlap(step))
    if step > 1:
        axis.set_ticks([places[text] for text in shown[::step]], labels=[text.get_text() for text in shown[::step]])
        axis.set_minor_formatter(NullFormatter())
    return step > 1


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns axes; `width` is of the figure, `height` of a row, both in inches."""
    figure = Figure(figsize=(width, rows * height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [list(row) for row in axes]


def is_narrow(count: int, width: float) -> bool:
    """Whether `count` panels do not fit side by side."""
    return count * PANEL > width


def legend(
    figure: Figure, shown: Mapping[str, Look], further: Sequence[Artist] = (), columns: int = 5, lines: bool = True
) -> None:
    """One legend below all axes, with lines of about equal length.

    Args:
        shown: looks of the drawn variants, by variant.
        further: handles of further entries.
        columns: most entries of one line; fewer if they would be wider than the figure.
        lines: False for markers without lines.
    """
    bare = {} if lines else {"linestyle": "none"}
    handles: list[Artist] = [Line2D([], [], label=look.label, **(look.of_line() | bare)) for look in shown.values()]
    handles += further
    if handles:
        names = [str(handle.get_label()) for handle in handles]
        evened = [-(-len(names) // -(-len(names) // count)) for count in range(1, columns + 1)]
        columns = max(count for count in evened if count == 1 or _fits(names, count, figure))
        lines_of_text = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + LINE * (lines_of_text - 1))  # the axes keep their height
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def full_precision_line() -> Artist:
    """The legend's entry of a grey line."""
    return Line2D([], [], color=GREY, linewidth=0.8, label="full precision")


# inches: width of a legend's entry without its text, and height of a line
ENTRY, LINE = 0.47, 0.15


def _fits(names: Sequence[str], columns: int, figure: Figure) -> bool:
    """Whether a legend with this number of columns, filled as matplotlib does, fits the figure."""
    font = FontProperties(size=matplotlib.rcParams["legend.fontsize"])
    inches: list[float] = [
        text_to_path.get_text_width_height_descent(name, font, ismath=False)[0] / 72 for name in names
    ]
    width = sum(ENTRY + float(max(part)) for part in np.array_split(inches, columns))
    return width <= float(figure.get_figwidth())
