"""Tracking with the real W&B client, offline, read back with the client's own inspector."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from bayesq.suite import tracking
from bayesq.suite.errors import UserError

LAYERS = [
    {"name": "stem", "shape": (16, 3, 3, 3), "bits/code": 4, "kappa": None},
    {"name": "head", "shape": (10, 64), "bits/code": 3.5, "kappa": 1.25},
]


def config(tmp_path: Path, **wandb: Any) -> DictConfig:
    return OmegaConf.create(
        {
            "model": {"name": "resnet", "modality": "image", "width": 16},
            "dataset": {"name": "digits", "modality": "image"},
            "method": {"name": "gptq", "clip": "auto"},
            "posterior": {"name": "kfac"},
            "allocator": "uniform",
            "bits": 3.0,
            "seed": 7,
            "calibration": {"examples": 64},
            "results_dir": str(tmp_path),
            "wandb": {"mode": "offline", "project": "bayesq-test", "entity": None, **wandb},
        }
    )


def result(run_id: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "finished",
        "method": "gptq",
        "bits/target": 3.0,
        "bits/code": 3.0,
        "q/accuracy": 0.75,
        "delta/accuracy/ci95": [-0.1, 0.05],
        "q/nll": float("nan"),
        "versions": {"torch": "2"},
        "config": {"bits": 3.0},
    }


def inspect(results_dir: Path, run_id: str, *options: str) -> str:
    """What the client itself says about an offline run."""
    (folder,) = (results_dir / "wandb").glob(f"offline-run-*-{run_id}")
    program = shutil.which("wandb", path=str(Path(sys.executable).parent)) or "wandb"
    done = subprocess.run(
        [program, "leet", "inspect", *options, "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_an_offline_run_holds_the_result_under_its_own_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert capfd.readouterr() == ("", "")
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    assert (read["state"], read["exit_code"], read["project"], read["run_id"]) == ("finished", 0, "bayesq-test", "one")
    summary = {key: value for key, value in read["summary"].items() if not key.startswith("_")}
    table = summary.pop("layers")
    # null is how a figure that does not exist is written, and W&B leaves such a key out
    assert summary == {key: value for key, value in result("one").items() if key != "q/nll"}
    assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 2, 4)
    (file,) = (tmp_path / "wandb").glob("*-one/files/media/table/*.json")
    assert json.loads(file.read_text()) == {
        "columns": ["name", "shape", "bits/code", "kappa"],
        "data": [["stem", "[16, 3, 3, 3]", 4, None], ["head", "[10, 64]", 3.5, 1.25]],
    }


def test_runs_group_by_method_and_bits_without_clicks(tmp_path: Path) -> None:
    with tracking.track(config(tmp_path), "one", tmp_path / "one"):
        pass
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    own = {key: value for key, value in read["config"].items() if not key.startswith("_")}
    assert {key: own[key] for key in ("model", "dataset", "method", "posterior", "bits", "seed")} == {
        "model": "resnet",
        "dataset": "digits",
        "method": "gptq",
        "posterior": "kfac",
        "bits": 3,
        "seed": 7,
    }
    assert (own["method/clip"], own["calibration/examples"]) == ("auto", 64)
    assert not any(isinstance(value, dict) for value in own.values())
    assert read["name"] == "gptq-3-s7"
    assert sorted(read["tags"]) == ["3-bit", "digits", "gptq", "resnet"]
    records = inspect(tmp_path, "one")
    assert "resnet-digits" in records, "the group"
    arguments = tracking.identity(config(tmp_path))
    assert (arguments["group"], arguments["job_type"]) == ("resnet-digits", "gptq")


def test_runs_of_one_process_are_separate(tmp_path: Path) -> None:
    for run_id, accuracy in (("one", 0.25), ("two", 0.5)):
        with tracking.track(config(tmp_path), run_id, tmp_path / run_id) as tracker:
            tracker.log_result({"q/accuracy": accuracy}, [])
    assert json.loads(inspect(tmp_path, "one", "--summary"))["summary"]["q/accuracy"] == 0.25
    assert json.loads(inspect(tmp_path, "two", "--summary"))["summary"]["q/accuracy"] == 0.5


def test_a_crash_marks_the_run_and_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracking.track(config(tmp_path), "one", tmp_path / "one"):
        raise ZeroDivisionError
    assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 1


@pytest.mark.parametrize("what", ["Table", "finish"])
def test_a_failure_of_wandb_is_a_warning_and_marks_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    import wandb

    def broken(*arguments: object, **keywords: object) -> None:
        raise ConnectionError("the server\nis gone")

    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        whole = wandb.Run.finish
        monkeypatch.setattr(*((wandb, "Table", broken) if what == "Table" else (wandb.Run, "finish", broken)))
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error == "ConnectionError: the server is gone"
    (record,) = (record for record in caplog.records if record.name == tracking.__name__)
    assert record.levelname == "WARNING"
    assert "\n" not in record.getMessage()
    if what == "Table":
        assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 1
    elif wandb.run is not None:
        whole(wandb.run)


def test_disabled_tracking_does_not_even_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    with tracking.track(config(tmp_path, mode="disabled"), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_be_reached_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1.0)
    wandb.teardown()  # the client reads its settings once
    try:
        with (
            pytest.raises(UserError, match=r"^wandb.mode=online: .*wandb.mode=offline") as caught,
            tracking.track(config(tmp_path, mode="online"), "one", tmp_path / "one"),
        ):
            pytest.fail("the block must not be entered")
    finally:
        wandb.teardown()
    assert "\n" not in str(caught.value)
