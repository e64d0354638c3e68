"""Titles, colours, markers and order of methods, from the block `display` of their YAML files (conf/method).

For a method without a file in the suite, the block is in the configuration of its runs, from the user's file
(`--config-dir`). Without a block, a method has its name as title, the next free colour and marker, and comes last.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.colors import is_color_like
from omegaconf import OmegaConf

from bayesq.defaults import conf_dir
from bayesq.suite.errors import UserError
from bayesq.suite.results import settings_of

# Colours of Okabe and Ito, distinct for colour-blind readers, that no method of the suite uses; then others.
FREE_COLORS = ("#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F3C8D", "#999933")
FREE_MARKERS = ("v", "P", "X", "<", ">", "p", "h", "*")
# Settings whose values are in labels, with the defaults of methods whose YAML has none.
DEFAULTS = {"allocator": "uniform", "inputs": "full", "correction": "none"}


@dataclass(frozen=True)
class Method:
    """What tables and figures need to know about a method.

    Attributes:
        title: in captions, heads and legends.
        color: hex code.
        marker: of matplotlib.
        order: place in tables and legends, smallest first; the last one is drawn on top.
        data_free: whether it reads no calibration data, so that every seed gives the same result.
        rival: the values of `inputs` with which it is a rival of the proposed method; none if it is no rival.
    """

    name: str
    title: str
    color: str
    marker: str
    order: float
    data_free: bool
    rival: tuple[str, ...] = ()


def methods_of(runs: pd.DataFrame | None = None) -> dict[str, Method]:
    """Every method of the suite, and of runs, in order.

    Args:
        runs: with a column `method`; a column `config` describes methods that the suite has no file of.

    Raises:
        UserError: a method's color is not one of matplotlib's.
    """
    blocks = dict(_suite_blocks())
    of_runs = pd.DataFrame(runs, columns=["method", "config"]).dropna(subset="method")
    for name, config in of_runs.itertuples(index=False, name=None):
        if name not in _suite_blocks():
            blocks[name] = blocks.get(name, {}) | (config["method"] if isinstance(config, Mapping) else {})
    displays = {name: blocks[name].get("display") or {} for name in sorted(blocks)}
    for name, display in displays.items():
        if not is_color_like(color := display.get("color") or "black"):
            raise UserError(f"display.color={color} of method={name}: needs a color of matplotlib, such as '#1b9e77'")
    colors = _free(FREE_COLORS, (display.get("color") for display in displays.values()))
    markers = _free(FREE_MARKERS, (display.get("marker") for display in displays.values()))
    methods = [
        Method(
            name=name,
            title=str(display.get("title", name)),
            color=str(display.get("color") or next(colors)),
            marker=str(display.get("marker") or next(markers)),
            order=float(display.get("order", math.inf)),
            data_free=blocks[name].get("data_free") is True,
            rival=tuple(display.get("rival", ())),
        )
        for name, display in displays.items()
    ]
    return {method.name: method for method in sorted(methods, key=lambda method: (method.order, method.name))}


def title(method: str) -> str:
    """The title of a method of the suite; of another one its name."""
    methods = methods_of()
    return methods[method].title if method in methods else method


def is_data_free(method: str, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a method reads no calibration data, by the suite's file or else by a run's configuration."""
    block = _suite_blocks().get(method) or (config or {}).get("method", {})
    return block.get("data_free") is True


def default_of(method: str, key: str) -> str:
    """The default of allocator, inputs or correction for a method of the suite; of another one that of most methods."""
    return str(_suite_blocks().get(method, {}).get(key, DEFAULTS[key]))


def setting(run: Mapping[str, Any], key: str) -> str:
    """The allocator, inputs or correction of a run; the method's default for a record of an older version."""
    settings = settings_of({"config": run["config"], "seed": run["seed"]})
    return str(settings.get(key, default_of(run["method"], key)))


def label(variant: str, methods: Mapping[str, Method]) -> str:
    """A variant as a legend shows it: `gptq allocator=knapsack refits=2` is `GPTQ + knapsack refits=2`."""
    name, *settings = variant.split(" ")
    return " ".join([methods[name].title if name in methods else name, *map(_in_label, settings)])


def _in_label(setting: str) -> str:
    """A setting as `label` shows it: only the value of allocator, inputs or correction."""
    key, _, value = setting.partition("=")
    if key not in DEFAULTS:
        return setting
    return "+ no correction" if setting == "correction=none" else f"+ {value}"


def _free(choices: Sequence[str], taken: Iterable[Any]) -> Iterator[str]:
    """Cycle endlessly through the choices that are not taken, or through all if none is left."""
    used = set(taken)
    return cycle([choice for choice in choices if choice not in used] or choices)


@cache
def _suite_blocks() -> dict[str, dict[str, Any]]:
    """The contents of conf/method/*.yaml by the method's name."""
    files = [OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((conf_dir() / "method").glob("*.yaml"))]
    return {
        str(file["name"]): {str(key): value for key, value in file.items()} for file in files if isinstance(file, dict)
    }
