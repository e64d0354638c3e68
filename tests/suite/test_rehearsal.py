"""What takes long once belongs to no method: after its rehearsal a method meets only machine code that is there."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_sets import STATISTICS
from torch import nn

from bayesq.budget import Budget
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.quant.layers import quantizable_layers
from bayesq.quant.tensor import QuantizedTensor
from bayesq.recipe import Recipe
from bayesq.suite.plan import make_recipe
from bayesq.suite.rehearsal import WEIGHTS, all_widths, random_statistic, rehearse, small_problems
from bayesq.uniform import Uniform

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "method=rtn": set(),
    "method=awq allocator=knapsack": {"_lower_hulls"},
    "method=gptq": {"_transpose", "_affine_block"},
    "bits=4": {"_bitshift_block", "_states", "_least_error"},
    "proxy=mc method.states=256 bits=2.5": {"_bitshift_block", "_round_column"},
    "method.levels=lloyd": {"_codebook_block", "_least_error"},
    "posterior=diag": {"_round_columns", "_states"},
}


@pytest.fixture(scope="module")
def compilations() -> dict[str, list[list[str]]]:
    """Per command: functions with machine code after the rehearsal, and those that got more when the layers came."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/suite/compilations.py"), *COMMANDS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    functions: dict[str, list[list[str]]] = json.loads(done.stdout)
    return functions


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_compiled_after_the_rehearsal(command, compilations):
    rehearsed, later = compilations[command]
    assert later == []
    assert {name.rpartition(".")[2] for name in rehearsed} >= COMMANDS[command]


def test_only_what_a_method_needs_is_compiled(compilations):
    assert compilations["method=rtn"][0] == []
    assert [name.rpartition(".")[2] for name in compilations["method=awq allocator=knapsack"][0]] == ["_lower_hulls"]
    assert not any(
        "bitshift" in name for name in compilations["method=gptq"][0] + compilations["method.levels=lloyd"][0]
    )


class Foreign:
    """A method from outside the project, with a compiled function."""

    statistics = frozenset({INPUT_MOMENT})

    def __init__(self) -> None:
        self.round = numba.njit(lambda x: np.rint(x).clip(0.0, 3.0))

    def prepare(self, layers, allocate, context):
        return allocate(layers)

    def quantize_layer(self, layer, width, context) -> QuantizedTensor:
        assert layer.input_statistic("input_moment").shape == (layer.weight.shape[0], *2 * layer.weight.shape[2:])
        codes = torch.from_numpy(self.round(layer.weight.flatten(0, 1).numpy())).to(torch.uint8)
        rows = torch.ones(layer.rows, 1, dtype=torch.float16)
        return QuantizedTensor(codes, width, rows, (rows * 0).to(torch.uint8), layer.weight.shape[0])


def recipe(method: Foreign) -> Recipe:
    return Recipe(method, Uniform(), Budget(3, "code"), inputs="prefix")


def layers() -> dict[str, nn.Module]:
    network = nn.ModuleDict(
        {
            "a": nn.Linear(700, 600),
            "b": nn.Linear(600, 600),
            "c": nn.Conv2d(40, 3, 3),
            "d": nn.Conv2d(64, 64, 7, groups=64),
            "e": nn.Conv2d(64, 128, 3, groups=4),
            "f": nn.Linear(900, 2),
        }
    )
    return quantizable_layers(network)


def test_methods_of_others_are_rehearsed_too():
    method = Foreign()
    rehearse(recipe(method), layers())
    assert len(method.round.nopython_signatures) == 1


class Failing(Foreign):
    def quantize_layer(self, layer, width, context):
        raise RuntimeError("only real layers, please")


def test_what_a_rehearsal_cannot_do_is_left_to_the_run(caplog):
    with caplog.at_level(logging.INFO):
        rehearse(recipe(Failing()), layers())
    assert not caplog.records


def test_small_layers_are_of_every_kind_and_enough_for_tables():
    problems = {problem.name: problem for problem in small_problems(layers(), [INPUT_MOMENT])}
    assert {name: tuple(problem.weight.shape) for name, problem in problems.items()} == {
        "a": (1, 256, 288),
        "c": (1, 3, 288),
        "d": (8, 1, 49),
        "e": (4, 32, 144),
        "f": (1, 2, 288),
    }
    assert sum(problem.weight.numel() for problem in problems.values()) >= WEIGHTS
    assert problems["d"].positions_per_channel == 49


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 1, 4), (2, 4, 1)])
def test_statistics_have_their_shapes(shape):
    for kind, statistic in STATISTICS.items():
        values = random_statistic(shape, statistic)
        assert tuple(values.shape) == statistic.shape(*shape) and values.dtype == torch.float32, kind
        statistic.check("layer", values)
        assert values.any() and torch.equal(values, random_statistic(shape, statistic))


def test_all_widths_occur():
    assert all_widths(16).tolist() == [2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 2, 3]


@pytest.mark.parametrize("override", ["allocator=uniform", "proxy=mc"])
def test_a_prior_of_all_layers_is_rehearsed(override, caplog):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["posterior.prior_scope=global", override])
    with caplog.at_level(logging.DEBUG, "bayesq.suite.rehearsal"):
        rehearse(make_recipe(cfg), layers())
    assert not caplog.records
