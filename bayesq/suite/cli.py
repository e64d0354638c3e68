"""The command line: check every job of a command, run those that are not finished, print a table.

Hydra composes, sweeps and launches. This module adds one-line errors, skips finished runs, ends cleanly after Ctrl-C or
SIGTERM, and prints the summary.
"""

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bayesq.defaults import conf_dir
from bayesq.files import lock, remove_leftovers
from bayesq.suite import code_digest, launchers, results, schema, wandb_environment
from bayesq.suite import config as settings
from bayesq.suite.arguments import command_line
from bayesq.suite.composition import BASIC_SWEEPER, CONFIG_NAME, VERSION_BASE, Job, as_typed, for_hydra, preflight
from bayesq.suite.errors import UserError
from bayesq.suite.labels import model_label
from bayesq.suite.newer_files import newer_than
from bayesq.suite.progress import Progress
from bayesq.suite.summary import results_table
from bayesq.suite.tracking import ERROR_KEY, leave, report_refusal

log = logging.getLogger(__name__)

TRACEBACK_FILE = "traceback.txt"
# the reason given for a run that was killed, for instance because memory ran out
NO_REASON = "it ended without reporting a reason"
# exit codes of a shell for programs that a signal ended
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Hydra's variable: 1 prints tracebacks, because Hydra then raises its errors
FULL_ERROR = "HYDRA_FULL_ERROR"
# Hydra's script completes one command. For `python` it would run any file, so `python run.py` has a separate function.
INSTALL = "install=bash"
COMPLETE_PYTHON = """
bayesq_python_completion()
{
    words=($COMP_LINE)
    if [ "${words[1]##*/}" == "run.py" ] && grep -qs "bayesq.suite.cli" "${words[1]}"; then
        hydra_bash_completion
    fi
}
complete -o nospace -o default -F bayesq_python_completion python"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C: files and W&B's run are closed before the program ends."""


_asked: type[KeyboardInterrupt] | None = None


def stop_if_asked() -> None:
    """Raise the KeyboardInterrupt of a signal again, because libraries may swallow it or raise another error."""
    if _asked is not None:
        raise _asked


def _stop(number: int, frame: object) -> NoReturn:
    """Raise in the main thread; a second signal of the same kind ends the program at once."""
    global _asked
    interrupt = number == signal.SIGINT
    signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
    _asked = KeyboardInterrupt if interrupt else Terminated
    raise _asked


@contextmanager
def stoppable() -> Iterator[None]:
    """Handle SIGTERM, and SIGINT unless the process ignores it, as a shell's background processes do."""
    global _asked
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number == signal.SIGTERM:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _label(config: Mapping[str, Any]) -> str:
    names = f"model={model_label(config)} dataset={config['dataset']['name']} method={config['method']['name']}"
    return f"{names} bits={settings.show(config['bits'])} seed={config['seed']}"


def job(cfg: DictConfig, progress: Progress, previous: list[Any], full_error: bool) -> None:
    """Run one configuration unless it is finished; report a failure in one line and store the reason in its folder.

    `main` reads failures from the folders. Hydra's basic sweeper would print a raised error again at the end, so errors
    are raised only under other sweepers. `full_error` prints tracebacks; for `previous` see `plan.placed_whitenings`.
    """
    folder = settings.run_dir(cfg)
    logging.raiseExceptions = False  # on a full disk the run reports the error once
    with ExitStack() as locks:
        try:
            # processes that share results_dir must not write the files of one run at the same time; the failure report
            # below is one of these files
            locks.enter_context(lock(folder / results.RESULT_FILE))
            stop_if_asked()
            run_unless_finished(cfg, folder, progress, previous)
        except Exception as error:
            stop_if_asked()  # the signal may have caused the error
            hydra_cfg = HydraConfig.get()
            reason = settings.disk_error(error, settings.resolved(cfg)) or error
            report_failure(folder, [as_typed(override) for override in hydra_cfg.overrides.task], reason, full_error)
            if hydra_cfg.sweeper._target_ != BASIC_SWEEPER:
                raise


def run_unless_finished(cfg: DictConfig, folder: Path, progress: Progress, previous: list[Any]) -> None:
    """Run one configuration unless `folder`, which is locked, has its result."""
    finished, config = results.finished_result(folder), settings.resolved(cfg)
    if finished is not None and not cfg.force:
        log.info("%s", skip_line(config, folder, finished, progress))
        agent = wandb_environment.under_agent() and cfg.wandb.mode == "online"
        if agent or (finished.get(ERROR_KEY) is not None and cfg.wandb.mode != "disabled"):
            log_what_wandb_lacks(folder, cfg.wandb.mode, agent)
        return
    if place := progress.place(folder):
        log.info("%s", ", ".join(filter(None, (f"run {place}: {_label(config)}", progress.left()))))
    # files of an earlier attempt must not be taken for the outcome of this one
    for name in (results.RESULT_FILE, results.FAILURE_FILE, TRACEBACK_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_leftovers(folder)
    # the preflight cannot check values that another sweeper chooses, or the machine of a remote job
    schema.validate(cfg)
    launchers.occupy(HydraConfig.get(), cfg.resources)
    settings.check_device(cfg)
    from bayesq.suite import plan, provenance, runner

    # cached now, while the source files are still the ones that this process has loaded
    provenance.git_state()
    code_digest.digest(code_digest.packages(config))
    plan.check_objects(config)
    runner.run(cfg, previous)


def skip_line(config: Mapping[str, Any], folder: Path, finished: Mapping[str, Any], progress: Progress) -> str:
    """The line about a finished run, with a hint if its code or its files have changed since."""
    place = progress.place(folder)
    line = f"skipped (finished): {folder.name} {_label(config)}{f' [{place}]' if place else ''}"
    if code_digest.has_changed(finished):
        line += "; the code that computes it has changed since: force=true runs it again"
    if newer := newer_than(folder / results.RESULT_FILE, config):
        line += f"; newer than its result: {', '.join(newer)}: force=true runs it again"
    return line


def log_what_wandb_lacks(folder: Path, mode: str, agent: bool) -> None:
    """Log a finished run to W&B; a sweep agent would start the run again if it did not learn the outcome."""
    from bayesq.suite.relog import relog_locked

    try:
        error = relog_locked(folder, mode, again=agent)
    except Exception as reason:
        stop_if_asked()
        error = str(reason)
    who = "the sweep agent is told of" if agent else "W&B lacked"
    log.info("%s %s: %s", who, folder.name, "logged from its files" if error is None else settings.one_line(error))


def report_failure(folder: Path, overrides: Sequence[str], error: Exception, full_error: bool) -> None:
    """Print in one line why a run failed and write status.json; unexplained errors also get a traceback.txt."""
    explained = isinstance(error, UserError)
    reason = settings.one_line(str(error) if explained else f"{type(error).__name__}: {error}")
    file = None if explained else TRACEBACK_FILE
    where = f"{folder.name}: {shlex.join(overrides) or 'no overrides'}{f'; {folder / file}' if file else ''}"
    print(f"error: {reason} [{where}]", file=sys.stderr, flush=True)
    if full_error:
        traceback.print_exception(error)
    status = {"status": "failed", "error": reason, "overrides": list(overrides), "traceback": file}
    try:
        if file:
            (folder / file).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        results.write_json(folder / results.FAILURE_FILE, status)
    except OSError as unwritable:
        if f"({unwritable.strerror})" not in reason:  # otherwise the line above names the full disk
            line = f"error: {folder}: the reason cannot be written there ({unwritable.strerror})"
            print(line, file=sys.stderr, flush=True)


def _outcome(job: Job) -> dict[str, Any]:
    """The result of a job, or the columns that the table shows for a job without one."""
    failed = (job.run_dir / results.FAILURE_FILE).exists()
    result = None if failed else results.finished_result(job.run_dir)
    return result or {
        "status": "failed" if failed else "missing",
        "run_id": job.run_id,
        "model": model_label(job.config),
        "dataset": job.config["dataset"]["name"],
        "method": job.config["method"]["name"],
        "bits/target": job.config["bits"],
        "seed": job.config["seed"],
        "config": job.config,
    }


def summarise(jobs: Sequence[Job]) -> bool:
    """Print the table of these jobs and why some have no result; returns whether all have one."""
    outcomes = [_outcome(job) for job in jobs]
    print(f"\n{results_table(outcomes)}", flush=True)
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome["status"] != "finished":
            reason = (results.read_result(job.run_dir / results.FAILURE_FILE) or {}).get("error", NO_REASON)
            print(f"{outcome['status']}: {job.run_id} {_label(job.config)}: {reason}", flush=True)
    return all(outcome["status"] == "finished" for outcome in outcomes)


def main() -> None:
    """Entry point of `python run.py` and `bayesq-run`.

    The exit code is 1 after any error, 130 after Ctrl-C and 143 after SIGTERM.
    """
    code: Any = 0
    try:
        with stoppable():
            try:
                jobs = preflight(sys.argv[1:]) or []
                for line in wandb_environment.remarks(job.config["wandb"] for job in jobs):
                    print(line, file=sys.stderr, flush=True)
                code = _run(jobs)
                stop_if_asked()
                if jobs and not summarise(jobs):
                    code = code or 1
            finally:
                stop_if_asked()  # the signal may have caused another error
    except UserError as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exc()
        line, code = settings.one_line(str(error)), 1
        print(f"error: {line}", file=sys.stderr)
        report_refusal(line)
    except KeyboardInterrupt as error:
        word, code = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        print(f"{word}: the same command continues with what is not finished", file=sys.stderr, flush=True)
    leave(code)


def _run(jobs: Sequence[Job]) -> Any:
    """Let Hydra run the jobs that are not finished; returns its exit code."""
    finished = {each.run_dir: results.finished_result(each.run_dir) for each in jobs}
    progress = Progress({each.run_dir: finished[each.run_dir] is None or each.config["force"] for each in jobs})
    if jobs and all(_is_settled(each, finished[each.run_dir]) for each in jobs):
        for each in jobs:
            print(skip_line(each.config, each.run_dir, finished[each.run_dir] or {}, progress), flush=True)
        return 0
    for each in jobs:
        if progress.runs[each.run_dir]:
            from bayesq.suite import plan  # imports torch

            plan.check_objects(each.config)
    full_error = os.environ.get(FULL_ERROR) == "1"
    task = partial(job, progress=progress, previous=[], full_error=full_error)
    asked = command_line(sys.argv[1:])
    if asked.shell_completion:
        asked.config_dir = _typed_config_dir()
    else:  # overrides of shell completion, such as install=bash, are not config keys
        asked.overrides = [for_hydra(override, asked.config_dir) for override in asked.overrides]
    version.setbase(VERSION_BASE)
    os.environ[FULL_ERROR] = "1"
    try:
        _run_hydra(asked, get_args_parser(), task, str(conf_dir()), CONFIG_NAME)
        if asked.shell_completion and INSTALL in asked.overrides:
            print(COMPLETE_PYTHON)
    except SystemExit as left:
        return left.code
    except (HydraException, OmegaConfBaseException, OSError) as error:
        reason = settings.disk_error(error, jobs[0].config) if jobs else None
        if reason is None and isinstance(error, OSError):
            raise
        raise reason or UserError(settings.explanation(error)) from error
    except Exception as error:
        if asked.shell_completion:  # the typed line may be incomplete, and config files may be broken
            raise UserError(f"--shell-completion: {settings.one_line(str(error)):.300}") from error
        if not jobs or jobs[0].launcher is None:
            raise
        first_line = str(error).partition("\n")[0]
        line = f"error: hydra/launcher={jobs[0].launcher.name} lost a run [{type(error).__name__}: {first_line}]"
        print(f"{line}; the same command continues with what is not finished", file=sys.stderr, flush=True)
        return 1
    finally:
        os.environ[FULL_ERROR] = str(int(full_error))
    return 0


def _typed_config_dir() -> str | None:
    """The --config-dir of the line that a shell wants completed, if it is a folder."""
    try:
        folder = command_line(os.environ.get("COMP_LINE", "").split()[1:]).config_dir
    except UserError:  # the line is not finished
        return None
    return folder if folder and Path(folder).is_dir() else None


def _is_settled(job: Job, finished: Mapping[str, Any] | None) -> bool:
    """Whether a job needs no work. If no job does, Hydra is not started: it would compose each job twice more."""
    if finished is None or job.config["force"] or wandb_environment.under_agent():
        return False
    return finished.get(ERROR_KEY) is None or job.config["wandb"]["mode"] == "disabled"
