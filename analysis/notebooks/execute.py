"""From a percent script to an executed notebook."""

import os
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from analysis.notebooks import FOLDER, OUTPUT_VARIABLE, RESULTS_VARIABLE, WHERE_VARIABLE

ROOT = Path(__file__).parents[2]
# of one cell; reading a large W&B project takes a while
CELL_SECONDS = 1800


def convert(name: str) -> NotebookNode:
    """The notebook of a script, not executed; the same script gives the same file."""
    notebook: NotebookNode = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{number}"  # jupytext's ids are random
    return notebook


def execute(name: str, source: str | Path, output: Path, where: Sequence[str] = ()) -> Path:
    """Execute a page in a new kernel, in the current folder, and write OUTPUT/NAME.ipynb.

    Args:
        source: a results folder or `wandb:entity/project`.
        where: filters of the runs.

    Returns:
        the path of the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {RESULTS_VARIABLE: str(source), OUTPUT_VARIABLE: str(output), WHERE_VARIABLE: "\n".join(where)}
    given["PYTHONPATH"] = os.pathsep.join(path)
    notebook = convert(name)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(Path.cwd())}},
    )
    client.execute(env={**os.environ, **given})
    written = output / f"{name}.ipynb"
    nbformat.write(notebook, written)
    return written
