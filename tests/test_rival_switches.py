"""Every switch of the methods that `test_end_to_end` does not cover changes what is stored, by runs on digits."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from bayesq.suite import config, runner, schema
from bayesq.suite.results import QUANTIZED_FILE
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
STORED = "budget.count=stored"
# What a run and its reference share -> switches that must change its file, one at a time.
SWITCHES = {
    "method=rtn": ["method.group_size=16", "method.symmetric=true", "correction=moments", "codec=entropy"],
    "method=rtn method.group_size=16 bits=5": [STORED],
    "method=gptq": ["method.symmetric=true", "method.clip=curvature", "method.sequential=false", "inputs=paired"],
    "method=gptq codec=entropy": ["method.act_order=false", "method.damping=0.1", "allocator=knapsack", STORED],
    "method=awq": ["method.group_size=16", "method.symmetric=true", "inputs=prefix"],
    "method=awq bits=5": [STORED, "allocator=knapsack"],
    "method=awq codec=entropy": ["method.exponents=3"],
    "method=gptaq": ["method.group_size=16", "method.symmetric=true", "method.clip=mse", "method.alpha=0.25"],
    "method=gptaq codec=entropy": ["method.alpha=0.25"],
    "method=qronos": ["method.act_order=false", "method.ridge=0.1"],
    "method=qronos codec=entropy": ["method.ridge=0.1"],
    "method=adaround method.steps=5": ["inputs=full", "method.clip=minmax", "method.steps=9", "method.strength=1"],
    "method=brecq method.steps=5": ["method.fisher=true", "method.learning_rate=0.1", "correction=moments"],
    "method=qtip": ["inputs=full", "allocator=knapsack"],
    "method=watersic": ["inputs=full", "method.act_order=false", "method.damping=0.1", "allocator=knapsack", STORED],
    "method=hqq": ["method.group_size=16", "method.growth=2", "method.fit_scale=false"],
    "method=squeezellm": ["method.sparse=0.01", "correction=moments"],
    "method=squeezellm method.sparse=0.01": ["method.sensitive=0.5"],
    "method=lnq": ["method.rounds=1", "method.sweeps=1"],
    "method=lnq method.groups=0": ["inputs=prefix"],
    "method=bayesq codec=entropy": ["method.levels=lloyd", "method.rounding=nearest"],
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
        buffers, _ = read_tensors(config.run_dir(cfg) / QUANTIZED_FILE)
        digest = hashlib.sha256()
        for name in sorted(buffers):
            digest.update(name.encode() + buffers[name].numpy().tobytes())
        return digest.hexdigest(), result["bits/stored"]

    return stored


@pytest.mark.parametrize(("base", "switch"), [(base, switch) for base in SWITCHES for switch in SWITCHES[base]])
def test_a_switch_changes_what_is_stored(run: Callable[[str], tuple[str, float]], base: str, switch: str) -> None:
    reference, (changed, bits) = run(base)[0], run(f"{base} {switch}")
    assert changed != reference
    if switch == STORED:
        assert bits <= (5 if "bits=5" in base else 3)
