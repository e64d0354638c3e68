"""Threads and GPUs of the runs of a sweep, under each of Hydra's launchers (conf/hydra/launcher/*.yaml).

Launchers give their runs different resources. So every run takes the share that the key `resources` names, before torch
is imported. Nothing here imports torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from bayesq.suite.errors import UserError

# the numerical libraries read these when they are imported
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# passes the GPUs of a command to its runs, because submitit overwrites CUDA_VISIBLE_DEVICES
GPUS_VARIABLE = "BAYESQ_GPUS"
POLL_S = 1.0
# what Ray appends to its folder, and the longest path that the operating system takes
RAY_SOCKET = "/ray/session_YYYY-MM-DD_HH-MM-SS_ffffff_{pid}/sockets/plasma_store"
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107

# Hydra warns because our launcher files have the names of the plugins' defaults
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


@dataclass(frozen=True)
class Launcher:
    """One of the presets in conf/hydra/launcher."""

    name: str
    package: str  # the distribution with its class
    extra: str  # of bayesq, which installs the package
    local: bool  # its runs are on the machine of the command


# by the class that the preset names
LAUNCHERS = {
    "JoblibLauncher": Launcher("joblib", "hydra-joblib-launcher", "", local=True),
    "LocalLauncher": Launcher("submitit_local", "hydra-submitit-launcher", "[slurm]", local=True),
    "SlurmLauncher": Launcher("submitit_slurm", "hydra-submitit-launcher", "[slurm]", local=False),
    "RayLauncher": Launcher("ray", "hydra-ray-launcher", "[ray]", local=False),
}


def chosen(hydra: DictConfig | HydraConf) -> Launcher | None:
    """The preset in Hydra's node; None for Hydra's basic launcher and for unknown ones."""
    return LAUNCHERS.get(str(hydra.launcher._target_).rpartition(".")[2])


def is_local(hydra: DictConfig | HydraConf) -> bool:
    """Whether the runs are on the machine of the command and use its accelerators."""
    launcher = chosen(hydra)
    return str(hydra.launcher._target_).endswith(".BasicLauncher") if launcher is None else launcher.local


def check(hydra: DictConfig, config: Mapping[str, Any]) -> None:
    """Check that the chosen launcher can start runs of the valid `config`, and that the machine has the GPUs of each.

    Raises:
        UserError: its package or Slurm's commands are missing, TMPDIR is too long for Ray, or resources do not fit the
            device or the machine.
    """
    launcher = chosen(hydra)
    if launcher is None:
        return
    choice = f"hydra/launcher={launcher.name}"
    try:
        distribution(launcher.package)
    except PackageNotFoundError:
        install = f"pip install -c constraints.txt -e '.{launcher.extra}'"
        raise UserError(f"{choice}: {launcher.package} is not installed; {install}") from None
    if launcher.name == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(f"{choice}: there is no sbatch here; start it on a machine of the cluster that can submit jobs")
    if launcher.name == "ray":
        _check_ray_folder(hydra.launcher.ray.init)
    gpus = int(config["resources"]["gpus"])
    if gpus == 0:
        if config["device"] not in ("auto", "cpu"):
            raise UserError(f"device={config['device']}: with {choice} a run gets no GPU; add resources.gpus=1")
    elif launcher.local:
        names = visible_gpus()
        if gpus > len(names):
            raise UserError(f"resources.gpus={gpus}: this machine has {len(names)} CUDA devices")
        os.environ[GPUS_VARIABLE] = ",".join(names)  # the runs inherit it


def _check_ray_folder(init: DictConfig) -> None:
    """Check that Ray, if it starts on this machine, can put its sockets below the temporary folder."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")
    longest = SOCKET_BYTES - len(RAY_SOCKET.format(pid=os.getpid()))
    starts_here = not (init.get("address") or init.get("_temp_dir") or "RAY_ADDRESS" in os.environ)
    if starts_here and len(os.fsencode(folder)) > longest:
        needs = f"hydra/launcher=ray puts sockets there, so the path may have at most {longest} bytes"
        raise UserError(f"{variable}={folder}: {needs}; set RAY_TMPDIR to a short folder, such as RAY_TMPDIR=/tmp")


def visible_gpus() -> list[str]:
    """CUDA's names of the GPUs that a command may pass to its runs, in order."""
    for variable in (GPUS_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [name for name in os.environ[variable].split(",") if name]
    # torch could count them too, but then CUDA would ignore a later CUDA_VISIBLE_DEVICES
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(k) for k in range(sum(line.startswith("GPU ") for line in lines))]


def jobs_at_once(cpus: int, gpus: int) -> int:
    """How many runs the cores and GPUs of this machine allow at the same time, at least one."""
    import joblib  # its count of cores respects cgroups and CPU affinity

    most: int = joblib.cpu_count() // cpus
    return max(1, most if gpus == 0 else min(most, len(visible_gpus()) // gpus))


# read by the launchers' presets
OmegaConf.register_new_resolver("jobs_at_once", lambda cpus, gpus: jobs_at_once(int(cpus), int(gpus)), replace=True)
# a process has one place until it ends, because CUDA cannot change devices after its start
_place: FileLock | None = None


def occupy(hydra: DictConfig | HydraConf, resources: DictConfig) -> None:
    """Take a run's share of its machine: threads and, with a local launcher, a place and its GPUs.

    Call it before the numerical libraries are imported. Runs of submitit_local wait here for a free place.
    """
    launcher = chosen(hydra)
    if launcher is None:
        return
    cpus, gpus = int(resources.cpus), int(resources.gpus)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(cpus)
    if "torch" in sys.modules:  # this process has had a run before
        sys.modules["torch"].set_num_threads(cpus)
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    global _place
    if launcher.local and _place is None:
        # submitit starts all runs at once; joblib starts no more than there are places
        limit = jobs_at_once(cpus, gpus) if launcher.name == "submitit_local" else None
        place, _place = _take_place(launcher.name, limit)
        if gpus:
            names = visible_gpus()
            taken = [names[(place * gpus + k) % len(names)] for k in range(gpus)]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _take_place(name: str, places: int | None) -> tuple[int, FileLock]:
    """Lock the first free of this machine's `places`, numbered from 0; the end of the process frees it."""
    folder = Path(tempfile.gettempdir()) / f"bayesq-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        for place in count() if places is None else range(places):
            lock = FileLock(folder / f"{name}-{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return place, lock
        time.sleep(POLL_S)
