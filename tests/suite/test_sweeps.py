"""The sweep files: every job they expand into composes, and their Hydra lines mean the same jobs."""

import itertools
import shlex
from pathlib import Path

import pytest
import yaml

from bayesq.suite.cli import Job, preflight
from bayesq.suite.config import flatten

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
ABLATIONS = sorted(path.stem for path in (ROOT / "conf" / "ablation").glob("*.yaml"))


def jobs(arguments: list[str], folder: Path) -> list[Job]:
    found = preflight([*arguments, f"results_dir={folder}", f"cache_dir={folder}"])
    assert found
    return found


def grid(path: Path) -> list[list[str]]:
    """Overrides of every job of a W&B grid sweep, without the logging mode that its command adds."""
    parameters = yaml.safe_load(path.read_text())["parameters"]
    axes = [[f"{key}={v}" for v in spec.get("values", [spec.get("value")])] for key, spec in parameters.items()]
    return [list(job) for job in itertools.product(*axes)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_file_and_its_hydra_line_are_the_same_jobs(path: Path, tmp_path: Path) -> None:
    (line,) = [line for line in path.read_text().splitlines() if "python run.py -m" in line]
    multirun = jobs(shlex.split(line.split("run.py")[1]), tmp_path)
    agents = [jobs(overrides, tmp_path)[0] for overrides in grid(path)]
    assert len(agents) == len({job.run_id for job in agents})
    assert {job.run_id for job in agents} == {job.run_id for job in multirun}


def test_the_ablation_sweeps_over_every_ablation() -> None:
    parameters = yaml.safe_load((ROOT / "sweeps" / "ablation.yaml").read_text())["parameters"]
    assert sorted(parameters["ablation"]["values"]) == ABLATIONS


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "full"])
def test_an_ablation_changes_what_its_file_says_and_nothing_else(name: str, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "conf" / "ablation" / f"{name}.yaml").read_text())
    replaced = {next(iter(entry)).split("/")[1] for entry in content.pop("defaults", [])}
    (full,), (own,) = jobs(["bits=3"], tmp_path), jobs([f"ablation={name}", "bits=3"], tmp_path)
    assert own.run_id != full.run_id
    before, after = flatten(full.config), flatten(own.config)
    assert all(after[key] == value for key, value in flatten(content).items())
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    # the allocator of a method is its default unless the file names one
    allowed = {"allocator"} if "method" in replaced else set()
    assert {key for key in changed - flatten(content).keys() - allowed if key.split(".")[0] not in replaced} == set()
