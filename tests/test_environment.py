"""The tests pass whatever the environment of the person who runs them says."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "BAYESQ_CACHE_DIR": "/proc/no-such-folder",
    "COLUMNS": "20",
    "CUDA_VISIBLE_DEVICES": "3",
    "GIT_DIR": "/nonexistent",
    "HF_ENDPOINT": "https://hub.example.org",
    "HF_HOME": "/proc/no-such-folder",
    "HF_HUB_OFFLINE": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HYDRA_FULL_ERROR": "1",
    "LANG": "C",
    "LC_ALL": "C",
    "OMP_NUM_THREADS": "2",
    "PYTHONOPTIMIZE": "1",
    "PYTHONUTF8": "0",
    "SLURM_JOB_ID": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_API_KEY": "tooshort",
    "WANDB_DIR": "/proc/no-such-folder",
    "WANDB_MODE": "disabled",
    "WANDB_RUN_ID": "someones",
}
# of the hub, of the cache folder and of a W&B login
TESTS = (
    "tests/suite/test_timm_model.py::TestPublishedWeights::test_an_unreachable_hub_is_one_line_at_once",
    "tests/suite/test_config.py::test_the_whole_pool_can_calibrate",
    "tests/suite/test_config.py::test_online_tracking_needs_a_key",
)


def test_the_tests_pass_in_somebody_elses_environment() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"} | SETTINGS
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_nothing_of_it_reaches_the_tests() -> None:
    foreign = {name for name, value in SETTINGS.items() if os.environ.get(name) == value}
    assert foreign <= {"OMP_NUM_THREADS"}
