"""The schema of conf/config.yaml: the type of every key, its allowed values, and which values fit together.

The YAML file has the defaults and explains each key. Constructors check the keys of the groups model, dataset, method
and posterior (`construct.check`); only the sizes of a data set are here too, because other keys are compared with them.
Nothing here imports torch.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bayesq.defaults import MAX_BITS, MIN_BITS, suggestion
from bayesq.suite.config import cache_folder, refuse, resolved, show
from bayesq.suite.errors import UserError


def value(needs: str, holds: Callable[[Any], bool] | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field, with the rule for its key in words and as a condition, which null need not fulfil."""
    return field(default=MISSING, metadata={"needs": needs, "holds": holds, "choices": choices})


def whole(low: int, high: int | None = None, null: str = "") -> Any:
    """A whole number from `low` to `high`; `null` explains null where it is allowed."""
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    text = f"needs a whole number {span}{f', or null {null}' if null else ''}"
    return value(text, lambda number: low <= number and (high is None or number <= high))


def _one_of(*choices: str) -> Any:
    return value(f"choose one of {', '.join(choices)}", choices.__contains__, choices)


def _flag() -> Any:
    return value("needs true or false")


def _is_width(number: object) -> bool:
    return type(number) is int and MIN_BITS <= number <= MAX_BITS


def _are_widths(numbers: object) -> bool:
    return isinstance(numbers, list) and 0 < len(numbers) == len({*map(repr, numbers)}) and all(map(_is_width, numbers))


def _is_named(text: str) -> bool:
    return bool(text.strip())


_WIDTH = f"a whole number from {MIN_BITS} to {MAX_BITS}"
_WIDTHS = f"a list of different whole numbers from {MIN_BITS} to {MAX_BITS}"
_LAYERS = "needs layer patterns with {} each, such as allocation.{}"


@dataclass
class _Resources:
    cpus: int = whole(1)
    gpus: int = whole(0)
    memory: float | None = value("needs a number of GiB above 0, or null for what is free", lambda number: number > 0)


@dataclass
class _Allocation:
    block: str = value("needs a name")  # Knapsack checks it
    group_rows: int = whole(1)
    row_multiple: int = whole(1)
    widths: list[int] = value(f"needs {_WIDTHS}, such as [2,3,4,5,6,8]", _are_widths)
    min_width: int | None = whole(MIN_BITS, MAX_BITS, null="for no limit")
    pinned: dict[Any, Any] = value(
        _LAYERS.format(_WIDTH, "pinned={conv1:8}"), lambda rules: all(map(_is_width, rules.values()))
    )
    allowed: dict[Any, Any] = value(
        _LAYERS.format(_WIDTHS, "allowed={conv1:[4,8]}"), lambda rules: all(map(_are_widths, rules.values()))
    )


@dataclass
class _Budget:
    count: str = _one_of("code", "stored")


@dataclass
class _MonteCarlo:
    samples: int = whole(0)
    examples: int = whole(1)


@dataclass
class _Distillation:
    samples: int = whole(0)
    moments: bool = _flag()
    # DistillationSettings checks the ranges of these
    steps: int = value("needs a whole number")
    evaluations: int = value("needs a whole number")
    held_out: float = value("needs a share between 0 and 1")
    batch_size: int = whole(1)


@dataclass
class _Calibration:
    examples: int = whole(1)
    batch_size: int = whole(1)
    offload: str = _one_of("memory", "disk")


@dataclass
class _Evaluation:
    batch_size: int = whole(1)
    autocast: str | None = _one_of("bfloat16", "float16")


@dataclass
class _Layers:
    exclude: list[str] = value("needs a list of module name patterns, such as ['head*']")
    include_embeddings: bool = _flag()


@dataclass
class _Wandb:
    mode: str = _one_of("online", "offline", "disabled")
    project: str = value("needs the name of a W&B project", _is_named)
    entity: str | None = value("needs a W&B user or team, or null for the default")
    log_artifact: bool = _flag()


@dataclass
class _Dataset:
    calibration_pool: int | None = whole(1)
    evaluation: int | None = whole(1)
    limit: int | None = whole(1, null="for all evaluation examples")


@dataclass
class Settings:
    """Every key of conf/config.yaml."""

    dataset: _Dataset = field(default_factory=_Dataset)
    bits: float = value(
        f"needs a number from {MIN_BITS} to {MAX_BITS} (bits per weight)", lambda bits: MIN_BITS <= bits <= MAX_BITS
    )
    seed: int = whole(0, 2**32 - 1)  # scikit-learn, which splits the data sets, takes seeds of 32 bits
    device: str = value(
        "choose auto, cpu, cuda, cuda:N (such as cuda:0) or mps",
        lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name) is not None,
    )
    force: bool = _flag()
    results_dir: str = value("needs the path of a folder, such as ./results", _is_named)
    cache_dir: str | None = value("needs the path of a folder, such as ./cache, or null for the default", _is_named)
    resources: _Resources = field(default_factory=_Resources)
    allocator: str = _one_of("uniform", "knapsack")
    inputs: str = _one_of("full", "prefix", "paired")
    allocation: _Allocation = field(default_factory=_Allocation)
    budget: _Budget = field(default_factory=_Budget)
    proxy: str = _one_of("none", "mc")
    monte_carlo: _MonteCarlo = field(default_factory=_MonteCarlo)
    correction: str = _one_of("none", "mean", "moments")
    distill: bool = _flag()
    distillation: _Distillation = field(default_factory=_Distillation)
    calibration: _Calibration = field(default_factory=_Calibration)
    evaluation: _Evaluation = field(default_factory=_Evaluation)
    layers: _Layers = field(default_factory=_Layers)
    wandb: _Wandb = field(default_factory=_Wandb)


def check(config: Mapping[str, Any], schema: Any = Settings, prefix: str = "") -> None:
    """Check the type and range of every key of a resolved configuration that the schema describes.

    OmegaConf checks types. Values that it would convert ("3" to 3, 1 to true) are refused, as they are mostly mistakes.

    Raises:
        UserError: naming the first key with a wrong value.
    """
    typed = _typed(schema)
    for each in fields(schema):
        if each.name not in config:
            continue
        key, given = f"{prefix}{each.name}", config[each.name]
        if is_dataclass(each.type):
            check(given, each.type, f"{key}.")
            continue
        needs, holds, choices = (each.metadata[name] for name in ("needs", "holds", "choices"))
        try:
            typed[each.name] = given
            read = typed[each.name]
            fits = read == given and isinstance(read, bool) == isinstance(given, bool)
        except OmegaConfBaseException:
            fits = False
        if not fits or (given is not None and holds is not None and not holds(given)):
            refuse(key, given, needs + suggestion(str(given), choices))


@cache
def _typed(schema: Any) -> DictConfig:
    """A node with the types of a dataclass; cached, because making it takes milliseconds."""
    node: DictConfig = OmegaConf.structured(schema)
    return node


def validate(cfg: DictConfig) -> dict[str, Any]:
    """Check every value that can be checked without loading anything; returns the resolved configuration.

    Raises:
        UserError: one line with the key, its value and the allowed values.
    """
    config = resolved(cfg)
    check(config)
    _check_sizes(config)
    if config["allocator"] == "knapsack":
        _check_reach(config["bits"], config["allocation"])
    elif config["proxy"] == "mc":
        refuse("proxy", "mc", "weighs predicted risks, so it needs allocator=knapsack")
    _check_pairing(config)
    _check_writable("results_dir", config["results_dir"])
    _check_writable("cache_dir", cache_folder(config))
    return config


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Check that the data set has enough examples, and that a distillation can hold some out."""
    dataset, examples = config["dataset"], config["calibration"]["examples"]
    pool, available, limit = (dataset.get(key) for key in ("calibration_pool", "evaluation", "limit"))
    if pool is not None and examples > pool:
        needs = f"needs a whole number from 1 to {pool} (dataset.calibration_pool of {dataset['name']})"
        refuse("calibration.examples", examples, needs)
    if None not in (limit, available) and limit > available:
        refuse("dataset.limit", limit, f"needs a whole number from 1 to {available}, or null for all of them")
    share = config["distillation"]["held_out"]
    if config["distill"] and round(share * examples) < 2:
        refuse("calibration.examples", examples, f"distill=true has to hold out two or more (held_out={show(share)})")


def _check_reach(bits: float, allocation: Mapping[str, Any]) -> None:
    """Check that every layer rule allows a width, and that the allowed widths can average to the budget."""
    low = MIN_BITS if allocation["min_width"] is None else allocation["min_width"]
    pinned = {pattern: [width] for pattern, width in allocation["pinned"].items()}
    reach: set[int] = set()
    key = ""
    for key, rules in (("pinned", pinned), ("allowed", allocation["allowed"]), ("widths", {"*": allocation["widths"]})):
        for pattern, widths in rules.items():
            if max(widths) < low:
                refuse(f"allocation.{key}", allocation[key], f"allocation.min_width={low} leaves '{pattern}' no width")
            reach.update(width for width in widths if width >= low)
        if "*" in rules:  # later rules apply to no layer; which layers other patterns match is not known yet
            break
    if not min(reach) <= bits <= max(reach):
        key = "min_width" if bits < low else key
        span = f"no mix of the allowed widths averages bits={show(bits)}"
        refuse(f"allocation.{key}", allocation[key], f"{span}; they allow budgets from {min(reach)} to {max(reach)}")


def _check_pairing(config: Mapping[str, Any]) -> None:
    """Check that model and data set have a task in common."""
    model, dataset = config["model"], config["dataset"]
    if not set(model["tasks"]) & set(dataset["tasks"]):
        raise UserError(
            f"dataset={dataset['name']} is for {' or '.join(dataset['tasks'])}, but model={model['name']} is for "
            f"{' or '.join(model['tasks'])}: choose a dataset and a model of one task "
            "(the pairs to start from: model=minilm dataset=movie_snippets, model=resnet dataset=digits, "
            "model=minilm dataset=glue, model=cifar_resnet56 dataset=cifar10, model=efficientnet_lite0 "
            "dataset=imagenet)"
        )


def _check_writable(key: str, folder: str) -> None:
    """Create `folder` and a file in it, because permission bits do not show read-only mounts and full disks."""
    if folder.startswith("~"):
        refuse(key, folder, "'~' is not expanded after '='; write $HOME instead")
    try:
        os.makedirs(folder, exist_ok=True)
        os.listdir(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        occupied = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if occupied else error.strerror or str(error)
        refuse(key, folder, f"needs a folder that can be read and written ({reason})")
