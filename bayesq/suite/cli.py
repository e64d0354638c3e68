"""The command line: every job of a command is checked before the first one runs, and a table closes it.

Hydra composes, sweeps and launches; this module adds what it leaves out: one-line errors, unknown keys behind `+`,
skipping of finished runs, and the summary.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import version
from hydra._internal import utils as hydra_utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import bayesq
from bayesq.suite import config as settings
from bayesq.suite import launchers, results, wandb_environment
from bayesq.suite.errors import UserError
from bayesq.suite.files import lock, remove_leftovers
from bayesq.suite.stopping import Terminated, stop_if_asked, stoppable
from bayesq.suite.summary import results_table
from bayesq.suite.tracking import ERROR_KEY, report_refusal

log = logging.getLogger(__name__)

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
TRACEBACK_FILE = "traceback.txt"
# of a run that was killed, for instance because memory ran out
NO_REASON = "it ended before it could say why"
# exit codes of shells for programs that a signal ended
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ConfigLoadError, YAMLError, ValueError)


@dataclass(frozen=True)
class Job:
    """One run of a command: its resolved configuration, its folder, its overrides, and what starts it."""

    run_id: str
    run_dir: Path
    config: dict[str, Any]
    overrides: tuple[str, ...]
    launcher: launchers.Launcher | None


def conf_dir() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: there is none in either place.
    """
    package = Path(bayesq.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder.absolute()
    raise UserError(f"no conf/{CONFIG_NAME}.yaml in {package} or beside it: install bayesq again")


def wants_traceback() -> bool:
    """Hydra's switch for people who debug the program rather than use it."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


# --------------------------------------------------------------------------------------------- before anything runs


class Preflight:
    """Composes the configurations of a command the way Hydra will, and explains what is wrong with them."""

    def __init__(self, config_name: str, config_path: str, config_dir: str | None) -> None:
        version.setbase(VERSION_BASE)
        search_path = create_automatic_config_search_path(None, None, config_path)
        if config_dir is not None:
            if not os.path.isdir(config_dir):
                raise UserError(f"--config-dir {config_dir}: there is no such folder")
            folder = f"file://{os.path.abspath(config_dir)}"
            search_path.prepend(provider="command-line", path=folder, anchor=SearchPathQuery(provider="schema"))
        self.config_name = config_name
        self.hydra = Hydra.create_main_hydra2(task_name="bayesq", config_search_path=search_path)
        GlobalHydra.instance().clear()  # it belongs to Hydra's own run, which comes later in this process
        self.loader = self.hydra.config_loader
        self.parser = OverridesParser.create(config_loader=self.loader)
        self._references: dict[tuple[str, ...], dict[str, Any]] = {}
        self._groups: dict[str, list[str]] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self.axes = tuple(self._compose([]).hydra.runtime.choices)

    def _compose(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        return self.loader.load_configuration(self.config_name, list(overrides), run_mode=mode)

    def _compose_job(self, parsed: Sequence[Override]) -> DictConfig:
        """`_compose` for one of many jobs: those that differ in single keys only are read from the YAML files once.

        Which files are read depends on choices and on Hydra's own keys alone; what is typed for single keys Hydra
        applies afterwards, in its order, as is done here.
        """
        values = [o for o in parsed if not o.is_hydra_override() and not self._options(o.key_or_group)]
        if any(o.is_sweep_override() for o in parsed):  # Hydra says why one job cannot have several values
            return self._compose([o.input_line or "" for o in parsed])
        others = [o for o in parsed if o not in values]
        rest = tuple(o.input_line or "" for o in others)
        if rest not in self._bases:
            base = self._bases[rest] = self._compose(rest)
            if all(self._is_axis(o.key_or_group) for o in others):  # then this is what the files give for these choices
                self._references[self._axis_overrides(base.hydra.runtime.choices)] = _unresolved(base)
        cfg = deepcopy(self._bases[rest])
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        return cfg

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Hydra's reading of the arguments.

        Raises:
            UserError: naming the argument that is not key=value.
        """
        try:
            return self.parser.parse_overrides(list(overrides))
        except OverrideParseException as error:
            reason = settings.one_line(error.message.partition("\nSee ")[0])
            raise UserError(f"cannot read '{error.override}': write key=value ({reason})") from error

    def reference(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config that the YAML files give for a choice on every axis, without any other override."""
        overrides = self._axis_overrides(choices)
        if overrides not in self._references:
            self._references[overrides] = _unresolved(self._compose(overrides))
        return self._references[overrides]

    def _axis_overrides(self, choices: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{axis}={name}" for axis, name in sorted(choices.items()) if name and self._is_axis(axis))

    def _is_axis(self, group: str) -> bool:
        return group in self.axes and not group.startswith("hydra/")

    def _options(self, group: str) -> list[str]:
        """The files of a config group; empty when `group` is no group."""
        if group not in self._groups:
            self._groups[group] = list(self.loader.get_group_options(group))
        return self._groups[group]

    def _chosen(self, typed: Mapping[str, str]) -> Mapping[str, Any]:
        """The choice on every axis, also where an experiment among the `typed` choices makes it."""
        overrides = [f"{'' if self._is_axis(group) else '+'}{group}={name}" for group, name in typed.items()]
        try:
            choices: Mapping[str, Any] = self._compose(overrides).hydra.runtime.choices
        except COMPOSITION_ERRORS:  # the experiment itself is wrong; the error to explain says how
            return typed
        return choices

    def explain(self, parsed: Sequence[Override], error: Exception) -> UserError:
        """The one line for an error of Hydra's, from what was typed where that says it better."""
        choices: dict[str, str] = {}
        for override in parsed:
            options = [] if override.is_hydra_override() else self._options(override.key_or_group)
            if not options:
                continue
            group, name = override.key_or_group, override.value()
            if override.is_delete():
                return UserError(f"~{group}: every run needs a {group}; choose one of {', '.join(options)}")
            if (override.is_add() or override.is_force_add()) and self._is_axis(group):
                return UserError(f"{override.input_line}: '{group}' is set already; write {group}={name} without '+'")
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [name]
            for value in values:
                if value not in options:
                    hint = settings.suggestion(str(value), options)
                    return UserError(f"{group}={settings.show(value)}: choose one of {', '.join(options)}{hint}")
            if not self._is_axis(group) and not (override.is_add() or override.is_force_add()):
                return UserError(
                    f"{override.input_line}: '{group}' is added to the other choices; write +{group}={name}"
                )
            choices[group] = str(values[0])
        known = settings.flatten(self.reference(self._chosen(choices)))
        for override in parsed:
            key = override.key_or_group
            if override.is_hydra_override() or self._options(key):
                continue
            if key not in known and not any(name.startswith(f"{key}.") for name in known):
                hint = settings.suggestion(key, [*known, *(axis for axis in self.axes if self._is_axis(axis))])
                return UserError(f"unknown key '{override.get_key_element()}' in '{override.input_line}'{hint}")
            if override.is_add() and key in known:
                typed = str(override.input_line)
                return UserError(f"{typed}: '{key}' is set already; write {typed.removeprefix('+')}")
        return UserError(settings.explanation(error))

    def jobs(self, arguments: Sequence[str], multirun: bool) -> list[Job]:
        """Check every job of the command: one without a sweep, the product of all lists of values with one.

        What a sweeper other than Hydra's basic one will try is its own affair: then what it cannot vary is checked and
        the list is empty.

        Raises:
            UserError: one line that names what is wrong with the first bad job.
        """
        parsed = self.parse(arguments)
        sweeps = [override for override in parsed if override.is_sweep_override()]
        if not multirun and self.hydra.get_mode(self.config_name, list(arguments)) != RunMode.MULTIRUN:
            if sweeps:
                raise UserError(f"{sweeps[0].input_line} lists several values: add -m to run every combination")
            job = self.check(arguments)
            if job.launcher is not None:
                raise UserError(f"hydra/launcher={job.launcher.name} starts the runs of a sweep: add -m")
            return [job]
        try:
            master = self._compose(arguments, RunMode.MULTIRUN)
        except COMPOSITION_ERRORS as error:
            raise self.explain(parsed, error) from error
        own = [str(override.input_line) for override in parsed if override.is_hydra_override()]
        if master.hydra.sweeper._target_ != BASIC_SWEEPER:
            fixed = [str(o.input_line) for o in parsed if not o.is_hydra_override() and not o.is_sweep_override()]
            self.check([*own, *fixed])
            return []
        params = [f"{key}={value}" for key, value in dict(master.hydra.sweeper.params or {}).items()]
        task = [str(override.input_line) for override in parsed if not override.is_hydra_override()]
        (combinations,) = BasicSweeper.split_arguments(self.parse([*params, *task]), max_batch_size=None)
        return [self.check([*own, *combination]) for combination in combinations]

    def check(self, overrides: Sequence[str]) -> Job:
        """Compose one job and check all that can be checked before it runs.

        Raises:
            UserError: one line that names what is wrong.
        """
        parsed = self.parse(overrides)
        try:
            cfg = self._compose_job(parsed)
            reference = self.reference(cfg.hydra.runtime.choices)
        except COMPOSITION_ERRORS as error:
            raise self.explain(parsed, error) from error
        for override in parsed:
            if override.is_delete() and not override.is_hydra_override():
                raise UserError(
                    f"{override.input_line}: every run needs '{override.key_or_group}', it cannot be removed"
                )
        settings.check_keys(_unresolved(cfg), reference)
        _check_ablation_holds(cfg, {override.key_or_group for override in parsed})
        settings.validate(cfg)
        settings.check_types(settings.resolved(cfg), reference)
        launchers.check(cfg)
        if launchers.is_local(cfg.hydra):
            settings.check_device(cfg)
        settings.check_wandb_login(cfg)
        task = tuple(o.input_line or "" for o in parsed if not o.is_hydra_override())
        return Job(
            settings.run_id(cfg), settings.run_dir(cfg), settings.resolved(cfg), task, launchers.chosen(cfg.hydra)
        )


def _check_ablation_holds(cfg: DictConfig, typed: Collection[str]) -> None:
    """Refuse an ablation that an experiment undoes: Hydra reads what is added with `+` after everything else.

    Args:
        cfg: a composed configuration.
        typed: keys given on the command line, which may replace whatever they like.

    Raises:
        UserError: the experiment sets a key that the ablation switches.
    """
    choices = cfg.hydra.runtime.choices
    experiment, ablation = choices.get("experiment"), choices.get("ablation")
    file = conf_dir() / "ablation" / f"{ablation}.yaml"
    if experiment is None or not file.is_file():
        return
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    for key, value in settings.flatten({str(k): v for k, v in content.items() if k != "defaults"}).items():
        if key not in typed and OmegaConf.select(cfg, key) != value:
            raise UserError(
                f"ablation={ablation} sets {key}={settings.show(value)}, but experiment={experiment} sets it to "
                f"{settings.show(OmegaConf.select(cfg, key))}: add {key}={settings.show(value)}"
            )


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    """The keys and raw values of a composed configuration without Hydra's node."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's reading of the command line, with errors that leave by exception instead of a usage text."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{settings.one_line(message)} (--help lists what there is)")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(argv))


def preflight(argv: Sequence[str]) -> list[Job] | None:
    """Check every job of a command line before anything runs.

    Returns the distinct jobs in the order they will run, an empty list when a sweeper other than Hydra's own decides
    them, or None when the command only asks Hydra for information (--help, --cfg, --info, ...).

    Raises:
        UserError: one line that names what is wrong.
    """
    arguments = _arguments(argv)
    asks = (arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion)
    if any(asks) or arguments.experimental_rerun:
        return None
    try:
        flight = Preflight(
            arguments.config_name or CONFIG_NAME,
            arguments.config_path or str(conf_dir()),
            arguments.config_dir,
        )
        jobs = flight.jobs(arguments.overrides, arguments.multirun)
    except COMPOSITION_ERRORS as error:
        raise UserError(settings.explanation(error)) from error
    return list({job.run_dir: job for job in jobs}.values())


# -------------------------------------------------------------------------------------------------------- one job


def _label(config: Mapping[str, Any]) -> str:
    names = " ".join(f"{axis}={config[axis]['name']}" for axis in ("model", "dataset", "method"))
    return f"{names} bits={settings.show(config['bits'])} seed={config['seed']}"


def user_error_in(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from: `instantiate` wraps what a constructor raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def job(cfg: DictConfig) -> None:
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
            run_unless_finished(cfg, folder)
        except Exception as error:
            stop_if_asked()  # the error may be what a library made of the signal
            hydra_cfg = HydraConfig.get()
            report_failure(
                folder, hydra_cfg.overrides.task, settings.disk_error(error, settings.resolved(cfg)) or error
            )
            if hydra_cfg.sweeper._target_ != BASIC_SWEEPER:
                raise


def run_unless_finished(cfg: DictConfig, folder: Path) -> None:
    """Run one configuration in `folder`, which no other process works in, unless its result is there already."""
    finished = results.finished_result(folder)
    if finished is not None and not cfg.force:
        log.info("skipped (finished): %s %s", folder.name, _label(settings.resolved(cfg)))
        agent = wandb_environment.under_agent() and cfg.wandb.mode == "online"
        if agent or (finished.get(ERROR_KEY) is not None and cfg.wandb.mode != "disabled"):
            log_what_wandb_lacks(folder, cfg.wandb.mode, agent)
        return
    # what an earlier attempt left must not pass for the outcome of this one
    for name in (results.RESULT_FILE, results.FAILURE_FILE, TRACEBACK_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_leftovers(folder)
    # the preflight has seen neither what a foreign sweeper made up nor the machine a remote job runs on
    settings.validate(cfg)
    launchers.occupy(HydraConfig.get(), cfg.resources)
    settings.check_device(cfg)
    from bayesq.suite import provenance, runner

    provenance.git_state()  # while the files are still those this process has loaded; the result asks again
    runner.run(cfg)


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
    names = {axis: job.config[axis]["name"] for axis in ("model", "dataset", "method")}
    return {
        "status": "failed" if failed else "missing",
        "run_id": job.run_id,
        **names,
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
    """Let Hydra run the command; returns its exit code."""
    run = hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base=VERSION_BASE)(job)
    runs = {job.run_dir: _label(job.config) for job in jobs or ()}
    try:
        with (
            launchers.attend(jobs[0].launcher if jobs else None, runs),
            _explained_disk(jobs[0].config if jobs else None),
        ):
            run()
    except SystemExit as left:
        return left.code
    return 0


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
