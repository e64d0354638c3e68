"""What every test runs under: nothing of the environment of the person who runs them, and one thread per xdist worker.

All of it holds before any other module is imported, because several libraries read the environment once, and for the
processes that tests start as well.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from hypothesis import settings

# Variables with these beginnings or names change what the program, Python or a library does. Those that choose a
# processor's kernels or the number of threads stay: the tests have to pass with any.
BEGINNINGS = ("BAYESQ_", "CUDA_", "GIT_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "HYDRA_", "LC_", "MPL", "RAY_")
BEGINNINGS += ("SBATCH_", "SLURM_", "SUBMITIT_", "TORCH_", "TQDM_", "TRANSFORMERS_", "WANDB_")
NAMES = {"COLUMNS", "FORCE_COLOR", "LANG", "LANGUAGE", "MATPLOTLIBRC", "NO_COLOR", "PYTHONDEVMODE", "PYTHONIOENCODING"}
NAMES |= {"PYTHONOPTIMIZE", "PYTHONUTF8", "PYTHONWARNINGS"}
for name in list(os.environ):
    if name.startswith(BEGINNINGS) or name in NAMES:
        del os.environ[name]

# what earlier runs left in the home folder, and the accounts and settings there, are not for the tests
HOME = Path(tempfile.mkdtemp(prefix="bayesq-tests-"))
os.environ |= {
    name: str(HOME / name.lower())
    for name in ("BAYESQ_CACHE_DIR", "HF_HOME", "NETRC", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
}
os.environ |= {"LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""}  # numbers are a CPU's
# `python -m pytest` works without an activated environment
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# servers on this machine are never behind a proxy
os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1")
# workers that each use every core only get in each other's way
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the first example of a test may be the one that numba compiles for
settings.register_profile("bayesq", deadline=None)
settings.load_profile("bayesq")


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)
