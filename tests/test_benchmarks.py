"""The benchmarks can be collected, and what they compare with is what it claims to be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.grids import AffineGrid, minmax_grid

FOLDER = Path(__file__).parent / "benchmarks"
pytest.importorskip("pytest_benchmark")


def test_the_lazy_blocks_compared_with_give_our_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from references import layer, lazy_block_factor, lazy_block_round

    weight, moment = layer(24, 200)
    factor, width = feedback_factor(moment, 0.01), torch.full((24,), 4)
    scale, zero = minmax_grid(weight.double(), width)
    codes, values, _ = feedback_round(weight, factor, AffineGrid(scale[:, None], zero[:, None], width))
    ordered = (weight.double()[:, factor.order], moment[factor.order][:, factor.order])
    theirs = lazy_block_round(ordered[0], lazy_block_factor(ordered[1], 0.01), scale, zero, 15)
    assert torch.equal(theirs[0], codes[:, factor.order].double()) and torch.equal(theirs[1], values[:, factor.order])


def test_the_pass_still_runs_as_a_run_does() -> None:
    small = [str(FOLDER / "bench_pass.py"), "-k", "test_pass and small", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-q", "-s", *small]
    run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert run.returncode == 0 and "test_pass[small]: ours" in run.stdout, run.stdout + run.stderr


def test_benchmarks_run_when_asked_for_and_are_collected_only_then() -> None:
    small = [str(FOLDER / "bench_rounding.py"), "-k", "test_depthwise and 96x1x9", "-p", "no:xdist"]
    pytest_command = [sys.executable, "-m", "pytest", "-q"]
    run = subprocess.run([*pytest_command, "-s", *small], capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert run.returncode == 0 and "one by one" in run.stdout, run.stdout + run.stderr
    collected = [*pytest_command, "--collect-only", "-p", "no:xdist"]
    default = subprocess.run([*collected, str(FOLDER)], capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert "no tests collected" in default.stdout
