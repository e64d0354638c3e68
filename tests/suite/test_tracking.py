"""Tracking with the real W&B client: offline, read back with its own inspector; online and synced, to a stub server."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from finished_runs import load_results
from omegaconf import DictConfig, OmegaConf
from wandb_server import API_KEY, WandbServer, connected, serving

from bayesq import evaluation
from bayesq.batches import Batch
from bayesq.contract import LayerProblem
from bayesq.likelihood import LIKELIHOODS
from bayesq.nearest import round_to_nearest
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite import plots, relog, runner, tracking, wandb_history
from bayesq.suite.results import (
    PREDICTIONS_FILE,
    PROVENANCE,
    QUANTIZED_FILE,
    plain,
    read_result,
    write_csv,
    write_json,
)

LAYERS = [
    {"name": "stem", "shape": (16, 3, 3, 3), "bits/code": 4, "bits/stored": 4.5, "kappa": None},
    {"name": "head", "shape": (10, 64), "bits/code": 3.5, "bits/stored": 3.75, "kappa": 1.25},
]
# as the runner makes them
RISKS = [
    {**layer, "shape": "16x27", "predicted_risk": 10.0**-i, "achieved_risk": 2 * 10.0**-i}
    for i, layer in enumerate(LAYERS, 2)
]
TABLES = {tracking.LAYERS_KEY, *(chart.table_key for chart in plots.CHARTS)}
ROOT = Path(__file__).parents[2]
WANDB = shutil.which("wandb", path=str(Path(sys.executable).parent)) or "wandb"


def config(tmp_path: Path, **wandb: Any) -> DictConfig:
    return OmegaConf.create(
        {
            "model": {"name": "resnet", "tasks": ["image classification"], "width": 16},
            "dataset": {"name": "digits", "tasks": ["image classification"]},
            "method": {"name": "gptq", "clip": "auto"},
            "posterior": {"name": "kfac"},
            "allocator": "uniform",
            "bits": 3.0,
            "seed": 7,
            "calibration": {"examples": 64},
            "results_dir": str(tmp_path),
            "wandb": {"mode": "offline", "project": "bayesq-test", "entity": None, "log_artifact": False, **wandb},
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


def predictions(likelihood: str = "categorical") -> list[dict[str, object]]:
    """Rows of predictions.csv as the evaluation makes them."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(20, 1 if likelihood == "gaussian" else 3, generator=generator)
    labels = full[:, 0] if likelihood == "gaussian" else full.argmax(1)
    meaning = LIKELIHOODS[likelihood]
    rows = evaluation.batch_rows(full, full + 0.3 * full.flip(0), Batch({}, labels, torch.arange(20)), meaning)
    return evaluation.prediction_rows(rows, [str(i) for i in range(20)])


def wandb_folder(results_dir: Path, run_id: str, prefix: str = "offline-run") -> Path:
    """Where the client put the one attempt at a run."""
    (folder,) = (results_dir / "wandb").glob(f"{prefix}-*-{run_id}")
    return folder


def inspect(results_dir: Path, run_id: str, *options: str) -> str:
    """What the client itself says about an offline run."""
    done = subprocess.run(
        [WANDB, "leet", "inspect", *options, "--json", str(wandb_folder(results_dir, run_id))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def logged_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables in the client's folder of a run, by key."""
    media = folder / "files" / "media" / "table"
    return {
        str(path.relative_to(media)).rsplit("_", 2)[0]: json.loads(path.read_text()) for path in media.rglob("*.json")
    }


def written(rows: list[dict[str, object]], folder: Path) -> bytes:
    """The bytes of a predictions.csv with these rows."""
    write_csv(folder / "expected.csv", rows)
    return (folder / "expected.csv").read_bytes()


def as_logged(content: dict[str, Any]) -> dict[str, Any]:
    """A result as W&B's summary holds it: without provenance, and without nulls, for which there is no number."""
    content = plain(content)
    return {key: value for key, value in content.items() if value is not None and key not in PROVENANCE}


def without_tables(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without tables and what it has of the history."""
    return {k: value for k, value in summary.items() if k not in TABLES and not k.startswith(wandb_history.HISTORY)}


def test_an_offline_run_holds_the_result_under_its_own_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert capfd.readouterr() == ("", "")
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    assert (read["state"], read["exit_code"], read["project"], read["run_id"]) == ("finished", 0, "bayesq-test", "one")
    summary = {key: value for key, value in read["summary"].items() if not key.startswith("_")}
    tables = {key: summary[key] for key in TABLES if key in summary}
    assert without_tables(summary) == as_logged(result("one"))
    assert summary["layer/bits/code"] == {"min": 3.5, "max": 4}
    assert set(tables) == {"layers", "plots/bits_per_layer_table"}
    assert (tables["layers"]["_type"], tables["layers"]["nrows"], tables["layers"]["ncols"]) == ("table-file", 2, 5)
    assert logged_tables(wandb_folder(tmp_path, "one"))["layers"] == {
        "columns": ["name", "shape", "bits/code", "bits/stored", "kappa"],
        "data": [["stem", "[16, 3, 3, 3]", 4, 4.5, None], ["head", "[10, 64]", 3.5, 3.75, 1.25]],
    }


def test_an_offline_run_holds_the_plots(tmp_path: Path) -> None:
    rows = predictions()
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), RISKS, rows)
    assert tracker.error is None
    found = logged_tables(wandb_folder(tmp_path, "one"))
    assert set(found) == TABLES
    for chart in plots.CHARTS:
        assert found[chart.table_key] == {"columns": [*chart.columns], "data": chart.rows(RISKS, rows)}
    records = [json.loads(line) for line in inspect(tmp_path, "one").splitlines()]
    shown = {
        key.removeprefix("_wandb.visualize."): value
        for record in records
        for key, value in record.get("config", {}).get("update", {}).items()
        if key.startswith("_wandb.visualize.")
    }
    for chart in plots.CHARTS:
        panel = shown[chart.key]["panel_config"]
        assert (panel["panelDefId"], panel["fieldSettings"]) == (chart.preset, dict(chart.fields))
        assert panel["stringSettings"] == chart.texts


def test_a_regression_is_logged_with_the_plots_that_it_has(tmp_path: Path) -> None:
    content = {**result("one"), "q/ece": None, "fp/ece": None, "q/agreement": None}
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(content, RISKS, predictions("gaussian"))
    assert tracker.error is None
    assert set(logged_tables(wandb_folder(tmp_path, "one"))) == TABLES - {"plots/reliability_table"}
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    assert read["exit_code"] == 0
    assert {key: read["summary"][key] for key in as_logged(content)} == as_logged(content)


def test_what_offline_runs_upload_later_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(os.environ["WANDB_DATA_DIR"])
    monkeypatch.delenv("WANDB_DATA_DIR")
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert "WANDB_DATA_DIR" not in os.environ
    data = tmp_path / "wandb" / tracking.DATA_FOLDER
    assert [folder.name for folder in data.iterdir()] == ["one"]
    assert any("stem" in path.read_text() for path in data.rglob("*") if path.is_file())
    monkeypatch.setenv("WANDB_DATA_DIR", str(home))
    with tracking.track(config(tmp_path), "two", tmp_path / "two") as tracker:
        tracker.log_result(result("two"), LAYERS)
    assert os.environ["WANDB_DATA_DIR"] == str(home)
    assert [folder.name for folder in data.iterdir()] == ["one"]


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


def layer_problems() -> list[tuple[LayerProblem, QuantizedTensor]]:
    """Two rounded layers, of 4 and of 3 to 4 bits."""
    made = []
    for row, widths in zip(RISKS, ([4] * 6, [3, 4] * 3), strict=True):
        weight = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(len(made)))
        problem = LayerProblem(str(row["name"]), "Linear", weight, statistic=lambda kind, weight=weight: weight)
        problem.notes["predicted_risk"] = row["predicted_risk"]
        made.append((problem, round_to_nearest(problem, torch.tensor(widths, dtype=torch.uint8), "mse")))
    return made


def test_the_history_has_a_record_for_each_layer_and_the_headline_numbers(tmp_path: Path, server: WandbServer) -> None:
    rows = [{**row, "seconds": 0.5} for row in RISKS]
    with tracking.track(config(tmp_path, mode="online"), "live", tmp_path / "live") as tracker:
        for problem, tensor in layer_problems():
            tracker.history.layer_rounded(problem, tensor, 0.5)
        tracker.log_result(result("live"), rows)
    with tracking.track(config(tmp_path), "later", tmp_path / "later") as tracker:
        tracker.log_result(result("later"), rows)
    sync(wandb_folder(tmp_path, "later"))
    for name, count in (("live", 5), ("later", 3)):
        history = [
            {key: value for key, value in row.items() if key.startswith("layer/") or key in ("q/accuracy", "bits/code")}
            for row in server.runs[name].history
        ]
        assert len(history) == count
        headline = history.pop()
        assert (headline["q/accuracy"], headline["bits/code"]) == (0.75, 3.0)
        points = [(row["layer/index"], key, value) for row in history for key, value in row.items()]
        expected = [
            (index, f"layer/{key}", row[key])
            for index, row in enumerate(rows)
            for key in ("bits/code", "bits/stored", "predicted_risk", "achieved_risk", "seconds", "kappa")
            if row[key] is not None
        ]
        steps = {(row["layer/index"], "layer/index", row["layer/index"]) for row in history}
        assert sorted(point for point in points if point not in steps) == sorted(expected), "each number once"
        assert server.runs[name].summary["layer/seconds"] == {"min": 0.5, "max": 0.5}
        metrics = server.runs[name].config["_wandb"]["m"]
        assert {"layer/index", "layer/*"} <= {metric.get("1") or metric.get("2") for metric in metrics}


def test_the_history_has_the_passes_and_the_distillation_over_their_own_steps(
    tmp_path: Path, server: WandbServer
) -> None:
    """Two passes of three batches, a long pass, and a distillation of a step; each once, also offline and synced."""
    evaluations = [(0, "heldout", 0.5), (1, "training", 0.25), (1, "training", 0.125), (1, "heldout", 0.75)]
    for name, mode in (("live", "online"), ("synced", "offline")):
        with tracking.track(config(tmp_path, mode=mode), name, tmp_path / name) as tracker:
            for batches in (3, 3, 1000):
                for batch in range(1, batches + 1):
                    tracker.history.batch_seen(batch, batches, 2)
            for evaluation in evaluations:
                tracker.history.divergence_measured(*evaluation)
            tracker.log_result(result(name), [])
        assert tracker.error is None
    sync(wandb_folder(tmp_path, "synced"))
    for run in server.runs.values():
        kept = [{key: row[key] for key in row if key.startswith(wandb_history.HISTORY)} for row in run.history]
        seen = [row for row in kept if "statistics/batch" in row]
        short = [(i, 1 if i <= 3 else 2, 2 * i) for i in range(1, 7)]
        rows = [tuple(row[f"statistics/{key}"] for key in ("batch", "pass", "examples")) for row in seen]
        assert rows[:6] == short
        assert len(rows) == 6 + wandb_history.PASS_RECORDS and rows[-1] == (1006, 3, 2012)
        assert [row for row in kept if "distillation/evaluation" in row] == [
            {"distillation/evaluation": place, "distillation/step": step, f"distillation/{part}_kl": kl}
            for place, (step, part, kl) in enumerate(evaluations)
        ]
        assert len(kept) == len(rows) + len(evaluations) + 1
        assert run.summary["statistics/examples"] == {"max": 2012}
        assert run.summary["distillation/heldout_kl"] == {"min": 0.5, "last": 0.75}
        steps = {metric.get("1") or metric.get("2"): metric.get("5") for metric in run.config["_wandb"]["m"]}
        names = [metric.get("1") or metric.get("2") for metric in run.config["_wandb"]["m"]]
        for prefix, step in (("statistics/*", "statistics/batch"), ("distillation/*", "distillation/evaluation")):
            assert names[steps[prefix] - 1] == step


def test_every_run_of_a_sweep_has_a_name_of_its_own() -> None:
    """Sixty runs of six ablations and switches, two budgets and five seeds."""
    chosen = (
        [],
        ["ablation=examples_64"],
        ["ablation=refits_0"],
        ["method.refits=0"],
        ["inputs=prefix", "results_dir=x"],
        ["posterior=diag"],
    )
    seen = []
    for overrides in chosen:
        for bits, seed in itertools.product((3, 4), range(5)):
            cfg = OmegaConf.merge(config(Path("there")), {"bits": bits, "seed": seed})
            seen.append(tracking.identity(cfg, [f"bits={bits}", f"seed={seed}", *overrides]))
    assert len({arguments["name"] for arguments in seen}) == len(seen) == 60
    assert len({(*arguments["tags"],) for arguments in seen}) == len(chosen) * 2
    assert {arguments["config"]["ablation"] for arguments in seen} == {"full", "examples_64", "refits_0"}
    assert seen[40]["name"] == "gptq-3-s0 inputs=prefix" and "refits=0" in seen[30]["tags"]


def test_the_overrides_are_those_that_hydra_recorded(tmp_path: Path) -> None:
    (tmp_path / "one" / ".hydra").mkdir(parents=True)
    (tmp_path / "one" / ".hydra" / "overrides.yaml").write_text("[ablation=gptq, ++method.damping=0.1, ++bits=3]")
    with tracking.track(config(tmp_path), "one", tmp_path / "one"):
        pass
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    assert (read["name"], read["config"]["ablation"]) == ("gptq-3-s7 gptq damping=0.1", "gptq")


def test_the_keys_of_wandb_replace_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "of the environment")
    keys = {"name": "mine", "group": "paper", "job_type": "final", "tags": ["draft"], "notes": "why"}
    arguments = tracking.identity(config(Path("there"), **keys))
    assert all(arguments[key] == keys[key] for key in ("name", "group", "job_type", "notes"))
    assert arguments["tags"] == ["resnet", "digits", "gptq", "3-bit", "draft"]
    assert tracking.identity(config(Path("there")))["name"] == "of the environment"


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

    whole, run = wandb.Run.finish, None
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        run = tracker._run
        monkeypatch.setattr(*((wandb, "Table", broken) if what == "Table" else (wandb.Run, "finish", broken)))
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error == "ConnectionError: the server is gone"
    (record,) = (record for record in caplog.records if record.name == tracking.__name__)
    assert record.levelname == "WARNING"
    assert "\n" not in record.getMessage()
    if what == "Table":
        assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 1
    elif run is not None:
        # the run is still open, and must not receive what the next one logs
        monkeypatch.setattr(wandb.Run, "finish", whole)
        with tracking.track(config(tmp_path), "two", tmp_path / "two") as tracker:
            tracker.log_result(result("two"), LAYERS)
        assert json.loads(inspect(tmp_path, "two", "--summary"))["summary"]["run_id"] == "two"
        whole(run)


def run_with(
    monkeypatch: pytest.MonkeyPatch, cfg: DictConfig, folder: Path, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The runner's `run` around stages that cost nothing; returns its result, with the keys of `more`."""
    content = {
        **result("one"),
        **(more or {}),
        "primary_metric": "accuracy",
        "seed": 0,
        "q/kl_to_fp": 0.0,
        "delta/accuracy": 0.0,
        "bits/stored": 3.0,
        "time/total_s": 1.0,
        "q/nll": None,
    }
    monkeypatch.setattr(runner, "run_dir", lambda cfg: folder)
    monkeypatch.setattr(runner, "execute", lambda *arguments: (dict(content), RISKS, predictions()))
    return runner.run(cfg)


def test_the_file_says_at_any_time_whether_wandb_has_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(tracker: tracking.Tracker, *arguments: Any) -> None:
        seen.append(read_result(tmp_path / "one" / "result.json"))
        whole(tracker, *arguments)

    whole = tracking.Tracker.log_result
    monkeypatch.setattr(tracking.Tracker, "log_result", look)
    found = run_with(monkeypatch, config(tmp_path), tmp_path / "one")
    assert [content and content["wandb/error"] for content in seen] == [tracking.UNFINISHED]
    assert found["wandb/error"] is None
    assert read_result(tmp_path / "one" / "result.json") == found
    summary = json.loads(inspect(tmp_path, "one", "--summary"))["summary"]
    assert without_tables({key: value for key, value in summary.items() if not key.startswith("_")}) == as_logged(found)


def test_a_lost_connection_is_named_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("wandb.plot_table", broken)
    found = run_with(monkeypatch, config(tmp_path), tmp_path / "one")
    assert (found["status"], found["wandb/error"]) == ("finished", "ConnectionError: the server is gone")
    assert read_result(tmp_path / "one" / "result.json") == found


def test_disabled_tracking_leaves_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_with(monkeypatch, config(tmp_path, mode="disabled"), tmp_path / "one")
    assert found["wandb/error"] is None
    assert not (tmp_path / "wandb").exists()


def test_disabled_tracking_does_not_even_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    with tracking.track(config(tmp_path, mode="disabled"), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert list(tmp_path.iterdir()) == []


def kill_services() -> None:
    """Kill the client's background processes; there must be one."""
    children = psutil.Process().children(recursive=True)
    services = [child for child in children if child.name().startswith("wandb-core")]
    assert services
    for child in services:
        child.kill()
    psutil.wait_procs(services, timeout=10)


def end_client() -> None:
    """End the client, whose background process sometimes waits forever for a server that cannot be reached."""
    wandb = pytest.importorskip("wandb")
    thread = threading.Thread(target=wandb.teardown, daemon=True)
    thread.start()
    thread.join(30)
    if thread.is_alive():
        kill_services()
        thread.join(30)


def test_a_server_that_cannot_be_reached_is_one_line_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        found = run_with(monkeypatch, config(tmp_path, mode="online"), tmp_path / "one")
    finally:
        end_client()
    assert found["status"] == "finished"
    assert found["wandb/error"].startswith("W&B did not start (CommError: ")
    assert "\n" not in found["wandb/error"]
    assert read_result(tmp_path / "one" / "result.json") == found
    (record,) = (record for record in caplog.records if record.name == tracking.__name__)
    assert record.getMessage() == f"wandb.mode=online: {found['wandb/error']}; the run goes on without it"


# ------------------------------------------------------------------------------------------------ a server on loopback


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A stub server that the client in this process and its commands talk to."""
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 6.0)
    with connected(monkeypatch) as running:
        yield running


def sync(*arguments: str | Path) -> str:
    """`wandb sync`; returns what it says."""
    done = subprocess.run(
        [WANDB, "sync", "--yes", *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout + done.stderr


def test_an_online_run_arrives_whole(tmp_path: Path, server: WandbServer) -> None:
    checkpoint = tmp_path / "quantized.safetensors"
    checkpoint.write_bytes(b"packed")
    with tracking.track(config(tmp_path, mode="online"), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), RISKS, predictions(), checkpoint)
    assert tracker.error is None
    assert list(server.runs) == ["one"]
    run = server.runs["one"]
    assert run.exit_code == 0
    assert without_tables(run.summary) == as_logged(result("one"))
    assert set(run.summary) & TABLES == TABLES
    assert (run.attributes["project"], run.attributes["groupName"]) == ("bayesq-test", "resnet-digits")
    assert (run.attributes["jobType"], run.attributes["displayName"]) == ("gptq", "gptq-3-s7")
    assert set(run.attributes["tags"]) == {"3-bit", "digits", "gptq", "resnet"}
    assert {key: run.config[key] for key in ("method", "bits", "seed")} == {"method": "gptq", "bits": 3, "seed": 7}
    uploaded = {place for place in server.uploads if place.startswith("/storage/run/one/media/table/")}
    assert len(uploaded) == len(TABLES)
    assert server.uploads[f"/storage/run/one/{PREDICTIONS_FILE}"] == written(predictions(), tmp_path)
    assert all(artifact.committed for artifact in server.artifacts)
    assert not any(artifact.type == "quantized-model" for artifact in server.artifacts)
    assert server.unknown == []


def test_runs_of_one_process_arrive_separately(tmp_path: Path, server: WandbServer) -> None:
    for run_id, accuracy in (("one", 0.25), ("two", 0.5)):
        with tracking.track(config(tmp_path, mode="online"), run_id, tmp_path / run_id) as tracker:
            tracker.log_result({"q/accuracy": accuracy}, [])
    assert {run_id: run.summary for run_id, run in server.runs.items()} == {
        "one": {"q/accuracy": 0.25},
        "two": {"q/accuracy": 0.5},
    }


def test_the_checkpoint_is_an_artifact_where_asked_for(tmp_path: Path, server: WandbServer) -> None:
    checkpoint = tmp_path / "quantized.safetensors"
    checkpoint.write_bytes(b"packed")
    cfg = config(tmp_path, mode="online", log_artifact=True)
    with tracking.track(cfg, "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), [], [], checkpoint)
    assert tracker.error is None
    (artifact,) = server.artifacts
    assert (artifact.name, artifact.type, artifact.run_id) == ("quantized-one", "quantized-model", "one")
    assert (artifact.committed, artifact.files) == (True, {"quantized.safetensors": b"packed"})
    assert (artifact.metadata["method"], artifact.metadata["q/accuracy"]) == ("gptq", 0.75)


def test_a_crash_arrives_as_failed(tmp_path: Path, server: WandbServer) -> None:
    cfg = config(tmp_path, mode="online")
    with pytest.raises(ZeroDivisionError), tracking.track(cfg, "one", tmp_path / "one"):
        raise ZeroDivisionError
    assert server.runs["one"].exit_code == 1


@pytest.mark.parametrize(
    "what",
    [
        "file_stream",
        pytest.param("CreateArtifact", marks=pytest.mark.slow),
        pytest.param("/storage/", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_fails_in_the_middle_costs_neither_the_result_nor_the_next_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    cfg = config(tmp_path, mode="online")
    server.breaks = lambda name: (what in name and "one" in name) or what == name
    found = run_with(monkeypatch, cfg, tmp_path / "one")
    assert found["status"] == "finished"
    assert found["wandb/error"].startswith("TimeoutError: ")
    assert read_result(tmp_path / "one" / "result.json") == found
    assert "W&B could not log this run" in caplog.text
    server.breaks = lambda name: False
    assert run_with(monkeypatch, cfg, tmp_path / "two")["wandb/error"] is None
    assert server.runs["two"].exit_code == 0

    folder = wandb_folder(tmp_path, "one", "run")
    remedy = f"wandb sync --include-online wandb/{folder.name}"
    assert found["wandb/error"].endswith(remedy)
    sync("--include-online", folder)
    assert list(server.runs) == ["one", "two"]
    assert without_tables(server.runs["one"].summary) == as_logged(found | {"wandb/error": None})
    assert server.runs["one"].exit_code == 0


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_client_that_dies_costs_neither_the_result_nor_the_next_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    cfg = config(tmp_path, mode=mode)

    def kill(tracker: tracking.Tracker, *arguments: Any) -> None:
        kill_services()
        whole(tracker, *arguments)

    whole = tracking.Tracker.log_result
    monkeypatch.setattr(tracking.Tracker, "log_result", kill)
    found = run_with(monkeypatch, cfg, tmp_path / "one")
    assert found["status"] == "finished"
    assert found["wandb/error"]
    monkeypatch.setattr(tracking.Tracker, "log_result", whole)
    assert run_with(monkeypatch, cfg, tmp_path / "two")["wandb/error"] is None


PROGRAM = """
import os, signal, sys
from omegaconf import OmegaConf
from pathlib import Path
from bayesq.suite import tracking

tracking.FINISH_TIMEOUT_S = 2.0
cfg, place, how = OmegaConf.create(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with tracking.track(cfg, "one", place / "one") as tracker:
    if how == "wait":
        print("started", flush=True)
        sys.stdin.readline()
    tracker.log_result({"q/accuracy": 0.25}, [{"name": "fc", "bits/code": 2.0, "bits/stored": 2.5}])
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
print(tracker.error)
"""

# The client's background process is stopped, so that it never ends by itself; then a command is refused.
STUCK_PROGRAM = """
import psutil, sys
from omegaconf import OmegaConf
from pathlib import Path
from bayesq.suite import cli, relog, tracking

tracking.EXIT_TIMEOUT_S = 1.0
cfg, place, how = OmegaConf.create(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with tracking.track(cfg, "one", place / "one") as tracker:
    tracker.log_result({"q/accuracy": 0.25}, [])
(service,) = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
service.suspend()
print(service.pid, flush=True)
sys.argv[1:] = ["bits=99"]
cli.main() if how == "run" else relog.main([str(place)])
"""


def start(
    cfg: DictConfig, place: Path, how: str, program: str = PROGRAM, **environment: str
) -> "subprocess.Popen[str]":
    """`program` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), OmegaConf.to_yaml(cfg), str(place), how],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_does_not_hold_up_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "WANDB_HTTP_TIMEOUT": "1"}
        process = start(config(tmp_path, mode="online"), tmp_path, "wait", **environment)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    begin = time.monotonic()
    out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, err
    assert out.startswith("TimeoutError: ")
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(("how", "status"), [("run", 1), ("relog", 0)])
def test_a_background_process_that_never_ends_does_not_hold_up_the_end(tmp_path: Path, how: str, status: int) -> None:
    process = start(config(tmp_path), tmp_path, how, STUCK_PROGRAM)
    assert process.stdout is not None
    service = psutil.Process(int(process.stdout.readline()))
    try:
        process.wait(30)
    finally:
        process.kill()
        service.kill()  # it has the pipes, too
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert err.endswith("W&B's client did not end within 1 s: the program ends without it\n")


def test_the_log_is_a_file_of_the_run(tmp_path: Path, server: WandbServer) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.log").write_text("quantizing 99 % of 0.1 M parameters\n")
    with tracking.track(config(tmp_path, mode="online"), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), [])
    assert tracker.error is None
    assert server.uploads["/storage/run/one/run.log"] == b"quantizing 99 % of 0.1 M parameters\n"


def test_the_diff_of_the_code_is_a_file_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    for name, diff in (("one", b"+ changed\n"), ("two", None)):
        monkeypatch.setattr(runner, "git_diff", lambda diff=diff: diff)
        run_with(monkeypatch, config(tmp_path, mode="online", diff=True), tmp_path / name)
        assert server.uploads.get(f"/storage/run/{name}/diff.patch") == diff
        assert ("no git checkout" in caplog.text) == (diff is None)
    run_with(monkeypatch, config(tmp_path, mode="disabled"), tmp_path / "one")
    assert not (tmp_path / "one" / "diff.patch").exists(), "that of an earlier attempt"


def test_an_offline_run_is_synced_once(tmp_path: Path, server: WandbServer) -> None:
    checkpoint = tmp_path / "quantized.safetensors"
    checkpoint.write_bytes(b"packed")
    with tracking.track(config(tmp_path, log_artifact=True), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), RISKS, predictions(), checkpoint)
    assert server.runs == {}
    folder = wandb_folder(tmp_path, "one")
    sync(folder)
    run = server.runs["one"]
    assert without_tables(run.summary) == as_logged(result("one"))
    assert (run.exit_code, run.attributes["groupName"], run.attributes["jobType"]) == (0, "resnet-digits", "gptq")
    assert run.config["method"] == "gptq"
    assert len(run.history) == 1 + len(RISKS)
    assert server.uploads[f"/storage/run/one/{PREDICTIONS_FILE}"] == written(predictions(), tmp_path)
    assert all(artifact.committed for artifact in server.artifacts)
    (packed,) = (artifact for artifact in server.artifacts if artifact.type == "quantized-model")
    assert packed.files == {"quantized.safetensors": b"packed"}

    requests = server.requests["UpsertBucket"]
    assert "Skipped 1 synced run" in sync(folder)
    assert server.requests["UpsertBucket"] == requests

    names = {artifact.name for artifact in server.artifacts}
    sync("--include-synced", folder)
    assert server.requests["UpsertBucket"] > requests
    assert list(server.runs) == ["one"]
    assert without_tables(server.runs["one"].summary) == as_logged(result("one"))
    assert len(server.runs["one"].history) == 1 + len(RISKS)
    assert {artifact.name for artifact in server.artifacts} == names
    assert server.unknown == []


def test_a_repeated_run_replaces_the_attempt_that_was_killed(tmp_path: Path, server: WandbServer) -> None:
    process = start(config(tmp_path), tmp_path, "kill")
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    first = wandb_folder(tmp_path, "one")
    time.sleep(1.1)  # W&B names folders by the second
    for run_id in ("one", "two"):
        with tracking.track(config(tmp_path), run_id, tmp_path / run_id) as tracker:
            tracker.log_result(result(run_id), RISKS, predictions())
    assert wandb_folder(tmp_path, "one") != first
    done = subprocess.run([WANDB, "sync", "--yes"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert set(server.runs) == {"one", "two"}, done.stderr
    for run_id, run in server.runs.items():
        assert without_tables(run.summary) == as_logged(result(run_id))
        assert (run.exit_code, len(run.history)) == (0, 1 + len(RISKS))


def test_one_run_on_two_machines_is_one_run(tmp_path: Path, server: WandbServer) -> None:
    for machine, accuracy in (("here", 0.5), ("there", 0.25)):
        with tracking.track(config(tmp_path), "one", tmp_path / machine / "one") as tracker:
            tracker.log_result({"q/accuracy": accuracy}, RISKS, predictions())
        sync(wandb_folder(tmp_path / machine, "one"))
    assert list(server.runs) == ["one"]
    assert without_tables(server.runs["one"].summary) == {"q/accuracy": 0.25}
    assert len(server.runs["one"].history) == 1 + len(RISKS)


@pytest.mark.slow
def test_a_real_sweep_arrives_as_its_files_say(tmp_path: Path, server: WandbServer) -> None:
    results_dir = tmp_path / "results"
    small = ("model.epochs=1", "calibration.examples=16", "dataset.limit=60", f"cache_dir={tmp_path / 'cache'}")
    sweep = ("-m", "model=resnet", "dataset=digits", "method=rtn,bayesq", "bits=3", f"results_dir={results_dir}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *sweep, *small, "wandb.mode=online", "wandb.log_artifact=true"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = {content["run_id"]: content for content in load_results(results_dir)}
    assert set(server.runs) == set(found)
    packed = {artifact.run_id: artifact.files for artifact in server.artifacts if artifact.type == "quantized-model"}
    read = {artifact.name: artifact for artifact in server.artifacts if artifact.used_by}
    assert set(read["weights-resnet"].used_by) == set(read["evaluation-digits"].used_by) == set(found)
    (using,) = (run_id for run_id, content in found.items() if content["method"] == "bayesq")
    assert read["statistics-resnet-digits"].used_by == [using]
    keys = json.loads(read["statistics-resnet-digits"].files["checksum.json"])["sha256"]
    assert {path.name for path in (tmp_path / "cache" / "statistics").iterdir()} == {*keys.values()}
    for run_id, content in found.items():
        run = server.runs[run_id]
        assert (run.exit_code, content["wandb/error"]) == (0, None)
        assert without_tables(run.summary) == as_logged(content)
        assert (run.attributes["jobType"], run.config["bits"]) == (content["method"], 3)
        assert packed[run_id] == {QUANTIZED_FILE: (results_dir / run_id / QUANTIZED_FILE).read_bytes()}
    assert server.unknown == []


# ------------------------------------------------------------------------------------------------------- logged again


def unlogged_run(monkeypatch: pytest.MonkeyPatch, cfg: DictConfig, folder: Path, error: str) -> dict[str, Any]:
    """A finished run without a W&B record; its result names `error`."""
    found = run_with(monkeypatch, OmegaConf.merge(cfg, {"wandb": {"mode": "disabled"}}), folder)
    found |= {"config": OmegaConf.to_container(cfg), "wandb/error": error}
    write_json(folder / "result.json", found)
    (folder / "quantized.safetensors").write_bytes(b"packed")
    return found


def test_runs_that_wandb_lacks_are_logged_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    found = unlogged_run(monkeypatch, cfg, tmp_path / "one", tracking.UNFINISHED)
    run_with(monkeypatch, cfg, tmp_path / "two")
    before = (tmp_path / "two" / "result.json").read_bytes()
    record = wandb_folder(tmp_path, "two")
    assert relog.relog(tmp_path / "two") is None
    assert wandb_folder(tmp_path, "two") == record
    with pytest.raises(SystemExit) as left:
        relog.main([str(tmp_path)])
    assert left.value.code == 0
    assert capsys.readouterr().out == "logged: one\n"
    assert read_result(tmp_path / "one" / "result.json") == found | {"wandb/error": None}
    assert (tmp_path / "two" / "result.json").read_bytes() == before

    # the record is the same as one that was made at once
    tables = logged_tables(wandb_folder(tmp_path, "one"))
    assert tables == logged_tables(wandb_folder(tmp_path, "two"))
    first, second = (
        (wandb_folder(tmp_path, name) / "files" / PREDICTIONS_FILE).read_bytes() for name in ("one", "two")
    )
    assert first == second == (tmp_path / "one" / PREDICTIONS_FILE).read_bytes()
    assert set(tables) == TABLES
    read = json.loads(inspect(tmp_path, "one", "--summary"))
    assert (read["exit_code"], read["name"]) == (0, "gptq-3-s7")
    assert without_tables({key: value for key, value in read["summary"].items() if not key.startswith("_")}) == (
        as_logged(found | {"wandb/error": None})
    )

    with pytest.raises(SystemExit) as left:
        relog.main([str(tmp_path)])
    assert (left.value.code, capsys.readouterr().out) == (0, "W&B has every finished run\n")


def test_what_the_server_lacked_arrives_when_it_is_logged_again(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = unlogged_run(monkeypatch, config(tmp_path, log_artifact=True), tmp_path / "one", "TimeoutError: gone")
    server.breaks = lambda name: name.endswith("/file_stream")
    with pytest.raises(SystemExit) as left:
        relog.main([str(tmp_path), "--mode", "online"])
    assert left.value.code == 1
    assert capsys.readouterr().out.startswith("failed: one: TimeoutError: ")
    assert (read_result(tmp_path / "one" / "result.json") or {})["wandb/error"].startswith("TimeoutError: ")

    server.breaks = lambda name: False
    with pytest.raises(SystemExit) as left:
        relog.main([str(tmp_path), "--mode", "online"])
    assert left.value.code == 0
    assert without_tables(server.runs["one"].summary) == as_logged(found | {"wandb/error": None})
    assert server.runs["one"].exit_code == 0
    assert any(artifact.files == {"quantized.safetensors": b"packed"} for artifact in server.artifacts)


def test_logging_again_without_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = unlogged_run(monkeypatch, config(tmp_path), tmp_path / "one", tracking.UNFINISHED)
    with pytest.raises(SystemExit, match=r"^error: wandb.mode=online: no W&B API key"):
        relog.main([str(tmp_path), "--mode", "online"])
    assert read_result(tmp_path / "one" / "result.json") == found
    with pytest.raises(SystemExit, match=r"^error: .*: no such folder$"):
        relog.main([str(tmp_path / "missing")])
