"""Whether the code behind a finished run has changed: what counts, and what nothing is known of."""

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
MINE = {"_target_": "mine_quant.method.Mine"}


def forget() -> None:
    """As a new process."""
    code_digest.digest.cache_clear()
    code_digest.sources.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's, with a module and a package beside it."""
    files = ("mine_quant/__init__.py", "mine_quant/method.py", "mine_quant/deeper/grids.py", "mine_quant/README.md")
    for name in (*files, "beside_quant.py", "neighbour/__init__.py", "neighbour/levels.py", "folder/notes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("STEP = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "mine_quant"


def result(**groups: Any) -> dict[str, Any]:
    """What a run of these groups leaves, as far as it matters here."""
    config = {"allocator": "uniform", "method": RTN, "posterior": {}, "model": {}, "dataset": {}, **groups}
    return {"config": config, "code": code_digest.digest(code_digest.packages(config))}


def edited(path: Path, change: Callable[[str], str] = lambda text: text.replace("1", "2")) -> None:
    path.write_text(change(path.read_text()))
    forget()


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("mine_quant/__init__.py", True),
        ("mine_quant/method.py", True),
        ("mine_quant/deeper/grids.py", True),
        ("beside_quant.py", True),
        ("neighbour/levels.py", True),
        ("mine_quant/README.md", False),
        ("folder/notes.py", False),
    ],
)
def test_the_users_package_and_what_it_may_import_from_beside_it_count(package: Path, file: str, counts: bool) -> None:
    finished = result(method=MINE)
    assert not code_digest.has_changed(finished)
    edited(package.parent / file)
    assert code_digest.has_changed(finished) == counts
    assert not code_digest.has_changed(result(method=MINE))


@pytest.mark.parametrize("group", ["method", "model", "dataset", "posterior"])
def test_every_group_and_what_is_nested_in_it_counts(package: Path, group: str) -> None:
    finished = result(**{group: {**RTN, "grid": {"_target_": "mine_quant.grids.grid"}}})
    edited(package / "method.py")
    assert code_digest.has_changed(finished)


def test_a_single_file_is_a_target_too(package: Path) -> None:
    finished = result(method={"_target_": "beside_quant.Mine.make"})
    edited(package.parent / "beside_quant.py")
    assert code_digest.has_changed(finished)


def test_an_installed_package_counts_without_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages" / "plugin_quant"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "method.py", "../other.py"):
        (folder / name).write_text("STEP = 1\n")
    monkeypatch.syspath_prepend(folder.parent)
    finished = result(method={"_target_": "plugin_quant.method.Mine"})
    edited(folder.parent / "other.py")
    assert not code_digest.has_changed(finished)
    edited(folder / "method.py")
    assert code_digest.has_changed(finished)


@pytest.mark.parametrize("file", ["bayesq/quant/grids.py", "bayesq/suite/models/resnet.py", "baselines/rtn.py"])
def test_our_own_code_counts(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    finished = result()
    assert not code_digest.has_changed(finished)
    forget()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"ADDED = 1\n" if path == ROOT / file else b""))
    assert code_digest.has_changed(finished)


def test_a_skipped_run_says_that_its_code_has_changed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["-m", "method=rtn", "method._target_=mine_quant.method.Mine", "seed=0,1"]
    jobs = cli.preflight(line) or []
    for job, kept in zip(jobs, (True, False), strict=True):
        digest = code_digest.digest(code_digest.packages(job.config))
        numbers = {"status": "finished", "model": "minilm", "dataset": "movie_snippets", "method": "rtn"}
        code = {"code": digest} if kept else {}  # the other is of an earlier version, which kept none
        write_json(job.run_dir / "result.json", {**numbers, **code, "config": job.config})
    assert cli._run(jobs) == 0
    assert "changed" not in capsys.readouterr().out
    edited(package / "method.py")
    assert cli._run(jobs) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"skipped (finished): {jobs[0].run_id} ")
    assert first.endswith("; the code that computes it has changed since: force=true runs it again")
    assert second.startswith(f"skipped (finished): {jobs[1].run_id} ") and "changed" not in second


def test_what_is_not_known_is_not_said(package: Path) -> None:
    finished = result(method=MINE)
    for older in ({}, {"code": None}, {"code": {"bytes": "text"}}):
        assert not code_digest.has_changed({"config": finished["config"], **older})
    for file in package.rglob("*.py"):
        file.unlink()
    forget()
    assert not code_digest.has_changed(finished)
    assert code_digest.digest(("no_such_package",)) is None


def test_nothing_is_imported_to_find_out(package: Path) -> None:
    result(method=MINE)
    assert not any(name.startswith("mine_quant") for name in sys.modules)
