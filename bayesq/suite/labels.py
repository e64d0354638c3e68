"""The label of a run's model: its name and the keys of the network that differ from its YAML file.

The label of `model=cifar_resnet56 model.depth=44` is `cifar_resnet56(depth=44)`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from omegaconf import OmegaConf

from bayesq.defaults import DESCRIPTIVE, conf_dir
from bayesq.suite.config import show

# Keys that the label leaves out: source and training of the weights, and inputs.
NOT_THE_NETWORK = {
    *DESCRIPTIVE,
    *("adapter", "checkpoint", "revision", "source", "hub", "hub_label_order", "label_order"),
    *("max_length", "epochs", "training_seed"),
}
# Files of the group `model` whose key `name` selects the network: model=timm model.name=resnet50.
NAMED = ("timm", "transformers", "causal_lm")


def model_label(config: Mapping[str, Any]) -> str:
    """The label of the model in a plain, resolved `config`."""
    model = config["model"]
    name = str(model.get("name"))
    files = [_file(name), *(file for file in map(_file, NAMED) if file.get("_target_") == model.get("_target_"))]
    differences = min((_changes(model, file) for file in files if file), key=len, default={})
    changed = ",".join(f"{key}={show(value)}" for key, value in differences.items())
    return f"{name}({changed})" if changed else name


def _changes(model: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the network whose values differ from the file, with their values in `model`."""
    reference = OmegaConf.create({"model": {**file, "name": model.get("name")}})
    known = cast(dict[str, Any], OmegaConf.to_container(reference, resolve=True))["model"]
    keys = [key for key in model if key in known and key not in NOT_THE_NETWORK]
    return {key: model[key] for key in keys if model[key] != known[key]}


@cache
def _file(name: str) -> dict[str, Any]:
    """The unresolved content of conf/model/<name>.yaml, merged with its defaults; empty if the file does not exist."""
    file = next((file for file in (conf_dir() / "model").glob("*.yaml") if file.stem == name), None)
    if file is None:
        return {}
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))
    below = {key: value for base in content.pop("defaults", []) for key, value in _file(base).items()}
    return {**below, **content}
