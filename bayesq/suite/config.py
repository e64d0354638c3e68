"""What a configuration means: which part of it determines the result, and whether it can be run at all.

Nothing here imports torch, so that a mistyped key costs a second and a sweep of finished runs hardly more.
"""

import difflib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import platformdirs
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import bayesq
from bayesq.suite import wandb_environment
from bayesq.suite.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
# scikit-learn, which splits the data sets, takes seeds of 32 bits
MAX_SEED = 2**32 - 1
OFFLOADS = ("memory", "disk")
# torch dtypes of evaluation.autocast
AUTOCAST = ("bfloat16", "float16")
# Keys that take null though their default is a number.
OPTIONAL = ("posterior.examples",)
# keys of a method that describe it: neither arguments of its constructor nor part of run_id
METHOD_METADATA = ("allocator", "uses_posterior", "data_free", "display")
# keys of a group that describe a choice and are not arguments of its constructor
DESCRIPTIVE = ("name", "modality", *METHOD_METADATA)
# where a run happens, how it is logged and whether it is repeated changes nothing about its numbers
WITHOUT_EFFECT = ("results_dir", "cache_dir", "force", "device", "resources", "wandb", "hydra")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, without Hydra's own node and with every interpolation followed.

    Raises:
        UserError: an interpolation leads nowhere, or a mandatory value (`???`) was not given.
    """
    # each child is converted on its own, because Hydra's node cannot be resolved outside a job
    keys = [str(key) for key in cfg if key != "hydra"]
    try:
        return {
            key: OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
            if isinstance(node := cfg[key], DictConfig)
            else (OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node)
            for key in keys
        }
    except MissingMandatoryValue as error:
        key = error.full_key or "a key"
        raise UserError(f"{key} has no default: add {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {explanation(error)}") from error


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, as one blank."""
    return re.sub(r"\s+", " ", text).strip()


def explanation(error: Exception) -> str:
    """What Hydra or OmegaConf said, as one line without the context they append for developers."""
    parts = [str(error), str(error.__cause__ or "")]
    return one_line(" ".join(re.split(r"\n\s*full_key: |\n+Config search path:|\nSee http", part)[0] for part in parts))


def flatten(config: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with joined keys; an empty mapping stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, separator, f"{name}{separator}"))
        else:
            flat[name] = value
    return flat


def _canonical(value: Any) -> Any:
    """One spelling per value: 3.0 and 3 are the same budget."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def settings_that_matter(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that determines the result.

    Dropped are
      * WITHOUT_EFFECT: where the run happens, how it is logged, whether it is repeated;
      * allocation, when allocator=uniform does not read it;
      * posterior, when neither the method (`uses_posterior: true` in its YAML) nor allocator=knapsack reads it;
      * distillation and monte_carlo, when distill=false and proxy=none do not read them;
      * calibration.offload: where tensors wait;
      * METHOD_METADATA: the method's default allocator (the effective one is the key `allocator`) and descriptions.
    Order and repetition do not count in allocation.widths and layers.exclude, and 3.0 equals 3. Of the patterns in
    allocation.pinned and allocation.allowed the order does count, so those mappings become lists of pairs.
    """
    matter = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
    knapsack = config["allocator"] == "knapsack"
    if not knapsack:
        matter.pop("allocation", None)
    elif "allocation" in matter:
        matter["allocation"] = _canonical_allocation(matter["allocation"])
    if not knapsack and config["method"].get("uses_posterior") is not True:
        matter.pop("posterior", None)
    if not config.get("distill"):
        matter.pop("distillation", None)
    if config.get("proxy") != "mc":
        matter.pop("monte_carlo", None)
    if "calibration" in matter:
        matter["calibration"] = {k: v for k, v in matter["calibration"].items() if k != "offload"}
    matter["method"] = {k: v for k, v in config["method"].items() if k not in METHOD_METADATA}
    if "exclude" in matter.get("layers", {}):
        matter["layers"] = {**matter["layers"], "exclude": sorted(set(matter["layers"]["exclude"]))}
    canonical: dict[str, Any] = _canonical(matter)
    return canonical


def _canonical_allocation(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """`allocation` with sorted widths, and with its patterns as [pattern, value] pairs, which JSON cannot reorder."""
    content = dict(allocation)
    if "widths" in content:
        content["widths"] = sorted(set(content["widths"]))
    if isinstance(content.get("pinned"), Mapping):
        content["pinned"] = [[str(pattern), width] for pattern, width in content["pinned"].items()]
    if isinstance(content.get("allowed"), Mapping):
        content["allowed"] = [[str(pattern), sorted(set(own))] for pattern, own in content["allowed"].items()]
    return content


def determines_result(cfg: DictConfig) -> dict[str, Any]:
    """`settings_that_matter` of a composed configuration; two configurations that agree in it give one result."""
    return settings_that_matter(resolved(cfg))


def run_id(cfg: DictConfig) -> str:
    """Twelve hexadecimal digits (48 bits of sha256) of what determines the result, the version of bayesq included."""
    return id_of(determines_result(cfg), bayesq.__version__)


def id_of(settings: Mapping[str, Any], version: str) -> str:
    """`run_id` of the settings that determine a result, under a version of bayesq."""
    text = json.dumps({"bayesq": version, "config": settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_dir(cfg: DictConfig) -> Path:
    """The folder of the run's files: <results_dir>/<run_id>, absolute."""
    return Path(cfg.results_dir).absolute() / run_id(cfg)


def register_resolvers() -> None:
    """Make ${run_id:} known to OmegaConf, for Hydra's output folders, and ${wandb:}, for W&B's own variables."""
    OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True)
    OmegaConf.register_new_resolver("wandb", wandb_environment.default, replace=True)


# workers of a parallel launcher import this module when they unpickle the job, and need the resolver from then on
register_resolvers()


def show(value: Any) -> str:
    """`value` as it would be typed on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    return str(value)


def _refuse(key: str, value: Any, allowed: str) -> NoReturn:
    raise UserError(f"{key}={show(value)}: {allowed}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing.

    Of dotted keys the last parts are compared, those below the same parent first.
    """
    parent, _, last = word.rpartition(".")
    names = sorted(known)
    for pool in ([name for name in names if name.rpartition(".")[0] == parent], names):
        by_last = {name.rpartition(".")[2]: name for name in reversed(pool)}
        if close := difflib.get_close_matches(last, list(by_last), n=1):
            return f"; did you mean '{by_last[close[0]]}'?"
    return ""


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(key, value, f"choose one of {', '.join(choices)}{suggestion(str(value), choices)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(key: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    if not _is_whole(value) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        _refuse(key, value, f"needs a whole number {span}{why}")


def check_keys(config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Check that a resolved configuration has exactly the keys of its YAML files.

    `reference` is what those files give without any override. A mapping that is empty there takes any key.

    Raises:
        UserError: naming the first key that nothing reads, or that was taken away.
    """
    given, known = flatten(config), flatten(reference)
    free = tuple(f"{key}." for key, value in known.items() if value == {})
    for key, value in given.items():
        if key in known or (free and key.startswith(free)):
            continue
        below = [name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}.")]
        if below:
            _refuse(key, value, f"'{key}' is a group of keys: {', '.join(f'{key}.{name}' for name in below)}")
        raise UserError(f"unknown key '{key}'{suggestion(key, known)}")
    for key in known:
        if key not in given and not (known[key] == {} and any(name.startswith(f"{key}.") for name in given)):
            raise UserError(f"'{key}' is missing: every run needs it, so it cannot be removed")


def check_types(config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Check that keys whose default is a number, a truth value or a list were given the same.

    Strings and null say nothing about what else a key takes, so they are left to whoever reads it.

    Raises:
        UserError: naming the key, its value and what it takes.
    """
    given = flatten(config)
    for key, default in flatten(reference).items():
        value = given.get(key)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                _refuse(key, value, "needs true or false")
        elif _is_number(default):
            if not _is_number(value) and not (value is None and key in OPTIONAL):
                null = ", or null" if key in OPTIONAL else ""
                _refuse(key, value, f"needs a number{null} (default {show(default)})")
        elif isinstance(default, list) and not isinstance(value, list):
            _refuse(key, value, f"needs a list, such as {key}={show(default)}")


def _check_allocation(config: Mapping[str, Any]) -> None:
    """Allocator, blocks and widths; what a knapsack may choose from must be able to meet the budget."""
    allocation = config["allocation"]
    _one_of("allocator", config["allocator"], ("uniform", "knapsack"))
    _one_of("allocation.block", allocation["block"], ("layer", "row", "group"))
    _one_of("budget.count", config["budget"]["count"], ("code", "stored"))
    group_rows, row_multiple = allocation["group_rows"], allocation["row_multiple"]
    _whole("allocation.group_rows", group_rows, 1)
    _whole("allocation.row_multiple", row_multiple, 1)
    if allocation["block"] == "group" and group_rows % row_multiple:
        needs = f"groups of allocation.group_rows={group_rows} rows must be a multiple of it"
        _refuse("allocation.row_multiple", row_multiple, needs)
    widths = f"different whole numbers from {MIN_BITS} to {MAX_BITS}"
    if not _are_widths(allocation["widths"]):
        _refuse("allocation.widths", allocation["widths"], f"needs a list of {widths}, such as [2,3,4,5,6,8]")
    min_width, pinned, allowed = allocation["min_width"], allocation["pinned"], allocation["allowed"]
    if min_width is not None and not _is_width(min_width):
        _refuse("allocation.min_width", min_width, f"needs a whole number from {MIN_BITS} to {MAX_BITS}, or null")
    if not isinstance(pinned, Mapping) or not all(map(_is_width, pinned.values())):
        needs = f"needs layer patterns with a whole number from {MIN_BITS} to {MAX_BITS} each"
        _refuse("allocation.pinned", pinned, f"{needs}, such as +allocation.pinned={{conv1:8}}")
    if not isinstance(allowed, Mapping) or not all(map(_are_widths, allowed.values())):
        needs = f"needs layer patterns with a list of {widths} each"
        _refuse("allocation.allowed", allowed, f"{needs}, such as +allocation.allowed={{conv1:[4,8]}}")
    if config["allocator"] == "knapsack":
        _check_reach(config["bits"], allocation)


def _is_width(value: Any) -> bool:
    return _is_whole(value) and MIN_BITS <= value <= MAX_BITS


def _are_widths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_width, value)) and len(set(value)) == len(value)


def _check_reach(bits: float, allocation: Mapping[str, Any]) -> None:
    """Every rule must leave a width, and the budget must lie between the extremes of all that any layer may get."""
    widths, pinned, allowed = allocation["widths"], allocation["pinned"], allocation["allowed"]
    low = MIN_BITS if allocation["min_width"] is None else allocation["min_width"]
    for key, rules in (("pinned", {p: [width] for p, width in pinned.items()}), ("allowed", allowed)):
        for pattern, own in rules.items():
            if max(own) < low:
                _refuse(f"allocation.{key}", allocation[key], f"allocation.min_width={low} leaves '{pattern}' no width")
    # which layers a pattern takes is not known yet, unless it takes all of them
    reach, key = set(pinned.values()), "pinned"
    if "*" not in pinned:
        reach, key = reach.union(*allowed.values()), "allowed"
        if "*" not in allowed:
            reach, key = reach.union(widths), "widths"
            if max(widths) < low:
                _refuse("allocation.min_width", low, f"leaves none of allocation.widths={show(widths)}")
    reach = {width for width in reach if width >= low}
    if not min(reach) <= bits <= max(reach):
        if MIN_BITS < low == min(reach) and bits < low:
            _refuse("allocation.min_width", low, f"no row may be narrower, so bits={show(bits)} cannot be met")
        span = f"no mix of these widths averages bits={show(bits)}"
        _refuse(f"allocation.{key}", allocation[key], f"{span}; they allow budgets from {min(reach)} to {max(reach)}")


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Numbers of examples and batch sizes, against what the data set holds."""
    dataset, calibration = config["dataset"], config["calibration"]
    for key in ("calibration_pool", "evaluation"):
        if dataset.get(key) is not None:
            _whole(f"dataset.{key}", dataset[key], 1)
    pool = dataset.get("calibration_pool")
    why = "" if pool is None else f" (dataset.calibration_pool of {dataset['name']} holds {pool})"
    _whole("calibration.examples", calibration["examples"], 1, pool, why)
    _whole("calibration.batch_size", calibration["batch_size"], 1)
    _one_of("calibration.offload", calibration["offload"], OFFLOADS)
    _whole("evaluation.batch_size", config["evaluation"]["batch_size"], 1)
    if config["evaluation"]["autocast"] is not None:
        _one_of("evaluation.autocast", config["evaluation"]["autocast"], AUTOCAST)
    limit, available = dataset.get("limit"), dataset.get("evaluation")
    if limit is not None:
        _whole("dataset.limit", limit, 1, available, ", or null for all evaluation examples")


def _check_source(config: Mapping[str, Any]) -> None:
    """A data set that may come from the hub or from a folder has to come from one of them."""
    dataset = config["dataset"]
    if "hub" in dataset and dataset["root"] is None and dataset["hub"] is None:
        raise UserError(f"dataset={dataset['name']}: give dataset.root=DIR or dataset.hub=REPOSITORY")


def _check_stages(config: Mapping[str, Any]) -> None:
    """Proxy, correction and distillation."""
    _one_of("proxy", config["proxy"], ("none", "mc"))
    _one_of("correction", config["correction"], ("none", "moments"))
    if not isinstance(config["distill"], bool):
        _refuse("distill", config["distill"], "needs true or false")
    if config["proxy"] == "mc" and config["allocator"] != "knapsack":
        _refuse("proxy", "mc", "weighs predicted risks, so it needs allocator=knapsack")
    options, monte_carlo, examples = config["distillation"], config["monte_carlo"], config["calibration"]["examples"]
    for key in ("samples", "steps"):
        _whole(f"distillation.{key}", options[key], 0)
    for key in ("batch_size", "evaluations"):
        _whole(f"distillation.{key}", options[key], 1)
    if not isinstance(options["moments"], bool):
        _refuse("distillation.moments", options["moments"], "needs true or false")
    if not _is_number(options["held_out"]) or not 0 < options["held_out"] < 1:
        _refuse("distillation.held_out", options["held_out"], "needs a share between 0 and 1")
    if config["distill"] and not 2 <= round(options["held_out"] * examples) < examples:
        _refuse("calibration.examples", examples, "distill=true has to hold out at least two and train on the rest")
    _whole("monte_carlo.samples", monte_carlo["samples"], 0)
    _whole("monte_carlo.examples", monte_carlo["examples"], 1)


def _check_pairing(config: Mapping[str, Any]) -> None:
    """Text models take text data, image models take images."""
    model, dataset = config["model"], config["dataset"]
    if model["modality"] != dataset["modality"]:
        raise UserError(
            f"dataset={dataset['name']} holds {_medium(dataset)}, but model={model['name']} takes {_medium(model)}: "
            f"choose a dataset of {_medium(model)} or a model for {_medium(dataset)} "
            "(the pairs to start from: model=minilm dataset=movie_snippets, model=resnet dataset=digits, "
            "model=minilm dataset=glue, model=cifar_resnet56 dataset=cifar10, model=efficientnet_lite0 "
            "dataset=imagenet)"
        )


def _medium(part: Mapping[str, Any]) -> str:
    return {"text": "text", "image": "images"}.get(part["modality"], str(part["modality"]))


def _check_writable(key: str, folder: Any) -> None:
    """Really create `folder` and a file in it: permission bits alone miss read-only mounts and full disks."""
    if not isinstance(folder, str) or not folder.strip():
        _refuse(key, folder, f"needs the path of a folder, such as {key}=./name")
    if folder.startswith("~"):
        _refuse(key, folder, "'~' is not expanded after '='; write $HOME instead")
    try:
        os.makedirs(folder, exist_ok=True)
        os.listdir(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if file else error.strerror or str(error)
        _refuse(key, folder, f"needs a folder that can be read and written ({reason})")


def validate(cfg: DictConfig) -> None:
    """Check every value that can be checked without loading anything.

    Devices and W&B keys belong to the machine that runs the job: see `check_device` and `check_wandb_login`.

    Raises:
        UserError: one line with the key as it is typed, its value and what is allowed.
    """
    config = resolved(cfg)
    bits = config["bits"]
    if not _is_number(bits) or not MIN_BITS <= bits <= MAX_BITS:
        several = "; for several budgets use -m and bits=3,4" if isinstance(bits, list) else ""
        _refuse("bits", bits, f"needs a number from {MIN_BITS} to {MAX_BITS} (bits per weight){several}")
    _whole("seed", config["seed"], 0, MAX_SEED)
    if not isinstance(config["force"], bool):
        _refuse("force", config["force"], "needs true or false")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", str(config["device"])):
        _refuse("device", config["device"], "choose auto, cpu, cuda, cuda:N (such as cuda:0) or mps")
    for key, low in (("cpus", 1), ("gpus", 0)):
        _whole(f"resources.{key}", config["resources"][key], low)
    memory = config["resources"]["memory"]
    if memory is not None and (not _is_number(memory) or not memory > 0):
        _refuse("resources.memory", memory, "needs a number of GiB above 0, or null for what the machine has free")
    _check_allocation(config)
    _check_sizes(config)
    _check_source(config)
    _check_stages(config)
    _check_pairing(config)
    exclude = config["layers"]["exclude"]
    if not isinstance(exclude, list) or not all(isinstance(pattern, str) for pattern in exclude):
        _refuse("layers.exclude", exclude, "needs a list of module name patterns, such as ['head*']")
    wandb = config["wandb"]
    _one_of("wandb.mode", wandb["mode"], ("online", "offline", "disabled"))
    if not isinstance(wandb["project"], str) or not wandb["project"].strip():
        _refuse("wandb.project", wandb["project"], "needs the name of a W&B project")
    if not isinstance(wandb["entity"], str | None):
        _refuse("wandb.entity", wandb["entity"], "needs a W&B user or team, or null for the default")
    if not isinstance(wandb["log_artifact"], bool):
        _refuse("wandb.log_artifact", wandb["log_artifact"], "needs true or false")
    _check_writable("results_dir", config["results_dir"])
    _check_writable("cache_dir", cache_folder(config))


def cache_folder(config: Mapping[str, Any]) -> Any:
    """The key cache_dir, or what stands for it where it is null."""
    if config["cache_dir"] is not None:
        return config["cache_dir"]
    return os.path.expanduser(os.environ.get("BAYESQ_CACHE_DIR") or platformdirs.user_cache_dir("bayesq"))


# What a disk says that takes no more, or takes nothing at all.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def disk_error(error: BaseException, config: Mapping[str, Any]) -> UserError | None:
    """The one line for a write that failed below results_dir or cache_dir; None for any other error.

    Args:
        error: what was raised; what it was raised from counts as well.
        config: plain and resolved.
    """
    chain: BaseException | None = error
    while chain is not None and not (isinstance(chain, OSError) and chain.errno in UNWRITABLE):
        chain = chain.__cause__ or chain.__context__
    if not isinstance(chain, OSError):
        return None
    cause, folder = chain, Path(config["results_dir"])
    named = cause.filename2 or cause.filename
    # only Hydra's files and logs are written without their names being known here, and they go to results_dir
    file = Path(named).absolute() if isinstance(named, str) else folder.expanduser().absolute() / "run.log"
    for key, folder in (("results_dir", config["results_dir"]), ("cache_dir", cache_folder(config))):
        if file.is_relative_to(Path(folder).expanduser().absolute()):
            return UserError(
                f"{key}={folder}: {file.name} cannot be written ({cause.strerror}): make room there, or choose another "
                f"{key}; the same command then continues"
            )
    return None


def check_device(cfg: DictConfig) -> None:
    """Check that this machine has the accelerator that was asked for; torch is imported only when one was.

    Raises:
        UserError: it has none, or fewer than the index needs.
    """
    device = str(cfg.device)
    if device in ("auto", "cpu"):
        return
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            _refuse("device", device, "no Metal device is available here; choose auto or cpu")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        _refuse("device", device, "no CUDA device is available here; choose auto or cpu")
    if int(device.partition(":")[2] or 0) >= count:
        _refuse(
            "device",
            device,
            f"this machine has cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0 exists",
        )


def check_wandb_login(cfg: DictConfig) -> None:
    """Check, without a prompt and without the network, that wandb.mode=online finds an API key.

    The client's own look-up (environment, settings, netrc file) is asked; left to `wandb.init` it would ask for a key
    on a terminal and wait.

    Raises:
        UserError: there is no key, or it is malformed.
    """
    if cfg.wandb.mode != "online":
        return
    remedy = "or use wandb.mode=offline"
    try:
        found = has_wandb_key()
    except UserError as error:
        raise UserError(f"wandb.mode=online: {error}; mend it, {remedy}") from error
    if not found:
        _refuse("wandb.mode", "online", f"no W&B API key found; run 'wandb login', set WANDB_API_KEY, {remedy}")


def has_wandb_key() -> bool:
    """Whether there is an API key for W&B, found without a prompt and without the network.

    Raises:
        UserError: it is malformed.
    """
    import wandb

    try:
        with wandb_environment.decided():
            wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
            return bool(wandb.login(prompt=False, verify=False))
    except (wandb.Error, ValueError) as error:  # other settings of the environment may be what it refuses
        raise UserError(one_line(str(error))) from error
