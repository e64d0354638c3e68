"""Result files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bayesq.suite import results

# -------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = {"a": np.float32(0.5), "b": np.int64(3), "c": [1, (2, "x")], "d": {"e": None, "f": True}, "p": Path("q")}
    results.write_json(tmp_path / "new" / "result.json", content)
    expected = {"a": 0.5, "b": 3, "c": [1, [2, "x"]], "d": {"e": None, "f": True}, "p": "q"}
    assert results.read_result(tmp_path / "new" / "result.json") == expected


def test_numbers_json_cannot_spell_become_null(tmp_path: Path) -> None:
    content = {"nan": math.nan, "inf": [math.inf], "nested": {"x": np.float64("-inf")}}
    results.write_json(tmp_path / "r.json", content)
    assert json.loads((tmp_path / "r.json").read_text()) == {"nan": None, "inf": [None], "nested": {"x": None}}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write_json(path, {"status": "finished"})
    with pytest.raises(TypeError, match=r"object has no place"):
        results.write_json(path, {"status": object()})
    with pytest.raises(RuntimeError), results.atomic_path(path) as temporary:
        temporary.write_text("half a res")
        raise RuntimeError
    assert results.read_result(path) == {"status": "finished"}
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    results.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize("text", ["", '{"status": "finis', "[1]", '{"status": "running"}', "\x00"])
def test_a_broken_or_other_result_is_not_finished(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    assert results.finished_result(tmp_path) is None


def test_only_finished_runs_are_loaded(tmp_path: Path) -> None:
    for run_id, status in (("b", "finished"), ("a", "finished"), ("c", "failed")):
        results.write_json(tmp_path / run_id / "result.json", {"run_id": run_id, "status": status})
    (tmp_path / "d").mkdir()
    (tmp_path / "multirun.yaml").write_text("x: 1")
    found = {path.name: results.finished_result(path) for path in sorted(tmp_path.iterdir())}
    assert [name for name, result in found.items() if result] == ["a", "b"]
    assert all(result["run_id"] == name for name, result in found.items() if result)


def test_csv_has_a_header_and_empty_cells_for_none(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "layers.csv", [{"name": "a,b", "kappa": None}, {"name": "c", "kappa": 1.5}])
    assert (tmp_path / "layers.csv").read_text() == 'name,kappa\n"a,b",\nc,1.5\n'
    with pytest.raises(ValueError, match=r"layers.csv"):
        results.write_csv(tmp_path / "layers.csv", [])
    with pytest.raises(ValueError, match=r"other"):
        results.write_csv(tmp_path / "layers.csv", [{"name": "a"}, {"other": 1}])


def test_runs_that_differ_in_what_run_id_leaves_out_are_told_apart() -> None:
    """codec=fixed and the neutral values of newer switches are not part of run_id."""

    def result(codec: str | None, **method: object) -> dict[str, object]:
        config: dict[str, object] = {
            "method": {"name": "gptq", "neutral": {"symmetric": False}, **method},
            "allocator": "uniform",
        }
        config |= {"seed": 0, "bits": 3} | ({} if codec is None else {"codec": codec})
        return {"config": config, "seed": 0, "model": "m", "dataset": "d", "method": "gptq", "bits/target": 3.0}

    plain, coded, even = result("fixed"), result("entropy"), result("fixed", symmetric=True)
    assert results.differing_settings([plain, coded]) == ["codec"]
    assert results.differing_settings([plain, result(None), result("fixed", symmetric=False)]) == []
    assert results.differing_settings([plain, even]) == ["method.symmetric"]
    assert (
        results.settings_of(plain)
        == results.settings_of(result(None))
        == results.settings_of(result("fixed", symmetric=False))
    )
