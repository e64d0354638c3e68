"""`sweeps/paper.sh`: its commands compose, they include those of the READMEs, and a failure stops nothing else."""

import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.selection import COMMA
from bayesq.suite.composition import Preflight

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps" / "paper.sh"
READMES = ("README.md", "analysis/README.md")
PLACES = ("results_dir", "cache_dir")
WORKLOAD = ("experiment", "model", "dataset")


def script(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=60)


def listed() -> list[tuple[str, ...]]:
    """The arguments of each `run.py` that the script starts."""
    lines = script("--list").stdout.splitlines()
    return [tuple(shlex.split(line.partition(" run.py ")[2])) for line in lines if " run.py " in line]


RUNS = listed()


def keys(arguments: tuple[str, ...]) -> dict[str, list[str]]:
    """The values of each key."""
    pairs = (argument.partition("=") for argument in arguments if "=" in argument)
    return {key: COMMA.split(values) for key, _, values in pairs}


def written() -> list[str]:
    """The arguments of each `run.py` in the READMEs, with WORKLOAD for a workload."""
    found = []
    for readme in READMES:
        text = (ROOT / readme).read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split(" #")[0].partition("python run.py ")[2] for line in lines]
        found += [inline.partition("python run.py ")[2] for inline in re.findall(r"`(python run\.py [^`]+)`", text)]
    return list(dict.fromkeys(" ".join(line.split()) for line in found if line))


def jobs(section: str) -> Iterator[list[str]]:
    """Runs of a section: every combination at the first seed and budget, but of further workloads only the first."""
    seen = set()
    for run in map(keys, RUNS):
        if run.pop("results_dir") != [f"results/paper/{section}"]:
            continue
        one = {key: values[:1] if key in ("seed", "bits") else values for key, values in run.items()}
        axes = repr(
            [pair for pair in one.items() if pair[0].partition(".")[0] not in ("experiment", "model", "dataset")]
        )
        chosen = [[f"{key}={value}" for value in values] for key, values in one.items()]
        yield from map(list, itertools.product(*(values[:1] if axes in seen else values for values in chosen)))
        seen.add(axes)


@pytest.fixture(scope="module")
def flight() -> Preflight:
    """One for all sections, because it composes the same choices only once."""
    return Preflight()


@pytest.mark.parametrize("section", dict.fromkeys(keys(run)["results_dir"][0].rpartition("/")[2] for run in RUNS))
def test_the_commands_of_a_section_compose(section: str, flight: Preflight) -> None:
    assert [flight.check(arguments).run_id for arguments in jobs(section)]


def test_the_commands_of_the_readmes_are_in_the_script() -> None:
    runs = [keys(run) for run in RUNS]
    asked = [keys(tuple(shlex.split(line))) for line in written()]
    assert len(asked) > 15
    for one in filter(None, asked):
        given = {
            key: set(values)
            for key, values in one.items()
            if key not in PLACES and not re.search(r"[A-Z]{3}|\$", ",".join(values))  # what a reader fills in
        }
        assert any(all(values <= set(run.get(key, ())) for key, values in given.items()) for run in runs), one


def stand_in(folder: Path, code: int) -> dict[str, str]:
    """A `python` that logs its arguments and fails with `code` on RTN."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\necho "$*" >> {folder}/log\ncase "$*" in *=rtn*) exit {code};; esac\n')
    program.chmod(0o755)
    return {"PYTHON": str(program), "OPTIONS": "wandb.mode=disabled", "RESULTS": str(folder / "a folder")}


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (130, 130)])
def test_a_failure_stops_nothing_else_and_a_signal_stops_all(code: int, expected: int, tmp_path: Path) -> None:
    done = script("lm", "demo", **stand_in(tmp_path, code))
    assert done.returncode == expected
    started = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("run.py")]
    assert len(started) == (3 if code == 1 else 1)
    assert all(line.endswith("wandb.mode=disabled") and f"={tmp_path}/a folder/" in line for line in started)


def test_a_list_runs_nothing_and_an_unknown_section_is_refused(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 0)
    assert script("--list", **python).returncode == 0
    refused = script("demo", "mian", **python)
    assert refused.returncode == 2 and refused.stderr.startswith("mian: choose from demo main ")
    assert not (tmp_path / "log").exists()
