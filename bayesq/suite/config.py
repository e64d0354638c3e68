"""Which part of a configuration determines the result, its run id, and whether this machine can run it.

`schema` checks values. Nothing here imports torch, so that a mistyped key is reported within a second.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import platformdirs
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import bayesq
from bayesq.defaults import METHOD_METADATA, suggestion
from bayesq.suite import wandb_environment
from bayesq.suite.errors import UserError

# these keys change no number: they say where a run happens, how it is logged and whether it is repeated
WITHOUT_EFFECT = ("results_dir", "cache_dir", "force", "device", "resources", "wandb", "hydra")


# keys of other libraries, and what replaces them here
DEAD_ENDS = {
    "pretrained": "; networks have published weights, or yours with model.checkpoint=FILE",
    "num_classes": "; the data set determines the number of classes",
}


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """A configuration as plain containers; `resolve` follows interpolations."""
    container = OmegaConf.to_container(cfg, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, without Hydra's node and with every interpolation followed.

    Raises:
        UserError: an interpolation cannot be followed, or a mandatory value (`???`) is missing.
    """
    if "hydra" in cfg:  # its node cannot be resolved outside a job
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return plain(cfg, resolve=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no default: add {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {explanation(error)}") from error


def one_line(text: str) -> str:
    """`text` with one space in place of each run of white space."""
    return re.sub(r"\s+", " ", text).strip()


def explanation(error: Exception) -> str:
    """The message of Hydra or OmegaConf in one line, without the context for developers."""
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


def reads_posterior(config: Mapping[str, Any]) -> bool:
    """Whether a run computes a posterior: its method asks for one, or the knapsack needs predicted risks."""
    return config["allocator"] != "uniform" or config["method"].get("uses_posterior") is True


def settings_that_matter(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that determines the result.

    It leaves out the keys WITHOUT_EFFECT, METHOD_METADATA, calibration.offload and calibration.source (which the data
    sets that read it have as a key), and sections that nothing reads: allocation with allocator=uniform, distillation
    with distill=false, zeroshot_root without zeroshot, and so on. Order and repetition do not count in
    allocation.widths and layers.exclude, and 3.0 equals 3. The order of the patterns in allocation.pinned and
    allocation.allowed does count.
    """
    read = {
        **dict.fromkeys(WITHOUT_EFFECT, False),
        "allocation": config["allocator"] != "uniform",
        "posterior": reads_posterior(config),
        "distillation": config.get("distill"),
        "monte_carlo": config.get("proxy") == "mc",
    }
    matter = {key: value for key, value in config.items() if read.get(key, True)}
    if "allocation" in matter:
        matter["allocation"] = _canonical_allocation(matter["allocation"])
    if "calibration" in matter:
        dropped = ("offload", "source")
        matter["calibration"] = {k: v for k, v in matter["calibration"].items() if k not in dropped}
    if not config.get("evaluation", {}).get("zeroshot") and "evaluation" in matter:
        matter["evaluation"] = {k: v for k, v in matter["evaluation"].items() if not k.startswith("zeroshot")}
    if "inputs" not in config:  # a record of an older version
        matter["inputs"] = inputs_of("full", config["method"].get("sequential"))
    matter["method"] = {k: v for k, v in config["method"].items() if k not in METHOD_METADATA}
    for key, value in (("codec", "fixed"), ("rotate", False)):  # older versions had only these values
        if matter.get(key) == value:
            del matter[key]
    if "posterior" in matter:
        matter["posterior"] = {k: v for k, v in matter["posterior"].items() if k not in METHOD_METADATA}
    if "exclude" in matter.get("layers", {}):
        matter["layers"] = {**matter["layers"], "exclude": sorted(set(matter["layers"]["exclude"]))}
    for key, value in (config["method"].get("neutral") or {}).items():  # switches newer than the first results
        if matter["method"].get(key) == value:
            matter["method"].pop(key, None)
    canonical: dict[str, Any] = _canonical(matter)
    return canonical


def _canonical_allocation(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """`allocation` with sorted widths, and with patterns as pairs, because sorted JSON loses the order of a mapping."""
    content = dict(allocation)
    if "widths" in content:
        content["widths"] = sorted(set(content["widths"]))
    if isinstance(content.get("pinned"), Mapping):
        content["pinned"] = [[str(pattern), width] for pattern, width in content["pinned"].items()]
    if isinstance(content.get("allowed"), Mapping):
        content["allowed"] = [[str(pattern), sorted(set(widths))] for pattern, widths in content["allowed"].items()]
    return content


def run_id(cfg: DictConfig) -> str:
    """Twelve hexadecimal digits of the sha256 of the settings that determine the result and bayesq's version."""
    return id_of(settings_that_matter(resolved(cfg)), bayesq.__version__)


def id_of(settings: Mapping[str, Any], version: str) -> str:
    """`run_id` of `settings_that_matter` and a version of bayesq."""
    text = json.dumps({"bayesq": version, "config": settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_dir(cfg: DictConfig) -> Path:
    """The folder of the run's files: <results_dir>/<run_id>, absolute."""
    return dir_of(resolved(cfg))


def dir_of(config: Mapping[str, Any]) -> Path:
    """`run_dir` of a resolved configuration."""
    return Path(config["results_dir"]).absolute() / id_of(settings_that_matter(config), bayesq.__version__)


def inputs_of(default: str, sequential: Any) -> str:
    """The method's default of `inputs`, unless method.sequential, its old name, is given."""
    by_old_name = {None: default, True: "prefix", False: "full"}
    return by_old_name.get(sequential, str(sequential))


# ${run_id:} names Hydra's output folders, ${wandb:} reads W&B's variables. They are registered at import, because the
# workers of a parallel launcher need them as soon as they unpickle a job.
OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True)
OmegaConf.register_new_resolver("inputs_of", inputs_of, replace=True)
OmegaConf.register_new_resolver("wandb", wandb_environment.default, replace=True)


def show(value: Any) -> str:
    """`value` as typed on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    return str(value)


def refuse(key: str, value: Any, allowed: str) -> NoReturn:
    """Raise the UserError `key=value: allowed`."""
    raise UserError(f"{key}={show(value)}: {allowed}")


def check_keys(config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Raise UserError at the first key of a plain configuration that `reference` lacks, or that it lacks itself.

    `reference` is composed from the YAML files. A mapping that is empty there accepts any key.
    """
    given, known = flatten(config), flatten(reference)
    free = tuple(f"{key}." for key, value in known.items() if value == {})
    for key, value in given.items():
        if key in known or (free and key.startswith(free)):
            continue
        if below := [name for name in known if name.startswith(f"{key}.")]:
            refuse(key, value, f"'{key}' is a group of keys: {', '.join(below)}")
        hint = DEAD_ENDS.get(key.rpartition(".")[2]) or suggestion(key, [*known, *reference])
        raise UserError(f"unknown key '{key}'{hint}")
    for key in known:
        if key not in given and not any(name.startswith(f"{key}.") for name in given):
            raise UserError(f"'{key}' is missing: every run needs it, so it cannot be removed")


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Absolute cache folder: `cache_dir`, else the variable BAYESQ_CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("BAYESQ_CACHE_DIR") or platformdirs.user_cache_dir("bayesq")
    return Path(chosen).expanduser().absolute()


def cache_folder(config: Mapping[str, Any]) -> str:
    """The cache folder as it was given, or the default one."""
    return config["cache_dir"] or str(resolve_cache_dir(None))


# a full disk, or a folder without permission to write
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def disk_error(error: BaseException, config: Mapping[str, Any]) -> UserError | None:
    """The error for the user if `error` or a cause of it is a failed write below results_dir or cache_dir."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in UNWRITABLE):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return None
    name = cause.filename2 or cause.filename
    for key, folder in (("results_dir", config["results_dir"]), ("cache_dir", cache_folder(config))):
        path = Path(folder).absolute()
        # an error without a file name comes from Hydra, which writes run.log and copies of the configuration
        file = Path(name).absolute() if isinstance(name, str) else path / "run.log"
        if file.is_relative_to(path):
            return UserError(
                f"{key}={folder}: {file.name} cannot be written ({cause.strerror}): free space there, or choose "
                f"another {key}; the same command then continues"
            )
    return None


def check_device(cfg: DictConfig) -> None:
    """Raise UserError if this machine lacks the accelerator of the key `device`; cpu and auto do not import torch."""
    device = str(cfg.device)
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    import torch

    count = torch.mps.device_count() if kind == "mps" else torch.cuda.device_count()
    if int(index or 0) >= count:
        available = ", ".join(f"{kind}:{k}" for k in range(count)) or f"no device {kind}"
        refuse("device", device, f"this machine has {available}; choose auto or cpu")


def check_wandb_login(cfg: DictConfig) -> None:
    """`require_wandb_key` if wandb.mode=online."""
    if cfg.wandb.mode == "online":
        require_wandb_key("wandb.mode=online", "use wandb.mode=offline")


def require_wandb_key(what: str, alternative: str) -> None:
    """Raise UserError if W&B's client finds no well-formed API key; `wandb.init` would ask for one and wait.

    The message starts with `what` and ends with `alternative`. The network is not used.
    """
    import wandb

    try:
        with wandb_environment.decided():
            wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
            available = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:  # the client may also refuse other settings of the environment
        raise UserError(f"{what}: {one_line(str(error))}; correct it, or {alternative}") from error
    if not available:
        raise UserError(f"{what}: no W&B API key found; run 'wandb login', set WANDB_API_KEY, or {alternative}")
