"""The configurations of a command: composed the way Hydra will, checked before anything runs.

Hydra composes and sweeps; this module adds one line for each of its errors, and unknown keys behind `+`.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
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
from bayesq.suite import launchers
from bayesq.suite.arguments import command_line
from bayesq.suite.errors import UserError

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
ABLATION = "ablation"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ConfigLoadError, YAMLError, ValueError)


@dataclass(frozen=True)
class Job:
    """One run of a command: its resolved configuration, its folder, its overrides, and what starts it.

    Attributes:
        own_logging: Hydra was told to log, or to call back, otherwise than conf/config.yaml says.
    """

    run_id: str
    run_dir: Path
    config: dict[str, Any]
    overrides: tuple[str, ...]
    launcher: launchers.Launcher | None
    own_logging: bool = False


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
            # then this is what the files give for these choices
            if all(self._is_axis(o.key_or_group) and o.key_or_group != ABLATION for o in others):
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
        except Exception as error:  # Hydra's parser moves on within its assertions
            if not sys.flags.optimize:
                raise
            if len(overrides) > 1:  # which of them
                return [one for override in overrides for one in self.parse([override])]
            raise UserError(
                f"cannot read '{overrides[0]}': range(), glob(), choice() and {{...}} need Python's assertions; unset "
                "PYTHONOPTIMIZE, or leave out python -O"
            ) from error

    def reference(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config that the YAML files give for a choice on every axis, without any other override.

        An ablation is no choice here: like an experiment it sets keys of the others, and invents none.
        """
        overrides = self._axis_overrides(choices)
        if overrides not in self._references:
            self._references[overrides] = _unresolved(self._compose(overrides))
        return self._references[overrides]

    def _axis_overrides(self, choices: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(
            f"{axis}={name}"
            for axis, name in sorted(choices.items())
            if name and self._is_axis(axis) and axis != ABLATION
        )

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
        swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
        for override in parsed:
            key = override.key_or_group
            if override.is_hydra_override() or self._options(key):
                continue
            if key not in known and not any(name.startswith(f"{key}.") for name in known):
                hint = settings.suggestion(key, [*known, *(axis for axis in self.axes if self._is_axis(axis))])
                return UserError(f"unknown key '{override.get_key_element()}' in '{override.input_line}'{hint}")
            group = key.partition(".")[0]
            if key in known and group in swept and not override.is_force_add():
                return UserError(
                    f"{override.input_line}: with several values of {group} write ++{override.input_line} "
                    f"(Hydra looks for the key in the default {group})"
                )
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
        swept = self.parse([*params, *task])
        _check_sweeps(swept)
        (combinations,) = BasicSweeper.split_arguments(swept, max_batch_size=None)
        several = {override.get_key_element() for override in swept if override.is_sweep_override()}
        jobs = []
        for combination in combinations:
            try:
                jobs.append(self.check([*own, *combination]))
            except UserError as error:
                which = [value for value in combination if value.partition("=")[0] in several]
                raise UserError(f"{error} [{' '.join(which)}]" if which else str(error)) from error
        return jobs

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
        _check_ablation(cfg, reference, {override.key_or_group for override in parsed})
        settings.check_keys(_unresolved(cfg), reference)
        settings.validate(cfg)
        settings.check_types(settings.resolved(cfg), reference)
        launchers.check(cfg)
        if launchers.is_local(cfg.hydra):
            settings.check_device(cfg)
        settings.check_wandb_login(cfg)
        task = tuple(o.input_line or "" for o in parsed if not o.is_hydra_override())
        return Job(
            settings.run_id(cfg),
            settings.run_dir(cfg),
            settings.resolved(cfg),
            task,
            launchers.chosen(cfg.hydra),
            own_logging=bool(cfg.hydra.callbacks or cfg.hydra.verbose)
            or any(cfg.hydra.runtime.choices[f"hydra/{kind}"] != "bayesq" for kind in ("job_logging", "hydra_logging"))
            or any(override.key_or_group.startswith("hydra.job_logging") for override in parsed),
        )


def _check_sweeps(overrides: Sequence[Override]) -> None:
    """Refuse what Hydra's sweeper cannot list, and what lists nothing.

    Raises:
        UserError: naming the override.
    """
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: list the values, such as {override.key_or_group}=2,3,4")
        if not list(override.sweep_string_iterator()):
            raise UserError(f"{override.input_line}: there is no such value, so there is nothing to run")


def _check_ablation(cfg: DictConfig, reference: Mapping[str, Any], typed: Collection[str]) -> None:
    """Refuse an ablation of keys that the chosen method and the like do not have, and one that an experiment undoes.

    Hydra reads an experiment, which is added with `+`, after everything else.

    Args:
        cfg: a composed configuration.
        reference: what the files give for its choices without the ablation.
        typed: keys given on the command line, which may replace whatever they like.

    Raises:
        UserError: the ablation sets an unknown key, or the experiment one that the ablation switches.
    """
    choices = cfg.hydra.runtime.choices
    experiment, ablation = choices.get("experiment"), choices.get(ABLATION)
    file = conf_dir() / ABLATION / f"{ablation}.yaml"
    if not file.is_file():
        return
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    known = settings.flatten(reference)
    for key, value in settings.flatten({str(k): v for k, v in content.items() if k != "defaults"}).items():
        group = key.partition(".")[0]
        if key not in known and group in choices:
            raise UserError(
                f"ablation={ablation} sets {key}, which {group}={choices[group]} does not have: leave this "
                f"ablation out, or choose another {group}"
            )
        if experiment is not None and key not in typed and OmegaConf.select(cfg, key) != value:
            raise UserError(
                f"ablation={ablation} sets {key}={settings.show(value)}, but experiment={experiment} sets it to "
                f"{settings.show(OmegaConf.select(cfg, key))}: add {key}={settings.show(value)}"
            )


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    """The keys and raw values of a composed configuration without Hydra's node."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


def preflight(argv: Sequence[str]) -> list[Job] | None:
    """Check every job of a command line before anything runs.

    Returns the distinct jobs in the order they will run, an empty list when a sweeper other than Hydra's own decides
    them, or None when the command only asks Hydra for information (--help, --cfg, --info, ...).

    Raises:
        UserError: one line that names what is wrong.
    """
    arguments = command_line(argv)
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
