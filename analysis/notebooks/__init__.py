"""The paper's pages: each notebook is a percent script that also runs as a plain one.

python analysis/notebooks/bit_curve.py results --output paper     one page as a script
python -m analysis.notebooks results --output paper               all pages as executed .ipynb files

Both take filters after the folder, such as `dataset=digits method=bayesq,gptq`. In a kernel the arguments come from
the environment: BAYESQ_RESULTS, BAYESQ_OUTPUT and BAYESQ_WHERE with one filter per line.
"""

import argparse
import builtins
import functools
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import analysis
from analysis import gaps, style
from analysis.captions import settings
from analysis.figures.shared import main_runs, without
from analysis.loading import UNKNOWN, finished, of_finished_workloads, records, without_result
from analysis.table import Table, remove_table, write_table
from bayesq.suite.errors import UserError

FOLDER = Path(__file__).parent
# in the order of a paper
NOTEBOOKS = (
    "main_figure",
    "main_table",
    "glue_table",
    "ablation",
    "bit_curve",
    "allocation",
    "calibration_size",
    "cost",
    "risk",
    "reliability",
    "rate_distortion",
    "league",
)
RESULTS_VARIABLE, OUTPUT_VARIABLE, WHERE_VARIABLE = "BAYESQ_RESULTS", "BAYESQ_OUTPUT", "BAYESQ_WHERE"
PAGES = "pages"


def arguments() -> tuple[str, tuple[str, ...], Path]:
    """Source of results, filters and output folder; in a kernel they come from the environment."""
    parser = argparse.ArgumentParser(description="Figures and tables of a results folder or a W&B project.")
    parser.add_argument("results", nargs="?", default=os.environ.get(RESULTS_VARIABLE, "results"))
    parser.add_argument("where", nargs="*", default=os.environ.get(WHERE_VARIABLE, "").splitlines())
    parser.add_argument("--output", type=Path, default=Path(os.environ.get(OUTPUT_VARIABLE, "paper")))
    given = parser.parse_intermixed_args([] if in_kernel() else sys.argv[1:])
    return given.results, tuple(given.where), given.output


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()


def in_kernel() -> bool:
    """Whether the code runs in a notebook, where the command line belongs to the kernel."""
    return hasattr(builtins, "__IPYTHON__")


class Page:
    """Input and output of one notebook.

    Everything shown also goes to OUTPUT/pages/NAME.md: figures with their captions, tables, and what is missing.

    Attributes:
        source: a results folder or `wandb:entity/project`.
        where: filters that the runs fit.
        output: folder of figures and tables.
        results: frames of the source.
        runs: all runs of workloads that have a result, failed ones included.
    """

    def __init__(self, name: str, tables: Sequence[str] = ()) -> None:
        """Read the runs, and remove files of an earlier page of this name.

        Args:
            tables: names of tables that the page may write.
        """
        self.name = name
        self.source, self.where, self.output = arguments()
        self.parts: list[str] = []
        try:
            self.results = read(self.source, self.where)
            self.runs = self.results.runs
        except (FileNotFoundError, UserError) as error:
            sys.exit(f"error: {error}")
        self._forget(tables)
        if self.where:
            self.say(self._only())

    @property
    def workloads(self) -> list[str]:
        """The workloads that have a result."""
        return sorted(set(self.runs["workload"]) - {UNKNOWN})

    @property
    def finished(self) -> pd.DataFrame:
        """The runs that have a result."""
        return finished(self.runs)

    @cached_property
    def main_runs(self) -> pd.DataFrame:
        """Runs for figures of all methods; a line names those left out."""
        shown, left_out = main_runs(self.runs)
        for line in left_out:
            self.say(line)
        return shown

    @property
    def looks(self) -> dict[str, style.Look]:
        """Look of every variant."""
        return style.looks(self.runs)

    def looks_without(self, setting: str) -> dict[str, style.Look]:
        """Looks of variants whose names leave out a setting that is an axis of the figure."""
        names = [without(variant, setting) for variant in self.runs["variant"]]
        return style.looks(self.runs.assign(variant=names))

    def command(self, workload: str, *overrides: str) -> str:
        """The line for the shell that makes runs of a workload."""
        run = records(self.runs[self.runs["workload"] == workload])[0]
        return gaps.workload_command(run, overrides, self.source)

    def figure(
        self, drawn: Figure, caption: str, data: pd.DataFrame, runs: pd.DataFrame, *of: Any, **options: Any
    ) -> None:
        """Save a figure with its data and its caption, which ends with the settings of its runs, and show it.

        Args:
            of: parts of the file's name after the page's name, such as workload and budget.
            options: `without`, of `captions.settings`, and `dpi`.
        """
        name = "_".join([self.name, *(slug(part) if isinstance(part, str) else f"{part:g}" for part in of)])
        caption += settings(runs, without=options.pop("without", ())) + (f" {self._only()}" if self.where else "")
        path = style.save(drawn, self.output, name, caption, data, **options)
        if in_kernel():
            from IPython.display import Image, display

            display(Image(path.read_bytes(), width=round(96 * drawn.get_figwidth() * 1.4)))
        self._say(f"![{name}](../{path.name})")
        self.say(caption)

    def table(self, table: Table, name: str) -> None:
        """Write a table as .md, .csv and .tex, and show it; without rows, show its footnotes only."""
        if table.empty:
            self.say(
                "\n".join(["No run that this table shows.", "", *(f"* {line}" for line in table.footnotes)]).strip()
            )
            return
        if self.where:
            table = replace(table, caption=f"{table.caption} {self._only()}")
        written = write_table(table, self.output, name)
        markdown = next(path for path in written if path.suffix == ".md")
        self.say(markdown.read_text(encoding="utf-8").strip())

    def _only(self) -> str:
        return f"Only runs with {' and '.join(self.where)}."

    def say(self, text: str) -> None:
        """Show a paragraph, in Markdown."""
        if in_kernel():
            from IPython.display import Markdown, display

            display(Markdown(text))
        else:
            print(text, end="\n\n")
        self._say(text)

    def nothing(self, why: str, command: str) -> None:
        """Say that there is nothing to show, and the command that makes it."""
        self.say(f"Nothing to show: {why}; `{command}`")

    def missing(self, lines: Sequence[str]) -> None:
        """Show lines about missing runs, with their commands."""
        if lines:
            self.say("Missing:\n\n" + "\n".join(f"* {line}" for line in lines))

    @property
    def path(self) -> Path:
        """The page in Markdown."""
        return self.output / PAGES / f"{self.name}.md"

    def _forget(self, tables: Sequence[str]) -> None:
        """Remove figures and tables of an earlier page, so that old ones are not mistaken for new ones."""
        for name in tables:
            remove_table(self.output, name)
        if self.path.is_file():
            for name in re.findall(r"^!\[(.+?)\]\(", self.path.read_text(encoding="utf-8"), re.MULTILINE):
                style.remove(self.output, name)
            self.path.unlink()

    def _say(self, text: str) -> None:
        self.parts.append(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n\n".join([f"# {self.name}", *self.parts]) + "\n", encoding="utf-8")


class Results:
    """The frames of a source, each read on first use; without workloads that have no finished run."""

    def __init__(self, source: str, where: Sequence[str] = ()) -> None:
        runs = analysis.load_runs(source, where)
        self.runs = of_finished_workloads(runs)
        print(without_result(runs), end="", file=sys.stderr)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """Long frame of layers.csv."""
        return analysis.layer_frame(self.runs)

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Long frame of predictions.csv."""
        return analysis.example_frame(self.runs)


@functools.lru_cache(maxsize=1)
def read(source: str, where: tuple[str, ...]) -> Results:
    """The results of a source, read once for all pages that one process renders."""
    return Results(source, where)


@contextmanager
def _given(source: str | Path, where: Sequence[str], output: Path) -> Iterator[None]:
    """Set the arguments of a script for the block."""
    before = sys.argv
    sys.argv = [before[0], str(source), *where, "--output", str(output)]
    try:
        yield
    finally:
        sys.argv = before


def render_all(
    source: str | Path, output: str | Path, names: Sequence[str] = NOTEBOOKS, where: Sequence[str] = ()
) -> None:
    """Run notebooks as scripts, in this process: every figure and table of a source.

    Args:
        source: a results folder or `wandb:entity/project`.
        output: folder of figures and tables.
        where: filters of the runs.
    """
    read.cache_clear()  # the folder may have grown
    with _given(source, where, Path(output)):
        for name in names:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
