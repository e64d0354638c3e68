"""The command line: every job of a command is checked before the first one runs, and a table closes it.

Hydra composes, sweeps and launches; this module adds one-line errors, skipping of finished runs, the clean end after
Ctrl-C or SIGTERM, and the summary.
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

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bayesq.files import lock, remove_leftovers
from bayesq.suite import code_digest, launchers, results, schema, wandb_environment
from bayesq.suite import config as settings
from bayesq.suite.composition import (
    BASIC_SWEEPER,
    CONFIG_NAME,
    VERSION_BASE,
    Job,
    as_typed,
    conf_dir,
    hydra_argv,
    preflight,
)
from bayesq.suite.errors import UserError
from bayesq.suite.labels import model_label
from bayesq.suite.progress import Progress
from bayesq.suite.session import Session
from bayesq.suite.summary import results_table
from bayesq.suite.tracking import ERROR_KEY, report_refusal

log = logging.getLogger(__name__)

TRACEBACK_FILE = "traceback.txt"
# of a run that was killed, for instance because memory ran out
NO_REASON = "it ended before it could say why"
# exit codes of shells for programs that a signal ended
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Hydra's switch for people who debug the program rather than use it
FULL_ERROR = "HYDRA_FULL_ERROR"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as what Ctrl-C raises: whatever is open is closed on the way out, W&B's run too."""


_asked: type[KeyboardInterrupt] | None = None


def stop_if_asked() -> None:
    """Raise what a signal asked for since `stoppable` began: libraries make other errors of it, or ignore it.

    Raises:
        KeyboardInterrupt: after SIGINT; `Terminated` after SIGTERM.
    """
    if _asked is not None:
        raise _asked


def _stop(number: int, frame: object) -> NoReturn:
    """Raise in the main thread; a second signal of the kind has its usual effect, for who cannot wait."""
    global _asked
    interrupt = number == signal.SIGINT
    signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
    _asked = KeyboardInterrupt if interrupt else Terminated
    raise _asked


@contextmanager
def stoppable() -> Iterator[None]:
    """Handle SIGINT, unless the process was started to ignore it as in a shell's background, and SIGTERM."""
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


def user_error_in(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from: `instantiate` wraps what a constructor raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def job(cfg: DictConfig, progress: Progress, session: Session, full_error: bool) -> None:
    """Run one configuration unless it is finished; report a failure in one line and leave the reason in its folder.

    Failures are not passed on to Hydra, which would print them again at the end of a sweep: `main` reads them from the
    folders. Only a sweeper other than Hydra's basic one gets them.

    Args:
        cfg: the run's, with Hydra's node set.
        progress: of the command.
        session: of the command.
        full_error: print tracebacks.
    """
    folder = settings.run_dir(cfg)
    logging.raiseExceptions = False  # on a full disk the run itself says so, once
    with ExitStack() as held:
        try:
            # two processes that share results_dir must not write one run's files at the same time, the report included
            held.enter_context(lock(folder / results.RESULT_FILE))
            stop_if_asked()
            run_unless_finished(cfg, folder, progress, session)
        except Exception as error:
            stop_if_asked()  # the error may be what a library made of the signal
            hydra_cfg = HydraConfig.get()
            reason = settings.disk_error(error, settings.resolved(cfg)) or error
            report_failure(folder, as_typed(hydra_cfg.overrides.task), reason, full_error)
            if hydra_cfg.sweeper._target_ != BASIC_SWEEPER:
                raise


def run_unless_finished(cfg: DictConfig, folder: Path, progress: Progress, session: Session) -> None:
    """Run one configuration in `folder`, which no other process works in, unless its result is there already."""
    finished = results.finished_result(folder)
    config = settings.resolved(cfg)
    if finished is not None and not cfg.force:
        log.info("%s", skip_line(config, folder, finished, progress))
        agent = wandb_environment.under_agent() and cfg.wandb.mode == "online"
        if agent or (finished.get(ERROR_KEY) is not None and cfg.wandb.mode != "disabled"):
            log_what_wandb_lacks(folder, cfg.wandb.mode, agent)
        return
    if place := progress.place(folder):
        log.info("%s", ", ".join(filter(None, (f"run {place}: {_label(config)}", progress.left()))))
    # what an earlier attempt left must not pass for the outcome of this one
    for name in (results.RESULT_FILE, results.FAILURE_FILE, TRACEBACK_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_leftovers(folder)
    # the preflight has seen neither what a foreign sweeper made up nor the machine a remote job runs on
    schema.validate(cfg)
    launchers.occupy(HydraConfig.get(), cfg.resources)
    settings.check_device(cfg)
    from bayesq.suite import construct, provenance, runner

    # while the files are still those this process has loaded; the result asks again
    provenance.git_state()
    code_digest.digest(code_digest.packages(config))
    construct.check([config])
    runner.run(cfg, session)


def skip_line(config: Mapping[str, Any], folder: Path, finished: Mapping[str, Any], progress: Progress) -> str:
    """What is said of a run that is not repeated, and of one whose code has changed since, which is not either."""
    place = progress.place(folder)
    line = f"skipped (finished): {folder.name} {_label(config)}{f' [{place}]' if place else ''}"
    if code_digest.has_changed(finished):
        line += "; the code that computes it has changed since: force=true runs it again"
    return line


def log_what_wandb_lacks(folder: Path, mode: str, agent: bool = False) -> None:
    """Give W&B a finished run that it failed to log; whatever it says, the run stays finished.

    Args:
        folder: of the run.
        mode: of W&B.
        agent: it is a sweep agent that has to learn the outcome, which starts the job again otherwise.
    """
    from bayesq.suite.relog import relog_locked

    try:
        error = relog_locked(folder, mode, again=agent)
    except Exception as reason:
        stop_if_asked()
        error = str(reason)
    who = "the sweep agent is told of" if agent else "W&B lacked"
    log.info("%s %s: %s", who, folder.name, "logged from its files" if error is None else settings.one_line(error))


def report_failure(folder: Path, overrides: Sequence[str], error: Exception, full_error: bool) -> None:
    """Say in one line why a run failed; status.json and, for a defect, traceback.txt keep it in the run's folder.

    Args:
        folder: of the run.
        overrides: that the run was composed from, without those of hydra.*.
        error: what was raised.
        full_error: print the traceback.
    """
    explained = user_error_in(error)
    reason = settings.one_line(str(explained) if explained else f"{type(error).__name__}: {error}")
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
        if f"({unwritable.strerror})" not in reason:  # else the full disk is what the run failed of
            said = f"error: {folder}: the reason cannot be kept there ({unwritable.strerror})"
            print(said, file=sys.stderr, flush=True)


def _outcome(job: Job) -> dict[str, Any]:
    """The result of a job, or what the table needs to show that there is none."""
    failed = (job.run_dir / results.FAILURE_FILE).exists()
    result = None if failed else results.finished_result(job.run_dir)
    if result is not None:
        return result
    return {
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
    """Print the table of exactly these jobs and the reasons of those without a result; whether all have one."""
    outcomes = [_outcome(job) for job in jobs]
    print(f"\n{results_table(outcomes)}", flush=True)
    lacking = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome["status"] != "finished"]
    for job, outcome in lacking:
        reason = (results.read_result(job.run_dir / results.FAILURE_FILE) or {}).get("error", NO_REASON)
        print(f"{outcome['status']}: {job.run_id} {_label(job.config)}: {reason}", flush=True)
    return not lacking


def main() -> None:
    """Entry point of `python run.py` and `bayesq-run`.

    Exits with 1 when anything was wrong or failed, with 130 after Ctrl-C and with 143 after SIGTERM.
    """
    code: Any = 0
    try:
        with stoppable():
            try:
                jobs = preflight(sys.argv[1:])
                for line in wandb_environment.remarks(job.config["wandb"] for job in jobs or ()):
                    print(line, file=sys.stderr, flush=True)
                code = _run(jobs)
                stop_if_asked()
                if jobs and not summarise(jobs):
                    code = code or 1
            finally:
                stop_if_asked()  # an error may be what a library made of the signal
    except UserError as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exc()
        print(f"error: {settings.one_line(str(error))}", file=sys.stderr)
        report_refusal(settings.one_line(str(error)))
        sys.exit(1)
    except KeyboardInterrupt as error:
        word, code = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        print(f"{word}: the same command continues with what is not finished", file=sys.stderr, flush=True)
    sys.exit(code)


def _run(jobs: Sequence[Job] | None) -> Any:
    """Let Hydra run what is not finished; returns its exit code.

    Raises:
        UserError: a constructor refuses a value of a run that would be computed, or Hydra cannot write or launch.
    """
    finished = {each.run_dir: results.finished_result(each.run_dir) for each in jobs or ()}
    progress = Progress({each.run_dir: finished[each.run_dir] is None or each.config["force"] for each in jobs or ()})
    if jobs and all(_is_settled(each, finished[each.run_dir]) for each in jobs):
        for each in jobs:
            print(skip_line(each.config, each.run_dir, finished[each.run_dir] or {}, progress), flush=True)
        return 0
    if computed := [each.config for each in jobs or () if progress.runs[each.run_dir]]:
        from bayesq.suite import construct

        construct.check(computed)

    full_error = os.environ.get(FULL_ERROR) == "1"
    task = partial(job, progress=progress, session=Session(), full_error=full_error)
    run = hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base=VERSION_BASE)(task)
    try:
        with hydra_argv(), launchers.tolerating_lost_runs(jobs[0].launcher if jobs else None):
            run()
    except SystemExit as left:
        return left.code
    except (HydraException, OmegaConfBaseException, OSError) as error:
        reason = settings.disk_error(error, jobs[0].config) if jobs else None
        if reason is None and isinstance(error, OSError):
            raise
        raise reason or UserError(settings.explanation(error)) from error
    return 0


def _is_settled(job: Job, finished: Mapping[str, Any] | None) -> bool:
    """Whether a job needs no more than a line: then Hydra, which composes each twice more, is not asked."""
    if finished is None or job.config["force"] or wandb_environment.under_agent():
        return False
    return finished.get(ERROR_KEY) is None or job.config["wandb"]["mode"] == "disabled"
