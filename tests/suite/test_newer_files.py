"""A finished run is skipped although a file it has read was edited: the line says so."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayesq.suite import cli, newer_files
from bayesq.suite.results import write_json


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    newer_files._modified.cache_clear()
    yield
    newer_files._modified.cache_clear()


def set_time(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def test_an_edited_file_is_named_when_its_run_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n")
    jobs = cli.preflight(["method=rtn", "model=minilm", "dataset=csv", "dataset.file=mine.csv"]) or []
    (job,) = jobs
    numbers = {"status": "finished", "model": "minilm", "dataset": "csv", "method": "rtn", "config": job.config}
    write_json(job.run_dir / "result.json", numbers)
    written = (job.run_dir / "result.json").stat().st_mtime
    for seconds, told in ((-60, False), (60, True)):
        set_time(file, written + seconds)
        newer_files._modified.cache_clear()
        assert cli._run(jobs) == 0
        line = "newer than its result: dataset.file=mine.csv: force=true runs it again"
        assert (line in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("edited", "told"),
    [("", True), ("train", True), ("train/cat", True), ("train/cat/0.jpg", False), ("labels.txt", True)],
)
def test_a_folder_is_as_new_as_what_is_added_to_it(edited: str, told: bool, tmp_path: Path) -> None:
    """Of the photos of a class the folder alone counts, because there may be millions."""
    data, result = tmp_path / "data", tmp_path / "result.json"
    (data / "train/cat").mkdir(parents=True)
    for file in (data / "train/cat/0.jpg", data / "labels.txt", result):
        file.write_text("")
    for path in (result, data, *data.rglob("*")):
        set_time(path, 1000)
    set_time(data / edited, 2000)
    config = {"model": {"name": "data"}, "dataset": {"name": "data", "folder": str(data)}}
    assert newer_files.newer_than(result, config) == [f"dataset.folder={data}"] * told


def test_a_file_that_is_gone_is_not_newer(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("")
    config = {"model": {"checkpoint": str(tmp_path / "gone")}, "dataset": {"val": None}}
    assert newer_files.newer_than(tmp_path / "result.json", config) == []
