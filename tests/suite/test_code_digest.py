"""Whether the code behind a finished run has changed: what counts, and what must not raise an alarm."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bayesq
from bayesq.suite import cli, code_digest
from bayesq.suite.results import write_json

ROOT = Path(bayesq.__file__).parents[1]
RTN = {"_target_": "baselines.rtn.RTN"}
CACHED = ("digests", "_files", "_home", "_imports", "_path", "_folders", "_source", "_syntax")


def forget() -> None:
    """As a new process."""
    for name in CACHED:
        getattr(code_digest, name).cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's with a method in several files, and others that it does not import."""
    files = {
        "__init__.py": "",
        "method.py": "from .grids import (\n    grid,  # first\n)\nimport mine_quant.levels as l\n",
        "grids.py": "from mine_quant import shared\n\ndef grid(w):\n    # nearest\n    return round(w)\n",
        "levels.py": "LEVELS = 4\n",
        "shared.py": "STEP = 1\n",
        "other.py": "from mine_quant import method\n",
        "README.md": "text\n",
    }
    folder = tmp_path / "mine_quant"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def result(**groups: Any) -> dict[str, Any]:
    """What a run of these groups leaves, as far as it matters here."""
    config = {"allocator": "uniform", "method": RTN, "posterior": {}, "model": {}, "dataset": {}, **groups}
    return {"config": config, "code": code_digest.digests(code_digest.targets(config))}


def edited(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))
    forget()


@pytest.mark.parametrize(
    "line",
    [
        "import beside_quant",
        "import os; import beside_quant as b",
        "if True: import beside_quant",
        "from beside_quant import (  # )\n    STEP)",
    ],
)
def test_files_beside_a_target_count(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_quant.py").write_text("STEP = 1\n")
    (tmp_path / "alone_quant.py").write_text(f"{line}\n\nclass Mine:\n    bits = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    finished = result(method={"_target_": "alone_quant.Mine"})
    edited(tmp_path / "beside_quant.py", lambda text: text.replace("1", "2"))
    assert code_digest.has_changed(finished)


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("method.py", True),
        ("grids.py", True),
        ("levels.py", True),
        ("shared.py", True),
        ("__init__.py", True),
        ("other.py", False),
        ("README.md", False),
    ],
)
def test_what_a_method_of_the_users_imports_counts(package: Path, file: str, counts: bool) -> None:
    finished = result(method={"_target_": "mine_quant.method.Mine"})
    assert not code_digest.has_changed(finished)
    edited(package / file, lambda text: f"{text}\nADDED = 1\n")
    assert code_digest.has_changed(finished) == counts


@pytest.mark.parametrize("group", ["method", "model", "dataset", "posterior"])
def test_every_group_and_what_is_nested_in_it_counts(package: Path, group: str) -> None:
    nested = {**RTN, "grid": {"_target_": "mine_quant.grids.grid"}}
    finished = result(**{group: nested, "allocator": "knapsack"})
    edited(package / "shared.py", lambda text: text.replace("1", "2"))
    assert code_digest.has_changed(finished)


def test_a_posterior_that_is_not_read_does_not_count(package: Path) -> None:
    finished = result(posterior={"_target_": "mine_quant.grids.grid"})
    edited(package / "grids.py", lambda text: text.replace("round", "int"))
    assert not code_digest.has_changed(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("# nearest", "# to the nearest"),
        lambda text: text.replace("def grid(w):", 'def grid(w):\n    """Grid."""'),
        lambda text: text.replace("\n\n", "\n\n\n\n"),
        lambda text: text.replace("(w)", "( w )"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(package: Path, change: Callable[[str], str]) -> None:
    finished = result(method={"_target_": "mine_quant.grids.grid"})
    before = (package / "grids.py").read_text()
    edited(package / "grids.py", change)
    assert (package / "grids.py").read_text() != before
    assert not code_digest.has_changed(finished)


def test_a_single_file_and_a_method_of_a_class_are_targets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alone_quant.py").write_text("class Mine:\n    bits = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    finished = result(method={"_target_": "alone_quant.Mine.make"})
    edited(tmp_path / "alone_quant.py", lambda text: text.replace("3", "4"))
    assert code_digest.has_changed(finished)


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("bayesq/quant/grids.py", True),
        ("bayesq/calibration/passes.py", True),
        ("bayesq/fisher.py", True),
        ("bayesq/suite/calibration.py", True),
        ("bayesq/suite/runner.py", True),
        ("baselines/rtn.py", True),
        ("bayesq/suite/models/resnet.py", True),
        ("bayesq/suite/datasets/digits.py", True),
        ("bayesq/suite/plots.py", False),
        ("bayesq/suite/cli.py", False),
        ("bayesq/suite/tracking.py", False),
        ("bayesq/suite/dashboard.py", False),
        ("baselines/awq.py", False),
        ("bayesq/method.py", False),
        ("bayesq/suite/models/minilm.py", False),
        ("bayesq/suite/datasets/glue.py", False),
    ],
)
def test_of_our_own_code_counts_what_computes_the_run(monkeypatch: pytest.MonkeyPatch, file: str, counts: bool) -> None:
    finished = result(
        model={"_target_": "bayesq.suite.models.resnet.SmallResNet"},
        dataset={"_target_": "bayesq.suite.datasets.digits.Digits"},
    )
    assert not code_digest.has_changed(finished)
    assert (ROOT / file).is_file()
    forget()
    read = code_digest._source

    def changed(path: Path) -> bytes:
        return read(path) + (b"\nADDED = 1\n" if path == ROOT / file else b"")

    monkeypatch.setattr(code_digest, "_source", changed)
    found = code_digest.has_changed(finished)
    monkeypatch.undo()
    assert found == counts


def test_a_skipped_run_says_that_its_code_has_changed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["-m", "method=rtn", "method._target_=mine_quant.method.Mine", "seed=0,1"]
    jobs = cli.preflight(line) or []
    for job, kept in zip(jobs, (True, False), strict=True):
        digests = code_digest.digests(code_digest.targets(job.config))
        numbers = {"status": "finished", "model": "minilm", "dataset": "movie_snippets", "method": "rtn"}
        code = {"code": digests} if kept else {}  # the other is of an earlier version, which kept none
        write_json(job.run_dir / "result.json", {**numbers, **code, "config": job.config})
    assert cli._run(jobs) == 0
    assert "changed" not in capsys.readouterr().out
    edited(package / "shared.py", lambda text: text.replace("1", "2"))
    assert cli._run(jobs) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"skipped (finished): {jobs[0].run_id} ")
    assert first.endswith("; the code that computes it has changed since: force=true runs it again")
    assert second.startswith(f"skipped (finished): {jobs[1].run_id} ") and "changed" not in second


def test_what_is_not_known_is_not_said(package: Path) -> None:
    finished = result(method={"_target_": "mine_quant.method.Mine"})
    for older in ({}, {"code": None}, {"code": "text"}):
        assert not code_digest.has_changed({"config": finished["config"], **older})
    for file in package.iterdir():
        file.unlink()
    package.rmdir()
    forget()
    assert not code_digest.has_changed(finished)
    assert code_digest.digests(("no_such_package.Net",)) is None


def test_nothing_is_imported_to_find_out(package: Path) -> None:
    result(method={"_target_": "mine_quant.method.Mine"})
    assert not any(name.startswith("mine_quant") for name in sys.modules)
