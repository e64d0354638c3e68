"""Every switch of the methods that `test_end_to_end` does not cover changes what is stored, by runs on digits."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from bayesq.suite import config, runner, schema
from bayesq.tensor_file import read_tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FAST = (
    "model=resnet",
    "dataset=digits",
    "dataset.limit=100",
    "calibration.examples=48",
    "wandb.mode=disabled",
    "bits=3",
)
EVERY = ["allocator=knapsack", "correction=moments", "budget.count=stored"]
GRIDS = ["method.group_size=16", "method.symmetric=true"]
CODED = ["method.act_order=false", "method.damping=0.1", "allocator=knapsack", "correction=moments"]
# What a run and its reference share -> switches that must change its file, one at a time.
SWITCHES = {
    "method=rtn": [*EVERY, *GRIDS, "method.clip=minmax", "codec=entropy"],
    "method=gptq": [*GRIDS, "method.clip=curvature", "method.sequential=false", "inputs=paired", "codec=entropy"],
    "method=gptq codec=entropy": ["inputs=full", *CODED],
    "method=awq": [*EVERY, *GRIDS, "inputs=prefix", "inputs=paired"],
    "method=awq codec=entropy": ["method.exponents=3", "budget.count=stored"],
    "method=gptaq": [*EVERY, *GRIDS, *CODED[:2], "method.clip=mse", "method.alpha=0.25", "codec=entropy"],
    "method=gptaq codec=entropy": ["method.alpha=0.25"],
    "method=qronos": [*EVERY, *CODED[:2], "method.clip=mse", "method.ridge=0.1", "codec=entropy"],
    "method=qronos codec=entropy": ["method.ridge=0.1"],
    "method=adaround method.steps=10": [
        *EVERY,
        *("inputs=full", "inputs=prefix", "method.clip=minmax", "method.steps=20"),
        *("method.learning_rate=0.1", "method.strength=1"),
    ],
    "method=brecq method.steps=10": [
        *EVERY,
        *("method.clip=minmax", "method.steps=20", "method.fisher=true"),
        *("method.learning_rate=0.1", "method.strength=1"),
    ],
    "method=qtip": [*EVERY, "inputs=full", "inputs=paired", "method.states=8", "method.damping=0.1"],
    "method=watersic": [*CODED, "inputs=full", "inputs=paired", "budget.count=stored"],
    "method=hqq": [
        *EVERY,
        *("method.norm=0.5", "method.beta=1", "method.growth=2", "method.steps=3", "method.fit_scale=false"),
        GRIDS[0],
    ],
    "method=squeezellm bits=4": [*EVERY, "method.sparse=0.01"],
    "method=squeezellm method.sparse=0.01": ["method.sensitive=0.5"],
    "method=lnq bits=4": [*EVERY, "method.groups=2", "method.rounds=1", "method.sweeps=1", "method.damping=0.1"],
    "method=lnq method.groups=0": ["inputs=prefix", "inputs=paired"],
    "method=bayesq codec=entropy": [
        *("method.levels=lloyd", "method.states=8", "method.rounding=nearest", "method.refits=0", "method.damping=0.1"),
        *("inputs=full", "correction=none", "allocator=uniform", "posterior=diag", "budget.count=stored"),
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, float]]:
    """A digest of all that a run stores, and its stored bits."""
    folder = tmp_path_factory.mktemp("switches")

    @cache
    def stored(overrides: str) -> tuple[str, float]:
        given = {one.partition("=")[0]: one for one in (*FAST, *overrides.split())}  # the last value counts
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*given.values(), f"results_dir={folder}/results", f"cache_dir={folder}/cache"])
        schema.validate(cfg)
        result = runner.run(cfg)
        buffers, _ = read_tensors(config.run_dir(cfg) / runner.QUANTIZED_FILE)
        digest = hashlib.sha256()
        for name in sorted(buffers):
            digest.update(name.encode() + buffers[name].numpy().tobytes())
        return digest.hexdigest(), result["bits/stored"]

    return stored


@pytest.mark.parametrize(("base", "switch"), [(base, switch) for base in SWITCHES for switch in SWITCHES[base]])
def test_a_switch_changes_what_is_stored(run: Callable[[str], tuple[str, float]], base: str, switch: str) -> None:
    reference, (changed, bits) = run(base)[0], run(f"{base} {switch}")
    assert changed != reference
    if switch == "budget.count=stored":
        assert bits <= (4 if "bits=4" in base else 3)


def test_a_second_run_stores_the_same(run: Callable[[str], tuple[str, float]]) -> None:
    """So a difference is the switch's alone."""
    for base in ("method=brecq method.steps=10", "method=bayesq codec=entropy"):
        assert run(f"{base} force=true") == run(base)
