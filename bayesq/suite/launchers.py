"""What the runs of a sweep may use of a machine, whichever launcher starts them: threads, GPUs and their turn.

Hydra's launchers start the runs (conf/hydra/launcher/*.yaml). They differ in what a run gets of the machine, so each
run takes what `resources` grants before torch is imported. Nothing here imports torch.
"""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError
from bayesq.suite.results import FAILURE_FILE, read_result

log = logging.getLogger(__name__)

# read by the numerical libraries when they are imported
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# tells the runs of a launcher on one machine which GPUs the command may use: submitit overwrites CUDA_VISIBLE_DEVICES
GPUS_VARIABLE = "BAYESQ_GPUS"
POLL_S, QUEUE_POLL_S = 1.0, 10.0

# conf/hydra/launcher has the plugins' own names for what replaces their defaults; their types still check it
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


@dataclass(frozen=True)
class Launcher:
    """One of the presets in conf/hydra/launcher.

    Attributes:
        name: as it is chosen.
        package: the distribution that brings it.
        module: what has to be importable for it.
        install: what pip is told to install.
        local: its runs are on the machine of the command.
        asynchronous: its runs write logs of their own, and outlive the command.
    """

    name: str
    package: str
    module: str
    install: str
    local: bool
    asynchronous: bool


SUBMITIT = ("hydra-submitit-launcher", "hydra_plugins.hydra_submitit_launcher", "-c constraints.txt -e '.[slurm]'")
# by the class that the preset names
LAUNCHERS = {
    "JoblibLauncher": Launcher(
        "joblib",
        "hydra-joblib-launcher",
        "hydra_plugins.hydra_joblib_launcher",
        "-c constraints.txt -e .",
        local=True,
        asynchronous=False,
    ),
    "LocalLauncher": Launcher("submitit_local", *SUBMITIT, local=True, asynchronous=True),
    "SlurmLauncher": Launcher("submitit_slurm", *SUBMITIT, local=False, asynchronous=True),
    "RayLauncher": Launcher(
        "ray",
        "hydra-ray-launcher",
        "hydra_plugins.hydra_ray_launcher",
        "-c constraints.txt -e '.[ray]'",
        local=False,
        asynchronous=False,
    ),
}


def chosen(hydra: DictConfig | HydraConf) -> Launcher | None:
    """The preset in Hydra's node; None for Hydra's own launcher, one run after the other, and for unknown ones."""
    return LAUNCHERS.get(str(hydra.launcher._target_).rpartition(".")[2])


def is_local(hydra: DictConfig | HydraConf) -> bool:
    """Whether the runs are on the machine of the command, so that its accelerators are theirs."""
    launcher = chosen(hydra)
    return str(hydra.launcher._target_).endswith(".BasicLauncher") if launcher is None else launcher.local


# --------------------------------------------------------------------------------------------- before anything runs


def check(cfg: DictConfig) -> None:
    """Check that the chosen launcher can start anything, and that the machine has what each run is to get.

    Args:
        cfg: the composed configuration with Hydra's node, after `config.validate`.

    Raises:
        UserError: its package or Slurm's commands are missing, or resources do not fit the device or the machine.
    """
    launcher = chosen(cfg.hydra)
    if launcher is None:
        return
    choice = f"hydra/launcher={launcher.name}"
    if not _importable(launcher.module):
        raise UserError(f"{choice}: {launcher.package} is not installed; pip install {launcher.install}")
    if launcher.name == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(f"{choice}: there is no sbatch here; start it on a machine of the cluster that can submit jobs")
    gpus = int(cfg.resources.gpus)
    if gpus == 0:
        if str(cfg.device) not in ("auto", "cpu"):
            raise UserError(f"device={cfg.device}: {choice} gives a run no GPU; add resources.gpus=1")
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


# ------------------------------------------------------------------------------------------------------ in a run

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
        # joblib counts its processes itself
        place, _place = _take_place(launcher.name, jobs_at_once(cpus, gpus) if launcher.asynchronous else None)
        if gpus:
            names = visible_gpus()
            own = [names[(place * gpus + k) % len(names)] for k in range(gpus)]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


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


# -------------------------------------------------------------------------------- while a launcher waits for its runs


@contextmanager
def attend(launcher: Launcher | None, runs: Mapping[Path, str]) -> Iterator[None]:
    """Wait for every run of submitit and Ray, whatever happens to one, and say at once which of submitit's failed.

    Left to themselves, their launchers give up at the first run that was killed, with others still in the queue; and
    on a Slurm cluster without accounting submitit never finds out. What its runs print is in their logs.

    Args:
        launcher: what starts the runs.
        runs: the runs' folders, and how to name each.
    """
    # the launchers are Hydra's plugins and name these functions themselves: there is no place to hand over our own
    with ExitStack() as replaced:
        if launcher is not None and launcher.asynchronous:
            import submitit

            results = submitit.Job.results
            replaced.enter_context(_replaced(submitit.Job, "wait", _wait))
            replaced.enter_context(_replaced(submitit.Job, "results", lambda job: _results(job, results)))
            over = threading.Event()
            relay = threading.Thread(target=_relay, args=(runs, time.time(), over), daemon=True)
            relay.start()
            replaced.callback(relay.join)
            replaced.callback(over.set)
        elif launcher is not None and launcher.name == "ray":
            import ray

            get = ray.get
            replaced.enter_context(_replaced(ray, "get", partial(_result, get)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _wait(job: Any) -> None:
    """Wait until a submitit job left its result, or has ended without one."""
    asked = time.monotonic()
    while not job.done():
        time.sleep(POLL_S)
        if time.monotonic() - asked > QUEUE_POLL_S:
            if _has_left_queue(job):
                return
            asked = time.monotonic()


def _has_left_queue(job: Any) -> bool:
    """Whether Slurm's queue does not hold the job any more; no answer does not count as one."""
    import submitit

    if not isinstance(job, submitit.SlurmJob):
        return False
    command = ["squeue", "--noheader", "--jobs", job.job_id]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return not answer.stdout.strip() if answer.returncode == 0 else "Invalid job id" in answer.stderr


def _results(job: Any, results: Callable[[Any], Any]) -> Any:
    """What a submitit job returned; of one that was killed, a line about it and an empty return.

    The run's folder tells that it has no result.
    """
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return results(job)
    except (FailedJobError, UncompletedJobError):
        overrides = " ".join(job.submission().args[0])
        return [_ended(f"{overrides}; job {job.job_id} {job.state}; {job.paths.stdout}")]


def _result(get: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """As `_results`, for what Ray returns."""
    import ray

    try:
        return get(*arguments, **options)
    except ray.exceptions.RayError as error:
        return _ended(one_line(f"{type(error).__name__}: {error}"))


def _ended(place: str) -> JobReturn:
    print(f"error: a run ended before it could say why [{place}]", file=sys.stderr, flush=True)
    return JobReturn(_return_value=None, status=JobStatus.COMPLETED)


def _relay(runs: Mapping[Path, str], start: float, over: threading.Event) -> None:
    """Report each run that failed since `start`, once, until `over` and what came before it."""
    left = dict(runs)
    while left:
        last = over.wait(POLL_S)
        for folder, name in list(left.items()):
            file = folder / FAILURE_FILE
            if file.exists() and file.stat().st_mtime >= start:
                reason = (read_result(file) or {}).get("error")
                print(f"error: {reason} [{folder.name} ({name}); {folder}]", file=sys.stderr, flush=True)
                del left[folder]
        if last:
            return
