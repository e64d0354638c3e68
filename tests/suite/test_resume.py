"""Runs that are killed by SIGKILL: what they leave behind, and that the same command ends as if nothing had happened.

One process imports what a run needs and forks one child per attempt, which saves the seconds that imports take; the
children run the real program on real data with W&B offline.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from kill_sweep import ROOT, compare, content

SWEEP = (
    *("-m", "model=resnet", "dataset=digits", "model.epochs=1", "dataset.limit=50", "calibration.examples=32"),
    *("method=gptq", "inputs=full", "allocator=knapsack,uniform", "bits=3"),
)

# Every attempt is a fork that runs the command line of the program. `kill_at` is part of a file's name: just before the
# file gets this name, when all of it is written under a temporary one, the process kills itself. Each file that gets
# its name is noted in written.txt.
ATTEMPTS = r"""
import json, os, signal, sys
import bayesq.suite.runner, sklearn.datasets, timm, wandb  # what the children need
from bayesq.suite import cli

replace = os.replace

def attempt(arguments, kill_at, log):
    child = os.fork()
    if child:
        return child
    def replaced(source, target):
        if kill_at and kill_at in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        with open("written.txt", "a") as file:
            file.write(f"{os.path.relpath(target)}\n")
    os.replace = replaced
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["run.py", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        sys.stdout.flush()
        os._exit(left.code or 0)
    os._exit(99)

for line in sys.stdin:
    children = [attempt(*each) for each in json.loads(line)]
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""

# (arguments, where the process kills itself, log file)
Attempt = tuple[list[str], str | None, str]
Launcher = Callable[..., list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def launch(folder: Path) -> Iterator[Launcher]:
    """A function that runs attempts side by side in `folder` and returns their exit codes."""
    # a W&B service of the tests' own process would be shared by all attempts, dead or alive
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = subprocess.Popen(
        [sys.executable, "-c", ATTEMPTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def run(*attempts: Attempt) -> list[int]:
        given.write(json.dumps(attempts) + "\n")
        given.flush()
        codes: list[int] = json.loads(answers.readline())
        return codes

    yield run
    given.close()
    assert process.wait(60) == 0
    answers.close()


@pytest.fixture(scope="module")
def alone(folder: Path, launch: Launcher) -> dict[str, dict[str, Any]]:
    """What the sweep finds when nothing disturbs it."""
    assert launch(sweep("alone")) == [0]
    found = contents(folder / "alone")
    assert len(found) == 2
    return found


def sweep(name: str, kill_at: str | None = None, log: str | None = None, cache: str | None = None) -> Attempt:
    """An attempt at the sweep with results in the folder `name` and a cache of its own."""
    return [*SWEEP, f"results_dir={name}", f"cache_dir={cache or f'{name}-cache'}"], kill_at, log or f"{name}.txt"


def contents(results_dir: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: content(path.parent) for path in results_dir.glob("*/result.json")}


def written(folder: Path, name: str) -> list[str]:
    """Files of a sweep and its cache, as often as they got their names."""
    return [line for line in (folder / "written.txt").read_text().splitlines() if line.startswith(name)]


STAGES = ("/models/", "/gradient_moment.", "/input_moment.", "/quantized.safetensors", "/result.json")


def test_a_sweep_killed_in_every_stage_ends_as_one_left_alone(
    folder: Path, launch: Launcher, alone: dict[str, dict[str, Any]]
) -> None:
    for stage in STAGES:
        assert launch(sweep("killed", stage)) == [-signal.SIGKILL], stage
        assert list(folder.glob("killed*/**/*.tmp")), "the process died in the middle of writing"
    assert contents(folder / "killed") == {}
    assert launch(sweep("killed")) == [0]
    assert contents(folder / "killed") == alone
    assert not list(folder.glob("killed*/**/*.tmp")), "what was half written is gone"
    cached = written(folder, "killed-cache/")
    assert len(cached) == len(set(cached)) == 4, "what was whole was reused"


def test_two_processes_in_one_folder_share_the_work(
    folder: Path, launch: Launcher, alone: dict[str, dict[str, Any]]
) -> None:
    assert launch(sweep("both", log="first.txt"), sweep("both", log="second.txt")) == [0, 0]
    assert contents(folder / "both") == alone
    computed = [name for name in written(folder, "both") if name.endswith(".safetensors")]
    assert len(computed) == len(set(computed)) == 6, "nothing was computed twice"
    logs = (folder / "first.txt").read_text() + (folder / "second.txt").read_text()
    assert logs.count("skipped (finished)") == 2
    assert "waiting for another process, which holds " in logs


def test_damaged_statistics_are_noticed_and_computed_again(
    folder: Path, launch: Launcher, alone: dict[str, dict[str, Any]]
) -> None:
    cache = folder / "alone-cache"
    damaged = [*cache.glob("statistics/**/*.safetensors"), *cache.glob("full_precision/*.safetensors")]
    assert len(damaged) == 3
    for file in damaged:  # as after a crash that lost the file's last page
        whole = file.read_bytes()
        file.write_bytes(whole[:-64] + bytes(255 - byte for byte in whole[-64:]))
    assert launch(sweep("mended", cache="alone-cache")) == [0]
    assert (folder / "mended.txt").read_text().count("computing it again") == len(damaged)
    assert contents(folder / "mended") == alone


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_one_left_alone(tmp_path: Path) -> None:
    """The same with 60 runs and 10 kills: `python tests/suite/kill_sweep.py`."""
    outcome = compare(["ablation=full,gptq", "bits=3.5", "seed=0,1"], 2, 1, tmp_path)
    assert outcome.complaints == []
    assert (outcome.runs, len(outcome.finished_at_kill)) == (4, 2)


@pytest.mark.slow
def test_the_runner_adds_less_than_one_second_to_a_run(folder: Path, launch: Launcher) -> None:
    seeds = "seed=0,1,2,3,4,5,6,7"
    command = ["-m", "model=resnet", "dataset=digits", "method=rtn", seeds, "results_dir=many", "cache_dir=alone-cache"]
    assert launch((command, None, "many.txt")) == [0]
    files = sorted((path for path in folder.glob("many/*/result.json")), key=lambda path: path.stat().st_mtime_ns)
    ends = [path.stat().st_mtime for path in files]
    totals = [json.loads(path.read_text())["time/total_s"] for path in files]
    beside = [end - before - total for before, end, total in zip(ends, ends[1:], totals[1:], strict=False)]
    assert len(beside) == 7
    assert median(beside) < 1  # .54 to .61 s on a slow machine
