"""Tables of a paper: their numbers, how they are written, and what they hold."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Table:
    """A table as it is shown and as numbers.

    Attributes:
        cells: what is shown, text only, one row a line; column names are the heads.
        numbers: the same rows unrounded, one column per number (and the columns that name the row).
        bold: same shape as `cells`, True where a cell is set in bold.
        caption: one sentence or more, with n.
        footnotes: one line each, those about missing cells with the command that fills them.
    """

    cells: pd.DataFrame
    numbers: pd.DataFrame
    bold: pd.DataFrame
    caption: str
    footnotes: list[str] = field(default_factory=list)


def write_table(table: Table, folder: str | Path, name: str) -> list[Path]:
    """Write name.md, name.csv and name.tex; returns their paths."""
    raise NotImplementedError


def summarise(runs: pd.DataFrame, by: list[str] | None = None) -> pd.DataFrame:
    """Means and standard deviations over seeds of every number of the finished runs.

    One row for each value of `by` (default: workload, variant, method, bits), with `n` (seeds) and, for each numeric
    key of result.json such as `q/kl_to_fp`, the columns `KEY` (mean) and `KEY/std`. `score` is the primary metric as a
    fraction, `fp/score` the full-precision model's.
    """
    raise NotImplementedError


def main_table(runs: pd.DataFrame) -> Table:
    """Methods at 3, 3.5 and 4 bits against GPTQ."""
    raise NotImplementedError


def glue_table(runs: pd.DataFrame) -> Table:
    """GLUE scores per task and their mean. Raises ValueError where no run is of a GLUE task."""
    raise NotImplementedError


def ablation_table(runs: pd.DataFrame) -> Table:
    """Every variant of BayesQ (and of GPTQ) at one budget against the full method."""
    raise NotImplementedError


def cost_table(runs: pd.DataFrame) -> Table:
    """Preprocessing time and memory against GPTQ."""
    raise NotImplementedError


def calibration_size(runs: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of runs that differ in calibration.examples: one row per workload, method, bits and `examples`."""
    raise NotImplementedError


def bit_curve(runs: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of the plain variants, one row per workload, variant and budget, sorted by budget."""
    raise NotImplementedError
