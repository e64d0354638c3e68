"""Running a record again: what counts as a difference, what only as a warning, and the whole thing for real."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesq.suite import code_digest, provenance, reproduce, results
from bayesq.suite.composition import preflight
from bayesq.suite.errors import UserError
from bayesq.tensor_file import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
CODES = {"a/codes": torch.tensor([1, 2, 3], dtype=torch.uint8), "a/scales": torch.tensor([0.5, 0.25])}
RESULT: dict[str, Any] = {
    "run_id": "0123",
    "status": "finished",
    "q/accuracy": 0.5,
    "delta/accuracy/ci95": [-0.25, 0.25],
    "risk/rank_correlation": None,
    "time/total_s": 1.0,
    "memory/peak_rss_bytes": 7,
    "fallback/dead_columns": 0,
    "fallback/oom_retries": 0,
    "config": {"bits": 3, "results_dir": "results"},
    "versions": {"torch": "2"},
    "host": {"threads": 1, "directory": "/here"},
    "git": {"commit": "abc", "dirty": False},
    "source": {"dataset": {"sha256": "00"}, "weights": "11"},
}


def record(folder: Path, codes: dict[str, torch.Tensor] = CODES, seconds: float = 1.0, **changes: Any) -> Path:
    results.write_json(folder / "result.json", {**RESULT, **changes})
    results.write_csv(folder / "layers.csv", [{"name": "a", "bits/code": 3, "seconds": seconds}])
    results.write_csv(folder / "predictions.csv", [{"label": 1, "kl": 0.125}, {"label": 2, "kl": 0.25}])
    write_tensors(folder / "quantized.safetensors", codes, {"widths": "3"})
    return folder


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record(tmp_path / "recorded")


# --------------------------------------------------------------------------------------------------- what is compared


def test_machine_time_and_place_make_no_difference(tmp_path: Path, recorded: Path) -> None:
    elsewhere = {
        "time/total_s": 2.0,
        "memory/peak_rss_bytes": 8,
        "fallback/oom_retries": 1,
        "config": {"bits": 3, "results_dir": "other"},
        "versions": {"torch": "3"},
        "host": {"threads": 2},
        "git": {"commit": "def", "dirty": True},
        "code": "0123456789abcdef",
    }
    assert reproduce.compare_runs(recorded, record(tmp_path / "here", seconds=9, **elsewhere)) == []


@pytest.mark.parametrize(
    ("key", "value", "what", "then"),
    [
        ("q/accuracy", 0.5000000000000001, "q/accuracy", "0.5"),
        ("delta/accuracy/ci95", [-0.25, 0.5], "delta/accuracy/ci95", "[-0.25, 0.25]"),
        ("risk/rank_correlation", 0.0, "risk/rank_correlation", "None"),
        ("fallback/dead_columns", 1, "fallback/dead_columns", "0"),
        ("source", {"dataset": {"sha256": "01"}, "weights": "11"}, "source.dataset.sha256", "00"),
        ("q/more", 1.0, "q/more", "absent"),
    ],
)
def test_every_number_and_checksum_is_compared(
    key: str, value: Any, what: str, then: str, tmp_path: Path, recorded: Path
) -> None:
    here = record(tmp_path / "here", **{key: value})
    ((found, one, _),) = reproduce.compare_runs(recorded, here)
    assert (found, one) == (what, then)


def test_a_key_that_is_gone_is_a_difference(tmp_path: Path, recorded: Path) -> None:
    here = record(tmp_path / "here")
    content = {key: value for key, value in RESULT.items() if key != "q/accuracy"}
    results.write_json(here / "result.json", content)
    assert reproduce.compare_runs(recorded, here) == [("q/accuracy", "0.5", "absent")]


def test_tables_are_compared_cell_by_cell(tmp_path: Path, recorded: Path) -> None:
    here = record(tmp_path / "here")
    results.write_csv(here / "predictions.csv", [{"label": 1, "kl": 0.125}, {"label": 2, "kl": 0.5}])
    assert reproduce.compare_runs(recorded, here) == [("predictions.csv, row 2: kl", "0.25", "0.5")]
    newer = [{"label": 1, "kl": 0.125, "more": 1}, {"label": 2, "kl": 0.25, "more": 2}]
    results.write_csv(here / "predictions.csv", newer)
    assert reproduce.compare_runs(recorded, here) == []
    results.write_csv(here / "predictions.csv", [{"label": 1}, {"label": 2}])
    gone = [(f"predictions.csv, row {row}: kl", kl, "absent") for row, kl in ((1, "0.125"), (2, "0.25"))]
    assert reproduce.compare_runs(recorded, here) == gone
    results.write_csv(here / "predictions.csv", [{"label": 1, "kl": 0.125}])
    assert reproduce.compare_runs(recorded, here) == [("predictions.csv", "2 rows", "1 rows")]


@pytest.mark.parametrize(
    ("codes", "row"),
    [
        (
            {**CODES, "a/codes": torch.tensor([1, 2, 4], dtype=torch.uint8)},
            ("a/codes", "3 elements", "1 of them differ"),
        ),
        ({**CODES, "b/codes": CODES["a/codes"].clone()}, ("b/codes", "absent", "torch.uint8 [3]")),
        ({**CODES, "a/scales": torch.zeros(3)}, ("a/scales", "torch.float32 [2]", "torch.float32 [3]")),
    ],
)
def test_codes_are_compared_tensor_by_tensor(
    codes: dict[str, torch.Tensor], row: tuple[str, str, str], tmp_path: Path, recorded: Path
) -> None:
    here = record(tmp_path / "here", codes)
    assert reproduce.compare_runs(recorded, here) == [(f"quantized.safetensors: {row[0]}", *row[1:])]


def test_lost_and_damaged_files_are_differences(tmp_path: Path, recorded: Path) -> None:
    here = record(tmp_path / "here")
    file = recorded / "quantized.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ((what, then, _),) = reproduce.compare_runs(recorded, here)
    assert (what, then[:7]) == ("quantized.safetensors", "damaged")
    file.unlink()
    (recorded / "layers.csv").unlink()
    assert [what for what, *_ in reproduce.compare_runs(recorded, here)] == ["layers.csv", "quantized.safetensors"]


# ------------------------------------------------------------------------------------------------------- surroundings


def test_other_code_packages_and_hardware_are_warned_about() -> None:
    here = {
        "versions": {"torch": "3"},
        "host": {"threads": 4, "directory": "/there"},
        "git": {"commit": "def", "dirty": True},
    }
    assert reproduce.warnings(RESULT, here) == [
        "git.commit: recorded abc, here def",
        "git.dirty: recorded False, here True",
        "versions.torch: recorded 2, here 3",
        "host.threads: recorded 1, here 4",
        "git.dirty: this checkout is of files that differ from their commit",
    ]
    same = {key: RESULT[key] for key in ("versions", "host", "git")}
    assert reproduce.warnings(RESULT, same) == []
    assert reproduce.warnings({**RESULT, "code": code_digest.digest(())}, same) == []
    (line,) = reproduce.warnings({**RESULT, "code": "0123456789abcdef"}, same)
    assert line == "code: the sources that compute a result have changed since the record"


def test_a_record_of_other_keys_says_which_version_it_needs() -> None:
    (job,) = preflight(["method=rtn"]) or ()
    result = {"config": job.config, "versions": {"bayesq": "0.1"}, "git": {"commit": "abc"}}
    assert reproduce.recorded_config(result) == job.config
    settled = {**job.config, "device": "cpu", "cache_dir": "/cache", "results_dir": "elsewhere", "force": True}
    del settled["wandb"]
    found = reproduce.recorded_config({**result, "config": settled})
    assert found == {**job.config, "device": "cpu", "cache_dir": "/cache"}
    without = {key: value for key, value in job.config.items() if key != "evaluation"}
    for config in (without, {**job.config, "extra": 1}):
        with pytest.raises(UserError, match=r"bayesq 0\.1 at commit abc"):
            reproduce.recorded_config({**result, "config": config})


def test_what_was_downloaded_is_reused_and_what_was_computed_is_not(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in (*reproduce.COMPUTED, "downloads"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_text("content")
    fresh = reproduce.fresh_cache(cache, tmp_path / "fresh")
    assert [entry.name for entry in fresh.iterdir()] == ["downloads"]
    assert (fresh / "downloads" / "file").read_text() == "content"
    assert list(reproduce.fresh_cache(tmp_path / "absent", tmp_path / "empty").iterdir()) == []


def test_many_differences_are_cut_short() -> None:
    table = reproduce.show([("q/accuracy", "x" * 100, "0.5")] * 50, limit=3)
    assert table.count("q/accuracy") == 3
    assert table.endswith("... and 47 more")
    assert max(map(len, table.splitlines())) < 120


def test_the_state_of_the_code_is_that_of_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = provenance.git_state()
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == first


# ----------------------------------------------------------------------------------------------------------- for real


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


@pytest.mark.slow
def test_a_run_is_reproduced_bit_for_bit_and_a_changed_record_is_noticed(tmp_path: Path) -> None:
    run, elsewhere = ROOT / "run.py", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # a relative folder in the config: reproducing it has to find the place again
    small = ["model=resnet", "dataset=digits", "model.epochs=1", "dataset.limit=50", "calibration.examples=32"]
    done = program(str(run), *small, "ablation=full", "bits=2.5", "cache_dir=cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "results").glob("*/result.json"))
    again = ("-m", "bayesq.suite.reproduce", str(folder))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for options in ((), ("--fresh",)):
        same = program(*again, *options, cwd=elsewhere)
        assert same.returncode == 0, same.stdout + same.stderr
        assert same.stdout.splitlines()[-1].startswith("identical: ")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, "nothing is written but in a temporary folder"

    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    result = json.loads((folder / "result.json").read_text())
    assert result["source"].keys() >= {"dataset", "model", "weights", "calibration", "evaluation"}
    result["q/kl_to_fp"] *= 1 + 1e-15
    result["versions"]["torch"] = "0.0"
    results.write_json(changed / "result.json", result)
    tensors, header = read_tensors(folder / "quantized.safetensors")
    codes = next(name for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.uint8)
    tensors[codes].view(-1)[0] ^= 1
    write_tensors(changed / "quantized.safetensors", tensors, header)
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    results.write_csv(
        changed / "predictions.csv", [{**row, "kl": "0"} if i == 7 else row for i, row in enumerate(rows)]
    )
    other = program("-m", "bayesq.suite.reproduce", str(changed), cwd=elsewhere)
    assert other.returncode == 1
    assert "warning: versions.torch: recorded 0.0, here " in other.stderr
    table = [line for line in other.stdout.splitlines() if "elements" in line or "q/" in line or ".csv" in line]
    assert [line.split("  ")[0] for line in table] == [
        "q/kl_to_fp",
        "predictions.csv, row 8: kl",
        f"quantized.safetensors: {codes}",
    ]


def test_what_is_no_finished_run_is_one_line(tmp_path: Path) -> None:
    done = program("-m", "bayesq.suite.reproduce", str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "give a folder results/<run_id>" in done.stderr
