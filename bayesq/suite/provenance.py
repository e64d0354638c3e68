"""Versions, host and git commit of a run, as recorded in its result."""

import os
import platform
import subprocess
import sys
import uuid
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import bayesq

if TYPE_CHECKING:
    import torch

NETWORKS = ("torch", "torchvision", "timm", "transformers", "tokenizers")
NUMBERS_AND_FILES = ("numba", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")
PACKAGES = (*NETWORKS, *NUMBERS_AND_FILES, "hydra-core", "omegaconf", "wandb")


@cache
def versions() -> dict[str, str]:
    """Versions of bayesq, Python and `PACKAGES`; "absent" if a package is not installed."""
    installed = {"bayesq": bayesq.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "absent"
    return installed


def host(device: "torch.device") -> dict[str, str | int]:
    """Hardware, number of threads, and the working directory, to which relative paths in the config refer."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "directory": str(Path.cwd()),
    }


def process() -> str:
    """A unique name of this process. Runs in one process share their peak memory."""
    return f"{os.getpid()}-{_BEGUN}"


_BEGUN = uuid.uuid4().hex[:12]


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


@cache
def git_state() -> dict[str, str | bool | None]:
    """Commit of the checkout with the code, and whether its files differ from it; None outside a checkout.

    Cached, because a later edit or commit does not change the code that this process has loaded.
    """
    output = _git("status", "--porcelain=v2", "--branch")
    if output is None:
        return {"commit": None, "dirty": None}
    commit, *lines = output.decode(errors="replace").splitlines()  # "# branch.oid COMMIT", other headers, changed files
    return {"commit": commit.split()[-1], "dirty": any(not line.startswith("#") for line in lines)}


@cache
def git_diff() -> bytes | None:
    """Changes of the code's tracked files since their commit, as a patch; None outside a checkout. Cached."""
    return _git("diff", "--binary", "HEAD")


def _git(*arguments: str) -> bytes | None:
    """Output of git in the checkout with the code; None outside a checkout, or if git fails."""
    root = Path(bayesq.__file__).parents[1]
    try:
        (root / ".git").stat()  # fails outside a checkout, also if an outer folder is a checkout
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
