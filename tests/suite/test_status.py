"""The status of a results folder: what is done, failed, running and missing, and how to fill the gaps."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesq.files import lock
from bayesq.suite import results, status
from bayesq.suite.composition import Job, for_hydra, preflight
from bayesq.suite.errors import UserError

ROOT = Path(__file__).parents[2]
SWEEP = ("method=gptq,rtn", "bits=3,3.5")
SYNTHETIC, LIMIT_S = 1000, 5.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jobs(*arguments: str) -> list[Job]:
    found = preflight(["-m", *arguments])
    assert found
    return found


def begin(job: Job, *extra: str) -> None:
    """What Hydra writes before a run begins."""
    (job.run_dir / ".hydra").mkdir(parents=True)
    recorded = [for_hydra(override) for override in (*job.overrides, *extra)]
    (job.run_dir / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(recorded))


def finish(job: Job) -> None:
    begin(job)
    axes = {axis: job.config[axis]["name"] for axis in ("model", "dataset", "method")}
    content = {"status": "finished", "run_id": job.run_id, **axes, "seed": job.config["seed"], "config": job.config}
    results.write_json(job.run_dir / "result.json", content)


def fail(job: Job) -> None:
    begin(job)
    content = {"status": "failed", "error": "ValueError: no", "overrides": job.overrides, "traceback": "traceback.txt"}
    results.write_json(job.run_dir / "status.json", content)
    (job.run_dir / "traceback.txt").write_text("Traceback")


def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bayesq.suite.status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_every_state_of_a_sweep_is_told_from_the_others() -> None:
    done, failed, running, killed = jobs(*SWEEP)
    finish(done)
    fail(failed)
    begin(running)
    begin(killed)
    with lock(running.run_dir / "result.json"):
        answer = asked("results", "-m", *SWEEP)
    assert answer.returncode == 1
    assert answer.stderr == ""
    assert answer.stdout.splitlines() == [
        f"done    {done.run_id} method=gptq bits=3",
        f"running {running.run_id} method=rtn bits=3",
        f"missing {killed.run_id} method=rtn bits=3.5: it ended without reporting a reason",
        "        bayesq-run method=rtn bits=3.5",
        f"failed  {failed.run_id} method=gptq bits=3.5: ValueError: no [{failed.run_dir}/traceback.txt]",
        "4 runs: 1 done, 1 failed, 1 running, 1 missing",
        "All that is not done: bayesq-run -m method=gptq,rtn bits=3,3.5",
    ]


def test_only_a_sweep_that_is_done_has_exit_code_0() -> None:
    first, *others = jobs(*SWEEP)
    finish(first)
    assert asked("results", *SWEEP).returncode == 1
    assert asked("results").returncode == 0, "all that was started is done"
    for job in others:
        finish(job)
    answer = asked("results", *SWEEP)
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (0, "4 runs: 4 done, 0 failed, 0 running, 0 missing")


def test_without_a_sweep_every_run_that_was_started_is_listed() -> None:
    done, failed, killed, _ = jobs(*SWEEP)
    finish(done)
    fail(failed)
    begin(killed, "results_dir=results")
    Path("results/wandb/offline-run-1").mkdir(parents=True)
    answer = asked("results")
    assert answer.returncode == 1
    assert answer.stdout.splitlines()[-1] == "3 runs: 1 done, 1 failed, 0 running, 1 missing"
    assert f"missing {killed.run_id} method=rtn bits=3" in answer.stdout
    assert "        bayesq-run method=rtn bits=3\n" in answer.stdout


@pytest.mark.parametrize("folder", ["out", "my results/it's (1)"])
def test_the_commands_of_missing_runs_start_exactly_them(folder: str) -> None:
    sweep = ["model=resnet", "dataset=digits", "+allocation.pinned={fc:8}", "ablation=full,gptq_knapsack", "bits=3"]
    settled = ["device=cpu", "wandb.mode=disabled", "force=true"]
    answer = asked(folder, *sweep, *settled)
    lines = answer.stdout.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("        bayesq-run ")]
    ids = [line.split()[1] for line in lines if line.startswith("missing")]
    assert len(commands) == len(ids) == 2
    for command, run_id in zip(commands, ids, strict=True):
        (job,) = preflight(command[1:]) or ()
        assert (job.run_id, job.run_dir.parent) == (run_id, Path(folder).absolute())
        assert (job.config["device"], job.config["wandb"]["mode"], job.config["force"]) == ("cpu", "disabled", True)
    whole = preflight(shlex.split(lines[-1].partition(": ")[2])[1:])
    assert whole is not None
    assert [job.run_dir for job in whole] == [Path(folder).absolute() / run_id for run_id in ids]


def test_where_and_how_runs_are_started_is_no_part_of_the_question() -> None:
    for job in jobs(*SWEEP):
        finish(job)
    assert asked("results", *SWEEP, "results_dir=results", "device=cuda:7", "wandb.mode=online").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-folder"], "no-such-folder: there is no such folder"),
        (["results", "bitz=3"], "unknown key 'bitz'"),
        (["results", "bits=9"], "bits=9"),
        (["results", "bits=3", "results_dir=other"], "results_dir=other: another folder than results"),
        (["results", "-m", "hydra.sweeper._target_=my.Sweeper", "bits=3"], "known beforehand"),
        (["results", "--help"], "known beforehand"),
    ],
)
def test_bad_questions_are_one_line(arguments: list[str], named: str) -> None:
    answer = asked(*arguments)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert named in answer.stderr


def test_in_a_checkout_the_commands_start_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status.command(Path("results"), ["bits=3"]) == "bayesq-run bits=3"
    monkeypatch.chdir(ROOT)
    assert status.command(Path("out"), ["bits=3"], "-m") == "python run.py -m bits=3 results_dir=out"


def test_an_empty_folder_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    answer = asked("results")
    assert (answer.returncode, answer.stdout) == (1, "0 runs: 0 done, 0 failed, 0 running, 0 missing\n")


def test_damaged_files_do_not_stop_the_list() -> None:
    first, second, *_ = jobs(*SWEEP)
    finish(first)
    (first.run_dir / "result.json").write_text('{"status": "fin')
    begin(second)
    (second.run_dir / ".hydra" / "overrides.yaml").write_text("]")
    (second.run_dir / "status.json").write_text('{"status": "failed"}')
    found = {run.run_id: run for run in status.started_runs(Path("results"))}
    assert (found[first.run_id].state, found[second.run_id].state) == ("missing", "failed")
    assert found[second.run_id].overrides == ()


def test_runs_are_listed_in_the_order_of_their_overrides() -> None:
    """Whatever their run ids, whatever was started first, and whether they are done or not."""
    digits, films = ["model=resnet", "dataset=digits"], ["model=minilm", "dataset=movie_snippets"]
    questions = [
        [*films, "method=rtn", "bits=4", "seed=0"],
        [*digits, "method=awq", "bits=8", "seed=2"],
        [*digits, "method=rtn", "bits=2", "seed=10"],
        [*digits, "method=rtn", "bits=3", "method.clip=minmax", "seed=0"],
        [*digits, "method=rtn", "bits=3", "method.clip=minmax", "seed=2"],
        [*digits, "method=rtn", "bits=3", "seed=2"],
        [*digits, "method=rtn", "bits=3", "seed=10"],
        [*digits, "method=rtn", "bits=3.5", "seed=0"],
    ]
    for question in reversed(questions):
        (job,) = preflight(question) or ()
        finish(job)
        (job,) = preflight([*question, "correction=moments"]) or ()
        begin(job)
    bare = Path("results/0000")
    bare.mkdir()
    (bare / "result.json").write_text("{")
    strange = Path("results/0001/.hydra")
    strange.mkdir(parents=True)
    (strange / "overrides.yaml").write_text("[bits=3]")
    found = status.started_runs(Path("results"))
    listed = [[*run.overrides] for run in found if run.state == "done"]
    assert listed == questions
    others = [run for run in found if run.state == "missing"]
    assert [[*run.overrides] for run in others[1:-1]] == [[*question, "correction=moments"] for question in questions]
    assert [run.run_id for run in (others[0], others[-1])] == ["0001", "0000"]
    lines = status.report(found, Path("results")).splitlines()
    assert [line.split()[2:] for line in lines if line.startswith("done")] == questions


def test_no_folder_is_an_error_of_its_own() -> None:
    with pytest.raises(UserError, match=r"^nothing: there is no such folder"):
        status.started_runs(Path("nothing"))


# -------------------------------------------------------------------------------------------------- a thousand runs


@pytest.fixture(scope="module")
def thousand_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of a result as the runner writes it (150 keys with its config), under run ids of their own."""
    folder = tmp_path_factory.mktemp("thousand")
    (job,) = preflight(["model=resnet", "dataset=digits", "method=gptq"]) or ()
    result: dict[str, Any] = {
        "status": "finished",
        **{axis: job.config[axis]["name"] for axis in ("model", "dataset", "method")},
        "primary_metric": "accuracy",
        "bits/target": 4.0,
        **{f"metric/{i}": i / 7 for i in range(60)},
        "q/accuracy": 0.5,
        "delta/accuracy/ci95": [-0.25, 0.25],
        "config": job.config,
        **{name: {f"{name}{i}": f"1.2.{i}" for i in range(12)} for name in ("versions", "host", "git", "source")},
    }
    for number in range(SYNTHETIC):
        run = folder / f"{number:012x}"
        (run / ".hydra").mkdir(parents=True)
        own = {"run_id": run.name, "seed": number, "config": {**job.config, "seed": number}}
        (run / "result.json").write_text(json.dumps({**result, **own}, indent=2))
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["method=gptq", f"seed={number}"]))
        (folder / "wandb" / f"offline-run-{number}").mkdir(parents=True)
    return folder


def spent_by_children() -> float:
    """Seconds of processor time of the processes that ended, whatever else the machine does meanwhile."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_thousand_runs_are_listed_within_seconds(thousand_runs: Path) -> None:
    begin = spent_by_children()
    answer = asked(str(thousand_runs))
    assert spent_by_children() - begin < LIMIT_S
    assert answer.returncode == 0
    assert answer.stdout.splitlines()[-1] == f"{SYNTHETIC} runs: {SYNTHETIC} done, 0 failed, 0 running, 0 missing"


def test_a_thousand_runs_are_loaded_within_seconds(thousand_runs: Path) -> None:
    code = f"from analysis import load_runs; print(len(load_runs({str(thousand_runs)!r})))"
    begin = spent_by_children()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert spent_by_children() - begin < LIMIT_S
    assert done.stdout == f"{SYNTHETIC}\n"


def test_neither_needs_torch(thousand_runs: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['status', sys.argv[1]]\n"
        "runpy.run_module('bayesq.suite.status', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(thousand_runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
