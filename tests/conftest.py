"""What every test runs under: no credentials or switches of the person who runs them, one thread per xdist worker."""

import os

# before torch is imported anywhere: workers that each use every core only get in each other's way
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from bayesq.suite import wandb_environment

# the first example of a test may be the one that numba compiles for
settings.register_profile("bayesq", deadline=None)
settings.load_profile("bayesq")

SWITCHES = (
    *("HYDRA_FULL_ERROR", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"),
    *wandb_environment.DECIDED,
    wandb_environment.SWEEP,
)


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path_factory.getbasetemp() / "wandb-home"
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
