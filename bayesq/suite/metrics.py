"""Task metrics and the uncertainty of their difference between two networks on the same examples.

Every metric takes weights: how often each example counts, one row per bootstrap resample. That makes resampling a
matter of arithmetic on whole arrays, also for metrics that are no mean over examples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ECE_BINS = 15
BOOTSTRAP_RESAMPLES = 10_000
# Elements of the weights of one part of the resamples: 32 MiB in float64.
PART_ELEMENTS = 2**22


def accuracy(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Share of the examples [resamples] whose predicted class [n] is the label [n]."""
    correct = (predicted == labels).astype(np.float64)
    return np.asarray(weights @ correct / weights.sum(1))


def f1(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """2 TP / (2 TP + FP + FN) [resamples] of class 1; 0 where it is neither predicted nor a label."""
    hits, false_alarms, misses, _ = _binary_counts(predicted, labels, weights)
    return _ratio(2 * hits, 2 * hits + false_alarms + misses)


def matthews(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Matthews correlation [resamples] of two classes; 0 where predictions or labels are all alike."""
    tp, fp, fn, tn = _binary_counts(predicted, labels, weights)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Pearson correlation [resamples] of predictions [n] and labels [n]; 0 where either is constant."""
    shape = (len(weights), 1)
    return _correlation(np.broadcast_to(predicted, weights.shape), np.tile(labels, shape), weights)


def spearman(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Spearman correlation [resamples]: Pearson's of the ranks within each resample, ties at their mean rank."""
    return _correlation(_ranks(predicted, weights), _ranks(labels, weights), weights)


FUNCTIONS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


@dataclass(frozen=True)
class Metric:
    """A metric of a data set.

    Attributes:
        name: its result key, as in fp/<name>.
        function: key of FUNCTIONS.
        start, stop: the evaluation examples it is measured on, as in a slice.
    """

    name: str
    function: str
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        """The evaluation examples it is measured on."""
        return slice(self.start, self.stop)


def measure(metric: Metric, predicted: Floats, labels: Floats) -> float:
    """The metric of predictions [n], classes or numbers; NaN where none of its examples is there.

    Args:
        predicted, labels: of all evaluation examples.
    """
    own, truth = predicted[metric.rows], labels[metric.rows]
    if not len(own):
        return float("nan")
    return float(FUNCTIONS[metric.function](own, truth, np.ones((1, len(own))))[0])


def difference_interval(
    metric: Metric, before: Floats, after: Floats, labels: Floats, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of metric(after) - metric(before), by resampling examples with replacement.

    Both networks are measured on the same resamples. Examples that agree in label and both predictions are alike, so
    a resample is a multinomial draw over the distinct triples.

    Args:
        before, after, labels: [n], of all evaluation examples.
        seed: of the resampling.

    Returns:
        None where none of the metric's examples is there.
    """
    triples = np.stack([labels[metric.rows], before[metric.rows], after[metric.rows]])
    count = triples.shape[1]
    if not count:
        return None
    if metric.function == "accuracy":
        truth, first, second = triples
        return bootstrap_interval((second == truth).astype(np.int64) - (first == truth), seed)
    (truth, first, second), counts = np.unique(triples, axis=1, return_counts=True)
    function, generator = FUNCTIONS[metric.function], np.random.default_rng(seed)
    step = max(PART_ELEMENTS // len(counts), 1)
    found = []
    for start in range(0, BOOTSTRAP_RESAMPLES, step):
        size = min(step, BOOTSTRAP_RESAMPLES - start)
        weights = generator.multinomial(count, counts / count, size=size).astype(np.float64)
        found.append(function(second, truth, weights) - function(first, truth, weights))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(differences: NDArray[np.generic], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences [n], by resampling examples with replacement.

    Differences of accuracies take the three values -1, 0 and 1, so a resample is a multinomial draw over the distinct
    values: the same distribution as drawing n indices, without an n x resamples table.
    """
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        len(differences), counts / len(differences), size=BOOTSTRAP_RESAMPLES
    )
    low, high = np.percentile(drawn @ values / len(differences), [2.5, 97.5])
    return float(low), float(high)


def _binary_counts(predicted: Floats, labels: Floats, weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """True and false positives, false and true negatives, [resamples] each."""
    says, is_one = predicted == 1, labels == 1
    cells = np.stack([says & is_one, says & ~is_one, ~says & is_one, ~says & ~is_one], axis=1)
    tp, fp, fn, tn = (weights @ cells.astype(np.float64)).T
    return tp, fp, fn, tn


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotients, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Weighted Pearson correlation of the rows of x and y [resamples, n]."""
    total = weights.sum(1, keepdims=True)
    x, y = (a - (weights * a).sum(1, keepdims=True) / total for a in (x, y))
    covariance, of_x, of_y = ((weights * a).sum(1) for a in (x * y, x * x, y * y))
    return _ratio(covariance, np.sqrt(of_x * of_y))


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Mean ranks [resamples, n] of values [n] that occur so many times; equal values share the mean of their ranks."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    times = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(times, axis=1) - (times - 1) / 2)[:, place])
