"""Writes what a notebook shows to files too: figures and tables with their captions, and what is missing."""

import builtins
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import figure_files, gaps, style
from analysis.captions import settings, titled
from analysis.figures.shared import main_runs, without
from analysis.loading import UNKNOWN, WANDB, finished, of_finished_workloads, records
from analysis.table import Table, remove_table, write_table
from analysis.venues import widths

ROOT = Path(__file__).parents[1]
NOTEBOOKS_FOLDER = ROOT / "analysis/notebooks"
PAGES = "pages"


def rooted(path: str) -> str:
    """A relative path counts from the checkout's root if a notebook was opened in its folder, else from here."""
    if path.startswith(WANDB) or Path.cwd() != NOTEBOOKS_FOLDER:
        return path
    return os.path.relpath(ROOT / path)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()


def in_kernel() -> bool:
    """Whether the code runs in a notebook, which shows Markdown and images."""
    return hasattr(builtins, "__IPYTHON__")


class Page:
    """The output of one notebook.

    Everything shown also goes to OUTPUT/pages/NAME.md: figures with their captions, tables, and what is missing.

    Attributes:
        runs: all runs of workloads that have a result, failed ones included.
        source: where the runs were read from.
        where: filters that the runs fit.
        output: folder of figures and tables.
        widths: of figures.
    """

    def __init__(
        self,
        name: str,
        runs: pd.DataFrame,
        output: str | Path = "paper",
        venue: str | None = None,
        columns: int | None = None,
        tables: Sequence[str] = (),
    ) -> None:
        """Remove files of an earlier page of this name.

        Args:
            runs: returned by `analysis.load_runs`.
            venue, columns: of the figures, see `venues.widths`.
            tables: names of tables that the page may write.

        Raises:
            UserError: an unknown venue or number of columns.
        """
        self.name, self.output, self.widths = name, Path(rooted(str(output))), widths(venue, columns)
        self.runs = of_finished_workloads(runs)
        self.source, self.where = str(runs.attrs.get("source", "results")), tuple(runs.attrs.get("where", ()))
        self.parts: list[str] = []
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
        """The shell command that makes runs of a workload."""
        run = records(self.runs[self.runs["workload"] == workload])[0]
        return gaps.workload_command(run, overrides, self.source)

    def figure(
        self, drawn: Figure, caption: str, data: pd.DataFrame, runs: pd.DataFrame, *of: Any, **options: Any
    ) -> None:
        """Save a figure with its data and its caption, which ends with the settings of its runs, and show it.

        Args:
            of: parts of the file's name after the page's name, such as workload and budget.
            options: `without`, as in `captions.settings`, and `dpi`.
        """
        name = "_".join([self.name, *(slug(part) if isinstance(part, str) else f"{part:g}" for part in of)])
        names = {workload: titled(workload) for workload in self.workloads}
        caption += settings(runs, names, options.pop("without", ())) + (f" {self._only()}" if self.where else "")
        path = figure_files.save(drawn, self.output, name, caption, data, **options)
        figure_files.write_figures_tex(self.output)
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
                figure_files.remove(self.output, name)
            self.path.unlink()
            figure_files.write_figures_tex(self.output)

    def _say(self, text: str) -> None:
        self.parts.append(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n\n".join([f"# {self.name}", *self.parts]) + "\n", encoding="utf-8")
