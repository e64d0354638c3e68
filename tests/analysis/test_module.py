"""`python -m analysis` on the terminal."""

import subprocess
import sys
from pathlib import Path

import pytest
from frozen import add, add_glue

from analysis.__main__ import TABLES, main
from analysis.notebooks.__main__ import main as notebooks
from analysis.report.__main__ import main as report

ROOT = Path(__file__).parents[2]


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analysis", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """What the module leaves with: a line for stderr, and exit code 1."""
    monkeypatch.setattr(sys, "argv", ["analysis", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add(tmp_path, "gptq", 3.0, 0, 20, 0.05)
    add(tmp_path, "gptq", 3.0, 1, 30, 0.075)
    add(tmp_path, "gptq", 3.5, 0, 35, 0.0875)
    add(tmp_path, "rtn", 3.0, 0, 10, 0.5)
    add(tmp_path, "rtn", 3.5, 0, error="memory ran out")
    return tmp_path


def test_the_module_prints_an_overview_in_markdown(folder):
    done = module(str(folder))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert rows[0] == ["workload", "method", "3 bit", "3.5 bit"]
    assert rows[2] == ["resnet / digits", "gptq", "62.50 / 0.0625 (n=2)", "87.50 / 0.0875 (n=1)"]
    assert rows[3] == ["resnet / digits", "rtn", "25.00 / 0.5000 (n=1)", "-"]
    assert "memory ran out" in done.stdout and "method=rtn bits=3.5 seed=0" in done.stdout


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--main", "Δ GPTQ"),
        ("--cost", "quantize ×"),
        ("--glue", "30.50"),
    ],
)
@pytest.mark.slow
def test_every_table_can_be_asked_for(folder, option, expected):
    add_glue(folder)
    done = module(str(folder), option)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and "nan" not in done.stdout


def test_nothing_to_show_is_one_line(tmp_path, monkeypatch):
    empty, failed = tmp_path / "empty", tmp_path / "failed"
    empty.mkdir()
    add(failed, "rtn", 3.5, 0, error="memory ran out")
    cases = {
        str(empty): f"no finished run in {empty}: start some with python run.py, or name another folder",
        str(failed): f"no finished run in {failed}: start some with python run.py, or name another folder",
        str(tmp_path / "missing"): f"no results folder {tmp_path / 'missing'}",
        "wandb:project": "wandb:project: needs wandb:ENTITY/PROJECT",
    }
    for source, message in cases.items():
        assert refusal(monkeypatch, source) == f"error: {message}"


@pytest.mark.parametrize("run", [main, notebooks, report], ids=["analysis", "notebooks", "report"])
def test_every_command_refuses_a_folder_without_finished_runs(tmp_path, monkeypatch, run):
    failed, output = tmp_path / "failed", tmp_path / "paper"
    add(failed, "rtn", 3.5, 0, error="memory ran out")
    options = [["--dry-run"], ["--html", str(output)]] if run is report else [["--output", str(output)]]
    options += [[f"--{name}"] for name in TABLES] if run is main else []
    for more in options:
        monkeypatch.setattr(sys, "argv", ["command", str(failed), *more])
        with pytest.raises(SystemExit) as left:
            run()
        assert str(left.value.code).startswith(f"error: no finished run in {failed}: start"), more
        assert not output.exists()


def test_an_output_that_cannot_be_a_folder_is_one_line(folder, monkeypatch):
    file = folder / "file"
    file.touch()
    for output in (file, file / "paper"):
        line = str(refusal(monkeypatch, str(folder), "--output", str(output)))
        assert line.startswith(f"error: --output {output}: cannot be a folder (") and "\n" not in line


def test_widths_without_figures_are_one_line(folder, monkeypatch):
    assert "add --output DIR" in str(refusal(monkeypatch, str(folder), "--venue", "icml"))


def test_a_table_without_rows_is_one_line_with_what_makes_them(folder, monkeypatch):
    line = str(refusal(monkeypatch, str(folder), "--ablation"))
    assert line.startswith(f"error: no run in {folder} that this table shows; resnet / digits: no variant of BayesQ")
    assert "`python run.py -m model=resnet dataset=digits ablation=full," in line and "\n" not in line


def test_no_glue_is_one_line(folder, monkeypatch):
    assert refusal(monkeypatch, str(folder), "--glue") == f"error: no run of a GLUE task in {folder}"
