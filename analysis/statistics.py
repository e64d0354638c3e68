"""Paired comparisons of two methods on the same examples and seeds, and corrected p values for many comparisons.

Values and predictions are arrays [seeds, examples]: every seed, a draw of the calibration set, is measured on the same
examples. Both are resampled, crossed: an example that is drawn twice counts twice under every seed (Owen, 2007, the
pigeonhole bootstrap). Drawing other examples for each seed would treat them as independent; intervals would be too
short.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from analysis.metrics import Floats
from analysis.metrics import function as metric_function

RESAMPLES = 10_000
# Elements of the weights of one part of the resamples: 32 MiB in float64.
PART_ELEMENTS = 2**22
# Drawing the count of a distinct example takes about as long as drawing this many examples.
COUNTED = 10


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile interval and the two-sided p value of no difference."""

    value: float
    low: float
    high: float
    p: float


def mean_std(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (n - 1; NaN for a single value) and n of the values that are not NaN or None."""
    numbers = np.asarray([value for value in values if value is not None], dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return math.nan, math.nan, 0
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan, len(numbers)


def mean_interval(
    mean: float, std: float, n: int, limits: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """The 95 % interval of a mean of n values, mean -+ t std / sqrt(n) with Student's t of n - 1 degrees of freedom.

    Args:
        std: sample standard deviation.
        limits: the least and the largest possible value of the quantity, at which the interval is cut.

    Returns:
        both ends, NaN for fewer than two values.
    """
    if n < 2 or math.isnan(std):
        return math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return max(mean - half, limits[0]), min(mean + half, limits[1])


def paired_bootstrap(
    first: Floats, second: Floats, seed: int = 0, resamples: int = RESAMPLES, ratio: bool = False
) -> Interval:
    """mean(second) - mean(first) of values [seeds, examples], or mean(second) / mean(first).

    A ratio is compared with 1; it is NaN if the first mean is 0.

    Raises:
        ValueError: the arrays differ in shape or are empty.
    """
    first, second = _paired(first, second)
    seeds = len(first)

    def statistic(columns: Floats, examples: Floats, chosen: Floats) -> Floats:
        means = examples @ columns.T
        of_first, of_second = ((part * chosen).sum(1) for part in (means[:, :seeds], means[:, seeds:]))
        if not ratio:
            return np.asarray(of_second - of_first)
        return np.asarray(np.divide(of_second, of_first, out=np.full_like(of_first, np.nan), where=of_first != 0))

    return _interval(*_resampled(np.concatenate([first, second]), seeds, statistic, seed, resamples), float(ratio))


def paired_metric_bootstrap(
    function: str, first: Floats, second: Floats, labels: Floats, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """metric(second) - metric(first), a mean over seeds, measured on every resample.

    Args:
        function: key of bayesq.metrics.METRICS: accuracy, f1, matthews, pearson or spearman.
        first, second: predictions [seeds, examples], classes or numbers.
        labels: [examples].

    Raises:
        ValueError: the arrays differ in shape or are empty.
    """
    labels = np.asarray(labels, dtype=np.float64)
    if labels.shape != np.shape(first)[-1:]:
        raise ValueError(f"labels of shape {labels.shape} do not fit predictions of shape {np.shape(first)}")
    task = Task(first, second, labels, np.zeros(len(labels)), [(function, 0)])
    return _interval(*_task_gain(task, seed, resamples), 0.0)


@dataclass(frozen=True)
class Task:
    """Predictions on one of several tasks, for the average over tasks.

    Attributes:
        first, second: predictions [seeds, examples].
        labels: [examples].
        parts: [examples], which metrics an example counts for.
        metrics: keys of bayesq.metrics.METRICS, each with its part; the task's score is their mean.
    """

    first: Floats
    second: Floats
    labels: Floats
    parts: Floats
    metrics: Sequence[tuple[str, int]]


def paired_average_bootstrap(tasks: Sequence[Task], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Average over tasks of score(second) - score(first), a mean over seeds.

    Examples and seeds are resampled within each task: the seeds of two tasks draw different calibration sets.

    Raises:
        ValueError: there is no task, or predictions of one differ in shape or are empty.
    """
    if not tasks:
        raise ValueError("no task to average over")
    values, drawn = zip(*(_task_gain(task, [seed, place], resamples) for place, task in enumerate(tasks)), strict=True)
    return _interval(float(np.mean(values)), np.mean(drawn, axis=0), 0.0)


def paired_ratio_bootstrap(
    pairs: Sequence[tuple[Floats, Floats]], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Geometric mean over pairs of mean(second) / mean(first), each of values [seeds, examples].

    Examples and seeds are resampled within each pair; NaN if a mean is 0.

    Raises:
        ValueError: there is no pair, or the arrays of one differ in shape or are empty.
    """
    if not pairs:
        raise ValueError("no pair to average over")
    values, drawn = [], []
    for place, (first, second) in enumerate(pairs):
        first, second = _paired(first, second)
        columns = np.concatenate([first, second])
        value, resampled = _resampled(columns, len(first), _log_ratio, [seed, place], resamples)
        values.append(value)
        drawn.append(resampled)
    return _interval(float(np.exp(np.mean(values))), np.exp(np.mean(drawn, axis=0)), 1.0)


def _log_ratio(columns: Floats, examples: Floats, chosen: Floats) -> Floats:
    """log of mean(second) / mean(first) of each resample, as a statistic of `_resampled`."""
    means = examples @ columns.T
    of_first, of_second = ((part * chosen).sum(1) for part in np.split(means, 2, axis=1))
    usable = (of_first > 0) & (of_second > 0)
    return np.asarray(np.log(np.divide(of_second, of_first, out=np.full_like(of_first, np.nan), where=usable)))


def _task_gain(task: Task, seed: int | Sequence[int], resamples: int) -> tuple[float, Floats]:
    """score(second) - score(first) of one task, and the same of its resamples."""
    first, second = _paired(task.first, task.second)
    seeds = len(first)

    def statistic(columns: Floats, examples: Floats, chosen: Floats) -> Floats:
        truth, parts, before, after = columns[0], columns[1], columns[2 : seeds + 2], columns[seeds + 2 :]
        gained = np.zeros((len(examples), seeds))
        for function, part in task.metrics:
            inside, measure = parts == part, metric_function(function)
            for place in range(seeds):
                of_second, of_first = (
                    measure(side[place, inside], truth[inside], examples[:, inside]) for side in (after, before)
                )
                gained[:, place] += (of_second - of_first) / len(task.metrics)
        return np.asarray((gained * chosen).sum(1))

    columns = np.concatenate([np.stack([task.labels, task.parts]), first, second])
    return _resampled(columns, seeds, statistic, seed, resamples)


def _paired(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    first, second = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    if first.shape != second.shape or not first.size:
        raise ValueError(f"values of shapes {first.shape} and {second.shape} are not paired")
    return first, second


def _resampled(
    columns: Floats,
    seeds: int,
    statistic: Callable[[Floats, Floats, Floats], Floats],
    seed: int | Sequence[int],
    resamples: int,
) -> tuple[float, Floats]:
    """A statistic, and the same over resampled examples and seeds [resamples].

    Args:
        columns: [k, examples], all numbers of an example that the statistic reads. Examples with equal numbers are
            drawn together: their counts are multinomial.
        seeds: number of seeds.
        statistic: of distinct columns [k, m], weights [resamples, m] and weights [resamples, seeds], which sum to 1.
        seed: of the resampling.
    """
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    examples, generator = columns.shape[1], np.random.default_rng(seed)
    value = float(statistic(distinct, counts[None] / examples, np.full((1, seeds), 1 / seeds))[0])
    step = max(PART_ELEMENTS // len(counts), 1)
    parts = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = _draw(generator, counts, size) / examples
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        parts.append(statistic(distinct, weights, chosen))
    return value, np.concatenate(parts)


def _interval(value: float, drawn: Floats, null: float) -> Interval:
    """The percentile interval of resamples, and twice the share of them on the other side of `null`."""
    if np.isnan(value) or np.isnan(drawn).any():
        return Interval(value, math.nan, math.nan, math.nan)
    low, high = np.percentile(drawn, [2.5, 97.5])
    tail = min(np.count_nonzero(drawn <= null), np.count_nonzero(drawn >= null))
    return Interval(value, float(low), float(high), float(min(2 * (tail + 1) / (len(drawn) + 1), 1.0)))


def _draw(generator: np.random.Generator, counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Counts [size, m] of each distinct example, for as many draws as there are examples."""
    examples, distinct = int(counts.sum()), len(counts)
    if COUNTED * distinct < examples:
        return generator.multinomial(examples, counts / examples, size=size)
    drawn = np.repeat(np.arange(distinct), counts)[generator.integers(examples, size=(size, examples))]
    drawn += distinct * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * distinct).reshape(size, distinct)


def mcnemar(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """Exact two-sided p value of equal accuracy, of correctness (0 or 1) [seeds, examples] or [examples].

    For one seed it is McNemar's test: an example that only one of the two gets right is equally likely to be the
    first's or the second's. With several seeds the examples remain the units, because they are the same for all seeds:
    each contributes the sum of its differences, both signs of which are equally likely. The sum over the examples is
    compared with its exact distribution under all such signs.

    Raises:
        ValueError: the arrays differ in shape or are empty.
    """
    before, after = _paired(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    net = np.rint((after - before).sum(0)).astype(np.int64)
    distribution = np.ones(1)
    for size, times in zip(*np.unique(np.abs(net[net != 0]), return_counts=True), strict=True):
        # of `times` differences of one size, k are positive: the sum is size * (2 k - times)
        sums = np.zeros(2 * size * times + 1)
        sums[:: 2 * size] = _binomial_half(int(times))
        distribution = np.convolve(distribution, sums)
    reach = len(distribution) // 2
    tail = distribution[reach + abs(int(net.sum())) :].sum()
    return float(min(2 * tail, 1.0))


def _binomial_half(n: int) -> Floats:
    """Probabilities [n + 1] of 0 to n heads in n throws of a fair coin."""
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    return np.exp(np.asarray(logs) - n * math.log(2))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values in the order given; NaN stays NaN and does not count as a test.

    The i-th smallest of m, from 0, is multiplied by m - i; then each is at least as large as those before it.
    """
    order = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min((len(order) - rank) * value, 1.0))
        adjusted[place] = largest
    return adjusted
