"""Sweeps through Hydra's parallel launchers: what a run gets of the machine, and that nothing else changes.

Real runs, of the digits workload, show that all launchers give the same numbers. For what goes wrong a stand-in takes
the runner's place, in every process that a launcher starts.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from finished_runs import load_results
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from bayesq.defaults import conf_dir
from bayesq.suite import cli, composition, config, launchers
from bayesq.suite.errors import UserError

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
LOCAL = ("joblib", "submitit_local")
# pytest replaces the filters that bayesq.suite.launchers sets
pytestmark = pytest.mark.filterwarnings("ignore:.*is validated against ConfigStore schema")
HAS_RAY = importlib.util.find_spec("ray") is not None

# python imports this file at its start, wherever it is on PYTHONPATH
STAND_IN = """
import os, signal, sys, time, types

def run(cfg, previous):
    from bayesq.suite import config, results
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    begun = time.time()
    time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
    if cfg.seed == 14:
        raise ZeroDivisionError("second\\nline")
    if cfg.seed == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    axes = {axis: cfg[axis].name for axis in ("model", "dataset", "method")}
    results.write_json(config.run_dir(cfg) / "result.json", {
        "status": "finished", "run_id": config.run_id(cfg), **axes, "seed": cfg.seed, "bits/target": cfg.bits,
        "primary_metric": "accuracy", "q/accuracy": 0.5, "delta/accuracy": -0.25, "fp/accuracy": 0.75,
        "config": config.resolved(cfg), "seen": seen, "process": os.getpid(), "begun": begun, "ended": time.time(),
    })

sys.modules["bayesq.suite.runner"] = types.SimpleNamespace(run=run)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep in the current folder as a process of its own; `path` comes before the project's."""
    modules = os.pathsep.join(filter(None, [path, str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """What PYTHONPATH needs for the stand-in; places on the machine are the test's own."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN)
    return str(folder)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base=composition.VERSION_BASE):
        return compose("config", list(overrides), return_hydra_config=True)


def launcher_of(*overrides: str) -> dict[str, Any]:
    content = OmegaConf.to_container(composed(*overrides).hydra.launcher, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


# ---------------------------------------------------------------------------------------------------------- presets


def test_every_launcher_takes_the_same_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = ("resources.cpus=3", "resources.gpus=2")
    for name in ("submitit_local", "submitit_slurm"):
        found = launcher_of(f"hydra/launcher={name}", *resources)
        assert (found["cpus_per_task"], found["gpus_per_node"]) == (3, 2)
        assert found["submitit_folder"] == "results/.submitit"
    found = launcher_of("hydra/launcher=ray", *resources)["ray"]["remote"]
    assert (found["num_cpus"], found["num_gpus"]) == (3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert launcher_of("hydra/launcher=joblib")["n_jobs"] == 8
    assert launcher_of("hydra/launcher=joblib", "resources.cpus=3")["n_jobs"] == 2
    assert launcher_of("hydra/launcher=joblib", "resources.gpus=2")["n_jobs"] == 2
    assert launcher_of("hydra/launcher=joblib", "resources.cpus=99")["n_jobs"] == 1


def test_resources_do_not_determine_the_result() -> None:
    assert config.run_id(composed()) == config.run_id(composed("resources.cpus=2", "resources.gpus=1"))


REFUSED = [
    (["hydra/launcher=joblib"], "add -m"),
    (["-m", "hydra/launcher=joblib", "resources.cpus=0"], "resources.cpus=0"),
    (["-m", "hydra/launcher=joblib", "resources.gpus=-1"], "resources.gpus=-1"),
    (["-m", "hydra/launcher=joblib", "resources.gpus=0.5"], "resources.gpus=0.5"),
    (["-m", "hydra/launcher=joblib", "resources.gpus=3"], "resources.gpus=3: this machine has 2 CUDA devices"),
    (["-m", "hydra/launcher=joblib", "device=cuda"], "add resources.gpus=1"),
    (["-m", "hydra/launcher=submitit_slurm"], "there is no sbatch here"),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_what_cannot_be_launched_is_refused_in_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as refusal:
        cli.preflight(arguments)
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_a_launcher_that_is_not_installed_is_named_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"hydra-ray-launcher is not installed; pip install .*\[ray\]"):
        cli.preflight(["-m", "hydra/launcher=ray"])


def test_a_temporary_folder_too_long_for_the_sockets_of_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "distribution", str)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    ray = ["-m", "hydra/launcher=ray", "wandb.mode=disabled"]
    with pytest.raises(UserError, match=r"^TMPDIR=/tmp/x+: hydra/launcher=ray .* set RAY_TMPDIR to a short folder"):
        cli.preflight(ray)
    assert cli.preflight([*ray, "hydra.launcher.ray.init.address=auto"])
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert cli.preflight(ray)


def test_the_machine_is_asked_for_gpus_unless_the_environment_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launchers.visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-x)'\necho 'GPU 1: A (UUID: GPU-y)'\n")
    program.chmod(0o755)
    assert launchers.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-z")
    assert launchers.visible_gpus() == ["5", "GPU-z"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launchers.visible_gpus() == []


# ------------------------------------------------------------------------------------------- what goes on and wrong


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LOCAL)
def test_runs_at_the_same_time_have_gpus_of_their_own(launcher: str, stand_in: str, tmp_path: Path) -> None:
    done = command(
        f"hydra/launcher={launcher}",
        "seed=range(6)",
        "resources.gpus=1",
        path=stand_in,
        CUDA_VISIBLE_DEVICES="4,7",
        SECONDS_EACH="1",
        TMPDIR=str(tmp_path),
        OMP_NUM_THREADS="5",
    )
    assert done.returncode == 0, done.stderr
    found = load_results(Path("results"))
    assert len(found) == 6
    assert {run["seen"]["OMP_NUM_THREADS"] for run in found} == {"1"}
    places = min(2, launchers.jobs_at_once(1, 0))
    assert {run["seen"]["CUDA_VISIBLE_DEVICES"] for run in found} == {"4", "7"} if places == 2 else {"4"}
    for name in ("4", "7"):
        own = sorted((run["begun"], run["ended"]) for run in found if run["seen"]["CUDA_VISIBLE_DEVICES"] == name)
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(own))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LOCAL)
def test_a_failed_run_is_reported_and_the_others_go_on(launcher: str, stand_in: str, tmp_path: Path) -> None:
    arguments = (f"hydra/launcher={launcher}", "seed=14,1,2")
    done = command(*arguments, path=stand_in, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert sorted(run["seed"] for run in load_results(Path("results"))) == [1, 2]
    (status,) = Path("results").glob("*/status.json")
    assert json.loads(status.read_text())["error"] == "ZeroDivisionError: second line"
    assert (status.parent / "traceback.txt").exists()
    # what a run of submitit says is in its log
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == (launcher == "joblib")
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith(f"failed: {status.parent.name}")]
    for line in (*lines, reason):
        assert "ZeroDivisionError: second line" in line and status.parent.name in line and "seed=14" in line
    assert {run["seen"]["CUDA_VISIBLE_DEVICES"] for run in load_results(Path("results"))} == {""}

    finished = {run["run_id"]: run["process"] for run in load_results(Path("results"))}
    again = command(*arguments, path=stand_in, TMPDIR=str(tmp_path))
    assert again.returncode == 1
    assert {run["run_id"]: run["process"] for run in load_results(Path("results"))} == finished


def check_killed(done: subprocess.CompletedProcess[str], launcher: str, error: str) -> None:
    """A killed run ends the command with one line, and the table names it."""
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"error: hydra/launcher={launcher}")]
    assert f"lost a run [{error}: " in line and "the same command continues" in line
    assert "Traceback" not in done.stderr
    assert "missing: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "error"),
    [
        ("joblib", "TerminatedWorkerError"),
        ("submitit_local", "UncompletedJobError"),
        pytest.param("ray", "WorkerCrashedError", marks=pytest.mark.skipif(not HAS_RAY, reason="needs '.[ray]'")),
    ],
)
def test_a_killed_run_is_reported_and_the_same_command_continues(launcher: str, error: str, stand_in: str) -> None:
    # not below tmp_path: Ray puts sockets there, whose paths may have 107 characters
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        place = {"path": stand_in, "TMPDIR": short}
        check_killed(command(f"hydra/launcher={launcher}", "seed=15,1,2", **place), launcher, error)
        assert command(f"hydra/launcher={launcher}", "seed=1,2", **place).returncode == 0
    assert sorted(run["seed"] for run in load_results(Path("results"))) == [1, 2]


# --------------------------------------------------------------------------------------------- the numbers are equal


# the two of AWQ begin together where two begin at once, and need the same statistics
SWEEP = ("model=resnet", "dataset=digits", "method=awq,gptq", "bits=3,4")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every result without what a run cost, and where it ran."""
    apart = ("config", "versions", "host", "git")
    return [
        {key: value for key, value in run.items() if not key.startswith(("time/", "memory/")) and key not in apart}
        for run in load_results(folder)
    ]


def sweep(folder: Path, cache: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The metrics of the sweep through a launcher; both budgets of AWQ have to report the same computation."""
    done = command(*SWEEP, f"results_dir={folder}", f"cache_dir={cache}", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    spent = [run["time/calibrate_s"] for run in load_results(folder) if run["method"] == "awq"]
    assert len(spent) == 2 and spent[0] == spent[1] > 0
    found = metrics(folder)
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def basic(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return sweep(tmp_path_factory.mktemp("basic"), cache)


@pytest.mark.slow
def test_joblib_changes_no_number_and_computes_nothing_twice(basic: list[dict[str, Any]], tmp_path: Path) -> None:
    own = tmp_path / "cache"  # empty: both processes need the trained network and the statistics at the same moment
    assert sweep(tmp_path / "results", own, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == basic


@pytest.mark.slow
def test_submitit_changes_no_number(basic: list[dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path, cache, "hydra/launcher=submitit_local") == basic


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="ray is not installed: pip install '.[ray]'")
def test_ray_changes_no_number(basic: list[dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path, cache, "hydra/launcher=ray") == basic


# ------------------------------------------------------------------------------------------------------------ Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster of this machine."""
    if os.getuid() != 0 or not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs root and Slurm: tests/slurm/cluster.sh install")
    # munged wants folders that every user may enter, which pytest's are not
    folder = Path(tempfile.mkdtemp(prefix="bayesq-slurm-"))
    folder.chmod(0o755)
    cluster = folder / "cluster"
    try:
        subprocess.run([CLUSTER, "start", cluster], check=True, timeout=60)
        yield {"SLURM_CONF": str(cluster / "slurm.conf"), "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}"}
    finally:
        if (cluster / "slurm.conf").exists():
            subprocess.run([CLUSTER, "stop", cluster], check=True, timeout=60)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_slurm_changes_no_number(
    slurm: dict[str, str], basic: list[dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    assert sweep(tmp_path, cache, "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=2", **slurm) == basic


@pytest.mark.slow
def test_a_run_that_slurm_lost_is_reported(slurm: dict[str, str], stand_in: str) -> None:
    start = time.monotonic()
    arguments = ("hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=1", "seed=15,14,1,2")
    done = command(*arguments, path=stand_in, **slurm)
    assert time.monotonic() - start < 120
    check_killed(done, "submitit_slurm", "UncompletedJobError")
