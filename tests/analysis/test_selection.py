"""Filters of runs: what they leave, and what they say about keys and values that no run has."""

from pathlib import Path

import pytest
from frozen import add, config, started
from test_module import module, refusal

from analysis import load_runs
from analysis.loading import records
from analysis.notebooks import render_all
from analysis.tables.main import main_table
from bayesq.suite.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """RTN, GPTQ, AWQ and BayesQ on digits, GPTQ and BayesQ on photos with smaller calibration sets, one run failed."""
    results = tmp_path / "results"
    for bits in (3.0, 4.0):
        for method in ("rtn", "gptq", "awq", "bayesq"):
            add(results, method, bits, 0)
        for method in ("gptq", "bayesq"):
            add(results, method, bits, 0, model="cifar_resnet20", dataset="cifar10", calibration__examples=64)
    add(results, "gptq", 3.0, 0, distill=True)
    add(results, "awq", 3.0, 1, error="memory ran out")
    return results


def left(folder: Path, *where: str) -> set[tuple[str, str, float, int]]:
    runs = records(load_runs(folder, where))
    return {(run["dataset"], run["variant"], run["bits/target"], run["seed"]) for run in runs}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["method=rtn"], {("digits", "rtn", 3.0, 0), ("digits", "rtn", 4.0, 0)}),
        (["method=rtn,awq", "bits=4.0"], {("digits", "rtn", 4.0, 0), ("digits", "awq", 4.0, 0)}),
        (["method=awq"], {("digits", "awq", 3.0, 0), ("digits", "awq", 4.0, 0), ("digits", "awq", 3.0, 1)}),
        (["dataset=cifar10", "bits=3"], {("cifar10", "gptq", 3.0, 0), ("cifar10", "bayesq", 3.0, 0)}),
        (["calibration.examples=64", "bits/target=3"], {("cifar10", "gptq", 3.0, 0), ("cifar10", "bayesq", 3.0, 0)}),
        (["calibration/examples=64", "method=gptq", "bits=3,4"], {("cifar10", "gptq", b, 0) for b in (3.0, 4.0)}),
        (["distill=true"], {("digits", "gptq", 3.0, 0)}),
        (["distill=True", "method=gptq"], {("digits", "gptq", 3.0, 0)}),
        (["model=cifar_resnet20", "method=gptq", "bits=3"], {("cifar10", "gptq", 3.0, 0)}),
        (["wandb/error=null", "method=rtn", "bits=3"], {("digits", "rtn", 3.0, 0)}),
    ],
)
def test_runs_that_fit_every_filter_are_left(folder: Path, where: list[str], expected: set[object]) -> None:
    assert left(folder, *where) == expected


def test_names_are_those_of_what_is_left(folder: Path) -> None:
    """A setting that all runs share tells no variant from another."""
    assert {run["variant"] for run in records(load_runs(folder))} >= {"gptq", "gptq distill=true"}
    assert {run["variant"] for run in records(load_runs(folder, ["distill=true"]))} == {"gptq"}


def test_a_list_is_one_value(tmp_path: Path) -> None:
    for widths in ([2, 4], [2, 8]):
        add(tmp_path, "bayesq", 3.0, 0, allocation={"widths": widths}, name=f"w{widths[1]}")
    runs = records(load_runs(tmp_path, ["allocation.widths=[2,8]"]))
    assert [run["run_id"] for run in runs] == ["w8"]
    assert len(load_runs(tmp_path, ["allocation.widths=[2,8],[2,4]"])) == 2


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["metod=gptq"], "metod=gptq: no run has the key 'metod'; did you mean 'method'?"),
        (["calibration.exmples=64"], "no run has the key 'calibration.exmples'; did you mean 'calibration.examples'?"),
        (["zzz=1"], "no run has the key 'zzz': give one of result.json or of the configuration"),
        (["method=bayes"], "no finished run has method=bayes; did you mean 'bayesq'? There is awq, bayesq, gptq, rtn"),
        (["method=gptq,qronos"], "no finished run has method=qronos. There is awq, bayesq, gptq, rtn"),
        (["bits=3,5"], "bits=3,5: no finished run has bits=5. There is 3.0, 4.0"),
        (["seed=1"], "no finished run has seed=1. There is 0"),  # the failed run has it
        (["dataset=cifar10", "method=rtn"], "no finished run has all of dataset=cifar10 method=rtn"),
        (["digits"], "'digits' is no filter: write key=value"),
        (["method="], "'method=' is no filter: write key=value"),
    ],
)
def test_what_no_run_has_is_one_line_that_says_what_there_is(folder: Path, where: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_runs(folder, where)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_filters_of_the_command_line_stand_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = module(str(folder), "method=rtn", "--main", "dataset=digits")
    assert done.returncode == 0, done.stderr
    assert "| rtn " in done.stdout and "gptq" not in done.stdout.partition("\n\n")[2]
    assert refusal(monkeypatch, str(folder), "method=bayes").startswith("error: method=bayes: no finished run has")


def test_tables_of_filtered_runs_miss_nothing_that_was_left_out(folder: Path) -> None:
    """Neither rows, nor columns, nor commands for methods, budgets and workloads that nobody asked for."""
    table = main_table(load_runs(folder, ["method=gptq,bayesq", "dataset=cifar10", "bits=3"]))
    assert table.cells[["bits", "method"]].to_numpy().tolist() == [["3", "gptq"], ["3", "bayesq"]]
    assert table.footnotes == []
    assert table.caption.startswith("Methods at 3 bits: ")


def test_every_file_of_filtered_runs_says_so(folder: Path, tmp_path: Path) -> None:
    where = ["method=gptq,bayesq", "dataset=cifar10"]
    render_all(folder, tmp_path / "paper", ("main_figure", "main_table", "bit_curve", "cost"), where)
    files = [path for path in (tmp_path / "paper").rglob("*") if path.suffix in (".md", ".txt", ".tex")]
    assert len(files) >= 10
    for path in files:
        text = path.read_text()
        assert "Only runs with method=bayesq,gptq" in text or "Only runs with method=gptq,bayesq" in text, path
        assert "digits" not in text.replace(str(folder), ""), path


def test_a_run_that_is_not_finished_stays_where_its_configuration_fits(tmp_path: Path) -> None:
    add(tmp_path, "gptq", 3.0, 0)
    add(tmp_path, "gptq", 3.0, 1, error="memory ran out")
    started(tmp_path / "begun", ["bits=3"], config("rtn", 3.0, 2, "resnet", "digits"))
    assert {run["seed"] for run in records(load_runs(tmp_path, ["method=gptq"]))} == {0, 1}
    assert {run["seed"] for run in records(load_runs(tmp_path, ["model=resnet"]))} == {0, 1, 2}
