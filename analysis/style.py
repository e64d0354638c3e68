"""Look and files of all figures: style, widths, looks of variants, files without a date."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.loading import UNKNOWN
from analysis.methods import Method, label, methods_of

STYLE_FILE = Path(__file__).with_name("bayesq.mplstyle")
# inches: one column and both columns of a page
SINGLE, DOUBLE = 3.3, 6.9
# Metadata that matplotlib adds, left out because it depends on the date and the version.
PDF_METADATA = {"CreationDate": None, "Producer": None, "Creator": None}
PNG_METADATA = {"Software": None}
SUFFIXES = (".pdf", ".png", ".txt", ".csv")
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
# dashes of a method's second, third ... variant
VARIANT_LINES: tuple[Any, ...] = ((0, (3, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Look:
    """Style of a variant; variants of a method share color and marker."""

    label: str
    color: str
    marker: str
    line: Any
    filled: bool = True

    @property
    def face(self) -> str:
        """Color inside the marker."""
        return self.color if self.filled else "white"

    def of_line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "markersize": MARKERS.get(self.marker, OTHER_MARKER)[0],
            "markerfacecolor": self.face,
            "markeredgecolor": self.color,
        }


def look(method: Method, variant: int = 0, label: str | None = None) -> Look:
    """Style of a method's plain variant, or of a further one: the same color and marker, hollow, with other lines.

    Args:
        label: in legends; the method's title without it.
    """
    line = VARIANT_LINES[(variant - 1) % len(VARIANT_LINES)] if variant else MARKERS.get(method.marker, OTHER_MARKER)[1]
    return Look(label or method.title, method.color, method.marker, line, filled=variant == 0)


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


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns axes; `width` is of the figure, `height` of a row, both in inches."""
    figure = Figure(figsize=(width, rows * height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [list(row) for row in axes]


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
        columns = max(count for count in range(1, columns + 1) if count == 1 or _fits(names, count, figure))
        lines_of_text = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + LINE * (lines_of_text - 1))  # the axes keep their height
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // lines_of_text))


def full_precision_line() -> Artist:
    """The legend's entry of a grey line."""
    return Line2D([], [], color=GREY, linewidth=0.8, label="full precision")


# inches: width of a legend's entry without its text, of a character (about), and height of a line
ENTRY, CHARACTER, LINE = 0.47, 0.047, 0.15


def _fits(names: Sequence[str], columns: int, figure: Figure) -> bool:
    """Whether a legend with this number of columns, filled one after the other, fits the figure."""
    lines = -(-len(names) // columns)
    parts = [names[place : place + lines] for place in range(0, len(names), lines)]
    return sum(ENTRY + CHARACTER * max(map(len, part)) for part in parts) <= figure.get_figwidth()


def save(
    figure: Figure, folder: Path, name: str, caption: str, data: pd.DataFrame | None = None, dpi: int = 300
) -> Path:
    """Write NAME.pdf, NAME.png, the caption as NAME.txt and the data as NAME.csv; the same input gives the same bytes.

    Returns:
        the path of the PNG file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(folder / f"{name}.pdf", metadata=PDF_METADATA)
        figure.savefig(folder / f"{name}.png", metadata=PNG_METADATA, dpi=dpi)
    (folder / f"{name}.txt").write_text(caption.strip() + "\n", encoding="utf-8")
    if data is not None:
        data.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.10g")
    return folder / f"{name}.png"


def remove(folder: Path, name: str) -> None:
    """Remove the files of a figure without data, so that old ones are not mistaken for new ones."""
    for suffix in SUFFIXES:
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
