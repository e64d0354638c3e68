"""The configurations of a command: composed the way Hydra will, checked before anything runs.

Hydra composes and sweeps. Here every key is set as behind `++`, so that any choice of method, data set and so on can
be combined with any key; which keys there are, the YAML files of the choices say (`config.check_keys`).
"""

import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import bayesq
from bayesq.suite import config as settings
from bayesq.suite import launchers, schema
from bayesq.suite.arguments import command_line
from bayesq.suite.errors import UserError

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
# what sets keys of other groups, and has no keys in a configuration
PRESETS = ("ablation", "experiment")
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ConfigLoadError, YAMLError, ValueError)


@dataclass(frozen=True)
class Job:
    """One run of a command: its resolved configuration, its folder, its overrides as typed, and what starts it."""

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


def for_hydra(override: str, config_dir: str | None = None) -> str:
    """An override as Hydra gets it: a key behind `++`, a choice on an axis without `+`, all else as it is typed.

    Args:
        override: as it is typed.
        config_dir: folder with groups that are on no axis.
    """
    bare = override.lstrip("+")
    key = re.split(r"[=@]", bare)[0]
    if bare.startswith(("~", "hydra.", "hydra/")) or "=" not in bare:
        return override
    if (conf_dir() / key).is_dir():
        return bare
    return override if config_dir is not None and (Path(config_dir) / key).is_dir() else f"++{bare}"


def as_typed(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides without what `for_hydra` adds."""
    return tuple(override.removeprefix("++") for override in overrides)


class Preflight:
    """Composes the configurations of a command the way Hydra will, and explains what is wrong with them.

    Args:
        config_name, config_path, config_dir: Hydra's options of these names; None takes the suite's.

    Raises:
        UserError: a folder is missing.
    """

    def __init__(
        self, config_name: str | None = None, config_path: str | None = None, config_dir: str | None = None
    ) -> None:
        if config_dir is not None and not os.path.isdir(config_dir):
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        self.config_name, self.config_dir = config_name or CONFIG_NAME, config_dir
        path = os.path.abspath(config_path or conf_dir())
        with initialize_config_dir(path, job_name="bayesq", version_base=VERSION_BASE):
            self.loader = GlobalHydra.instance().config_loader()
        self.search_path = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
        self.parser = OverridesParser.create(config_loader=self.loader)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._groups: dict[str, list[str]] = {}

    def compose(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The configuration that Hydra composes, with Hydra's node; read-only, because it is shared.

        Raises:
            UserError: what Hydra says is wrong.
        """
        key = (*overrides, mode.name)
        if key not in self._composed:
            try:
                self._composed[key] = self.loader.load_configuration(
                    self.config_name, [*self.search_path, *overrides], run_mode=mode
                )
            except COMPOSITION_ERRORS as error:
                raise UserError(settings.explanation(error)) from error
        return self._composed[key]

    def compose_job(self, parsed: Sequence[Override]) -> tuple[DictConfig, DictConfig, dict[str, Any]]:
        """The configuration of one of many jobs, Hydra's node, and the `reference` of its choices.

        Jobs with the same choices share what the YAML files give. Hydra too sets single keys after it has read the
        files, in the order in which they are typed.
        """
        keys = [o for o in parsed if o.is_force_add() and not o.is_hydra_override() and o.package is None]
        base = self.compose([str(o.input_line) for o in parsed if o not in keys])
        choices = {group: name for group, name in base.hydra.runtime.choices.items() if not group.startswith("hydra/")}
        cfg = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
        presets = [name for group, name in choices.items() if not self.is_axis(group)]
        reference = (
            self.reference(choices) if any(name not in (None, "full") for name in presets) else settings.plain(cfg)
        )
        for override in keys:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
        return cfg, base.hydra, reference

    @staticmethod
    def is_axis(group: str) -> bool:
        """Whether a choice in this group is needed, and has keys; presets set keys of other groups."""
        return group not in PRESETS and (conf_dir() / group).is_dir()

    def reference(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config that the YAML files give for a choice on every axis, without presets and other overrides."""
        cfg = self.compose([f"{group}={name}" for group, name in sorted(choices.items()) if self.is_axis(group)])
        return {key: value for key, value in settings.plain(cfg).items() if key != "hydra"}

    def _options(self, group: str) -> list[str]:
        """The files of a config group; empty when `group` is no group."""
        if group not in self._groups:
            self._groups[group] = list(
                self.loader.get_group_options(group, config_name=self.config_name, overrides=self.search_path)
            )
        return self._groups[group]

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Hydra's reading of the arguments, each as `for_hydra` has it.

        Raises:
            UserError: naming the argument that cannot be read, removes a key, or chooses what there is not.
        """
        parsed = [self._parse_one(override) for override in overrides]
        for override in parsed:
            key, typed = override.key_or_group, str(override.input_line).removeprefix("++")
            if override.is_hydra_override():
                continue
            if override.is_delete():
                raise UserError(f"{typed}: every run needs '{key}', it cannot be removed")
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [override.value()]
            if not values:
                raise UserError(f"{typed}: there is no such value, so there is nothing to run")
            for value in values:
                if (options := self._options(key)) and value not in options:
                    hint = settings.suggestion(str(value), options)
                    settings.refuse(key, value, f"choose one of {', '.join(options)}{hint}")
        return parsed

    def _parse_one(self, typed: str) -> Override:
        try:
            return self.parser.parse_overrides([for_hydra(typed, self.config_dir)])[0]
        except Exception as error:  # under python -O the parser fails at any function
            reason = settings.one_line(getattr(error, "message", str(error)).partition("\nSee ")[0])
            if sys.flags.optimize:
                reason = "range(), glob(), choice() and {...} need Python's assertions: unset PYTHONOPTIMIZE"
            raise UserError(f"cannot read '{typed}': write key=value ({reason})") from error

    def jobs(self, typed: Sequence[str], multirun: bool) -> list[Job]:
        """Check every job of the command: one without a sweep, the product of all lists of values with one.

        What a sweeper other than Hydra's basic one will try is its decision: then what it cannot vary is checked and
        the list is empty.

        Raises:
            UserError: one line that names what is wrong with the first bad job.
        """
        parsed = self.parse(typed)
        master = self.compose([str(override.input_line) for override in parsed], RunMode.MULTIRUN).hydra
        sweeps = as_typed([str(override.input_line) for override in parsed if override.is_sweep_override()])
        if not multirun and master.mode != RunMode.MULTIRUN:
            if sweeps:
                raise UserError(f"{sweeps[0]} lists several values: add -m to run every combination")
            job = self.check(typed)
            if job.launcher is not None:
                raise UserError(f"hydra/launcher={job.launcher.name} starts the runs of a sweep: add -m")
            return [job]
        if master.sweeper._target_ != BASIC_SWEEPER:
            self.check([str(override.input_line) for override in parsed if not override.is_sweep_override()])
            return []
        params = self.parse([f"{key}={value}" for key, value in (master.sweeper.params or {}).items()])
        # Hydra gives the overrides of hydra.* to every job; what is typed comes after the parameters of the sweeper
        parsed.sort(key=lambda override: not override.is_hydra_override())
        hydra = [override for override in parsed if override.is_hydra_override()]
        several = [*hydra, *params, *parsed[len(hydra) :]]
        jobs = []
        for combination in itertools.product(*map(_values, several)):
            try:
                jobs.append(self.check(combination))
            except UserError as error:
                pairs = zip(several, combination, strict=True)
                swept = as_typed([value for override, value in pairs if override.is_sweep_override()])
                raise UserError(f"{error} [{' '.join(swept)}]" if swept else str(error)) from error
        return jobs

    def check(self, typed: Sequence[str]) -> Job:
        """Compose one job and check all that can be checked before it runs.

        Raises:
            UserError: one line that names what is wrong.
        """
        parsed = self.parse(typed)
        cfg, hydra, reference = self.compose_job(parsed)
        choices = hydra.runtime.choices
        try:
            settings.check_keys(settings.plain(cfg), reference)
        except UserError as error:
            if choices.get("ablation") in (None, "full"):
                raise
            raise UserError(f"ablation={choices.ablation} with method={choices.method}: {error}") from error
        config = schema.validate(cfg)
        launchers.check(hydra, config)
        if launchers.is_local(hydra):
            settings.check_device(cfg)
        settings.check_wandb_login(cfg)
        run_id = settings.id_of(settings.settings_that_matter(config), bayesq.__version__)
        overrides = [str(override.input_line) for override in parsed if not override.is_hydra_override()]
        folder = Path(config["results_dir"]).absolute() / run_id
        return Job(run_id, folder, config, as_typed(overrides), launchers.chosen(hydra))


def _values(override: Override) -> list[str]:
    """One override for each value that an override lists.

    Raises:
        UserError: it gives a range of real numbers.
    """
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        typed = str(override.input_line).removeprefix("++")
        raise UserError(f"{typed}: list the values, such as {override.key_or_group}=2,3,4")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def preflight(argv: Sequence[str]) -> list[Job] | None:
    """Check every job of a command line before anything runs.

    Returns the distinct jobs in the order they will run, an empty list when a sweeper other than Hydra's decides
    them, or None when the command only asks Hydra for information (--help, --cfg, --info, ...).

    Raises:
        UserError: one line that names what is wrong.
    """
    asked = command_line(argv)
    questions = (asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion)
    if any(questions) or asked.experimental_rerun:
        return None
    jobs = Preflight(asked.config_name, asked.config_path, asked.config_dir).jobs(asked.overrides, asked.multirun)
    return list({job.run_dir: job for job in jobs}.values())


@contextmanager
def hydra_argv() -> Iterator[None]:
    """Give Hydra the command line with the overrides first, as `for_hydra` has them, and errors as exceptions.

    Hydra's parser refuses overrides on both sides of an option, and it prints errors unless HYDRA_FULL_ERROR is 1.
    """
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    read = command_line(argv[1:])
    options = [argument for argument in argv[1:] if argument not in read.overrides]
    sys.argv = [argv[0], *(for_hydra(override, read.config_dir) for override in read.overrides), *options]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
