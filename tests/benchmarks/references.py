"""What the benchmarks compare with, and how: interleaved, in CPU time of the process, by medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# CPU time rather than wall time: with one thread it is the time on an idle machine, also where other jobs run.
TIMER = time.process_time
BLOCK = 128


def seconds(run: Callable[[], object]) -> float:
    start = TIMER()
    run()
    return TIMER() - start


def compare(
    benchmark: Any, ours: Callable[[], object], references: Mapping[str, Callable[[], object]], rounds: int = 5
):
    """Time `ours`, each reference once before every round, and print the median of each and its ratio to ours.

    Returns:
        median of each, ours included, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in ("ours", *references)}

    def timed() -> None:
        times["ours"].append(seconds(ours))

    def others() -> None:
        for name, run in references.items():
            times[name].append(seconds(run))

    torch.set_num_threads(1)
    for run in (ours, *references.values()):  # compilation and first touches
        run()
    benchmark.pedantic(timed, setup=others, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    text = ", ".join(f"{name} {1e3 * t:.4g} ms ({t / medians['ours']:.3g} x)" for name, t in medians.items())
    print(f"\n{benchmark.name}: {text}")
    benchmark.extra_info.update({f"{name}/ours": t / medians["ours"] for name, t in medians.items()})
    return medians


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [R, C] float32 and an input moment [C, C] float64 of correlated inputs of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(columns + 64, columns, generator=generator)
    inputs = (inputs + inputs.roll(1, 1) + 0.5) * torch.rand(columns, generator=generator).exp()
    return weight, (inputs.T @ inputs / len(inputs)).double()


def matrix_product(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    """One product with as many operations as feedback has, R C^2: every column meets half of the others."""
    left, right = torch.ones(rows, columns, dtype=dtype), torch.ones(columns, columns // 2, dtype=dtype)
    return lambda: left @ right


def lazy_block_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse, by way of the inverse."""
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def lazy_block_round(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Error feedback as it is usually published: lazy blocks of 128 columns, inside them a step per column.

    Args:
        weight: [R, C] in visiting order, as is `factor`; computes in its dtype.
        scale, zero: [R] of affine grids with codes 0 .. top.

    Returns:
        codes and values [R, C].
    """
    weight, scale, zero = weight.clone(), scale[:, None].to(weight), zero[:, None].to(weight)
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block, own = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            code = (torch.round(block[:, j : j + 1] / scale) + zero).clamp(0, top)
            value = scale * (code - zero)
            codes[:, start + j], values[:, start + j] = code[:, 0], value[:, 0]
            errors[:, j] = (block[:, j] - value[:, 0]) / own[j, j]
            block[:, j:] -= errors[:, j : j + 1] @ own[j : j + 1, j:]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, values
