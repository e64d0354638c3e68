"""Settings that are not the suite's defaults, and the overrides that make a run again."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from bayesq.defaults import METHOD_METADATA, conf_dir
from bayesq.suite.composition import CONFIG_NAME
from bayesq.suite.config import resolved, show
from bayesq.suite.results import neutral_settings, settings_of

AXES = ("model", "dataset", "method")
# Places of files do not change results, and the task is part of the workload's name.
NOT_NAMED = ("dataset.root", "dataset.hub", "dataset.task")
PLACES = (*NOT_NAMED, "model.checkpoint", "model.name", "dataset.name")
# Descriptions of networks and data sets are no settings.
DESCRIBED = ("model.tasks", "dataset.tasks")
METADATA = tuple(f"method.{key}" for key in METHOD_METADATA)


def command_overrides(run: Mapping[str, Any]) -> list[str]:
    """Overrides that start a run again: the recorded ones, else the differences between its config and the defaults."""
    if run.get("overrides"):
        return list(run["overrides"])
    config = run.get("config")
    if not isinstance(config, Mapping):
        return []
    settings = settings_of({"config": config, "seed": run["seed"]})
    axes = {axis: str(settings[axis]) for axis in (*AXES, "posterior") if axis in settings}
    defaults = _defaults(tuple(axes.items()))
    task = ["dataset.task"] if "dataset.task" in settings else []
    keys = [
        *AXES,
        *task,
        *(key for key in settings if key in defaults and defaults[key] != settings[key] and key not in AXES),
    ]
    chosen = {key: settings[key] for key in dict.fromkeys([*keys, "bits"])}
    return [*(f"{key}={show(value)}" for key, value in chosen.items() if value is not None), f"seed={run['seed']}"]


def unchanged_values(runs: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The defaults of a method that has no YAML file in the suite: what its keys are in runs that did not set them.

    A key without such a run, or with several values in them (the file was edited), has no known default.

    Args:
        runs: of one method, with `overrides` where these were recorded.
        settings: `settings_of` each.
    """
    if is_of_the_suite("method", str(settings[0]["method"])):
        return {}
    values: dict[str, list[Any]] = {}
    for run, chosen in zip(runs, settings, strict=True):
        typed = {override.lstrip("+").partition("=")[0] for override in run["overrides"]}
        if not typed:  # not recorded
            continue
        for key, value in chosen.items():
            if key.startswith("method.") and key not in typed:
                values.setdefault(key, []).append(value)
    return {key: same[0] for key, same in values.items() if all(value == same[0] for value in same)}


def named_deviations(
    config: Mapping[str, Any], settings: Mapping[str, Any], keys: Sequence[str], unchanged: Mapping[str, Any]
) -> list[str]:
    """Those of `keys` that are not at the default, as name=value; keys of the method without its prefix.

    Args:
        config: of a run.
        settings: `settings_of` it.
        keys: of `settings`.
        unchanged: defaults of a method that has no file in the suite, see `unchanged_values`.
    """
    defaults = {**unchanged, **_method_defaults(config, settings)} if keys else {}
    return [
        f"{key.removeprefix('method.')}={show(settings[key])}"
        for key in keys
        if key in settings and not (key in defaults and defaults[key] == settings[key])
    ]


def deviations(run: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of a run that differs from the default for its model, data set and method, as typed.

    The axes, budget, seed and places of files are left out. If no YAML file of the suite has the name of the model,
    data set, method or posterior (`model=timm`, a method of the user's), its settings are those in the run's overrides.

    Args:
        run: a row of `load_runs` with a configuration.
    """
    settings = settings_of({"config": run["config"], "seed": run["seed"]})
    choices = {axis: str(settings[axis]) for axis in (*AXES, "posterior") if axis in settings}
    defaults = {
        **neutral_settings(run["config"]),
        **_method_defaults(run["config"], settings),
        **{
            key: value
            for axis in ("model", "dataset")
            for key, value in _defaults(((axis, choices[axis]),)).items()
            if key.startswith(f"{axis}.")
        },
    }
    strange = [axis for axis, name in choices.items() if not is_of_the_suite(axis, name)]
    changed = {}
    for key, value in settings.items():
        skipped = key in (*AXES, "bits", *PLACES, *DESCRIBED) or ("." in key and key.partition(".")[0] in strange)
        if not skipped and key in defaults and defaults[key] != value:
            changed[key] = show(value)
    for override in command_overrides(run) if strange else []:
        key, _, text = override.lstrip("+").partition("=")
        if key.partition(".")[0] in strange and "." in key and key not in (*PLACES, *DESCRIBED, *METADATA):
            changed[key] = text
    return changed


def switches_nothing(ablation: str) -> bool:
    """Whether an ablation of the suite sets only defaults, such as `inputs_full` if the default is inputs=full."""
    return _defaults((("ablation", ablation),)) == _defaults(())


def is_of_the_suite(axis: str, name: str) -> bool:
    """Whether conf/ has a YAML file of this name."""
    return (conf_dir() / axis / f"{name}.yaml").is_file()


def _method_defaults(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a run's method and posterior.

    The YAML file of a method that is not the suite's is recorded with the run. It has the defaults of allocator,
    inputs, correction and rotate; those of the method's own keys are not known.
    """
    axes = tuple((axis, str(settings[axis])) for axis in ("method", "posterior") if axis in settings)
    defaults = _defaults(axes)
    if is_of_the_suite("method", str(settings["method"])):
        return defaults
    usual = {"allocator": "uniform", "inputs": "full", "correction": "none", "rotate": False}
    of_file = {key: config["method"].get(key, value) for key, value in usual.items()}
    return {key: value for key, value in defaults.items() if not key.startswith("method.")} | of_file


@cache
def _defaults(axes: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """`settings_of` the suite's YAML files with these choices; unknown choices are ignored.

    The name of the posterior is the suite's default; its settings are the defaults of the chosen posterior.
    """
    choices = [f"{axis}={name}" for axis, name in axes if is_of_the_suite(axis, name)]
    choices.append("++dataset.task=null")  # it has no default
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose(CONFIG_NAME, overrides=choices)
    for key in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, key, None)
    config = resolved(composed)
    settings = settings_of({"config": config, "seed": config["seed"]})
    return {**settings, "posterior": _defaults(())["posterior"]} if axes else settings
