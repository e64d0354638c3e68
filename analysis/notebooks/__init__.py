"""The paper's pages as notebooks: executed here, in a kernel, by papermill, or opened in Jupyter.

The cell tagged `parameters` names the results folder, filters, the output folder and the venue of the figures.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.loading import load_runs, require_finished, without_result
from analysis.venues import widths
from bayesq.suite.errors import UserError

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# in the order of a paper
NOTEBOOKS = (
    "main_figure",
    "main_table",
    "glue_table",
    "pareto",
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
PARAMETERS, INJECTED = "parameters", "injected-parameters"
# metadata of notebooks that are stored with outputs
DIGEST = "sources_sha256"
# of one cell; reading a large W&B project takes a while
CELL_SECONDS = 1800


def parameters(
    results: str | Path,
    output: str | Path,
    where: Sequence[str] = (),
    venue: str | None = None,
    columns: int | None = None,
) -> dict[str, Any]:
    """Values for the parameters cell of every notebook, checked before any notebook runs.

    Args:
        results: a results folder or `wandb:entity/project`.
        output: folder of figures and tables.
        where: filters of the runs.
        venue, columns: widths of figures, see `venues.widths`.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: the W&B project cannot be read, no run is finished, a filter fits no run, there is no such venue, or
            `output` cannot be a folder.
    """
    widths(venue, columns)
    print(without_result(require_finished(load_runs(results, where))), end="", file=sys.stderr)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be a folder ({error.strerror}): choose another") from error
    given = {"results": str(results), "where": list(where), "output": str(output)}
    return {**given, "venue": venue, "columns": columns}


def with_parameters(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A stored notebook with a cell that sets parameters after the one tagged `parameters`, like papermill's."""
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    place = next(i for i, cell in enumerate(notebook["cells"]) if PARAMETERS in cell["metadata"].get("tags", ()))
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": f"{name}-{INJECTED}",
        "metadata": {"tags": [INJECTED]},
        "outputs": [],
        "source": "\n".join(f"{key} = {value!r}" for key, value in given.items()),
    }
    notebook["cells"].insert(place + 1, cell)
    return notebook


def render_all(
    results: str | Path,
    output: str | Path,
    names: Sequence[str] = NOTEBOOKS,
    where: Sequence[str] = (),
    **options: Any,
) -> None:
    """Run the notebooks' code in this process: every figure and table of a source.

    Args:
        where, options: as in `parameters`, which raises the same errors.
    """
    given = parameters(results, output, where, **options)
    for name in names:
        variables: dict[str, Any] = {}
        for number, cell in enumerate(with_parameters(name, given)["cells"]):
            if cell["cell_type"] == "code":
                exec(compile(cell["source"], f"{name}.ipynb, cell {number}", "exec"), variables)


def execute(
    results: str | Path,
    output: Path,
    names: Sequence[str] = NOTEBOOKS,
    where: Sequence[str] = (),
    **options: Any,
) -> list[Path]:
    """Execute notebooks one after the other in one kernel, in the current folder, and write OUTPUT/NAME.ipynb.

    Args:
        where, options: as in `parameters`, which raises further errors.

    Returns:
        the paths of the notebooks.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    given = parameters(results, output, where, **options)
    notebooks = {name: nbformat.from_dict(with_parameters(name, given)) for name in names}
    cells = [cell for notebook in notebooks.values() for cell in notebook.cells]
    together = nbformat.v4.new_notebook(cells=cells)
    here = {"metadata": {"path": str(Path.cwd())}}
    client = NotebookClient(together, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, resources=here)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client.execute(env={**os.environ, "PYTHONPATH": path})
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, notebook in notebooks.items():
        count_from_one(notebook)
        written.append(output / f"{name}.ipynb")
        nbformat.write(notebook, written[-1])
    return written


def update(executed: Path) -> None:
    """Store an executed notebook in this folder, without its injected parameters, with the digest of its sources."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", ())]
    count_from_one(notebook)
    notebook.metadata[DIGEST] = digest(notebook)
    (FOLDER / executed.name).write_text(f"{nbformat.writes(notebook).rstrip()}\n", encoding="utf-8")


def digest(notebook: Mapping[str, Any]) -> str:
    """SHA-256 of the sources of a notebook's cells; outputs belong to the sources whose digest is stored."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()


def count_from_one(notebook: Any) -> None:
    """Number the executed cells of a notebook from 1."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        for shown in cell.outputs:
            if shown.output_type == "execute_result":
                shown.execution_count = number
