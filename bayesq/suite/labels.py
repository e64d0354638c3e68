"""What a run calls its model: the name of its YAML file, and what was changed of the network.

`model=cifar_resnet56 model.depth=44` is no ResNet-56: it is called `cifar_resnet56(depth=44)`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from omegaconf import OmegaConf

from bayesq.defaults import DESCRIPTIVE, conf_dir
from bayesq.suite.config import show

# keys of a model that say where its weights come from, how they were trained and what they are fed: the network stays
NOT_THE_NETWORK = frozenset(
    [
        *DESCRIPTIVE,
        *("checkpoint", "revision", "source", "hub", "hub_label_order", "label_order"),
        *("max_length", "epochs", "training_seed"),
    ]
)
# files of the group `model` whose network is the one that is named: model=timm model.name=resnet50
NAMED = ("timm", "transformers")


def model_label(config: Mapping[str, Any]) -> str:
    """The name of a run's model; with whatever differs from the model's YAML file and makes another network of it.

    Args:
        config: plain and resolved.
    """
    model = config["model"]
    name = str(model.get("name"))
    files = [_file(name), *(file for file in map(_file, NAMED) if file.get("_target_") == model.get("_target_"))]
    differences = min((_changes(model, file) for file in files if file), key=len, default={})
    if not differences:
        return name
    return f"{name}({','.join(f'{key}={show(value)}' for key, value in differences.items())})"


def _changes(model: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the network whose values are not what the file gives a model of this name, with these values."""
    reference = OmegaConf.create({"model": {**file, "name": model.get("name")}})
    known = cast(dict[str, Any], OmegaConf.to_container(reference, resolve=True))["model"]
    keys = [key for key in model if key in known and key not in NOT_THE_NETWORK]
    return {key: model[key] for key in keys if model[key] != known[key]}


@cache
def _file(name: str) -> dict[str, Any]:
    """What conf/model/<name>.yaml gives, unresolved, with the files it builds on; nothing where there is none."""
    file = next((file for file in (conf_dir() / "model").glob("*.yaml") if file.stem == name), None)
    if file is None:
        return {}
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))
    below = {key: value for base in content.pop("defaults", []) for key, value in _file(base).items()}
    return {**below, **content}
