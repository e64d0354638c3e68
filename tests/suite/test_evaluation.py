"""Metrics against naive loops, and the cached full-precision logits."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesq.suite import evaluation
from bayesq.suite.evaluation import (
    cached_logits,
    compare,
    expected_calibration_error,
    kl_divergence,
    negative_log_likelihood,
)
from bayesq.suite.metrics import Metric, bootstrap_interval
from bayesq.suite.models.base import TensorExamples
from bayesq.suite.results import plain

CPU = torch.device("cpu")


def random_logits(seed: int, count: int = 200, classes: int = 4, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 200, classes: int = 4) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(99))


def naive_softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def test_kl_is_the_sum_over_classes_and_never_negative():
    full, other = random_logits(0), random_logits(1)
    found = kl_divergence(full, other)
    for i in range(len(full)):
        p, q = naive_softmax(full[i].tolist()), naive_softmax(other[i].tolist())
        assert float(found[i]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-9)
    assert found.dtype == torch.float64 and bool((found >= 0).all())
    assert not kl_divergence(full, full).any()
    assert bool((kl_divergence(full, full + 7.5).abs() < 1e-6).all())  # a shift of all logits is no change
    assert bool((kl_divergence(full.double(), full.double() + 1e-9 * other) > -1e-15).all())
    extreme = kl_divergence(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]))
    assert float(extreme) == pytest.approx(400)


def test_nll_is_the_mean_log_loss():
    logits, truth = random_logits(2), labels()
    naive = [-math.log(naive_softmax(row)[y]) for row, y in zip(logits.tolist(), truth.tolist(), strict=True)]
    assert negative_log_likelihood(logits, truth) == pytest.approx(sum(naive) / len(naive), rel=1e-9)


def naive_ece(logits: Tensor, truth: Tensor, bins: int = 15) -> float:
    """sum_m |B_m| / n |acc(B_m) - conf(B_m)|, bin m holding confidences in ((m - 1) / bins, m / bins]."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.tolist(), truth.tolist(), strict=True):
        p = naive_softmax(row)
        confidence = max(p)
        for m in range(bins):
            if m / bins < confidence <= (m + 1) / bins:
                members[m].append((confidence, p.index(confidence) == label))
    assert sum(map(len, members)) == len(truth)
    total = 0.0
    for held in members:
        if held:
            accuracy, confidence = np.mean([c for _, c in held]), np.mean([c for c, _ in held])
            total += len(held) / len(truth) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 100.0])
def test_ece_is_the_naive_one(spread):
    logits, truth = random_logits(3, spread=spread), labels()
    assert expected_calibration_error(logits, truth) == pytest.approx(naive_ece(logits, truth), abs=1e-12)


def test_ece_of_certain_predictions():
    certain = torch.tensor([[1000.0, 0.0]]).expand(4, 2)
    assert expected_calibration_error(certain, torch.tensor([0, 0, 0, 0])) == 0
    assert expected_calibration_error(certain, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[-1, 0, 1], [0.0, 0.25, -1.5, 2.0]])
def test_bootstrap_interval_is_that_of_resampled_examples(values):
    random = np.random.default_rng(0)
    differences = random.choice(values, size=300, p=random.dirichlet(np.ones(len(values))))
    means = [differences[random.integers(0, 300, size=300)].mean() for _ in range(10_000)]
    low, high = bootstrap_interval(differences, seed=1)
    spread = np.std(means)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.12 * spread)
    assert low <= differences.mean() <= high and 3.5 * spread < high - low < 4.4 * spread


def test_bootstrap_interval_of_no_difference_is_a_point_and_seeds_decide():
    assert bootstrap_interval(np.zeros(50, dtype=int), seed=0) == (0.0, 0.0)
    assert bootstrap_interval(np.ones(1, dtype=int), seed=0) == (1.0, 1.0)
    differences = np.random.default_rng(2).normal(size=100)
    assert (
        bootstrap_interval(differences, 3) == bootstrap_interval(differences, 3) != bootstrap_interval(differences, 4)
    )


def test_compare_reports_the_contracts_metrics():
    full, quantized, truth = random_logits(4), random_logits(4) + random_logits(5, spread=0.7), labels()
    metrics, rows = compare(full, quantized, truth, seed=0)
    before = [row.index(max(row)) for row in full.tolist()]
    after = [row.index(max(row)) for row in quantized.tolist()]
    right_before = [int(a == y) for a, y in zip(before, truth.tolist(), strict=True)]
    right_after = [int(a == y) for a, y in zip(after, truth.tolist(), strict=True)]
    assert metrics["fp/accuracy"] == pytest.approx(np.mean(right_before))
    assert metrics["q/accuracy"] == pytest.approx(np.mean(right_after))
    assert metrics["delta/accuracy"] == pytest.approx(np.mean(right_after) - np.mean(right_before))
    low, high = metrics["delta/accuracy/ci95"]
    assert low <= metrics["delta/accuracy"] <= high and high - low < 0.2
    assert metrics["q/agreement"] == np.mean([a == b for a, b in zip(before, after, strict=True)])
    assert metrics["q/kl_to_fp"] == pytest.approx(np.mean([row["kl"] for row in rows]))
    assert metrics["q/ece"] == pytest.approx(naive_ece(quantized, truth))
    assert metrics["fp/ece"] == pytest.approx(naive_ece(full, truth))
    assert metrics["q/nll"] == negative_log_likelihood(quantized, truth) != metrics["fp/nll"]
    assert metrics["fp/nll"] == negative_log_likelihood(full, truth)
    assert [(r["label"], r["fp_prediction"], r["q_prediction"], r["fp_correct"], r["q_correct"]) for r in rows] == list(
        zip(truth.tolist(), before, after, right_before, right_after, strict=True)
    )
    assert [r["kl"] for r in rows] == kl_divergence(full, quantized).tolist()
    same, _ = compare(full, full, truth, seed=0)
    assert same["q/kl_to_fp"] == 0 and same["q/agreement"] == 1 and same["delta/accuracy/ci95"] == [0.0, 0.0]


def test_compare_of_a_regression():
    generator = torch.Generator().manual_seed(0)
    truth, full = torch.rand(50, generator=generator) * 5, torch.randn(50, 1, generator=generator)
    quantized = full + 0.1 * torch.randn(50, 1, generator=generator)
    names = ("pearson", "spearman")
    metrics, rows = compare(full, quantized, truth, 0, [Metric(name, name) for name in names], "gaussian")
    assert metrics["fp/pearson"] == pytest.approx(np.corrcoef(full[:, 0], truth)[0, 1], rel=1e-5)
    differences = ((full - quantized).double()[:, 0] ** 2 / 2).tolist()
    assert [row["kl"] for row in rows] == pytest.approx(differences)
    assert metrics["q/kl_to_fp"] == pytest.approx(np.mean(differences))
    assert [metrics[key] for key in ("q/agreement", "q/ece", "fp/ece")] == [None] * 3
    density = [-torch.distributions.Normal(f, 1.0).log_prob(y) for f, y in zip(quantized[:, 0], truth, strict=True)]
    assert metrics["q/nll"] == pytest.approx(float(sum(density)) / 50, rel=1e-5) != metrics["fp/nll"]
    for row, f, g, y in zip(rows, full[:, 0].tolist(), quantized[:, 0].tolist(), truth.tolist(), strict=True):
        assert (row["fp_prediction"], row["q_prediction"], row["label"]) == (f, g, pytest.approx(y, abs=1e-6))
        assert row["q_squared_error"] == pytest.approx((g - y) ** 2, rel=1e-4)
        assert row["fp_squared_error"] == pytest.approx((f - y) ** 2, rel=1e-4)


def test_a_metric_without_examples_is_null():
    full = random_logits(4)
    metrics, _ = compare(full, full, labels(), 0, [Metric("accuracy", "accuracy"), Metric("other", "accuracy", 200)])
    assert metrics["delta/other/ci95"] is None and math.isnan(metrics["q/other"])
    assert plain(metrics)["q/other"] is None


# ------------------------------------------------------------------------------------------------------------ logits


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.passes += 1
        return torch.stack([(x * mask).sum(1), x[:, 0], -x[:, 0]], 1)


def examples(count: int = 10) -> TensorExamples:
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(1, 6, (count,), generator=generator)
    mask = (torch.arange(5) < lengths[:, None]).float()
    inputs = {"x": torch.randn(count, 5, generator=generator), "mask": mask}
    return TensorExamples(inputs, torch.zeros(count).long(), lengths)


def test_logits_come_in_the_order_of_the_examples():
    given = examples()
    assert [b.index.tolist() for b in given.batches(4, CPU)] != [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    found, retries = evaluation.logits(Model(), given, 4, CPU, "test")
    assert retries == 0
    torch.testing.assert_close(found, Model()(**given.inputs))
    assert found.dtype == torch.float32 and not found.requires_grad


def test_full_precision_logits_are_computed_once(tmp_path):
    model, given = Model(), examples()
    first, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    second, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    assert model.passes == 3 and torch.equal(first, second)
    torch.testing.assert_close(first, Model()(**given.inputs))
    for checksum, these, batch_size in (("other", given, 4), ("checksum", examples(8), 4), ("checksum", given, 5)):
        before = model.passes
        cached_logits(model, checksum, these, batch_size, CPU, tmp_path)
        assert model.passes == before + -(-len(these) // batch_size)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_file_is_noticed_and_computed_again(damage, tmp_path, caplog):
    model, given = Model(), examples()
    first, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content if damage == "flip" else content[:-20]))
    with caplog.at_level(logging.WARNING):
        second, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    assert model.passes == 6 and torch.equal(first, second)
    assert len(caplog.records) == 1 and str(path) in caplog.text
    cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    assert model.passes == 6


class Narrow(Model):
    """Runs out of memory with more than three examples at a time."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, mask)


def test_running_out_of_memory_halves_the_batch_and_is_remembered(tmp_path):
    model, given = Narrow(), examples()
    first, retries = cached_logits(model, "checksum", given, 8, CPU, tmp_path)
    assert retries == 2 and model.passes == 5
    torch.testing.assert_close(first, Model()(**given.inputs))
    second, retries = cached_logits(model, "checksum", given, 8, CPU, tmp_path)
    assert retries == 2 and model.passes == 5 and torch.equal(first, second)


def test_autocast_computes_products_in_the_lower_precision_and_has_a_file_of_its_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(16, 3)
    model.weight.data = torch.randn(3, 16, generator=generator)
    inputs = {"input": torch.randn(10, 16, generator=generator)}
    given = TensorExamples(inputs, torch.zeros(10).long())
    exact, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path)
    lower, _ = cached_logits(model, "checksum", given, 4, CPU, tmp_path, autocast="bfloat16")
    expected = model.to(torch.bfloat16)(inputs["input"].to(torch.bfloat16)).float()
    assert lower.dtype == torch.float32 and not torch.equal(lower, exact)
    torch.testing.assert_close(lower, expected, rtol=1e-2, atol=1e-2)
    effect = evaluation.autocast_effect(exact, lower)
    assert effect["autocast/kl_to_float32"] == pytest.approx(float(evaluation.kl_divergence(exact, lower).mean()))
    assert 0 < effect["autocast/kl_to_float32"] < 1e-2
