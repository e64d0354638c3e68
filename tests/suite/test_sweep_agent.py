"""A real agent of W&B's runs a real sweep of ours against the stub server: it learns every job's outcome."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import load_results
from wandb_server import API_KEY, ENTITY, RemoteSweep, WandbServer, serving

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WANDB = shutil.which("wandb", path=str(BIN)) or "wandb"


def sweep_of(tmp_path: Path, **parameters: Any) -> RemoteSweep:
    """A file of sweeps/ with a workload and parameters of seconds."""
    content = yaml.safe_load((ROOT / "sweeps" / "main_table.yaml").read_text())
    fixed = {
        **{"model": "resnet", "dataset": "digits", "method": "rtn", "model.epochs": 1, "dataset.limit": 60},
        **{"calibration.examples": 16, "results_dir": str(tmp_path / "results"), "cache_dir": str(tmp_path / "cache")},
    }
    grid = {key: {"value": value} for key, value in fixed.items()}
    grid |= {key: {"values": values} for key, values in parameters.items()}
    return RemoteSweep(content | {"parameters": grid})


def agent(tmp_path: Path, server: WandbServer, name: str, count: int) -> str:
    """Run `wandb agent` until it has no more to do, or has run `count` jobs; returns what it and its jobs say."""
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [WANDB, "agent", "--count", str(count), f"{ENTITY}/bayesq/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_skipped_job_tells_the_agent_what_the_run_has_measured(tmp_path: Path) -> None:
    with serving() as server:
        server.sweeps["first"] = sweep_of(tmp_path, bits=[3])
        agent(tmp_path, server, "first", 5)
        assert [taken["bits"] for taken in server.sweeps["first"].taken.values()] == [3]
        (before,) = load_results(tmp_path / "results")
        server.sweeps["second"] = sweep_of(tmp_path, bits=[3, 4])
        said = agent(tmp_path, server, "second", 5)
    again = server.sweeps["second"]
    assert [parameters["bits"] for parameters in again.suggested] == [3, 4], "each once, then no more"
    assert set(server.runs) == {"first0", "second0", "second1"}
    assert "skipped (finished)" in said and "the sweep agent is told of" in said
    found = {content["bits/target"]: content for content in load_results(tmp_path / "results")}
    assert sorted(found) == [3, 4]
    assert found[3] == before, "the run itself stays as it is"
    for name, bits in (("first0", 3), ("second0", 3), ("second1", 4)):
        run = server.runs[name]
        assert (run.exit_code, run.attributes["sweep"]) == (0, name[:-1])
        assert run.summary["q/kl_to_fp"] == found[bits]["q/kl_to_fp"]
        assert run.summary["run_id"] == found[bits]["run_id"]
        assert (run.config["method"], run.config["bits"]) == ("rtn", bits)
    assert server.unknown == []


@pytest.mark.slow
def test_a_refused_job_is_a_failed_run_of_the_sweep(tmp_path: Path) -> None:
    with serving() as server:
        server.sweeps["wrong"] = sweep_of(tmp_path, bits=[9, 10])
        said = agent(tmp_path, server, "wrong", 5)
    assert [parameters["bits"] for parameters in server.sweeps["wrong"].suggested] == [9, 10]
    assert {name: run.exit_code for name, run in server.runs.items()} == {"wrong0": 1, "wrong1": 1}
    assert server.runs["wrong0"].attributes["notes"].startswith("bits=9: ")
    assert "error: bits=9: " in said


@pytest.mark.slow
def test_a_job_that_never_begins_a_run_is_suggested_again(tmp_path: Path) -> None:
    """What the tests above would see if a job kept its outcome for itself."""
    with serving() as server:
        server.sweeps["silent"] = sweep_of(tmp_path, bits=[3], **{"wandb.mode": ["disabled"]})
        said = agent(tmp_path, server, "silent", 2)
    assert [parameters["bits"] for parameters in server.sweeps["silent"].suggested] == [3, 3]
    assert server.runs == {}
    assert "wandb.mode=disabled: the sweep agent does not learn" in said
