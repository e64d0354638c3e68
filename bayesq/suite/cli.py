"""The command line: every job of a command is checked before the first one runs, and a table closes it.

Hydra composes, sweeps and launches; this module adds what it leaves out: one-line errors, unknown keys behind `+`,
skipping of finished runs, and the summary.
"""

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bayesq.suite import code_digest, launchers, results, wandb_environment
from bayesq.suite import config as settings
from bayesq.suite.arguments import hydra_argv
from bayesq.suite.composition import BASIC_SWEEPER, CONFIG_NAME, VERSION_BASE, Job, conf_dir, preflight
from bayesq.suite.errors import UserError
from bayesq.suite.files import lock, remove_leftovers
from bayesq.suite.labels import model_label
from bayesq.suite.progress import Progress
from bayesq.suite.stopping import Terminated, stop_if_asked, stoppable
from bayesq.suite.summary import results_table
from bayesq.suite.tracking import ERROR_KEY, report_refusal

log = logging.getLogger(__name__)

TRACEBACK_FILE = "traceback.txt"
# of a run that was killed, for instance because memory ran out
NO_REASON = "it ended before it could say why"
# exit codes of shells for programs that a signal ended
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# of a sweep agent of W&B, which has to hear of every run
AGENT_VARIABLE = "WANDB_SWEEP_ID"


def wants_traceback() -> bool:
    """Hydra's switch for people who debug the program rather than use it."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


# -------------------------------------------------------------------------------------------------------- one job


def _label(config: Mapping[str, Any]) -> str:
    names = f"model={model_label(config)} dataset={config['dataset']['name']} method={config['method']['name']}"
    return f"{names} bits={settings.show(config['bits'])} seed={config['seed']}"


def user_error_in(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from: `instantiate` wraps what a constructor raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def job(cfg: DictConfig, progress: Progress) -> None:
    """Run one configuration unless it is finished; report a failure in one line and leave the reason in its folder.

    Failures are not passed on to Hydra, which would print them a second time at the end of a sweep: `main` finds them
    by what the folder holds. A sweeper other than Hydra's own has to know, so there they are.
    """
    folder = settings.run_dir(cfg)
    # run.log on a full disk: the run says itself what is wrong, once, and not for every line it would have logged
    logging.raiseExceptions = False
    with ExitStack() as held:
        try:
            # two processes that share results_dir must not write one run's files at the same time, the report included
            held.enter_context(lock(folder / results.RESULT_FILE))
            stop_if_asked()
            run_unless_finished(cfg, folder, progress)
        except Exception as error:
            stop_if_asked()  # the error may be what a library made of the signal
            hydra_cfg = HydraConfig.get()
            report_failure(
                folder, hydra_cfg.overrides.task, settings.disk_error(error, settings.resolved(cfg)) or error
            )
            if hydra_cfg.sweeper._target_ != BASIC_SWEEPER:
                raise


def run_unless_finished(cfg: DictConfig, folder: Path, progress: Progress) -> None:
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
    settings.validate(cfg)
    launchers.occupy(HydraConfig.get(), cfg.resources)
    settings.check_device(cfg)
    from bayesq.suite import construct, provenance, runner

    # while the files are still those this process has loaded; the result asks again
    provenance.git_state()
    code_digest.digest(code_digest.packages(config))
    construct.check([config])
    runner.run(cfg)


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


def report_failure(folder: Path, overrides: Sequence[str], error: Exception) -> None:
    """Say in one line why a run failed; status.json and, for a defect, traceback.txt keep it in the run's folder.

    Args:
        folder: of the run.
        overrides: that the run was composed from, without Hydra's own.
        error: what was raised.
    """
    explained = user_error_in(error)
    reason = settings.one_line(str(explained) if explained else f"{type(error).__name__}: {error}")
    status = {
        "status": "failed",
        "error": reason,
        "overrides": list(overrides),
        "traceback": None if explained else TRACEBACK_FILE,
    }
    where = f"{folder.name}: {shlex.join(overrides) or 'no overrides'}"
    if status["traceback"]:
        where += f"; {folder / TRACEBACK_FILE}"
    print(f"error: {status['error']} [{where}]", file=sys.stderr, flush=True)
    if wants_traceback():
        traceback.print_exception(error)
    try:
        if status["traceback"]:
            (folder / TRACEBACK_FILE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        results.write_json(folder / results.FAILURE_FILE, status)
    except OSError as unwritable:  # the disk that is full may be what the run failed of, and has been named then
        if f"({unwritable.strerror})" in reason:
            return
        print(f"error: {folder}: the reason cannot be kept there ({unwritable.strerror})", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- afterwards


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
    complete = True
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome["status"] == "finished":
            continue
        complete = False
        status = results.read_result(job.run_dir / results.FAILURE_FILE) or {}
        reason = status.get("error", NO_REASON)
        print(f"{outcome['status']}: {job.run_id} {_label(job.config)}: {reason}", flush=True)
    return complete


def main() -> None:
    """Entry point of `python run.py` and `bayesq-run`.

    Exits with 1 when anything was wrong or failed, with 130 after Ctrl-C and with 143 after SIGTERM.
    """
    jobs: list[Job] | None = None
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
            except Exception:
                stop_if_asked()
                raise
            stop_if_asked()
    except UserError as error:
        if wants_traceback():
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
        UserError: a constructor refuses a value of a run that would be computed.
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

    def task(cfg: DictConfig) -> None:
        job(cfg, progress)

    run = hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base=VERSION_BASE)(task)
    launcher = jobs[0].launcher if jobs else None
    runs = {each.run_dir: _label(each.config) for each in jobs or ()} if launcher else {}
    try:
        with (
            hydra_argv(),
            launchers.attend(launcher, runs),
            _explained_disk(jobs[0].config if jobs else None),
        ):
            run()
    except SystemExit as left:
        return left.code
    return 0


def _is_settled(job: Job, finished: Mapping[str, Any] | None) -> bool:
    """Whether a job needs no more than a line: then Hydra, which composes each twice more, is not asked."""
    if finished is None or job.config["force"] or job.own_logging or AGENT_VARIABLE in os.environ:
        return False
    return finished.get(ERROR_KEY) is None or job.config["wandb"]["mode"] == "disabled"


@contextmanager
def _explained_disk(config: Mapping[str, Any] | None) -> Iterator[None]:
    """Have Hydra leave with one line where its own files cannot be written, and with its traceback for all else.

    Args:
        config: of a job of the command; None changes nothing.
    """
    report = hydra_utils.run_and_report

    def explained(func: Any) -> Any:
        def attempt() -> Any:
            try:
                return func()
            except Exception as error:
                stop_if_asked()
                if not isinstance(error, OSError) or config is None:
                    raise
                reason = settings.disk_error(error, config)
                if reason is None:
                    raise
                print(f"error: {settings.one_line(str(reason))}", file=sys.stderr, flush=True)
                sys.exit(1)

        return report(attempt)

    hydra_utils.run_and_report = explained
    try:
        yield
    finally:
        hydra_utils.run_and_report = report
