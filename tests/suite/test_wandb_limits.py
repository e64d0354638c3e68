"""What W&B refuses, and what its environment variables say, never costs a result."""

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_tracking import LAYERS, RISKS, config, inspect, predictions, result, run_with, wandb_folder, written
from wandb_server import API_KEY, WandbServer, connected, serving

from bayesq.suite import relog, tracking, wandb_artifacts, wandb_environment, wandb_names
from bayesq.suite.cli import preflight
from bayesq.suite.results import PREDICTIONS_FILE, read_result, write_json

wandb = pytest.importorskip("wandb")
ROOT = Path(__file__).parents[2]

TEXTS = [
    "/scratch/project/user/checkpoints/2026-11-28/bert-base-uncased-fine-tuned-on-sst2/epoch-3",
    "x" * 65,
    "y" * 300,
    "a/b\\c#d?e%f:g",
    "microsoft/deberta-v3-base" * 6,
    "模型" * 50,
    "caf\udce9",  # a path that is no UTF-8
    "tab\tand\nline" * 12,
]


@pytest.fixture(autouse=True)
def fresh_client() -> Iterator[None]:
    """The client reads its settings once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_client_takes_every_label(text: str) -> None:
    settings = wandb.Settings(run_tags=wandb_names.tag_list([text]), project=wandb_names.project_label(text))
    assert (settings.run_tags, settings.project) == ((*wandb_names.tag_list([text]),), wandb_names.project_label(text))
    for made in (wandb_names.label(text), *wandb_names.tag_list([text]), wandb_names.project_label(text)):
        assert made.encode() and len(made) <= 128


def test_what_the_client_takes_stays_as_it_is() -> None:
    assert wandb_names.tag_list(["resnet", "", " ", "digits", "x" * 64, "resnet"]) == ["resnet", "digits", "x" * 64]
    assert wandb_names.project_label("p" * 128) == "p" * 128
    assert wandb_names.label("minilm-glue/sst2") == "minilm-glue/sst2"


def test_labels_that_had_to_be_changed_stay_different() -> None:
    long = ["/data/" + "a" * 80 + middle + "b" * 80 + "/model" for middle in ("1", "2", "12", "21")]
    projects = ["a/b", "a-b", "a#b", "a?b", "a\\b"]
    assert len({wandb_names.label(text, 64) for text in long}) == len(long)
    assert len({wandb_names.project_label(name) for name in projects}) == len(projects)
    made = wandb_names.label("/scratch/group/" + "deep/" * 30 + "bert-of-monday", 64)
    assert made.startswith("/scratch/group/") and "bert-of-monday-" in made and len(made) == 64


def test_two_runs_with_long_names_do_not_collide(tmp_path: Path) -> None:
    seen = []
    for end in ("one", "two"):
        cfg = config(tmp_path)
        cfg.model.name = "/checkpoints/" + "x" * 100 + end + "y" * 100
        with tracking.track(cfg, end, tmp_path / end) as tracker:
            tracker.log_result(result(end), LAYERS)
        assert tracker.error is None
        read = json.loads(inspect(tmp_path, end, "--summary"))
        assert (read["exit_code"], read["config"]["model"]) == (0, cfg.model.name), "the config is never shortened"
        arguments = tracking.identity(cfg)
        assert set(read["tags"]) == set(arguments["tags"])
        seen.append((arguments["group"], *arguments["tags"]))
    assert len(set(seen)) == 2
    assert set(seen[0]) & set(seen[1]) == {"digits", "gptq", "3-bit"}


@pytest.mark.parametrize(
    ("axis", "name"), [("model", "m" * 200), ("dataset", ""), ("method", "my/method" * 20), ("model", "caf\udce9")]
)
def test_no_name_of_an_axis_fails_a_run(tmp_path: Path, axis: str, name: str) -> None:
    cfg = config(tmp_path)
    cfg[axis].name = name
    with tracking.track(cfg, "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 0


@pytest.mark.parametrize("project", ["team/bayesq", "p" * 129, "50%", "C:\\runs"])
def test_a_project_that_wandb_refuses_is_changed_and_said(
    tmp_path: Path, project: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", tracking.__name__)
    with tracking.track(config(tmp_path, project=project), "one", tmp_path / "one"):
        pass
    taken = json.loads(inspect(tmp_path, "one", "--summary"))["project"]
    assert taken == wandb_names.project_label(project) != project
    (record,) = (record for record in caplog.records if record.name == tracking.__name__)
    assert f"wandb.project={project}: " in record.getMessage() and taken in record.getMessage()


# ------------------------------------------------------------------------------------------------------- environment


def job_settings(*overrides: str) -> dict[str, Any]:
    """The resolved node `wandb` of a command."""
    jobs = preflight(["model=resnet", "dataset=digits", "method=rtn", *overrides])
    assert jobs is not None
    return jobs[0].config["wandb"]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "Disabled "}, "disabled"),
        ({"WANDB_MODE": ""}, "offline"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "offline"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "offline"}, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": API_KEY}, "online"),
        ({"WANDB_MODE": "run", "WANDB_API_KEY": API_KEY}, "online"),
        ({"WANDB_SWEEP_ID": "abc", "WANDB_API_KEY": API_KEY}, "online"),
        ({"WANDB_SWEEP_ID": "abc", "WANDB_MODE": "offline"}, "offline"),
    ],
    ids=str,
)
def test_the_environment_is_the_default_of_the_mode(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = job_settings()
    assert settings["mode"] == mode
    lines = wandb_environment.remarks([settings])
    assert lines == ([] if mode == "online" or "WANDB_SWEEP_ID" not in environment else lines[:1])


def test_what_is_typed_comes_before_the_environment_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "people")
    assert {key: job_settings()[key] for key in ("mode", "project", "entity")} == {
        **{"mode": "disabled", "project": "theirs", "entity": "people"}
    }
    typed = job_settings("wandb.mode=offline", "wandb.project=mine")
    assert (typed["mode"], typed["project"], typed["entity"]) == ("offline", "mine", "people")
    assert wandb_environment.remarks([typed, typed]) == [
        "wandb.mode=offline is used, not WANDB_MODE=disabled",
        "wandb.project=mine is used, not WANDB_PROJECT=theirs",
    ]
    monkeypatch.setenv("WANDB_DISABLED", "yes")
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_environment.remarks([typed])[0] == "wandb.mode=offline is used, not WANDB_DISABLED=yes"


def test_a_mode_that_does_not_exist_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of")
    settings = job_settings()
    (line,) = wandb_environment.remarks([settings])
    assert settings["mode"] == "offline"
    assert line.startswith("WANDB_MODE=of is none of online, offline, disabled")


def test_a_typed_mode_is_the_one_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
        tracker.log_result(result("one"), LAYERS)
    assert tracker.error is None
    assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 0
    assert os.environ["WANDB_MODE"] == "disabled"


def test_labels_of_the_environment_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        chosen = {
            **{"WANDB_NAME": "mine", "WANDB_RUN_GROUP": "paper", "WANDB_JOB_TYPE": "table", "WANDB_NOTES": "why"},
            **{"WANDB_TAGS": f"monday,,{'t' * 99}, rerun", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY},
        }
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)
        with tracking.track(config(tmp_path, mode="online"), "one", tmp_path / "one") as tracker:
            pass
        wandb.teardown()
    assert tracker.error is None
    given = server.runs["one"].attributes
    assert (given["displayName"], given["groupName"], given["jobType"], given["notes"]) == (
        *("mine", "paper", "table", "why"),
    )
    assert set(given["tags"]) == {
        "resnet",
        "digits",
        "gptq",
        "3-bit",
        "monday",
        "rerun",
        wandb_names.label("t" * 99, 64),
    }


def test_no_variable_makes_one_run_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "same")
    monkeypatch.setenv("WANDB_RESUME", "must")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        for name in ("one", "two"):
            with tracking.track(config(tmp_path, mode="online"), name, tmp_path / name) as tracker:
                tracker.log_result({"q/accuracy": 0.5}, [])
            assert tracker.error is None
        wandb.teardown()
    assert list(server.runs) == ["one", "two"]
    lines = wandb_environment.remarks([OmegaConf.to_container(config(tmp_path).wandb)])
    assert [line.partition(" is not used")[0] for line in lines] == ["WANDB_RUN_ID=same", "WANDB_RESUME=must"]


def test_the_folder_of_the_environment_holds_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    for _ in range(2):
        with tracking.track(config(tmp_path / "results"), "one", tmp_path / "results" / "one") as tracker:
            tracker.log_result(result("one"), LAYERS)
        assert tracker.error is None
        assert wandb_folder(tmp_path / "scratch", "one").is_dir(), "one record, also of a repeated run"
    assert not (tmp_path / "results" / "wandb").exists()


# ------------------------------------------------------------------------------------------------- what W&B cannot do


def unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_DIR", "/proc/nowhere")
    return "/proc/nowhere"


def in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "wandb").write_text("a file")
    return "wandb"


def refused_setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_CONSOLE", "sideways")
    return "console: "


def refused_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_BASE_URL", "nowhere")
    return "base_url: "


def missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    return "wandb"


def raising(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def broken(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("protobuf\nis too old")

    monkeypatch.setattr(wandb, "init", broken)
    return "RuntimeError: protobuf is too old"


FAULTS = [unwritable, in_the_way, refused_setting, refused_address, missing, raising]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_does_not_start_costs_nothing_but_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    cfg = config(tmp_path)
    with monkeypatch.context() as patch:
        named = fault(tmp_path, patch)
        found = run_with(patch, cfg, tmp_path / "one")
    assert found["status"] == "finished"
    assert found["wandb/error"].startswith("W&B did not start (") and named in found["wandb/error"]
    assert "\n" not in found["wandb/error"] and "pydantic" not in found["wandb/error"]
    assert read_result(tmp_path / "one" / "result.json") == found
    (record,) = (record for record in caplog.records if record.name == tracking.__name__)
    assert record.getMessage() == f"wandb.mode=offline: {found['wandb/error']}; the run goes on without it"

    wandb.teardown()  # the process that comes back to it later
    (tmp_path / "wandb").unlink(missing_ok=True) if fault is in_the_way else None
    write_json(tmp_path / "one" / "result.json", found | {"config": OmegaConf.to_container(cfg)})
    assert relog.relog(tmp_path / "one") is None
    assert (read_result(tmp_path / "one" / "result.json") or {})["wandb/error"] is None
    assert json.loads(inspect(tmp_path, "one", "--summary"))["exit_code"] == 0


def test_a_key_that_is_gone_when_the_job_begins_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_with(monkeypatch, config(tmp_path, mode="online"), tmp_path / "one")
    assert found["status"] == "finished"
    assert found["wandb/error"].startswith("W&B did not start (wandb.mode=online: no W&B API key")


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SPARE_BYTES", 2**62)
    found = run_with(monkeypatch, config(tmp_path), tmp_path / "one")
    assert found["wandb/error"].startswith(f"OSError: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")


@pytest.mark.parametrize("kib", [64, 80, 150])
def test_a_record_that_did_not_fit_is_never_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kib: int
) -> None:
    """The client's background process drops what does not fit; how much that is depends on the size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, and not in every container")
    try:
        monkeypatch.setenv("WANDB_DIR", str(folder))
        with tracking.track(config(tmp_path), "one", tmp_path / "one") as tracker:
            tracker.log_result(result("one") | {f"key/{i}": i for i in range(2000)}, LAYERS, predictions())
        assert tracker.error is not None and os.strerror(errno.ENOSPC) in tracker.error
    finally:
        wandb.teardown()
        subprocess.run(["umount", "--lazy", folder], check=True)


# --------------------------------------------------------------------------------------------------- what is uploaded


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with connected(monkeypatch) as running:
        yield running


def test_a_results_folder_of_any_name_uploads_its_predictions(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "r[1]*?"
    with tracking.track(config(folder, mode="online"), "one", folder / "one") as tracker:
        tracker.log_result(result("one"), RISKS, predictions())
    assert tracker.error is None
    assert server.uploads[f"/storage/run/one/{PREDICTIONS_FILE}"] == written(predictions(), tmp_path)


def test_an_artifact_is_described_by_as_much_as_it_takes(tmp_path: Path, server: WandbServer) -> None:
    (tmp_path / "quantized.safetensors").write_bytes(b"packed")
    many = result("one") | {f"fallback/{i}": i for i in range(150)}
    with tracking.track(config(tmp_path, mode="online", log_artifact=True), "one", tmp_path / "one") as tracker:
        tracker.log_result(many, [], [], tmp_path / "quantized.safetensors")
    assert tracker.error is None
    (artifact,) = server.artifacts
    assert artifact.committed and len(artifact.metadata) == wandb_artifacts.ARTIFACT_KEYS
    assert (artifact.metadata["method"], artifact.metadata["q/accuracy"]) == ("gptq", 0.75)
    assert server.runs["one"].summary["fallback/149"] == 149


@pytest.mark.slow
def test_a_command_with_long_names_is_logged_and_can_be_logged_again(tmp_path: Path) -> None:
    results_dir = tmp_path / "results"
    names = [f"/cluster/scratch/{'deep/' * 20}run-{i}/{'checkpoint-' * 8}" for i in range(2)]
    small = ("model.epochs=1", "calibration.examples=16", "dataset.limit=60", f"cache_dir={tmp_path / 'cache'}")
    typed = (f"results_dir={results_dir}", f"model.name={','.join(names)}", "wandb.mode=offline")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", "model=resnet", "dataset=digits", "method=rtn", *small, *typed],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb.mode=offline is used, not WANDB_MODE=disabled") == 1
    files = sorted(results_dir.glob("*/result.json"))
    found = [read_result(file) or {} for file in files]
    assert sorted(content["model"] for content in found) == sorted(names)
    assert [content["wandb/error"] for content in found] == [None, None]
    groups = {tracking.identity(OmegaConf.create(content["config"]))["group"] for content in found}
    assert len(groups) == 2
    for file, content in zip(files, found, strict=True):
        write_json(file, content | {"wandb/error": tracking.UNFINISHED})
        assert relog.relog(file.parent) is None
    read = [json.loads(inspect(results_dir, content["run_id"], "--summary")) for content in found]
    assert all(left["tags"] != right["tags"] for left, right in itertools.combinations(read, 2))
