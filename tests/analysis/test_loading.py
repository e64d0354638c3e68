"""Runs of a results folder and of a W&B project as one frame."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from frozen import EXAMPLES, add, config, started
from omegaconf import OmegaConf

from analysis import example_frame, layer_frame, load_runs
from analysis.defaults import command_overrides
from analysis.loading import records
from analysis.report.content import content_of
from analysis.tables.main import main_table
from bayesq.files import lock
from bayesq.suite.errors import UserError
from bayesq.suite.relog import typed_rows
from bayesq.suite.results import read_result, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "suite"))
from wandb_server import API_KEY, ENTITY, WandbServer, serving

COLUMNS = {"run_id", "status", "workload", "variant", "memory/own_process", "error", "duplicates", "path", "overrides"}


def by_id(runs: pd.DataFrame) -> dict[str, dict]:
    return {run["run_id"]: run for run in records(runs)}


def test_one_row_per_run_with_the_keys_of_its_result(tmp_path):
    folder = add(tmp_path, "gptq", 3.0, 1)
    (run,) = records(load_runs(tmp_path))
    result = read_result(folder / "result.json")
    assert set(run) == {*result, *COLUMNS}
    assert {key: run[key] for key in result} == result
    assert (run["workload"], run["variant"], run["path"]) == ("resnet / digits", "gptq", str(folder))
    assert (run["error"], run["duplicates"]) == (None, 0)
    assert run["overrides"] == ["model=resnet", "dataset=digits", "method=gptq", "bits=3", "seed=1"]


def test_runs_without_a_result_say_why(tmp_path):
    add(tmp_path, "rtn", 3.0, 0, name="done")
    add(tmp_path, "gptq", 3.0, 0, name="broke", error="memory ran out")
    started(tmp_path / "begun", ["bits=4"], config("awq", 4.0, 2, "resnet", "digits"))
    started(tmp_path / "works", ["bits=4"], config("awq", 4.0, 1, "resnet", "digits"))
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    with lock(tmp_path / "works" / "result.json"):
        runs = by_id(load_runs(tmp_path))
    states = {name: (run["status"], None if pd.isna(run["error"]) else run["error"]) for name, run in runs.items()}
    assert states == {
        "done": ("finished", None),
        "broke": ("failed", "memory ran out"),
        "begun": ("missing", "it ended without reporting a reason"),
        "works": ("running", None),
    }
    begun = runs["begun"]
    assert (begun["workload"], begun["variant"], begun["bits/target"], begun["seed"]) == (
        "resnet / digits",
        "awq",
        4,
        2,
    )
    assert pd.isna(begun["q/accuracy"])


def test_damaged_files_are_named_once_and_stop_nothing(tmp_path, caplog):
    add(tmp_path, "rtn", 3.0, 0, name="done")
    half = add(tmp_path, "gptq", 3.0, 0, name="half")
    (half / "result.json").write_text('{"status": "fin')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "result.json").write_text("")
    wrong = add(tmp_path, "awq", 3.0, 0, name="wrong", error="x")
    (wrong / ".hydra/config.yaml").write_text("]")
    with caplog.at_level(logging.WARNING):
        runs = by_id(load_runs(tmp_path))
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == sorted(
        [
            f"{bare / 'result.json'}: not readable as JSON",
            f"{half / 'result.json'}: not readable as JSON",
            f"{wrong / '.hydra/config.yaml'}: not readable as a configuration",
        ]
    )
    assert {name: run["status"] for name, run in runs.items()} == {
        "done": "finished",
        "half": "missing",
        "bare": "missing",
        "wrong": "failed",
    }
    assert runs["half"]["workload"] == "resnet / digits" and runs["bare"]["workload"] == "unknown"


def test_settings_that_differ_and_are_no_default_name_a_variant(tmp_path):
    for seed in (0, 1):
        add(tmp_path, "gptq", 3.0, seed, inputs="prefix")
        add(tmp_path, "gptq", 3.0, seed, inputs="full")
        add(tmp_path, "bayesq", 3.0, seed)
        add(tmp_path, "bayesq", 3.0, seed, distill=True)
        add(tmp_path, "bayesq", 3.5, seed, calibration__examples=64)  # nothing at its budget differs from it
        add(tmp_path, "rtn", 3.0, seed, dataset="other", calibration__examples=64)
    runs = load_runs(tmp_path)
    assert runs.groupby("variant").size().to_dict() == {
        "gptq": 2,
        "gptq inputs=full": 2,
        "bayesq": 2,
        "bayesq distill=true": 2,
        "bayesq calibration.examples=64": 2,
        "rtn": 2,
    }
    assert set(runs["workload"]) == {"resnet / digits", "resnet / other"}


def test_tasks_and_evaluation_sets_are_workloads(tmp_path):
    add(tmp_path, "rtn", 3.0, 0, dataset="glue", dataset__task="sst2")
    add(tmp_path, "rtn", 3.0, 0, dataset="glue", dataset__task="mrpc", dataset__limit=None)
    add(tmp_path, "rtn", 3.0, 0, dataset="glue", dataset__task="mrpc", dataset__limit=500)
    runs = load_runs(tmp_path)
    assert sorted(runs["workload"]) == [
        "resnet / glue mrpc",
        "resnet / glue mrpc dataset.limit=500",
        "resnet / glue sst2",
    ]
    assert set(runs["variant"]) == {"rtn"}


def test_folders_of_results_folders_are_read_and_the_newest_finished_duplicate_counts(tmp_path):
    for place, when, correct in (("a", 300, 10), ("b", 200, 20)):
        folder = add(tmp_path / place, "gptq", 3.0, 0, correct, name="same")
        os.utime(folder / "result.json", (when, when))
    add(tmp_path / "c", "gptq", 3.0, 0, name="same", error="newer, but failed")
    add(tmp_path / "c", "rtn", 3.0, 0)
    runs = by_id(load_runs(tmp_path))
    assert len(runs) == 2
    assert runs["same"]["q/accuracy"] == 10 / EXAMPLES and runs["same"]["duplicates"] == 2
    assert runs["same"]["path"] == str(tmp_path / "a" / "same")


def test_a_seed_counts_once_also_when_another_version_made_it(tmp_path):
    old, new = (add(tmp_path, "gptq", 3.0, 0, correct, name=name) for name, correct in (("a", 10), ("b", 20)))
    os.utime(new / "result.json", (100, 100))
    os.utime(old / "result.json", (50, 50))
    (run,) = records(load_runs(tmp_path))
    assert run["run_id"] == "b" and run["duplicates"] == 1


def test_layers_and_examples_stand_beside_their_run(tmp_path, caplog):
    add(tmp_path, "gptq", 3.0, 0)
    add(tmp_path, "rtn", 4.0, 1, error="no")
    lost = add(tmp_path, "rtn", 3.0, 1)
    (lost / "predictions.csv").unlink()
    runs = load_runs(tmp_path)
    layers, examples = layer_frame(runs), example_frame(runs)
    first = ["run_id", "workload", "variant", "bits", "seed"]
    assert list(layers)[:5] == first and list(examples)[:6] == [*first, "row"]
    assert layers[["variant", "bits", "name"]].to_numpy().tolist() == [["gptq", 3.0, "stem"], ["rtn", 3.0, "stem"]]
    assert list(examples["row"]) == list(range(EXAMPLES)) and set(examples["variant"]) == {"gptq"}
    assert list(examples["id"][:2]) == ["e0", "e1"]
    assert f"{lost / 'predictions.csv'}: not readable" in caplog.text


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results folder"):
        load_runs(tmp_path / "missing")
    assert load_runs(tmp_path).empty


def test_overrides_can_be_told_from_the_config_where_they_were_not_recorded(tmp_path):
    add(tmp_path, "gptq", 3.5, 2, calibration__examples=64, correction="moments", inputs="prefix")
    (run,) = records(load_runs(tmp_path))
    expected = {*run["overrides"]} - {"inputs=prefix"}
    assert {*command_overrides({**run, "overrides": []})} == expected


@pytest.mark.slow
def test_a_thousand_runs_load_within_five_seconds(tmp_path):
    folder = add(tmp_path, "gptq", 3.0, 0, name="first")
    result = json.loads((folder / "result.json").read_text())
    result |= {f"metric/{i}": i / 7 for i in range(80)}
    for seed in range(1, 1000):
        copy = tmp_path / f"{seed:04d}"
        (copy / ".hydra").mkdir(parents=True)
        shutil.copy(folder / ".hydra/overrides.yaml", copy / ".hydra/overrides.yaml")
        own = {**result, "run_id": copy.name, "seed": seed, "config": {**result["config"], "seed": seed}}
        (copy / "result.json").write_text(json.dumps(own, indent=2))
    start = time.process_time()
    runs = load_runs(tmp_path)
    assert len(runs) == 1000 and time.process_time() - start < 5


# ----------------------------------------------------------------------------------------------------------------- W&B


@pytest.mark.parametrize("source", ["wandb:", "wandb:project", "wandb:a/b/c"])
def test_a_project_is_named_with_its_entity(source):
    with pytest.raises(UserError, match="needs wandb:ENTITY/PROJECT"):
        load_runs(source)


@contextmanager
def wandb_project(folders: Sequence[Path], place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the client talks to, with the project `paper` of what these run folders hold."""
    import wandb

    from bayesq.suite import tracking

    with serving() as server:
        for name, value in (("BASE_URL", server.url), ("API_KEY", API_KEY), ("SILENT", "true")):
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("WANDB_DIR", str(place))
        wandb.teardown()  # the client reads its settings once
        settings = {"mode": "online", "project": "paper", "entity": ENTITY, "log_artifact": False}
        for folder in folders:
            cfg = OmegaConf.load(folder / ".hydra/config.yaml")
            cfg.wandb = settings
            result = read_result(folder / "result.json")
            try:
                with tracking.track(cfg, folder.name, folder) as tracker:
                    if result is None:
                        raise RuntimeError("memory ran out")
                    tracker.log_result(
                        result, *(typed_rows(folder / name) for name in ("layers.csv", "predictions.csv"))
                    )
                    assert tracker.error == tracking.UNFINISHED
            except RuntimeError:
                pass
        yield server
        assert not server.unknown
        wandb.teardown()


@pytest.mark.slow
def test_a_wandb_project_gives_the_frame_of_its_folder(tmp_path, monkeypatch):
    results = tmp_path / "results"
    done = add(results, "gptq", 3.0, 0)
    made = {"versions": {"torch": "2"}, "host": {"name": "here", "threads": 1}}
    write_json(done / "result.json", (read_result(done / "result.json") or {}) | made)
    failed = add(results, "rtn", 3.5, 1, error="memory ran out")
    with wandb_project([done, failed], tmp_path, monkeypatch):
        remote, local = load_runs(f"wandb:{ENTITY}/paper"), load_runs(results)
        tables, examples = layer_frame(remote), example_frame(remote)
    nullable = {"risk/rank_correlation", "q/agreement", "q/ece", "fp/ece"}  # the frozen result has none of them
    assert set(remote) - nullable == set(local)
    assert len(remote) == len(local) == 2
    places = ("path", "overrides", "config", "error")
    for name, mine in by_id(local).items():
        theirs = by_id(remote)[name]
        for key in set(local) - {*places}:
            assert theirs[key] == mine[key] or (pd.isna(theirs[key]) and pd.isna(mine[key])), key
        assert theirs["path"] == f"wandb:{ENTITY}/paper/{name}"
        if mine["status"] == "finished":
            assert {key: value for key, value in theirs["config"].items() if key != "wandb"} == mine["config"]
        else:
            assert "its own" not in mine["error"] and "reason is in the run's own folder" in theirs["error"]
    assert tables.drop(columns="achieved_risk").equals(layer_frame(local).drop(columns="achieved_risk"))
    pd.testing.assert_frame_equal(examples, example_frame(local))
    assert len(examples) == EXAMPLES


@pytest.mark.slow
def test_a_wandb_project_gives_the_intervals_of_its_folder(tmp_path, monkeypatch, caplog):
    results = tmp_path / "results"
    folders = [add(results, method, 3.0, seed) for method in ("gptq", "bayesq") for seed in (0, 1)]
    without = add(results, "awq", 3.0, 0)
    (without / "predictions.csv").unlink()
    with wandb_project([*folders, without], tmp_path, monkeypatch):
        remote, local = (main_table(load_runs(source)) for source in (f"wandb:{ENTITY}/paper", results))
    pd.testing.assert_frame_equal(remote.numbers, local.numbers)
    row = remote.numbers.set_index(["variant", "bits"]).loc[("bayesq", 3.0)]
    assert row["delta_low"] < row["delta"] < row["delta_high"] and row["p"] < 0.01
    assert f"wandb:{ENTITY}/paper/{without.name}: W&B has no predictions.csv of it" in caplog.text
    assert any(note.startswith("resnet / digits, awq at 3 bits: not compared") for note in remote.footnotes)


def rewrite(folder: Path, **changes: object) -> None:
    """Change keys of a run's result; None removes one."""
    result = read_result(folder / "result.json")
    kept = {key: value for key, value in {**result, **changes}.items() if value is not None}
    write_json(folder / "result.json", kept)


def test_runs_that_read_different_files_under_one_name_are_not_averaged(tmp_path):
    """The user has edited the file between two runs, so their settings are the same."""
    for seed, (checksum, examples) in enumerate((("a" * 64, 16), ("a" * 64, 16), ("b" * 64, 12), (None, 16))):
        source = {"dataset": {"origin": "mine.csv", **({"sha256": checksum} if checksum else {})}, "model": {}}
        rewrite(add(tmp_path, "gptq", 3.0, seed, name=f"run{seed}"), source=source, **{"evaluation/examples": examples})
    rewrite(
        add(tmp_path, "gptq", 3.0, 0, name="net", dataset="other"), source={"model": {"checkpoint_sha256": "c" * 64}}
    )
    runs = by_id(load_runs(tmp_path))
    assert {name: run["workload"] for name, run in runs.items()} == {
        "run0": "resnet / digits dataset.sha256=aaaaaaaa",
        "run1": "resnet / digits dataset.sha256=aaaaaaaa",
        "run2": "resnet / digits dataset.sha256=bbbbbbbb",
        "run3": "resnet / digits",
        "net": "resnet / other",
    }


@pytest.mark.parametrize("key", ["model", "dataset", "method", "bits/target", "seed", "config"])
def test_a_result_without_what_names_it_is_not_read(key, tmp_path, caplog):
    add(tmp_path, "gptq", 3.0, 0, name="whole")
    rewrite(add(tmp_path, "gptq", 3.0, 1, name="part"), **{key: None})
    runs = by_id(load_runs(tmp_path))
    assert (runs["whole"]["status"], runs["part"]["status"]) == ("finished", "missing")
    assert runs["part"]["error"] == f"result.json has no {key}" and f"part: result.json has no {key}" in caplog.text
    assert runs["part"]["workload"] == "resnet / digits", "from the recorded configuration"
    main_table(load_runs(tmp_path))


def test_numbers_that_every_result_lacks_are_columns(tmp_path):
    keys = ("q/kl_to_fp", "q/accuracy", "bits/stored", "evaluation/examples")
    rewrite(add(tmp_path, "gptq", 3.0, 0), **dict.fromkeys(keys))
    runs = load_runs(tmp_path)
    assert runs[["q/kl_to_fp", "bits/stored", "evaluation/examples"]].isna().all(axis=None)
    assert content_of(tmp_path).table["n"].tolist() == [1]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", '"', "\0\0"])
@pytest.mark.parametrize("file", ["layers.csv", "predictions.csv"])
def test_a_damaged_table_is_told_and_left_out(content, file, tmp_path, caplog):
    whole = add(tmp_path, "gptq", 3.0, 0, name="whole")
    (add(tmp_path, "gptq", 3.0, 1, name="part") / file).write_text(content)
    frame = (layer_frame if file == "layers.csv" else example_frame)(load_runs(tmp_path))
    assert set(frame["run_id"]) == {whole.name} and f"part/{file}: not readable" in caplog.text


def test_a_result_without_a_score_is_not_compared(tmp_path, caplog):
    for method in ("gptq", "bayesq"):
        for seed in (0, 1):
            rewrite(add(tmp_path, method, 3.0, seed), **({} if seed else {"q/accuracy": None}))
    main_table(load_runs(tmp_path))
    assert "gptq-3-0: predictions.csv does not give the accuracy of its result; not compared" in caplog.text


def test_scores_that_are_no_numbers_are_left_out(tmp_path):
    folder = add(tmp_path, "gptq", 3.0, 0)
    write_json(folder / "result.json", {**read_result(folder / "result.json"), "q/accuracy": float("inf")})
    (remark,) = content_of(tmp_path).remarks
    assert "its q/accuracy is no number" in remark
