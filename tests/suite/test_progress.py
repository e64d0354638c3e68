"""How far a sweep is."""

import json
import os
from pathlib import Path

import pytest

from bayesq.suite.progress import Progress, duration


def ended(folder: Path, at: float, name: str = "result.json") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).touch()
    os.utime(folder / name, (at, at))


def test_the_rate_is_of_what_this_command_has_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / str(k) for k in range(6)]
    ended(folders[0], 500)  # finished before: skipped
    progress = Progress({folder: folder != folders[0] for folder in folders})
    progress.start = 1000
    assert [progress.place(folder) for folder in folders] == [f"{k} of 6" for k in range(1, 7)]
    monkeypatch.setattr("time.time", lambda: 1060)
    assert progress.left() == ""
    ended(folders[1], 1010)
    ended(folders[2], 1050, "status.json")  # a failure takes time as well
    ended(folders[3], 900, "status.json")  # of an earlier command
    assert progress.left() == "about 2 min left"  # three more at 30 s each
    for folder in folders[3:]:
        ended(folder, 1060)
    assert progress.left() == ""


def test_what_the_first_run_prepares_is_no_part_of_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / str(k) for k in range(4)]
    progress = Progress(dict.fromkeys(folders, True))
    progress.start = 1000
    for k, (prepared, now, left) in enumerate([(90, 1100, "30 s"), (2, 1110, "22 s"), (1, 1120, "10 s")]):
        folders[k].mkdir()
        (folders[k] / "result.json").write_text(json.dumps({"time/prepare_s": prepared}))
        os.utime(folders[k] / "result.json", (now, now))
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert progress.left() == f"about {left} left"


def test_single_and_foreign_runs_have_no_place(tmp_path: Path) -> None:
    assert Progress({tmp_path: True}).place(tmp_path) == ""
    assert Progress({tmp_path / "a": True, tmp_path / "b": True}).place(tmp_path) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (9000, "2.5 h")])
def test_durations_are_in_the_unit_of_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
