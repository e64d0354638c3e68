"""The ablation group: complete in its sweep, and each file changes what it says and nothing else."""

from pathlib import Path

import pytest
import yaml

from bayesq.suite.cli import Job, preflight
from bayesq.suite.config import flatten

ROOT = Path(__file__).parents[2]
ABLATIONS = sorted(path.stem for path in (ROOT / "conf" / "ablation").glob("*.yaml"))


def jobs(arguments: list[str], folder: Path) -> list[Job]:
    found = preflight([*arguments, f"results_dir={folder}", f"cache_dir={folder}"])
    assert found
    return found


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
