"""Sweep files and the ablation group: what a file expands to is what it says, and nothing else."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesq.defaults import MAX_BITS, MIN_BITS
from bayesq.suite.composition import Job, Preflight
from bayesq.suite.config import flatten

ROOT = Path(__file__).parents[2]
# axes of which every value is an ablation, so that one of them is the full method
DEFAULTED = ("inputs",)
ABLATIONS = sorted(path.stem for path in (ROOT / "conf" / "ablation").glob("*.yaml"))


SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
HYDRA_LINE = "#   python run.py -m "
# number of different runs, so that a value that was lost from a file and its comment alike is noticed
RUNS = {
    "ablation": 42 * 3,
    "bit_curve": 4 * 9 * 3,
    "calibration_size": 2 * 7 * 3,
    "main_table": 4 * 3 * 3,
    "main_table_glue": 9 * 4 * 3 * 3,
    "main_table_imagenet": 4 * 3 * 3,
    "main_table_lm": 6 * 3 * 3,
    "rivals": 13 * 3 * 3,
    "seeds": 2 * 2 * 10,
}


def combinations(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of every run of a grid."""
    values = {key: entry.get("values", [entry.get("value")]) for key, entry in sweep["parameters"].items()}
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def agent_commands(sweep: Mapping[str, Any]) -> Iterator[list[str]]:
    """The commands of every run of a grid, put together by the code that W&B's agent uses."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    for parameters in combinations(sweep):
        macros = utils.create_sweep_command_args({"args": {key: {"value": v} for key, v in parameters.items()}})
        yield [
            part
            for chunk in utils.create_sweep_command(list(sweep["command"]))
            for part in (macros["args_no_hyphens"] if chunk == "${args_no_hyphens}" else [chunk])
        ]


def test_there_is_a_sweep_for_every_part_of_the_paper() -> None:
    assert [path.stem for path in SWEEPS] == sorted(RUNS)
    assert all(f"`{path.name}`" in (ROOT / "sweeps" / "README.md").read_text() for path in SWEEPS)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_file_and_its_command_in_the_comment_are_the_same_runs(path: Path, flight: Preflight) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = utils.load_sweep_config(str(path))
    assert sweep["method"] == "grid"
    assert (ROOT / sweep["program"]).is_file()
    (typed,) = (line for line in path.read_text().splitlines() if line.startswith(HYDRA_LINE))
    by_hydra = flight.jobs(typed.removeprefix(HYDRA_LINE).split(), multirun=True)
    by_agent = list(agent_commands(sweep))
    assert all(line[:4] == ["${env}", "${interpreter}", "${program}", "wandb.mode=online"] for line in by_agent)
    assert [set(line[4:]) for line in by_agent] == [set(job.overrides) for job in by_hydra]
    assert len(by_hydra) == RUNS[path.stem]
    defaulted = len(by_hydra) - len({job.run_id for job in by_hydra})
    assert defaulted == (len(DEFAULTED) * 3 if path.stem == "ablation" else 0)


def test_the_bit_curve_goes_from_the_lowest_to_the_highest_budget() -> None:
    bits = yaml.safe_load((ROOT / "sweeps" / "bit_curve.yaml").read_text())["parameters"]["bits"]["values"]
    assert (min(bits), max(bits)) == (MIN_BITS, MAX_BITS)


@pytest.fixture(scope="module")
def flight() -> Preflight:
    """One for all, because it composes the same choices only once."""
    return Preflight()


def job(flight: Preflight, folder: Path, *overrides: str) -> Job:
    return flight.check([*overrides, "bits=3", f"results_dir={folder}", f"cache_dir={folder}"])


def test_the_ablation_sweeps_over_every_ablation() -> None:
    parameters = yaml.safe_load((ROOT / "sweeps" / "ablation.yaml").read_text())["parameters"]
    assert sorted(parameters["ablation"]["values"]) == ABLATIONS


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "full"])
def test_an_ablation_changes_what_its_file_says_and_nothing_else(name: str, flight: Preflight, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "conf" / "ablation" / f"{name}.yaml").read_text())
    replaced = {next(iter(entry)).split("/")[1] for entry in content.pop("defaults", [])}
    full, own = job(flight, tmp_path), job(flight, tmp_path, f"ablation={name}")
    before, after = flatten(full.config), flatten(own.config)
    default = not replaced and flatten(content).items() <= before.items()
    assert (own.run_id == full.run_id) == default
    assert not default or name.split("_")[0] in DEFAULTED
    assert all(after[key] == value for key, value in flatten(content).items())
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    # allocator, inputs, correction and rotate have defaults of the method, and rotate of the posterior, unless named
    allowed = {"method": {"allocator", "inputs", "correction", "rotate"}, "posterior": {"rotate"}}
    allowed = set().union(*(allowed.get(axis, set()) for axis in replaced))
    assert {key for key in changed - flatten(content).keys() - allowed if key.split(".")[0] not in replaced} == set()
