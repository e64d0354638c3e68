"""Notebooks: what is stored, and that they run in this process, in one kernel, by papermill and from any folder."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from result_files import add_run

from analysis.notebooks import DIGEST, FOLDER, INJECTED, NOTEBOOKS, PARAMETERS, digest, execute, render_all, update
from analysis.notebooks.__main__ import main
from analysis.page import rooted

ROOT = Path(__file__).parents[2]
WITH_OUTPUTS = ("main_figure", "main_table")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def stored(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPTQ and BayesQ at two budgets, one of GPTQ missing."""
    folder = tmp_path_factory.mktemp("few") / "results"
    for method, bits in (("gptq", 3), ("bayesq", 3), ("bayesq", 4)):
        add_run(folder, method=method, bits=bits)
    return folder


# -------------------------------------------------------------------------------------------------------------- stored


def test_every_notebook_is_a_page() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_begins_with_its_text_and_its_parameters(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ") and len(notebook.cells[0].source) > 100
    (cell,) = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ())]
    values: dict[str, Any] = {}
    exec(cell.source, values)
    assert {key: values[key] for key in ("results", "where", "output", "venue", "columns")} == {
        "results": "results", "where": [], "output": "paper", "venue": None, "columns": None,
    }  # fmt: skip
    assert set(papermill.inspect_notebook(FOLDER / f"{name}.ipynb")) >= set(values) - {"__builtins__"}
    assert "load_runs(rooted(results), where)" in "".join(cell.source for cell in code_of(notebook))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_belong_to_the_stored_sources(name: str) -> None:
    notebook = stored(name)
    counts = [cell.execution_count for cell in code_of(notebook)]
    if name not in WITH_OUTPUTS:
        assert not outputs_of(notebook) and set(counts) == {None} and DIGEST not in notebook.metadata
        return
    outputs = outputs_of(notebook)
    assert counts == list(range(1, len(counts) + 1))
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}
    again = f"`python -m analysis.notebooks RESULTS --only {name} --update` stores the outputs of changed cells"
    assert notebook.metadata[DIGEST] == digest(notebook), again
    shown = [output.data for output in outputs]
    assert any("text/html" in data for data in shown), "no frame"
    assert any("image/png" in data for data in shown) == (name == "main_figure")
    assert name != "main_table" or any("| BayesQ" in data.get("text/markdown", "") for data in shown)
    text = json.dumps([{key: value for key, value in data.items() if key != "image/png"} for data in shown])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text), "a path of the machine it ran on"


def test_stored_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 450 * 1024


# ------------------------------------------------------------------------------------------------------- how they run


def test_a_notebook_in_its_folder_reads_and_writes_below_the_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder, expected in ((FOLDER, ROOT / "results"), (ROOT, ROOT / "results"), (tmp_path, tmp_path / "results")):
        monkeypatch.chdir(folder)
        assert Path(rooted("results")).resolve() == expected.resolve()
        assert rooted("wandb:me/project") == "wandb:me/project" and rooted(str(tmp_path)).endswith(tmp_path.name)


@pytest.mark.parametrize("names", [WITH_OUTPUTS, pytest.param(NOTEBOOKS, marks=pytest.mark.slow)], ids=["two", "all"])
def test_notebooks_run_in_one_kernel_and_write_what_the_process_writes(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    render_all(few, tmp_path / "process", names)
    paths = execute(few, tmp_path / "kernel", names)
    assert [path.stem for path in paths] == list(names)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        assert outputs_of(notebook), path.stem
        assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
        counts = [cell.execution_count for cell in code_of(notebook)]
        assert counts == list(range(1, len(counts) + 1))
    written = {path.relative_to(tmp_path / "process") for path in (tmp_path / "process").rglob("*") if path.is_file()}
    assert {
        Path("main_figure.pdf"),
        Path("figures.tex"),
        Path("main_table.tex"),
        Path("pages/main_figure.md"),
    } <= written
    for name in written:
        assert (tmp_path / "kernel" / name).read_bytes() == (tmp_path / "process" / name).read_bytes(), name
    page = (tmp_path / "process/pages/main_figure.md").read_text()
    assert f"method=gptq bits=4 seed=0 results_dir={few}" in page
    monkeypatch.setattr("analysis.notebooks.FOLDER", tmp_path)
    update(paths[0])
    again = nbformat.read(tmp_path / paths[0].name, as_version=4)
    assert [cell.source for cell in again.cells] == [cell.source for cell in stored(paths[0].stem).cells]
    assert again.metadata[DIGEST] == digest(again) and outputs_of(again)
    assert INJECTED not in json.dumps(again)


@pytest.mark.parametrize("cwd", [ROOT, FOLDER], ids=["root", "folder"])
@pytest.mark.slow
def test_papermill_sets_the_parameters(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    given = {"results": str(few), "output": str(tmp_path / "paper"), "where": ["method=bayesq"], "venue": "icml"}
    out = tmp_path / "pareto.ipynb"
    papermill.execute_notebook(FOLDER / "pareto.ipynb", out, parameters=given, cwd=cwd, progress_bar=False)
    assert not [output for output in outputs_of(nbformat.read(out, as_version=4)) if output.output_type == "error"]
    assert "Only runs with method=bayesq." in (tmp_path / "paper/pareto.txt").read_text()
    assert stored("pareto").cells == nbformat.read(FOLDER / "pareto.ipynb", as_version=4).cells


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "no results folder nowhere"), (["FEW", "bits=9"], "bits=9")]
)
def test_what_cannot_be_read_is_one_line(
    few: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebooks", *(str(few) if a == "FEW" else a for a in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert str(left.value.code).startswith(f"error: {message}") and "\n" not in str(left.value.code)


# ---------------------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTN, GPTQ and BayesQ on the digits, one budget of RTN missing, one run failed, one finished run copied."""
    folder = tmp_path_factory.mktemp("sweep") / "results"
    fixed = ["model=resnet", "dataset=digits", "wandb.mode=disabled", f"results_dir={folder}"]
    # rotated columns have another prior precision than bounds, which compare all methods in the columns as they are
    for arguments in (["method=gptq,bayesq", "rotate=false", "bits=3,4"], ["method=rtn", "bits=3"]):
        command = [sys.executable, str(ROOT / "run.py"), "-m", *fixed, *arguments]
        subprocess.run(command, env=environment(), check=True, capture_output=True, cwd=folder.parent)
    subprocess.run(
        [sys.executable, "-m", "analysis.bounds", str(folder)], env=environment(), check=True, cwd=folder.parent
    )
    add_run(folder, method="awq", bits=3, failed="the disk was full")
    return folder


@pytest.mark.slow
def test_bounds_judge_a_run_by_the_risk_it_recorded(sweep: Path) -> None:
    by_method: dict[tuple[str, float], float] = {}
    for file in sweep.glob("*/bounds.csv"):
        result = json.loads((file.parent / "result.json").read_text())
        with file.open(newline="") as bounds, (file.parent / "layers.csv").open(newline="") as layers:
            pairs = list(zip(csv.DictReader(bounds), csv.DictReader(layers), strict=True))
        for bound, layer in pairs:
            assert bound["name"] == layer["name"]
            assert float(bound["bits/code"]) == pytest.approx(float(layer["bits/code"]))
            assert float(bound["bound_bits"]) < float(bound["bits/code"])
            if result["method"] == "bayesq":
                assert float(bound["risk"]) == pytest.approx(float(layer["achieved_risk"]), rel=1e-6)
        by_method[result["method"], result["bits/target"]] = sum(float(bound["risk"]) for bound, _ in pairs)
    assert len(by_method) == 5
    assert by_method["bayesq", 4] < by_method["bayesq", 3] < by_method["gptq", 3] < by_method["rtn", 3]


@pytest.mark.slow
def test_bounds_are_written_once_and_a_lost_file_is_named(sweep: Path, tmp_path: Path) -> None:
    from analysis.bounds import write_bounds

    folder = tmp_path / "results"
    first, second, *_ = sorted(path.parent for path in sweep.glob("*/bounds.csv"))
    shutil.copytree(first, folder / first.name)
    shutil.copytree(second, folder / second.name)
    written = (folder / first.name / "bounds.csv").stat().st_mtime_ns
    (folder / second.name / "bounds.csv").unlink()
    (folder / second.name / "quantized.safetensors").unlink()
    (left,) = write_bounds(folder)
    assert left.startswith(second.name)
    assert "quantized.safetensors" in left
    assert (folder / first.name / "bounds.csv").stat().st_mtime_ns == written


@pytest.mark.slow
def test_notebooks_show_real_runs(sweep: Path, tmp_path: Path) -> None:
    render_all(sweep, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    for figure in ("main_figure", "pareto", "bit_curve", "allocation", "cost", "reliability", "rate_distortion"):
        assert any(name.startswith(figure) and name.endswith(".pdf") for name in written), figure
    page = (tmp_path / "pages/main_figure.md").read_text()
    assert "rtn at 4 bits: no result with seed 0" in page
    assert "the disk was full" in page
