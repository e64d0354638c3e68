"""How cost grows: fitted exponents of time over size. `pytest -s tests/benchmarks/bench_scaling.py`."""

import statistics

import numpy as np
import pytest
import torch
from references import TIMER, layer, seconds

from bayesq.batches import TensorExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT
from bayesq.quant.bitshift import BitshiftGrid
from bayesq.quant.codes import Congruential
from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.grids import AffineGrid, minmax_grid
from bayesq.quant.layers import quantizable_layers

pytestmark = pytest.mark.benchmark(timer=TIMER)
ROUNDS = 5


def report(benchmark, what: str, expected: str, sizes: list[int], jobs) -> float:
    """Time jobs[i] of size sizes[i], interleaved, and print the exponent."""
    torch.set_num_threads(1)
    times: list[list[float]] = [[] for _ in jobs]

    def one_round() -> None:
        for job, own in zip(jobs, times, strict=True):
            own.append(seconds(job))

    one_round()
    for own in times:
        own.clear()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    medians = [statistics.median(own) for own in times]
    slope = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
    shown = ", ".join(f"{size}: {1e3 * t:.4g} ms" for size, t in zip(sizes, medians, strict=True))
    print(f"\n{what}: time ~ size^{slope:.2f} (expected {expected}); {shown}")
    benchmark.extra_info["exponent"] = slope
    return slope


def rounding(rows: int, columns: int, states: int | None = None):
    weight, moment = layer(rows, columns)
    factor, width = feedback_factor(moment, 0.01), torch.full((rows,), 4)
    scale, zero = minmax_grid(weight.double(), width)
    grid = AffineGrid(scale[:, None], zero[:, None], width)
    if states is not None:
        grid = BitshiftGrid(scale, zero, width, Congruential(states))
    return lambda: feedback_round(weight, factor, grid)


@pytest.mark.parametrize("states", [None, 1024])
def test_rows(benchmark, states):
    """Linear in rows."""
    sizes = [512, 1024, 2048, 4096]
    slope = report(benchmark, f"rounding, rows, states={states}", "1", sizes, [rounding(n, 768, states) for n in sizes])
    assert slope < 1.25


@pytest.mark.parametrize("states", [None, 1024])
def test_columns(benchmark, states):
    """Between linear (rounding itself) and quadratic (feedback) in columns."""
    sizes = [512, 1024, 2048, 4096]
    what = f"rounding, columns, states={states}"
    slope = report(benchmark, what, "1 to 2", sizes, [rounding(512, n, states) for n in sizes])
    assert slope < 2.15


def test_factor(benchmark):
    """At most cubic in columns."""
    sizes = [512, 1024, 2048, 4096]
    moments = [layer(1, n)[1] for n in sizes]
    jobs = [lambda m=moment: feedback_factor(m, 0.01) for moment in moments]
    assert report(benchmark, "factorization, columns", "3 at most", sizes, jobs) < 3.2


@pytest.mark.parametrize("kinds", [(INPUT_MOMENT, GRADIENT_MOMENT), (FISHER_DIAGONAL,)], ids=["kfac", "diag"])
def test_examples(benchmark, kinds):
    """Linear in calibration examples."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, stride=2))
    module = torch.nn.Sequential(module, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10))
    sizes = [32, 64, 128, 256]

    def job(count: int) -> None:
        collector = Collector(module, quantizable_layers(module), kinds, None, torch.Generator())
        for batch in TensorExamples({"input": torch.ones(count, 3, 32, 32)}, torch.zeros(count).long()).batches(
            16, "cpu"
        ):
            collector.add(batch)

    jobs = [lambda n=n: job(n) for n in sizes]
    slope = report(benchmark, f"statistics {'+'.join(kind.name for kind in kinds)}, examples", "1", sizes, jobs)
    assert slope < 1.25
