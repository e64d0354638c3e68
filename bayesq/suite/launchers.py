"""Threads and GPUs of the runs of a sweep, whichever of Hydra's launchers starts them (conf/hydra/launcher/*.yaml).

Launchers differ in what they give a run, so every run takes what the key `resources` grants, before torch is imported.
Nothing here imports torch.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from bayesq.suite.errors import UserError

# read by the numerical libraries when they are imported
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# the GPUs of a command, for its runs on this machine: submitit overwrites CUDA_VISIBLE_DEVICES
GPUS_VARIABLE = "BAYESQ_GPUS"
POLL_S = 1.0

# the files of conf/hydra/launcher have the names of the plugins' defaults, whose types check them
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


@dataclass(frozen=True)
class Launcher:
    """One of the presets in conf/hydra/launcher.

    Attributes:
        name: as it is chosen.
        package: the distribution that brings it.
        extra: of bayesq, which installs it.
        local: its runs are on the machine of the command.
    """

    name: str
    package: str
    extra: str
    local: bool


# by the class that the preset names
LAUNCHERS = {
    "JoblibLauncher": Launcher("joblib", "hydra-joblib-launcher", "", local=True),
    "LocalLauncher": Launcher("submitit_local", "hydra-submitit-launcher", "[slurm]", local=True),
    "SlurmLauncher": Launcher("submitit_slurm", "hydra-submitit-launcher", "[slurm]", local=False),
    "RayLauncher": Launcher("ray", "hydra-ray-launcher", "[ray]", local=False),
}


def chosen(hydra: DictConfig | HydraConf) -> Launcher | None:
    """The preset in Hydra's node; None for Hydra's own launcher, one run after the other, and for unknown ones."""
    return LAUNCHERS.get(str(hydra.launcher._target_).rpartition(".")[2])


def is_local(hydra: DictConfig | HydraConf) -> bool:
    """Whether the runs are on the machine of the command, so that its accelerators are theirs."""
    launcher = chosen(hydra)
    return str(hydra.launcher._target_).endswith(".BasicLauncher") if launcher is None else launcher.local


def check(hydra: DictConfig, config: Mapping[str, Any]) -> None:
    """Check that the chosen launcher can start anything, and that the machine has what each run is to get.

    Args:
        hydra: Hydra's node.
        config: plain and resolved, after `schema.validate`.

    Raises:
        UserError: its package or Slurm's commands are missing, or resources do not fit the device or the machine.
    """
    launcher = chosen(hydra)
    if launcher is None:
        return
    choice = f"hydra/launcher={launcher.name}"
    if not _importable(f"hydra_plugins.{launcher.package.replace('-', '_')}"):
        install = f"pip install -c constraints.txt -e '.{launcher.extra}'"
        raise UserError(f"{choice}: {launcher.package} is not installed; {install}")
    if launcher.name == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(f"{choice}: there is no sbatch here; start it on a machine of the cluster that can submit jobs")
    gpus = int(config["resources"]["gpus"])
    if gpus == 0:
        if config["device"] not in ("auto", "cpu"):
            raise UserError(f"device={config['device']}: {choice} gives a run no GPU; add resources.gpus=1")
    elif launcher.local:
        names = visible_gpus()
        if gpus > len(names):
            raise UserError(f"resources.gpus={gpus}: this machine has {len(names)} CUDA devices to give to runs")
        os.environ[GPUS_VARIABLE] = ",".join(names)  # the runs inherit it


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def visible_gpus() -> list[str]:
    """CUDA's names of the GPUs that a command may give to its runs, in order."""
    for variable in (GPUS_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [name for name in os.environ[variable].split(",") if name]
    # torch would tell too, but then CUDA could not be told any more which of them to use
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(k) for k in range(sum(line.startswith("GPU ") for line in lines))]


def jobs_at_once(cpus: int, gpus: int) -> int:
    """How many runs the cores and GPUs of this machine allow at the same time, at least one."""
    import joblib  # counts what cgroups and CPU affinity leave, not what the machine has

    most: int = joblib.cpu_count() // cpus
    return max(1, most if gpus == 0 else min(most, len(visible_gpus()) // gpus))


# the launchers' presets ask for it
OmegaConf.register_new_resolver("jobs_at_once", lambda cpus, gpus: jobs_at_once(int(cpus), int(gpus)), replace=True)


# a process keeps its place until it ends: CUDA cannot change devices once it has begun
_place: FileLock | None = None


def occupy(hydra: DictConfig | HydraConf, resources: DictConfig) -> None:
    """Take what a run may use of its machine: threads, and with a launcher on one machine its place and its GPUs.

    Called before the numerical libraries are imported. Runs of submitit_local wait here until a place is free.
    """
    launcher = chosen(hydra)
    if launcher is None:
        return
    cpus, gpus = int(resources.cpus), int(resources.gpus)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(cpus)
    if "torch" in sys.modules:  # a process that has run before
        sys.modules["torch"].set_num_threads(cpus)
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    global _place
    if launcher.local and _place is None:
        # submitit starts all runs at once; joblib starts only as many as there are places
        limit = jobs_at_once(cpus, gpus) if launcher.name == "submitit_local" else None
        place, _place = _take_place(launcher.name, limit)
        if gpus:
            names = visible_gpus()
            taken = [names[(place * gpus + k) % len(names)] for k in range(gpus)]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _take_place(name: str, places: int | None) -> tuple[int, FileLock]:
    """The first free one of so many places on this machine, numbered from 0; None: there is always one more.

    The operating system frees a place when the process that holds it dies.
    """
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


@contextmanager
def tolerating_lost_runs(launcher: Launcher | None) -> Iterator[None]:
    """Have the launchers of submitit and Ray wait for every run, also after one was killed.

    They have no hook for it, and would end the command with runs still in the queue, or stop those. So the function
    that they ask for results is replaced: a killed run gives a line, and an empty return. Its folder has no result.
    """
    if launcher is None or launcher.name == "joblib":
        yield
        return
    owner: Any
    lost: tuple[type[Exception], ...]
    if launcher.name == "ray":
        import ray

        owner, name, lost = ray, "get", (ray.exceptions.RayError,)
    else:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError

        owner, name, lost = submitit.Job, "results", (FailedJobError, UncompletedJobError)
    original = getattr(owner, name)

    def tolerant(*arguments: Any, **options: Any) -> Any:
        try:
            return original(*arguments, **options)
        except lost as error:
            reason = str(error).partition("\n")[0]
            print(f"error: a run ended before it could say why [{type(error).__name__}: {reason}]", file=sys.stderr)
            ended = JobReturn(_return_value=None, status=JobStatus.COMPLETED)
            return ended if name == "get" else [ended]

    setattr(owner, name, tolerant)
    try:
        yield
    finally:
        setattr(owner, name, original)
