"""The schema of conf/config.yaml: the type of every key, its allowed values, and which values fit together.

The YAML file has the defaults and explains each key. Constructors check the keys of the groups model, dataset, method
and posterior (`plan.check_objects`); only the sizes of a data set are here too, because other keys are compared with
them. Nothing here imports torch.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig

from bayesq.defaults import MAX_BITS, MIN_BITS, MIN_STREAM_BITS, fits, settings, suggestion, without_effect
from bayesq.suite.config import cache_folder, inputs_of, refuse, resolved, show
from bayesq.suite.errors import UserError
from bayesq.suite.wandb_names import NOT_IN_PROJECTS


@dataclass(frozen=True)
class Rule:
    """What a key needs: in words, as a type, and as a condition, which null need not fulfil."""

    needs: str
    type: Any
    holds: Callable[[Any], object] = lambda _: True
    choices: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether the value has the type and fulfils the condition."""
        return fits(value, self.type) and (value is None or bool(self.holds(value)))


def _whole(low: int, high: float = math.inf, type: Any = int, null: str = "") -> Rule:
    """A whole number from `low` to `high`; `null` explains null where it is allowed."""
    span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    text = f"needs a whole number {span}{f', or null {null}' if null else ''}"
    return Rule(text, type, lambda number: low <= number <= high)


def _one_of(*choices: str, type: Any = str) -> Rule:
    return Rule(f"choose one of {', '.join(choices)}", type, choices.__contains__, choices)


def _named(needs: str, type: Any = str) -> Rule:
    return Rule(f"needs {needs}", type, lambda text: bool(text.strip()))


def _in_bits(number: float) -> bool:
    return MIN_BITS <= number <= MAX_BITS


def _patterns(each: str, example: str, holds: Callable[[Any], bool]) -> Rule:
    text = f"needs layer patterns with {each} each, such as allocation.{example}"
    return Rule(text, dict[Any, Any], lambda rules: all(map(holds, rules.values())))


def _is_width(number: object) -> bool:
    return type(number) is int and _in_bits(number)


def _are_widths(numbers: object) -> bool:
    return isinstance(numbers, list) and 0 < len(numbers) == len({*map(repr, numbers)}) and all(map(_is_width, numbers))


def _is_registry(name: str) -> bool:
    return bool(name.strip()) and not set(name) & set(NOT_IN_PROJECTS)


_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
_FLAG = Rule("needs true or false", bool)
_WIDTH = f"a whole number from {MIN_BITS} to {MAX_BITS}"
_WIDTHS = f"a list of different whole numbers from {MIN_BITS} to {MAX_BITS}"

# every key of conf/config.yaml; the keys of dataset may be missing
RULES = {
    "dataset.calibration_pool": _whole(1, type=int | None),
    "dataset.evaluation": _whole(1, type=int | None),
    "dataset.limit": _whole(1, type=int | None, null="for all evaluation examples"),
    "dataset.split_seed": _whole(0, 2**32 - 1, type=int | None),
    "bits": Rule(f"needs a number from {MIN_BITS} to {MAX_BITS} (bits per weight)", float, _in_bits),
    "seed": _whole(0, 2**32 - 1),  # scikit-learn, which splits the data sets, takes seeds of 32 bits
    "device": Rule("choose auto, cpu, cuda, cuda:N (such as cuda:0) or mps", str, _DEVICE.fullmatch),
    "force": _FLAG,
    "results_dir": _named("the path of a folder, such as ./results"),
    "cache_dir": _named("the path of a folder, such as ./cache, or null for the default", str | None),
    "resources.cpus": _whole(1),
    "resources.gpus": _whole(0),
    "resources.memory": Rule(
        "needs a number of GiB above 0, or null for what is free", float | None, lambda number: number > 0
    ),
    "allocator": _one_of("uniform", "knapsack", "ilp"),
    "inputs": _one_of("full", "prefix", "paired"),
    "codec": _one_of("fixed", "entropy"),
    "allocation.block": Rule("needs a name", str),  # Knapsack checks it
    "allocation.group_rows": _whole(1),
    "allocation.row_multiple": _whole(1),
    "allocation.widths": Rule(f"needs {_WIDTHS}, such as [2,3,4,5,6,8]", list[int], _are_widths),
    "allocation.min_width": _whole(MIN_BITS, MAX_BITS, int | None, null="for no limit"),
    "allocation.pinned": _patterns(_WIDTH, "pinned={conv1:8}", _is_width),
    "allocation.allowed": _patterns(_WIDTHS, "allowed={conv1:[4,8]}", _are_widths),
    "budget.count": _one_of("code", "stored"),
    "proxy": _one_of("none", "mc"),
    "monte_carlo.samples": _whole(0),
    "monte_carlo.examples": _whole(1),
    "correction": _one_of("none", "mean", "moments"),
    **dict.fromkeys(("distill", "rotate"), _FLAG),
    "distillation.samples": _whole(0),
    "distillation.moments": _FLAG,
    # DistillationSettings checks the ranges of the next three
    "distillation.steps": Rule("needs a whole number", int),
    "distillation.evaluations": Rule("needs a whole number", int),
    "distillation.held_out": Rule("needs a share between 0 and 1", float, math.isfinite),
    "distillation.batch_size": _whole(1),
    "calibration.examples": _whole(1),
    "calibration.batch_size": _whole(1),
    "calibration.source": _named("the path of a text file, or null for the data set's own", str | None),
    "calibration.offload": _one_of("memory", "disk"),
    "evaluation.batch_size": _whole(1),
    "evaluation.autocast": _one_of("bfloat16", "float16", type=str | None),
    "evaluation.zeroshot": Rule("needs a list of tasks, such as [piqa,arc_easy]", list[str]),
    "evaluation.zeroshot_root": _named("the path of a folder, or null", str | None),
    "evaluation.zeroshot_limit": _whole(1, type=int | None, null="for all questions"),
    "layers.exclude": Rule("needs a list of module name patterns, such as ['head*']", list[str]),
    "layers.include_embeddings": _FLAG,
    "wandb.mode": _one_of("online", "offline", "disabled"),
    "wandb.project": _named("the name of a W&B project"),
    "wandb.entity": Rule("needs a W&B user or team, or null for the default", str | None),
    **dict.fromkeys(("wandb.log_artifact", "wandb.diff"), _FLAG),
    "wandb.registry": Rule(f"needs a name without {NOT_IN_PROJECTS}, or null", str | None, _is_registry),
    **{f"wandb.{key}": Rule("needs text, or null", str | None) for key in ("name", "group", "job_type", "notes")},
    "wandb.tags": Rule("needs a list of texts, such as [paper,draft]", list[str]),
}
# of bits with codec=entropy
STREAM_BITS = Rule(
    f"needs a number from {MIN_STREAM_BITS} to {MAX_BITS} (bits per weight)",
    float,
    lambda number: MIN_STREAM_BITS <= number <= MAX_BITS,
)


def check(config: Mapping[str, Any]) -> None:
    """Raise UserError at the first key of a resolved configuration whose value breaks its rule."""
    rules = RULES | ({"bits": STREAM_BITS} if config.get("codec") == "entropy" else {})
    for key, rule in rules.items():
        group, _, name = key.rpartition(".")
        node = config.get(group, {}) if group else config
        if name in node and not rule.allows(node[name]):
            refuse(key, node[name], rule.needs + suggestion(str(node[name]), rule.choices))


def validate(cfg: DictConfig) -> dict[str, Any]:
    """Check all that needs no data or weights, or raise UserError; returns the resolved configuration."""
    config = resolved(cfg)
    check(config)
    _check_sizes(config)
    if config["codec"] == "entropy":
        _check_unread(config, "allocation", "codec=entropy, whose rows have steps and no widths", "codec=fixed")
    elif config["allocator"] == "uniform":
        _check_unread(config, "allocation", "allocator=uniform", "allocator=knapsack")
    else:
        _check_reach(config["bits"], config["allocation"])
        if config["allocation"]["block"] != "group":
            block = config["allocation"]["block"]
            _check_unread(config, "allocation", f"allocation.block={block}", "allocation.block=group", ["group_rows"])
    if not config["distill"]:
        _check_unread(config, "distillation", "distill=false", "distill=true")
    if config["proxy"] == "none":
        _check_unread(config, "monte_carlo", "proxy=none", "proxy=mc")
    sequential, inputs = config["method"].get("sequential"), config["inputs"]
    if sequential is not None and inputs_of(inputs, sequential) != inputs:
        refuse(
            "method.sequential", sequential, f"is the old name of inputs, and inputs={inputs} is given; leave one out"
        )
    for key, needs in without_effect(config["method"], config["codec"]):
        refuse(f"method.{key}", config["method"][key], needs)
    if config["allocator"] == "uniform" and config["proxy"] == "mc":
        refuse("proxy", "mc", "weighs predicted risks, so it needs allocator=knapsack or allocator=ilp")
    if config["wandb"].get("registry") and not config["wandb"]["log_artifact"]:
        refuse("wandb.registry", config["wandb"]["registry"], "links the packed file; add wandb.log_artifact=true")
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
    source = config["calibration"]["source"]
    if source is not None and "calibration_source" not in dataset:
        refuse("calibration.source", source, f"dataset={dataset['name']} has calibration examples; leave it at null")
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


@cache
def _defaults() -> Mapping[str, Any]:
    """The content of conf/config.yaml. A sweep checks hundreds of runs, and reading it takes longer than a check."""
    return settings("", "config")


def _check_unread(
    config: Mapping[str, Any], section: str, reader: str, other: str, keys: Sequence[str] | None = None
) -> None:
    """Check that the keys (None: all) of a section that a run does not read have their defaults.

    The setting `reader` makes the run ignore them; with the setting `other` it would read them.
    """
    for key, value in _defaults()[section].items():
        if config[section][key] != value and (keys is None or key in keys):
            unread = f"is not read with {reader}; leave it at {show(value)}, or choose {other}"
            refuse(f"{section}.{key}", config[section][key], unread)


def _check_pairing(config: Mapping[str, Any]) -> None:
    model, dataset = config["model"], config["dataset"]
    for group, node in (("model", model), ("dataset", dataset)):
        if not node.get("tasks"):
            raise UserError(f"{group}.tasks is missing in the YAML file of {group}={node['name']}: list what it is for")
    if not set(model["tasks"]) & set(dataset["tasks"]):
        raise UserError(
            f"dataset={dataset['name']} is for {' or '.join(dataset['tasks'])}, but model={model['name']} is for "
            f"{' or '.join(model['tasks'])}: choose a dataset and a model of one task "
            "(the pairs to start from: model=minilm dataset=movie_snippets, model=resnet dataset=digits, "
            "model=minilm dataset=glue, model=cifar_resnet56 dataset=cifar10, model=efficientnet_lite0 "
            "dataset=imagenet; texts of your own: dataset=csv, photos: dataset=image_folder)"
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
