"""What a results folder holds: runs that are done, failed, running, or missing, and the commands that fill the gaps.

python -m bayesq.suite.status results                                            every run that was ever started there
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

import yaml

from bayesq.files import is_locked
from bayesq.suite import config as settings
from bayesq.suite import results
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.cli import NO_REASON, TRACEBACK_FILE
from bayesq.suite.composition import as_typed, preflight
from bayesq.suite.errors import UserError

RUN_FILE = "run.py"
OVERRIDES_FILE = ".hydra/overrides.yaml"
STATES = ("done", "failed", "running", "missing")
# Failed and missing runs are printed last, where a long list on a terminal ends.
LISTED = ("done", "running", "missing", "failed")
MULTIRUN = ("-m", "--multirun")
NEVER_STARTED = "it was not started yet"


@dataclass(frozen=True)
class Run:
    """One run: its id, one of STATES, the overrides it is started with, and why there is no result."""

    run_id: str
    state: str
    overrides: tuple[str, ...]
    reason: str = ""


def state_of(folder: Path, overrides: Sequence[str]) -> Run:
    """What the folder of a run says about it; the folder need not exist."""
    if results.is_finished(folder):
        return Run(folder.name, "done", tuple(overrides))
    if is_locked(folder / results.RESULT_FILE):
        return Run(folder.name, "running", tuple(overrides))
    failure = results.read_result(folder / results.FAILURE_FILE)
    if failure is not None:
        reason = str(failure.get("error", NO_REASON))
        if (folder / TRACEBACK_FILE).exists():
            reason += f" [{folder / TRACEBACK_FILE}]"
        return Run(folder.name, "failed", tuple(overrides), reason)
    return Run(folder.name, "missing", tuple(overrides), NO_REASON if was_started(folder) else NEVER_STARTED)


def was_started(folder: Path) -> bool:
    """Whether a folder is one that a run was started in."""
    names = (OVERRIDES_FILE, results.RESULT_FILE, results.FAILURE_FILE)
    return any((folder / name).exists() for name in names)


def started_runs(results_dir: Path) -> list[Run]:
    """Every run that was started in `results_dir`, in the order of their overrides; last those without any.

    Raises:
        UserError: there is no such folder.
    """
    if not results_dir.is_dir():
        raise UserError(f"{results_dir}: there is no such folder")
    runs = [state_of(folder, recorded_overrides(folder)) for folder in filter(was_started, results_dir.iterdir())]
    return sorted(runs, key=lambda run: (not run.overrides, _natural(shlex.join(run.overrides)), run.run_id))


def _natural(text: str) -> list[tuple[str, float]]:
    """A key that orders the numbers in a text by their size."""
    parts = [*re.split(r"(\d+(?:\.\d+)?)", text), "0"]
    return [(words, float(number)) for words, number in zip(parts[::2], parts[1::2], strict=True)]


def recorded_overrides(folder: Path) -> list[str]:
    """The overrides that Hydra recorded in a run's folder; none where they cannot be read."""
    try:
        content = yaml.safe_load((folder / OVERRIDES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [as_typed(override) for override in content] if isinstance(content, list) else []


def sweep_runs(results_dir: Path, arguments: Sequence[str]) -> list[Run]:
    """The runs of a sweep, in its order, each of them once.

    Args:
        results_dir: where they are looked for.
        arguments: of `run.py -m`. Where and how runs are started (device, W&B, ...) tells no run from another.

    Raises:
        UserError: the arguments are not those of a sweep that can be listed, or name another folder.
    """
    for argument in arguments:
        if _key(argument) == "results_dir" and Path(argument.partition("=")[2]).absolute() != results_dir.absolute():
            raise UserError(f"{argument}: another folder than {results_dir}; leave it out")
    matter, extra = [a for a in arguments if not _is_without_effect(a)], list(filter(_is_without_effect, arguments))
    multirun = [] if any(option in matter for option in MULTIRUN) else ["-m"]
    jobs = preflight([*multirun, *matter, _in_folder(results_dir)])
    if not jobs:
        raise UserError("these arguments start no sweep whose runs are known beforehand: give those of run.py -m")
    more = [argument for argument in extra if _key(argument) != "results_dir"]
    return [state_of(job.run_dir, [*(o for o in job.overrides if not _is_without_effect(o)), *more]) for job in jobs]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _is_without_effect(argument: str) -> bool:
    key = _key(argument).partition(".")[0]
    return "=" in argument and key in settings.WITHOUT_EFFECT and key != "hydra"


def _in_folder(results_dir: Path) -> str:
    """The override that puts runs in `results_dir`, quoted where Hydra's grammar needs it."""
    plain = re.fullmatch(r"[\w./+-]+", str(results_dir))
    return f"results_dir={results_dir}" if plain else "results_dir='{}'".format(str(results_dir).replace("'", r"\'"))


def command(results_dir: Path, overrides: Iterable[str], *options: str) -> str:
    """A line for the shell that starts runs with these overrides in `results_dir`, from the folder one is in."""
    program = ["python", RUN_FILE] if Path(RUN_FILE).is_file() else ["bayesq-run"]
    given = [override for override in overrides if _key(override) != "results_dir"]
    folder = [] if results_dir == Path("results") else [_in_folder(results_dir)]
    return shlex.join([*program, *options, *given, *folder])


def report(runs: Sequence[Run], results_dir: Path) -> str:
    """One line per run by state, what is not done last with its reason and its command, and a line that counts."""
    lines = []
    for state in LISTED:
        for run in runs:
            if run.state != state:
                continue
            reason = f": {run.reason}" if run.reason else ""
            lines.append(f"{state:<7} {run.run_id} {shlex.join(run.overrides)}{reason}")
            if state == "missing":
                lines.append(f"        {command(results_dir, run.overrides)}")
    counts = Counter(run.state for run in runs)
    return "\n".join([*lines, f"{len(runs)} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES)])


def main() -> None:
    """Print the report; exit code 0 only if there are runs and all of them are done."""
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
    left = [run for run in runs if run.state in ("failed", "missing")]
    if left and sweep:
        print(f"All that is not done: {command(results_dir, (a for a in sweep if a not in MULTIRUN), '-m')}")
    sys.exit(0 if runs and all(run.state == "done" for run in runs) else 1)


if __name__ == "__main__":
    main()
