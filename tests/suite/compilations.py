"""What numba compiles, or loads from its cache, in a rehearsal and after it; each command in a process of its own.

    python tests/suite/compilations.py COMMAND [COMMAND ...]

A command's method quantizes layers of many kinds, after its rehearsal. Prints JSON: command -> [functions that had
machine code after the rehearsal, functions that got more of it later].
"""

import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from numba.core.dispatcher import Dispatcher
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rounding_loop import rounded
from tiny_sets import STATISTICS

from bayesq.budget import Allocation
from bayesq.calibration.statistic import LayerStatistics
from bayesq.contract import LayerProblem
from bayesq.quant.layers import kernel_positions, quantizable_layers, weight_to_matrix
from bayesq.suite import plan
from bayesq.suite.rehearsal import random_statistic, rehearse

ROOT = Path(__file__).resolve().parents[2]


def network() -> nn.Module:
    """Layers with and without groups, with few rows and many, a single column, and enough weights for tables."""
    torch.manual_seed(1)
    return nn.ModuleDict(
        {
            "wide": nn.Linear(400, 300),
            "plain": nn.Linear(30, 20),
            "convolution": nn.Conv2d(6, 9, 3),
            "grouped": nn.Conv2d(8, 24, (3, 1), groups=4),
            "depthwise": nn.Conv2d(12, 12, 5, groups=12),
            "pointwise": nn.Conv2d(5, 7, 1),
            "head": nn.Linear(33, 2),
            "column": nn.Linear(1, 11),
        }
    )


def signatures() -> dict[str, int]:
    """Number of signatures with machine code of each compiled function of the package."""
    found = {
        f"{value.__module__}.{value.__name__}": value
        for name, module in list(sys.modules.items())
        for value in vars(module).values()
        if name.partition(".")[0] in ("bayesq", "baselines") and isinstance(value, Dispatcher)
    }
    return {name: len(function.nopython_signatures) for name, function in found.items()}


def observe(command: str) -> tuple[list[str], list[str]]:
    """See above."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["model=resnet", "dataset=digits", *command.split()])
    layers = quantizable_layers(network())
    rehearse(plan.make_recipe(cfg), layers)
    before = signatures()

    recipe, problems = plan.make_recipe(cfg), []
    for name, layer in layers.items():
        weight = weight_to_matrix(layer).detach()
        read = LayerStatistics(name, STATISTICS, partial(random_statistic, tuple(weight.shape)))
        problems.append(LayerProblem(name, type(layer).__name__, weight, read, kernel_positions(layer)))
    for _, tensor in rounded(recipe.method, problems, Allocation(recipe.allocator, recipe.budget)):
        tensor.dequantize()
    if cfg.proxy == "mc":
        recipe.allocator.rounded(problems[0], 3)
    after = signatures()
    return sorted(name for name in before if before[name]), sorted(n for n in after if after[n] != before.get(n, 0))


def main() -> None:
    """One fork for each command: all of them begin without machine code."""
    found = {}
    for command in sys.argv[1:]:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[command] = pool.apply(observe, (command,))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
