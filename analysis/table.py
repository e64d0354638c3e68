"""A table: its contents, the formats of its numbers, and its files in Markdown, CSV and LaTeX."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.latex import floats
from analysis.metrics import SCALE

GAP = "-"
LEVEL = 0.05
ENDINGS = (".md", ".csv", ".tex")


@dataclass(frozen=True)
class Table:
    """A table as text and as numbers.

    Attributes:
        cells: the text of each cell; column names are the heads.
        numbers: the same rows unrounded: the columns that name a row, then one column per number.
        bold: of the shape of `cells`, True for bold cells.
        caption: with n.
        footnotes: a line each; those about missing cells name the command that fills them, in backquotes.
        padded: whether the columns of the Markdown are aligned by spaces.
    """

    cells: pd.DataFrame
    numbers: pd.DataFrame
    bold: pd.DataFrame
    caption: str
    footnotes: list[str] = field(default_factory=list)
    padded: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return self.cells.empty

    def markdown(self) -> str:
        """The table with caption and footnotes, in Markdown."""
        escaped = self.cells.map(lambda cell: cell.replace("|", "\\|"))
        shown = escaped.where(~self.bold, "**" + escaped + "**")
        if self.padded:
            table = shown.to_markdown(index=False, disable_numparse=True)
        else:
            lines = [[str(name) for name in shown], ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = ["\n".join(f"* {line}" for line in self.footnotes)] if self.footnotes else []
        return "\n\n".join([self.caption, table, *notes]) + "\n"

    def latex(self, label: str) -> str:
        """The table for booktabs and graphicx, see `floats`."""
        return floats(self.cells, self.bold, self.caption, self.footnotes, label)


def write_table(table: Table, folder: str | Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.csv (every number unrounded) and NAME.tex into `folder`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = (table.markdown(), table.numbers.to_csv(index=False, lineterminator="\n"), table.latex(name))
    paths = []
    for ending, content in zip(ENDINGS, contents, strict=True):
        paths.append(folder / f"{name}{ending}")
        paths[-1].write_text(content, encoding="utf-8")
    return paths


def remove_table(folder: str | Path, name: str) -> None:
    """Remove the files of a table without rows, so that old ones are not mistaken for new ones."""
    for ending in ENDINGS:
        (Path(folder) / f"{name}{ending}").unlink(missing_ok=True)


def make_table(
    cells: pd.DataFrame,
    numbers: pd.DataFrame,
    bold: Mapping[str, pd.Series],
    caption: str,
    footnotes: Iterable[str],
    padded: bool = True,
) -> Table:
    """A table without repeated footnotes.

    Args:
        bold: by column, True for bold cells.
    """
    marks = pd.DataFrame(False, index=cells.index, columns=cells.columns)
    for column, where in bold.items():
        marks[column] = where.astype(bool)
    notes = list(dict.fromkeys(footnotes))
    numbers = numbers.drop(columns="better", errors="ignore")
    return Table(cells.astype("object"), numbers, marks, caption, notes, padded)


def cells_of(table: pd.DataFrame, *columns: str, form: Callable[..., str]) -> list[str]:
    """One cell for each row, from the row's values in these columns."""
    return [form(*values) for values in zip(*(table[column] for column in columns), strict=True)]


def as_number(value: Any, form: str) -> str:
    """A number in a format of `format`; a gap for NaN."""
    return GAP if value is None or math.isnan(value) else format(value, form)


def as_points(fraction: float) -> str:
    """A difference in points with its sign; a plus if it rounds to 0."""
    return f"{round(SCALE * fraction, 2) + 0.0:+.2f}"


def as_spread(mean: float, std: float, form: str = ".2f") -> str:
    """`mean ± std`, or the mean alone without a standard deviation."""
    if math.isnan(mean):
        return GAP
    return format(mean, form) if math.isnan(std) else f"{mean:{form}} ± {std:{form}}"


def as_score(mean: float, std: float) -> str:
    """A score with its spread, times SCALE."""
    return as_spread(SCALE * mean, SCALE * std)


def as_kl(mean: float, std: float) -> str:
    """Four decimals, or more if fewer than two digits would be left."""
    digits = 1 - math.floor(math.log10(mean)) if mean > 0 else 4
    return as_spread(mean, std, f".{max(digits, 4)}f")


def as_delta(value: float, low: float, high: float) -> str:
    """A difference in points with its interval, if it has one."""
    if math.isnan(value):
        return GAP
    return as_points(value) if math.isnan(low) else f"{as_points(value)} [{as_points(low)}, {as_points(high)}]"


def as_ratio(value: float, low: float, high: float) -> str:
    """A ratio with its interval, if it has one."""
    if math.isnan(value):
        return GAP
    return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def as_p(value: float) -> str:
    """A p value with three decimals."""
    if math.isnan(value):
        return GAP
    return "<0.001" if value < 0.001 else f"{value:.3f}"
