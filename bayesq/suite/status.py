"""List the runs of a results folder: done, failed, running or missing, with the commands that start missing runs.

python -m bayesq.suite.status results                                            every run that was started there
python -m bayesq.suite.status results model=resnet dataset=digits bits=3,4       the runs of this sweep, as run.py -m
"""

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bayesq.files import is_locked
from bayesq.suite import config as settings
from bayesq.suite import results
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.cli import NO_REASON, TRACEBACK_FILE
from bayesq.suite.composition import preflight
from bayesq.suite.errors import UserError

RUN_FILE = "run.py"
STATES = ("done", "failed", "running", "missing")
# Failed and missing runs are printed last, so that they are visible at the end of a long list.
LISTED = ("done", "running", "missing", "failed")
MULTIRUN = ("-m", "--multirun")
NEVER_STARTED = "it was not started yet"


@dataclass(frozen=True)
class Run:
    """One run: its id, one of STATES, its overrides, and why it has no result."""

    run_id: str
    state: str
    overrides: tuple[str, ...]
    reason: str = ""


def state_of(folder: Path, overrides: Sequence[str]) -> Run:
    """The state of a run from its folder, which need not exist."""
    state, reason = "missing", NO_REASON if was_started(folder) else NEVER_STARTED
    if results.finished_result(folder) is not None:
        state, reason = "done", ""
    elif is_locked(folder / results.RESULT_FILE):
        state, reason = "running", ""
    elif (failure := results.read_result(folder / results.FAILURE_FILE)) is not None:
        where = f" [{folder / TRACEBACK_FILE}]" if (folder / TRACEBACK_FILE).exists() else ""
        state, reason = "failed", f"{failure.get('error', NO_REASON)}{where}"
    return Run(folder.name, state, tuple(overrides), reason)


def was_started(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    names = (results.OVERRIDES_FILE, results.RESULT_FILE, results.FAILURE_FILE)
    return any((folder / name).exists() for name in names)


def started_runs(results_dir: Path) -> list[Run]:
    """Every run that was started in `results_dir`, sorted by overrides; UserError if there is no such folder."""
    if not results_dir.is_dir():
        raise UserError(f"{results_dir}: there is no such folder")
    runs = [
        state_of(folder, results.recorded_overrides(folder)) for folder in filter(was_started, results_dir.iterdir())
    ]
    return sorted(runs, key=lambda run: (not run.overrides, _natural(shlex.join(run.overrides)), run.run_id))


def _natural(text: str) -> list[tuple[str, float]]:
    """A sort key that compares numbers in the text by value."""
    parts = [*re.split(r"(\d+(?:\.\d+)?)", text), "0"]
    return [(words, float(number)) for words, number in zip(parts[::2], parts[1::2], strict=True)]


def sweep_runs(results_dir: Path, arguments: Sequence[str]) -> list[Run]:
    """The runs of the sweep `run.py -m arguments`, in its order; runs that differ only in device, W&B, ... are one run.

    Raises UserError if the arguments do not start a sweep with known runs, or name another results folder.
    """
    for argument in arguments:
        if _key(argument) == "results_dir" and Path(argument.partition("=")[2]).absolute() != results_dir.absolute():
            raise UserError(f"{argument}: another folder than {results_dir}; leave it out")
    multirun = [] if any(option in arguments for option in MULTIRUN) else ["-m"]
    jobs = preflight([*multirun, *filter(_matters, arguments), _in_folder(results_dir)])
    if not jobs:
        raise UserError("these arguments start no sweep whose runs are known beforehand: give those of run.py -m")
    more = [argument for argument in arguments if not _matters(argument) and _key(argument) != "results_dir"]
    return [state_of(job.run_dir, [*filter(_matters, job.overrides), *more]) for job in jobs]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _matters(argument: str) -> bool:
    """Whether an argument can change a result, or belongs to Hydra."""
    key = _key(argument).partition(".")[0]
    return "=" not in argument or key not in settings.WITHOUT_EFFECT or key == "hydra"


def _in_folder(results_dir: Path) -> str:
    """The override of results_dir, in quotes if Hydra's grammar needs them."""
    plain = re.fullmatch(r"[\w./+-]+", str(results_dir))
    return f"results_dir={results_dir}" if plain else "results_dir='{}'".format(str(results_dir).replace("'", r"\'"))


def command(results_dir: Path, overrides: Iterable[str], *options: str) -> str:
    """The shell command that starts runs with these overrides in `results_dir` from the current folder."""
    program = ["python", RUN_FILE] if Path(RUN_FILE).is_file() else ["bayesq-run"]
    given = [override for override in overrides if _key(override) != "results_dir"]
    folder = [] if results_dir == Path("results") else [_in_folder(results_dir)]
    return shlex.join([*program, *options, *given, *folder])


def report(runs: Sequence[Run], results_dir: Path) -> str:
    """One line per run, sorted by state, with the reason and the command of a missing run; the last line has counts."""
    lines = []
    for run in sorted(runs, key=lambda run: LISTED.index(run.state)):
        reason = f": {run.reason}" if run.reason else ""
        lines.append(f"{run.state:<7} {run.run_id} {shlex.join(run.overrides)}{reason}")
        if run.state == "missing":
            lines.append(f"        {command(results_dir, run.overrides)}")
    counts = Counter(run.state for run in runs)
    return "\n".join([*lines, f"{len(runs)} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES)])


def main() -> None:
    """Print the report; the exit code is 0 only if there are runs and all are done."""
    parser = module_parser("status", __doc__)
    parser.add_argument("results_dir", type=Path, help="a results folder, such as results")
    parser.add_argument("sweep", nargs=argparse.REMAINDER, help="the arguments of run.py -m, to list its runs only")
    arguments = parser.parse_args()
    results_dir, sweep = arguments.results_dir, arguments.sweep
    try:
        runs = sweep_runs(results_dir, sweep) if sweep else started_runs(results_dir)
    except UserError as error:
        exit_with(error)
    print(report(runs, results_dir))
    if sweep and any(run.state in ("failed", "missing") for run in runs):
        print(f"All that is not done: {command(results_dir, (a for a in sweep if a not in MULTIRUN), '-m')}")
    sys.exit(0 if runs and all(run.state == "done" for run in runs) else 1)


if __name__ == "__main__":
    main()
