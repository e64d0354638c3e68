"""The pages on real runs, as scripts and as executed notebooks; and how a page gets its arguments."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from analysis.notebooks.execute import convert, execute
from result_files import add_run

from analysis.notebooks import FOLDER, NOTEBOOKS, render_all

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


# --------------------------------------------------------------------------------------------------------------- quick


def test_every_script_is_a_page() -> None:
    assert {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("__")} - {"execute"} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_script_converts_to_a_notebook_that_begins_with_its_text(name: str) -> None:
    notebook = convert(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert len(notebook.cells[0].source) > 100
    assert sum(cell.cell_type == "code" for cell in notebook.cells) >= 2
    assert nbformat.writes(notebook) == nbformat.writes(convert(name))


def test_a_script_takes_folder_and_output_and_says_what_is_missing(tmp_path: Path) -> None:
    add_run(tmp_path / "results", method="gptq", bits=3)
    add_run(tmp_path / "results", method="bayesq", bits=3)
    add_run(tmp_path / "results", method="bayesq", bits=4)
    done = script("main_figure", str(tmp_path / "results"), "--output", str(tmp_path / "paper"))
    assert done.returncode == 0, done.stderr
    assert f"method=gptq bits=4 seed=0 results_dir={tmp_path / 'results'}" in done.stdout
    assert done.stdout.split("\n\n")[0] in (tmp_path / "paper/pages/main_figure.md").read_text()
    assert (tmp_path / "paper/main_figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = script("main_figure", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTN, GPTQ and BayesQ on the digits, one budget of RTN missing, one run failed, one finished run copied."""
    folder = tmp_path_factory.mktemp("sweep") / "results"
    fixed = ["model=resnet", "dataset=digits", "wandb.mode=disabled", f"results_dir={folder}"]
    for arguments in (["method=gptq,bayesq", "bits=3,4"], ["method=rtn", "bits=3"]):
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
def test_pages_as_scripts_and_as_notebooks_write_the_same_files(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    render_all(sweep, tmp_path / "scripts")
    written = {path.name: path.read_bytes() for path in (tmp_path / "scripts").iterdir() if path.is_file()}
    for figure in ("main_figure", "bit_curve", "allocation", "cost", "reliability", "rate_distortion"):
        assert any(name.startswith(figure) and name.endswith(".pdf") for name in written), figure
    for name in NOTEBOOKS:
        path = execute(name, sweep, tmp_path / "notebooks")
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert outputs, name
        assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "rate_distortion shows no figure"
    for name, content in written.items():
        assert (tmp_path / "notebooks" / name).read_bytes() == content, name
    page = (tmp_path / "scripts/pages/main_figure.md").read_text()
    assert "rtn at 4 bits: no result with seed 0" in page
    assert "the disk was full" in page
