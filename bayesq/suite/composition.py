"""The configurations of a command, composed as Hydra composes them and checked before anything runs.

Every key is set as if `++` were typed before it, so any choice can be combined with any key. The YAML files of the
choices define which keys exist (`config.check_keys`).
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bayesq.defaults import conf_dir, suggestion
from bayesq.suite import config as settings
from bayesq.suite import launchers, schema
from bayesq.suite.arguments import command_line
from bayesq.suite.errors import UserError

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
# groups whose files set keys of other groups
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


def for_hydra(override: str, config_dir: str | None = None) -> str:
    """Add `++` to an override of a key; remove `+` from a choice of a group; leave others as they were typed.

    Groups are folders of conf/ and of `config_dir`.
    """
    bare = override.lstrip("+")
    key = re.split(r"[=@]", bare)[0]
    if bare.startswith(("~", "hydra.", "hydra/")) or "=" not in bare:
        return override
    if (conf_dir() / key).is_dir():
        return bare
    return override if config_dir is not None and (Path(config_dir) / key).is_dir() else f"++{bare}"


def as_typed(override: object) -> str:
    """The text of an override, typed or parsed by Hydra, without the `++` of `for_hydra`."""
    return str(getattr(override, "input_line", override)).removeprefix("++")


def is_axis(group: str) -> bool:
    """Whether every run needs a choice of this group; presets are optional."""
    return group not in PRESETS and (conf_dir() / group).is_dir()


def check_names(folder: Path) -> None:
    """Raise UserError if a YAML file in a user's folder has the name of one of conf/: Hydra would read ours."""
    for ours in sorted(conf_dir().rglob("*.yaml")):
        name = ours.relative_to(conf_dir())
        if (folder / name).is_file() and not ours.samefile(folder / name):
            raise UserError(
                f"--config-dir {folder}: {name} would be ignored, because conf/ of the suite has a file of this name: "
                "rename it, or set its keys on the command line"
            )


class Preflight:
    """Composes the configurations of a command, with Hydra's options, and explains what is wrong with them."""

    def __init__(
        self, config_name: str | None = None, config_path: str | None = None, config_dir: str | None = None
    ) -> None:
        if config_dir is not None and not os.path.isdir(config_dir):
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        if config_dir is not None and config_path is None:
            check_names(Path(config_dir))
        self.config_name, self.config_dir = config_name or CONFIG_NAME, config_dir
        path = os.path.abspath(config_path or conf_dir())
        with initialize_config_dir(path, job_name="bayesq", version_base=VERSION_BASE):
            self.loader = GlobalHydra.instance().config_loader()
        self.search_path = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
        self.parser = OverridesParser.create(config_loader=self.loader)
        # a cache on the class would keep every object alive
        self._compose, self._options = cache(self._compose), cache(self._options)  # type: ignore[method-assign]

    def compose(self, overrides: Iterable[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The configuration that Hydra composes, with Hydra's node, or UserError. Cached: do not change it."""
        try:
            return self._compose((*self.search_path, *overrides), mode)
        except COMPOSITION_ERRORS as error:
            raise UserError(settings.explanation(error)) from error

    def _compose(self, overrides: tuple[str, ...], mode: RunMode) -> DictConfig:
        return self.loader.load_configuration(self.config_name, list(overrides), run_mode=mode)

    def compose_job(self, parsed: Sequence[Override]) -> tuple[DictConfig, DictConfig, dict[str, Any]]:
        """The configuration of a job, Hydra's node, and the `reference` of its choices.

        Jobs with the same choices share one composition. Single keys are set afterwards in typed order, as Hydra does.
        """
        keys = [o for o in parsed if o.is_force_add() and not o.is_hydra_override() and o.package is None]
        base = self.compose([str(o.input_line) for o in parsed if o not in keys])
        choices = {group: name for group, name in base.hydra.runtime.choices.items() if not group.startswith("hydra/")}
        cfg = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
        presets = [name for group, name in choices.items() if not is_axis(group)]
        changed = any(name not in (None, "full") for name in presets)
        reference = self.reference(choices) if changed else settings.plain(cfg)
        for override in keys:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
        return cfg, base.hydra, reference

    def reference(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The plain configuration of a choice on every axis, without presets and other overrides."""
        cfg = self.compose(f"{group}={name}" for group, name in sorted(choices.items()) if is_axis(group))
        return {key: value for key, value in settings.plain(cfg).items() if key != "hydra"}

    def _options(self, group: str) -> list[str]:
        """The files of a config group; empty when `group` is no group."""
        return self.loader.get_group_options(group, config_name=self.config_name, overrides=self.search_path)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse overrides with Hydra's parser, each rewritten by `for_hydra`.

        Raises:
            UserError: naming the override that cannot be read, removes a key, or chooses an unknown file.
        """
        parsed = [self._parse_one(override) for override in overrides]
        for override in parsed:
            key, typed = override.key_or_group, as_typed(override)
            if override.is_hydra_override():
                continue
            if override.is_delete():
                raise UserError(f"{typed}: every run needs '{key}', it cannot be removed")
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [override.value()]
            if not values:
                raise UserError(f"{typed}: there is no such value, so there is nothing to run")
            for value in values:
                if (options := self._options(key)) and value not in options:
                    hint = suggestion(str(value), options)
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
        """Check every job of the command, or raise UserError; with `multirun`, every combination of the listed values.

        A sweeper other than Hydra's basic one chooses the values later. Then only the other keys are checked, and the
        list is empty.
        """
        parsed = self.parse(typed)
        master = self.compose([str(override.input_line) for override in parsed], RunMode.MULTIRUN).hydra
        sweeps = [as_typed(override) for override in parsed if override.is_sweep_override()]
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
        # Hydra passes overrides of hydra.* to every job; typed overrides come after the sweeper's parameters
        parsed.sort(key=lambda override: not override.is_hydra_override())
        hydra = [override for override in parsed if override.is_hydra_override()]
        several = [*hydra, *params, *parsed[len(hydra) :]]
        lists = {override.get_key_element(): override for override in several if override.is_sweep_override()}
        for override in lists.values():
            if not override.is_discrete_sweep():
                raise UserError(f"{as_typed(override)}: list the values, such as {override.key_or_group}=2,3,4")
        jobs = []
        (combinations,) = BasicSweeper.split_arguments(several, None)
        for combination in combinations:
            try:
                jobs.append(self.check(combination))
            except UserError as error:
                swept = [as_typed(value) for value in combination if value.partition("=")[0] in lists]
                raise UserError(f"{error} [{' '.join(swept)}]" if swept else str(error)) from error
        return jobs

    def check(self, typed: Sequence[str]) -> Job:
        """Compose one job and check what can be checked before it runs; UserError says in one line what is wrong."""
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
        overrides = tuple(as_typed(override) for override in parsed if not override.is_hydra_override())
        folder = settings.dir_of(config)
        return Job(folder.name, folder, config, overrides, launchers.chosen(hydra))


def preflight(argv: Sequence[str]) -> list[Job] | None:
    """Check every job of a command line before anything runs; UserError says in one line what is wrong.

    Returns:
        the distinct jobs in the order of the sweep; none if another sweeper than Hydra's chooses them; None if the
        command only asks for information (--help, --cfg, --info, ...).
    """
    asked = command_line(argv)
    if asked.experimental_rerun:
        raise UserError("--experimental-rerun is not supported: python -m bayesq.suite.reproduce repeats a run")
    if any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion)):
        return None
    jobs = Preflight(asked.config_name, asked.config_path, asked.config_dir).jobs(asked.overrides, asked.multirun)
    return list({job.run_dir: job for job in jobs}.values())
