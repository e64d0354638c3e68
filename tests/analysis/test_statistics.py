"""Bootstrap, McNemar and Holm against naive computations, and what they promise, by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis import statistics
from analysis.statistics import (
    Task,
    holm,
    mcnemar,
    mean_std,
    paired_average_bootstrap,
    paired_bootstrap,
    paired_metric_bootstrap,
)
from bayesq.metrics import METRICS


def naive_bootstrap(first, second, measure, resamples, seed=0):
    """One resample at a time, by indices: seeds and examples with replacement."""
    generator = np.random.default_rng(seed)
    seeds, examples = first.shape
    found = []
    for _ in range(resamples):
        rows, columns = generator.integers(seeds, size=seeds), generator.integers(examples, size=examples)
        found.append(measure(first[np.ix_(rows, columns)], second[np.ix_(rows, columns)], columns))
    return np.percentile(found, [2.5, 97.5])


def close(interval, naive, width=0.12):
    """Ends that agree within the Monte Carlo error, told in widths of the interval."""
    scale = naive[1] - naive[0]
    return abs(interval.low - naive[0]) < width * scale and abs(interval.high - naive[1]) < width * scale


@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_the_bootstrap_agrees_with_one_resample_at_a_time(ratio, discrete):
    generator = np.random.default_rng(1)
    common = generator.standard_normal((1, 80))
    first = 3 + common + 0.3 * generator.standard_normal((3, 1)) + generator.standard_normal((3, 80))
    second = 3.4 + common + 0.3 * generator.standard_normal((3, 1)) + generator.standard_normal((3, 80))
    if discrete:
        first, second = (first > 3).astype(float), (second > 3).astype(float)

    def measure(a, b, _):
        return b.mean() / a.mean() if ratio else b.mean() - a.mean()

    found = paired_bootstrap(first, second, resamples=4000, ratio=ratio)
    assert found.value == pytest.approx(measure(first, second, None))
    assert close(found, naive_bootstrap(first, second, measure, 4000))


@pytest.mark.parametrize("function", ["f1", "matthews", "pearson", "spearman", "accuracy", "perplexity"])
def test_metrics_are_measured_anew_on_every_resample(function):
    generator = np.random.default_rng(2)
    if function in ("pearson", "spearman"):
        labels = generator.standard_normal(60)
        first = labels + generator.standard_normal((2, 60))
        second = labels + 0.7 * generator.standard_normal((2, 60))
    elif function == "perplexity":  # nats per token of each sequence, and its number of tokens
        labels = generator.integers(3, 9, size=60).astype(float)
        first, second = 3 + generator.random((2, 60)), 2.9 + generator.random((2, 60))
    else:
        labels = generator.integers(2, size=60).astype(float)
        first, second = (np.where(generator.random((2, 60)) < share, labels, 1 - labels) for share in (0.7, 0.8))

    def score(predicted, truth):
        if function == "pearson":
            return stats.pearsonr(predicted, truth).statistic
        if function == "spearman":
            return stats.spearmanr(predicted, truth).statistic
        return float(METRICS[function].function(predicted, truth, np.ones((1, len(truth))))[0])

    def measure(a, b, columns):
        truth = labels[columns]
        return np.mean([score(y, truth) - score(x, truth) for x, y in zip(a, b, strict=True)])

    found = paired_metric_bootstrap(function, first, second, labels, resamples=3000)
    assert found.value == pytest.approx(measure(first, second, np.arange(60)))
    assert close(found, naive_bootstrap(first, second, measure, 800), 0.2)


def test_an_average_of_tasks_resamples_each_task_on_its_own():
    """One task has two metrics, the other one for each of two parts, as MNLI has."""
    generator = np.random.default_rng(4)
    tasks, sizes = [], (50, 120)
    for size, metrics in zip(sizes, ((("accuracy", 0), ("f1", 0)), (("accuracy", 0), ("accuracy", 1))), strict=True):
        labels = generator.integers(2, size=size).astype(float)
        first, second = (np.where(generator.random((2, size)) < share, labels, 1 - labels) for share in (0.7, 0.8))
        parts = np.zeros(size) if metrics[1][0] == "f1" else (np.arange(size) % 3 == 0).astype(float)
        tasks.append(Task(first, second, labels, parts, metrics))

    def f1(predicted, truth):
        hits = ((predicted == 1) & (truth == 1)).sum()
        return 2 * hits / ((predicted == 1).sum() + (truth == 1).sum())

    def score(place, predicted, columns):
        right = predicted == tasks[place].labels[columns]
        if place == 0:
            return (right.mean() + f1(predicted, tasks[place].labels[columns])) / 2
        return (right[columns % 3 == 0].mean() + right[columns % 3 != 0].mean()) / 2

    def gain(draw):
        gained = []
        for place, task in enumerate(tasks):
            rows, columns = draw(2), draw(sizes[place])
            pairs = [(task.first[row, columns], task.second[row, columns]) for row in rows]
            gained.append(np.mean([score(place, b, columns) - score(place, a, columns) for a, b in pairs]))
        return np.mean(gained)

    found = paired_average_bootstrap(tasks, resamples=4000)
    assert found.value == pytest.approx(gain(np.arange))
    naive = np.percentile([gain(lambda n: generator.integers(n, size=n)) for _ in range(2000)], [2.5, 97.5])
    assert close(found, naive)
    twice, once = (paired_average_bootstrap([tasks[1]] * count) for count in (2, 1))  # alike, but independent
    assert (twice.high - twice.low) / (once.high - once.low) == pytest.approx(0.5**0.5, rel=0.05)
    with pytest.raises(ValueError, match="no task"):
        paired_average_bootstrap([])


def test_one_seed_resamples_examples_only():
    values = np.random.default_rng(3).standard_normal((1, 400))
    found = paired_bootstrap(np.zeros_like(values), values)
    error = values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value) / error), abs=0.03)


def test_seeds_of_the_same_examples_are_no_further_examples():
    values = np.random.default_rng(4).standard_normal((1, 300))
    once, thrice = (paired_bootstrap(np.zeros((n, 300)), np.repeat(values, n, axis=0)) for n in (1, 3))
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.05)


def test_equal_methods_have_no_difference_and_p_is_one():
    same = np.random.default_rng(5).random((2, 50))
    found = paired_bootstrap(same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_ratio_to_nothing_is_no_number():
    found = paired_bootstrap(np.zeros((2, 10)), np.ones((2, 10)), ratio=True)
    assert all(math.isnan(value) for value in (found.value, found.low, found.high, found.p))


def test_the_bootstrap_depends_on_its_seed_only():
    first, second = np.random.default_rng(6).random((2, 3, 40))
    found = [paired_bootstrap(first, second, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_the_bootstrap_works_in_parts(monkeypatch):
    first, second = np.random.default_rng(7).random((2, 2, 100))
    monkeypatch.setattr(statistics, "PART_ELEMENTS", 1000)  # ten resamples at a time
    parts = paired_bootstrap(first, second, resamples=3005)
    monkeypatch.undo()
    whole = paired_bootstrap(first, second, resamples=3005)
    assert close(parts, (whole.low, whole.high))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((1, 3), (2, 3)), ((2, 0), (2, 0))])
def test_unpaired_values_are_refused(shapes):
    first, second = (np.zeros(shape) for shape in shapes)
    for compare in (paired_bootstrap, mcnemar):
        with pytest.raises(ValueError, match="not paired"):
            compare(first, second)


def test_labels_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="labels of shape"):
        paired_metric_bootstrap("f1", np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(4))


def correctness(gains, losses, ties):
    first = np.array([0] * gains + [1] * losses + [1] * ties)
    second = np.array([1] * gains + [0] * losses + [1] * ties)
    return first, second


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (1, 0), (5, 5), (12, 3), (40, 71), (300, 240), (700, 900)])
def test_mcnemar_of_one_seed_is_the_exact_binomial_test(gains, losses):
    expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    assert mcnemar(*correctness(gains, losses, 50)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_over_seeds_counts_every_sign_of_every_example():
    generator = np.random.default_rng(8)
    for _ in range(20):
        first, second = generator.integers(2, size=(2, 3, 9))
        net = (second - first).sum(0)
        signs = np.array(list(itertools.product([-1, 1], repeat=9)))
        sums = np.abs(signs @ np.abs(net))
        assert mcnemar(first, second) == pytest.approx((sums >= abs(net.sum())).mean())


def test_repeating_a_seed_does_not_make_it_more_significant():
    first, second = correctness(12, 3, 20)
    assert mcnemar(np.stack([first] * 3), np.stack([second] * 3)) == pytest.approx(mcnemar(first, second))


def naive_holm(p):
    """By the definition: reject in order of p while p (m - i) stays below the level."""
    adjusted = []
    for value in p:
        levels = []
        for level in np.arange(0.0005, 1.0005, 0.001):
            rejected = set()
            for i, (other, place) in enumerate(sorted((x, k) for k, x in enumerate(p))):
                if other * (len(p) - i) > level:
                    break
                rejected.add(place)
            if p.index(value) in rejected:
                levels.append(level)
        adjusted.append(min(levels, default=1.0))
    return adjusted


def test_holm_is_the_smallest_level_at_which_a_test_is_rejected():
    p = [0.01, 0.04, 0.03, 0.005, 0.6]
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert holm(p) == pytest.approx(naive_holm(p), abs=0.001)
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_holm_leaves_out_what_was_not_tested():
    assert holm([0.03, math.nan, 0.02])[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(holm([0.03, math.nan])[1]) and holm([]) == []


def test_means_know_how_many_values_they_are_of():
    assert mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)
    mean, std, n = mean_std([2.0, math.nan, None])
    assert mean == 2 and math.isnan(std) and n == 1
    assert mean_std([])[2] == 0 and math.isnan(mean_std([])[0])


# ---------------------------------------------------------------------------------------------------- by simulation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_both", "expected"),
    [
        (1, 0.0, 0.0, (0.93, 0.97)),
        (10, 0.05, 1.0, (0.93, 0.99)),
        # three seeds say little about how seeds vary: where nothing else varies much, intervals are too short
        (3, 0.05, 1.0, (0.91, 0.99)),
        (3, 0.3, 0.3, (0.70, 0.92)),
    ],
)
def test_the_interval_covers_the_difference(seeds, of_seeds, of_both, expected):
    generator, examples, covered = np.random.default_rng(9), 100, []
    for _ in range(600):
        gain = generator.standard_normal((1, examples)) + of_seeds * generator.standard_normal((seeds, 1))
        gain = gain + of_both * generator.standard_normal((seeds, examples)) + 0.2
        found = paired_bootstrap(np.zeros_like(gain), gain, resamples=500)
        covered.append(found.low <= 0.2 <= found.high)
    assert expected[0] <= np.mean(covered) <= expected[1]


def alike(generator, tests, seeds, examples):
    """Correctness of two methods that are equally good: p values of so many tests."""
    for _ in range(tests):
        skill = generator.random((1, examples))
        yield mcnemar(*(generator.random((seeds, examples)) < skill for _ in range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_mcnemar_errs_at_most_as_often_as_its_level(seeds):
    p = np.array(list(alike(np.random.default_rng(10), 2000, seeds, 200)))
    assert 0.02 <= (p <= 0.05).mean() <= 0.06


@pytest.mark.slow
def test_holm_errs_in_a_whole_table_at_most_as_often_as_its_level():
    generator, wrong, uncorrected = np.random.default_rng(11), [], []
    for _ in range(1000):
        p = list(alike(generator, 10, 1, 100))
        p += [mcnemar(*correctness(40, 5, 10))] * 5  # true differences, which Holm learns from
        wrong.append(min(holm(p)[:10]) <= 0.05)
        uncorrected.append(min(p[:10]) <= 0.05)
    assert np.mean(wrong) <= 0.06
    assert np.mean(uncorrected) > 0.2
