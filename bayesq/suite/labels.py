"""What a run calls its model: the name of its YAML file, and what was changed of the network.

`model=cifar_resnet56 model.depth=44` is no ResNet-56: it is called `cifar_resnet56(depth=44)`.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bayesq.suite.composition import conf_dir
from bayesq.suite.config import DESCRIPTIVE, show

# keys of a model that say where its weights come from, how they were trained and what they are fed: the network stays
NOT_THE_NETWORK = frozenset(
    [
        *DESCRIPTIVE,
        *("checkpoint", "revision", "source", "hub", "hub_label_order", "label_order"),
        *("max_length", "epochs", "training_seed"),
    ]
)


def model_label(config: Mapping[str, Any]) -> str:
    """The name of a run's model; with whatever differs from the model's YAML file and makes another network of it.

    Args:
        config: plain and resolved.
    """
    model = config["model"]
    name = str(model.get("name"))
    # a file that takes any name (model=timm model.name=...) describes this one as well
    described = [
        file
        for file in _files()
        if file.get("name") == name or (_takes_names(file) and file.get("_target_") == model.get("_target_"))
    ]
    differences = min((_changes(model, file) for file in described), key=len, default={})
    if not differences:
        return name
    return f"{name}({','.join(f'{key}={show(value)}' for key, value in differences.items())})"


def _changes(model: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the network whose values are not what the file gives a model of this name, with these values."""
    reference = OmegaConf.create({"model": {**file, "name": model.get("name")}})
    try:
        given = OmegaConf.to_container(reference, resolve=True)
    except OmegaConfBaseException:  # it refers to keys outside the model
        given = OmegaConf.to_container(reference, resolve=False)
    assert isinstance(given, dict)
    known = given["model"]
    keys = [key for key in model if key in known and key not in NOT_THE_NETWORK]
    return {key: model[key] for key in keys if model[key] != known[key]}


def _takes_names(file: Mapping[str, Any]) -> bool:
    """Whether the file's network depends on the name that it is given."""
    return file.get("name") == "???" or any("name}" in value for value in file.values() if isinstance(value, str))


def _files() -> Iterator[dict[str, Any]]:
    """What each file of the group `model` gives, of the suite and of folders given with --config-dir."""
    folders = [conf_dir()]
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders = [*(Path(source.path) for source in sources if source.schema == "file"), *folders]
    for folder in dict.fromkeys(folders):
        yield from _models(folder)


@cache
def _models(folder: Path) -> tuple[dict[str, Any], ...]:
    """The contents of <folder>/model/*.yaml, unresolved, each with those it builds on."""
    found = []
    for file in sorted((folder / "model").glob("*.yaml")):
        try:
            found.append(_content(file))
        except (OSError, YAMLError, OmegaConfBaseException):  # a file of the user's that no run could have chosen
            continue
    return tuple(found)


def _content(file: Path) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(loaded, dict):
        return {}
    below: dict[str, Any] = {}
    for default in loaded.pop("defaults", []):
        base = file.with_name(f"{default}.yaml")
        if isinstance(default, str) and default != "_self_" and base.is_file():
            below |= _content(base)
    return {**below, **{str(key): value for key, value in loaded.items()}}
