"""Task metrics against scikit-learn and scipy, and bootstrap intervals against resampled examples."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bayesq.metrics import (
    METRICS,
    PART_ELEMENTS,
    Metric,
    bootstrap_interval,
    difference_interval,
    measure,
    metric_of,
)

REFERENCES = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
}
CORRELATIONS = ("pearson", "spearman")


def naive_perplexity(tokens, nll) -> float:
    total = sum(count * nats for count, nats in zip(tokens.tolist(), nll.tolist(), strict=True))
    return math.exp(total / sum(tokens.tolist()))


REFERENCES["perplexity"] = naive_perplexity


def samples(function: str, count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and predictions of two networks that follow them, with ties among the numbers.

    For the perplexity: numbers of tokens, and two networks' nats per token.
    """
    random = np.random.default_rng(seed)
    if function == "perplexity":
        tokens = random.integers(1, 9, count).astype(float)
        first = random.gamma(2, size=count).round(1)
        return tokens, first, first + random.normal(size=count).round(1) / 2
    if function in CORRELATIONS:
        labels = random.integers(0, 11, count) / 2
        first = labels + random.normal(size=count)
        return labels, first.round(1), (first + random.normal(size=count) / 2).round(1)
    labels = random.integers(0, 2, count).astype(float)
    first, second = (np.where(random.random(count) < 0.25, 1 - labels, labels) for _ in range(2))
    return labels, first, second


def test_every_metric_has_a_reference():
    assert set(METRICS) == set(REFERENCES)
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("function", METRICS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_the_references(function, seed):
    labels, predicted, _ = samples(function, seed=seed)
    found = measure(METRICS[function], predicted, labels)
    assert found == pytest.approx(REFERENCES[function](labels, predicted), rel=1e-12)


@pytest.mark.parametrize("function", METRICS)
def test_weights_are_repetitions(function):
    """Each row of weights gives what the reference gives for examples repeated so many times."""
    labels, predicted, _ = samples(function, count=25)
    weights = np.random.default_rng(3).multinomial(25, np.full(25, 1 / 25), size=40)
    found = METRICS[function].function(predicted, labels, weights.astype(float))
    expected = [REFERENCES[function](np.repeat(labels, row), np.repeat(predicted, row)) for row in weights]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("function", ["f1", "matthews", "pearson", "spearman"])
def test_what_says_nothing_is_zero(function):
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    assert measure(METRICS[function], np.zeros(4), labels) == 0
    assert measure(METRICS[function], labels, np.zeros(4)) == 0


def part(start: int, stop: int | None = None) -> Metric:
    """Accuracy of some of the examples."""
    return replace(METRICS["accuracy"], start=start, stop=stop)


def test_rows_and_no_rows():
    labels, predicted = np.array([0.0, 1, 1, 1]), np.array([0.0, 1, 0, 0])
    assert measure(part(0, 2), predicted, labels) == 1
    assert measure(part(2), predicted, labels) == 0
    none = part(4)
    assert math.isnan(measure(none, predicted, labels))
    assert difference_interval(none, predicted, predicted, labels, 0) is None


def correlation(labels, predicted) -> float:
    """Also Matthews', which is Pearson's of two classes."""
    return np.corrcoef(labels, predicted)[0, 1]


def fast_f1(labels, predicted) -> float:
    return 2 * (labels * predicted).sum() / (labels.sum() + predicted.sum())


@pytest.mark.parametrize("function", METRICS)
def test_intervals_are_those_of_resampled_examples(function):
    labels, first, second = samples(function, count=120)
    random = np.random.default_rng(5)
    reference = {"f1": fast_f1, "matthews": correlation, "pearson": correlation}.get(function, REFERENCES[function])
    naive = []
    for _ in range(3000):
        rows = random.integers(0, 120, 120)
        naive.append(reference(labels[rows], second[rows]) - reference(labels[rows], first[rows]))
    low, high = difference_interval(METRICS[function], first, second, labels, seed=1)
    spread = np.std(naive)
    expected = np.percentile(naive, [2.5, 97.5]).tolist()
    assert [low, high] == pytest.approx(expected, abs=0.25 * spread + 1e-12)
    assert low < reference(labels, second) - reference(labels, first) < high


@pytest.mark.parametrize("function", METRICS)
def test_seeds_decide_and_equal_networks_differ_by_nothing(function):
    labels, first, second = samples(function)
    metric = METRICS[function]
    found = [difference_interval(metric, first, second, labels, seed) for seed in (3, 3, 4, 5, 6, 7)]
    assert found[0] == found[1]
    assert len(set(found)) > 1 or function == "accuracy"  # whose quantiles are whole examples
    assert difference_interval(metric, first, first, labels, 3) == (0.0, 0.0)


def test_accuracy_keeps_the_interval_of_its_mean_differences():
    labels, first, second = samples("accuracy")
    differences = (second == labels).astype(int) - (first == labels).astype(int)
    metric = part(10, 50)
    assert difference_interval(metric, first, second, labels, 7) == bootstrap_interval(differences[10:50], 7)


def test_resamples_come_in_parts_of_bounded_size():
    labels, first, second = samples("pearson", count=500)
    sizes = []

    def recorded(predicted, truth, weights):
        sizes.append(weights.shape)
        return METRICS["pearson"].function(predicted, truth, weights)

    difference_interval(replace(METRICS["pearson"], function=recorded), first, second, labels, 0)
    assert all(rows * columns <= PART_ELEMENTS for rows, columns in sizes) and len(sizes) > 2
    assert sum(rows for rows, _ in sizes) == 2 * 10_000


@pytest.mark.parametrize(
    ("name", "higher", "shown", "unit"),
    [
        ("accuracy", True, 12.5, "%"),
        ("f1", True, 12.5, "%"),
        ("accuracy_mismatched", True, 12.5, "%"),
        ("matthews", True, 12.5, "x100"),
        ("pearson", True, 12.5, "x100"),
        ("spearman", True, 12.5, "x100"),
        ("perplexity", False, 0.125, "e^nats/token"),
        ("somebodys_share", True, 12.5, "%"),
    ],
)
def test_a_metric_knows_its_direction_scale_and_unit(name, higher, shown, unit):
    metric = metric_of(name)
    assert (metric.higher_is_better, metric.scaled(0.125), metric.unit) == (higher, shown, unit)
