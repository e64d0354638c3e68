"""Inputs and output of a run as W&B artifacts: with the real client, online to the stub server, and offline."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_tracking import config, result, run_with, sync, wandb_folder
from wandb_server import ORGANIZATION, Artifact, WandbServer, connected

from bayesq.suite import relog, tracking, wandb_artifacts, wandb_environment
from bayesq.suite.results import read_result, write_json

wandb = pytest.importorskip("wandb")

SOURCE = {
    "weights": "11" * 32,
    "calibration": "22" * 32,
    "evaluation": "33" * 32,
    "statistics": {"input_moment": "44" * 12},
    "model": {"origin": "trained here", "parameters": 9},
    "dataset": {"origin": "the photos of user"},
}
INPUTS = {
    "weights-resnet": SOURCE["weights"],
    "calibration-digits": SOURCE["calibration"],
    "evaluation-digits": SOURCE["evaluation"],
    "statistics-resnet-digits": SOURCE["statistics"],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with connected(monkeypatch) as running:
        yield running


def of_inputs(run_id: str, **source: Any) -> dict[str, Any]:
    return result(run_id) | {"model": "resnet", "dataset": "digits", "source": SOURCE | source}


def log(tmp_path: Path, run_id: str, content: dict[str, Any], **keys: Any) -> str | None:
    """Track a run with a packed file of its own; returns the tracker's error."""
    checkpoint = tmp_path / run_id / "quantized.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(run_id.encode())
    cfg = config(tmp_path, **{"mode": "online", "log_artifact": True, **keys})
    with tracking.track(cfg, run_id, checkpoint.parent) as tracker:
        tracker.log_result(content, [], [], checkpoint)
    return tracker.error


def inputs_of(server: WandbServer) -> list[Artifact]:
    return [artifact for artifact in server.artifacts if wandb_artifacts.CHECKSUM_FILE in artifact.files]


def test_runs_with_equal_inputs_share_them_and_hold_only_checksums(tmp_path: Path, server: WandbServer) -> None:
    other = "55" * 32
    for run_id, source in (("one", {}), ("two", {}), ("three", {"calibration": other})):
        assert log(tmp_path, run_id, of_inputs(run_id, **source)) is None
    found = {(artifact.name, *artifact.used_by): artifact for artifact in inputs_of(server)}
    everyone, pair = ("one", "two", "three"), ("one", "two")
    assert set(found) == {
        ("weights-resnet", *everyone),
        ("evaluation-digits", *everyone),
        ("statistics-resnet-digits", *everyone),
        ("calibration-digits", *pair),
        ("calibration-digits", "three"),
    }
    for (name, *users), artifact in found.items():
        (text,) = artifact.files.values()
        expected = other if users == ["three"] else INPUTS[name]
        assert (artifact.committed, json.loads(text)) == (True, {"sha256": expected})
    assert found["weights-resnet", *everyone].metadata == SOURCE["model"]
    packed = [artifact for artifact in server.artifacts if artifact.type == wandb_artifacts.PACKED_TYPE]
    assert [(one.run_id, one.used_by, one.links) for one in packed] == [(run_id, [], []) for run_id in everyone]
    assert server.unknown == []


def test_without_the_key_nothing_is_an_artifact(tmp_path: Path, server: WandbServer) -> None:
    assert log(tmp_path, "one", of_inputs("one"), log_artifact=False, registry="model") is None
    assert server.artifacts == [] and server.runs["one"].exit_code == 0


def test_inputs_that_a_result_does_not_name_are_left_out(tmp_path: Path, server: WandbServer) -> None:
    """Round-to-nearest reads no statistics, and results of earlier versions do not name them."""
    assert log(tmp_path, "one", of_inputs("one", statistics={})) is None
    assert {artifact.name for artifact in inputs_of(server)} == {*INPUTS} - {"statistics-resnet-digits"}
    del server.artifacts[:]
    old = of_inputs("two")
    old["source"] = {key: value for key, value in SOURCE.items() if key != "statistics"}
    assert log(tmp_path, "two", old) is None
    assert len(inputs_of(server)) == 3


@pytest.mark.parametrize("registry", ["model", pytest.param("wandb-registry-model", marks=pytest.mark.slow)])
def test_the_packed_file_is_linked_to_the_registry(tmp_path: Path, server: WandbServer, registry: str) -> None:
    assert log(tmp_path, "one", of_inputs("one"), registry=registry) is None
    (linked,) = (artifact for artifact in server.artifacts if artifact.links)
    assert (linked.name, linked.files) == ("quantized-one", {"quantized.safetensors": b"one"})
    assert linked.links == [(f"{ORGANIZATION}_entity/wandb-registry-model/resnet-digits", ["one"])]
    assert server.unknown == []


@pytest.mark.parametrize("model", ["timm/vit(depth=2,name=a b)", "/scratch/" + "deep/" * 60, "模型"])
def test_names_are_those_that_the_client_takes(model: str) -> None:
    made = list(wandb_artifacts.inputs(of_inputs("one") | {"model": model}))
    assert len({artifact.name for artifact in made}) == len(INPUTS)
    assert all({*artifact.name} <= wandb_artifacts.NAME_CHARACTERS and len(artifact.name) <= 128 for artifact in made)


@pytest.mark.parametrize("broken", ["UseArtifact", pytest.param("LinkArtifact", marks=pytest.mark.slow)])
def test_a_server_without_answers_costs_neither_the_result_nor_the_next_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 2.0)
    cfg = config(tmp_path, mode="online", log_artifact=True, registry="model")
    server.breaks = lambda name: name == broken
    content = of_inputs("one")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "quantized.safetensors").write_bytes(b"packed")
    found = run_with(monkeypatch, cfg, tmp_path / "one", content)
    assert found["status"] == "finished" and found["wandb/error"]
    assert read_result(tmp_path / "one" / "result.json") == found
    server.breaks = lambda name: False
    assert log(tmp_path, "two", of_inputs("two")) is None
    assert server.runs["two"].exit_code == 0


def test_an_offline_run_has_the_packed_file_and_a_line_says_how_to_add_the_rest(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"log_artifact": True, "registry": "model"}
    cfg = config(tmp_path, **keys)
    (line,) = wandb_environment.remarks([OmegaConf.to_container(cfg.wandb)])
    assert line == (
        "wandb.log_artifact=true: an offline run has the packed file, but no inputs and no registry link; "
        "python -m bayesq.suite.relog RESULTS --mode online --again adds them"
    )
    assert wandb_environment.remarks([OmegaConf.to_container(config(tmp_path).wandb)]) == []
    online = OmegaConf.to_container(config(tmp_path, mode="online", **keys).wandb)
    assert wandb_environment.remarks([online]) == []

    assert log(tmp_path, "one", of_inputs("one"), mode="offline", registry="model") is None
    sync(wandb_folder(tmp_path, "one"))
    assert [artifact.name for artifact in server.artifacts] == ["quantized-one"]
    assert not server.artifacts[0].links

    content = of_inputs("one") | {"config": OmegaConf.to_container(cfg), "wandb/error": None}
    write_json(tmp_path / "one" / "result.json", content)
    with pytest.raises(SystemExit) as left:
        relog.main([str(tmp_path), "--mode", "online", "--again"])
    assert (left.value.code, capsys.readouterr().out) == (0, "logged: one\n")
    assert {artifact.name for artifact in inputs_of(server) if artifact.used_by == ["one"]} == {*INPUTS}
    (packed,) = (artifact for artifact in server.artifacts if artifact.type == wandb_artifacts.PACKED_TYPE)
    assert [path.rpartition("/")[2] for path, _ in packed.links] == ["resnet-digits"]
    assert list(server.runs) == ["one"]
