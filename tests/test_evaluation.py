"""Metrics against naive loops, and the cached full-precision logits."""

import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesq import evaluation
from bayesq.batches import Batch, TensorExamples
from bayesq.evaluation import (
    Rows,
    batch_rows,
    collect_rows,
    compare,
    expected_calibration_error,
    mean_nll,
    paired_rows,
    prediction_rows,
)
from bayesq.likelihood import Categorical, Gaussian, Likelihood, Tokens
from bayesq.metrics import ACCURACY, METRICS, bootstrap_interval
from bayesq.suite.full_precision import cached_logits
from bayesq.suite.results import plain

CPU = torch.device("cpu")
CATEGORICAL = Categorical()


def random_logits(seed: int, count: int = 200, classes: int = 4, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 200, classes: int = 4) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(99))


def naive_softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def rows_of(full: Tensor, quantized: Tensor, truth: Tensor, likelihood: Likelihood = CATEGORICAL) -> Rows:
    """Rows of outputs that are all there."""
    return batch_rows(full, quantized, Batch({}, truth, torch.arange(len(truth))), likelihood)


def calibration_error(logits: Tensor, truth: Tensor) -> float:
    rows = rows_of(logits, logits, truth)
    return expected_calibration_error(rows["q_confidence"], rows["q_correct"])


def test_nll_is_the_mean_log_loss():
    logits, truth = random_logits(2), labels()
    naive = [-math.log(naive_softmax(row)[y]) for row, y in zip(logits.tolist(), truth.tolist(), strict=True)]
    rows = rows_of(logits, logits, truth)
    assert mean_nll(rows["q_nll"], rows["predictions"]) == pytest.approx(sum(naive) / len(naive), rel=1e-9)


@pytest.mark.parametrize("count", [100, 199, 872, 1500])
def test_nll_has_the_bits_of_torchs_cross_entropy(count):
    logits, truth = random_logits(2, count, 7), labels(count, 7)
    rows = rows_of(logits, logits, truth)
    expected = torch.nn.functional.cross_entropy(logits.double(), truth)
    assert mean_nll(rows["q_nll"], rows["predictions"]) == float(expected)


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
    assert calibration_error(logits, truth) == pytest.approx(naive_ece(logits, truth), abs=1e-12)


def test_ece_of_certain_predictions():
    certain = torch.tensor([[1000.0, 0.0]]).expand(4, 2)
    assert calibration_error(certain, torch.tensor([0, 0, 0, 0])) == 0
    assert calibration_error(certain, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5)


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
    reduced = rows_of(full, quantized, truth)
    metrics, rows = compare(reduced, 0, [ACCURACY]), prediction_rows(reduced, [str(i) for i in range(200)])
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
    losses = [float(torch.nn.functional.cross_entropy(x.double(), truth)) for x in (full, quantized)]
    assert [metrics["fp/nll"], metrics["q/nll"]] == losses and losses[0] != losses[1]
    assert [(r["label"], r["fp_prediction"], r["q_prediction"], r["fp_correct"], r["q_correct"]) for r in rows] == list(
        zip(truth.tolist(), before, after, right_before, right_after, strict=True)
    )
    assert [r["kl"] for r in rows] == CATEGORICAL.kl(full, quantized).tolist()
    assert list(rows[0]) == [
        *("label", "fp_prediction", "q_prediction", "fp_correct", "q_correct", "kl", "fp_confidence", "q_confidence"),
        "id",
    ]
    assert [row["id"] for row in rows] == [str(i) for i in range(200)]
    same = compare(rows_of(full, full, truth), 0, [ACCURACY])
    assert same["q/kl_to_fp"] == 0 and same["q/agreement"] == 1 and same["delta/accuracy/ci95"] == [0.0, 0.0]


def test_compare_of_a_regression():
    generator = torch.Generator().manual_seed(0)
    truth, full = torch.rand(50, generator=generator) * 5, torch.randn(50, 1, generator=generator)
    quantized = full + 0.1 * torch.randn(50, 1, generator=generator)
    names = ("pearson", "spearman")
    reduced = rows_of(full, quantized, truth, Gaussian())
    metrics = compare(reduced, 0, [METRICS[name] for name in names])
    rows = prediction_rows(reduced, [str(i) for i in range(50)])
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
    metrics = compare(rows_of(full, full, labels()), 0, [ACCURACY, replace(ACCURACY, name="other", start=200)])
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
    assert 0 < float(CATEGORICAL.kl(exact, lower).mean()) < 1e-2


# -------------------------------------------------------------------------------------------------------- streaming


class Other(Model):
    """Another network on the same inputs."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + torch.stack([x[:, 0], 0 * x[:, 0], x[:, -1]], 1)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("stored", [True, False])
def test_rows_do_not_depend_on_the_batches(batch_size, stored):
    """Bit for bit those of all outputs at once, whether the full-precision ones are stored or computed again."""
    given, full = replace(examples(), labels=labels(10, 3)), Model()
    outputs = [evaluation.logits(module, given, batch_size, CPU, "test")[0] for module in (full, Other())]
    whole, reference, full.passes = rows_of(*outputs, given.labels), outputs[0] if stored else full, 0
    found, retries = paired_rows(reference, Other(), given, CATEGORICAL, batch_size, CPU, "test")
    assert retries == 0 and found.keys() == whole.keys()
    assert all(torch.equal(found[name], values) and found[name].dtype == values.dtype for name, values in whole.items())
    assert full.passes == (0 if stored else -(-10 // batch_size))


def test_running_out_of_memory_begins_the_rows_again():
    given = examples()
    expected, _ = paired_rows(Model(), Model(), given, CATEGORICAL, 2, CPU, "test")
    found, retries = paired_rows(Model(), Narrow(), given, CATEGORICAL, 8, CPU, "test")
    assert retries == 2 and all(torch.equal(found[name], values) for name, values in expected.items())


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="no example to evaluate"):
        collect_rows(iter(()), 0, CATEGORICAL)


VOCABULARY = 50


class NextToken(nn.Module):
    """A tiny language model, whose outputs at padding are no numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 12, generator=generator))
        self.head = nn.Parameter(torch.randn(12, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.embedding[input_ids].cumsum(1).tanh() @ self.head
        return logits.masked_fill(attention_mask[..., None] == 0, math.nan)


def sentences(count: int = 30, length: int = 9) -> TensorExamples:
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    real = torch.randint(2, length + 1, (count,), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(length) < real[:, None]).long()}
    return TensorExamples(inputs, torch.zeros(count), real)


def naive_tokens(first: NextToken, second: NextToken, given: TensorExamples) -> list[list[tuple[float, ...]]]:
    """(kl, nll, nll of the second, same, right, right of the second) of each predicted token of each sentence."""
    found = []
    for tokens, real in zip(given.inputs["input_ids"], given.lengths.tolist(), strict=True):
        sentence = {"input_ids": tokens[None, :real], "attention_mask": torch.ones(1, real)}
        with torch.no_grad():
            f, g = (model(**sentence)[0].double().log_softmax(-1) for model in (first, second))
        found.append([])
        for i, token in enumerate(tokens[1:real].tolist()):
            kl = sum(math.exp(a) * (a - b) for a, b in zip(f[i].tolist(), g[i].tolist(), strict=True))
            best, other = int(f[i].argmax()), int(g[i].argmax())
            losses = -float(f[i, token]), -float(g[i, token])
            found[-1].append((kl, *losses, best == other, best == token, other == token))
    return found


@pytest.mark.parametrize("batch_size", [4, 30])
def test_a_language_model_is_evaluated_per_token(batch_size):
    full, quantized, given = NextToken(0), NextToken(0), sentences()
    quantized.head = nn.Parameter(full.head + 0.3 * NextToken(1).head)
    rows, _ = paired_rows(full, quantized, given, Tokens(), batch_size, CPU, "test")
    naive = naive_tokens(full, quantized, given)
    of_sentence = [np.mean(np.array(tokens, float), axis=0) for tokens in naive]
    names = ("kl", "fp_nll", "q_nll", "agreement", "fp_correct", "q_correct")
    for place, name in enumerate(names):
        assert rows[name].tolist() == pytest.approx([row[place] for row in of_sentence], rel=1e-5), name
    assert rows["predictions"].tolist() == [len(tokens) for tokens in naive]

    found = compare(rows, 0, [METRICS["perplexity"]])
    kl, nll, q_nll, agreement, *_ = np.mean(np.array([row for tokens in naive for row in tokens], float), axis=0)
    assert [found["q/kl_to_fp"], found["fp/nll"], found["q/nll"]] == pytest.approx([kl, nll, q_nll], rel=1e-5)
    assert found["q/agreement"] == pytest.approx(agreement)
    perplexities = math.exp(nll), math.exp(q_nll)
    assert [found["fp/perplexity"], found["q/perplexity"]] == pytest.approx(perplexities, rel=1e-5)
    assert found["delta/perplexity"] == pytest.approx(perplexities[1] - perplexities[0], rel=1e-4)
    low, high = found["delta/perplexity/ci95"]
    assert low < found["delta/perplexity"] < high
    assert found["q/ece"] is None and found["fp/ece"] is None
    written = prediction_rows(rows, [f"sentence {i}" for i in range(30)])
    assert list(written[0]) == [
        *("predictions", "fp_nll", "q_nll", "fp_correct", "q_correct", "agreement", "kl"),
        "id",
    ]


def test_the_interval_of_a_perplexity_resamples_sentences():
    full, quantized, given = NextToken(0), NextToken(0), sentences()
    quantized.head = nn.Parameter(full.head + 0.3 * NextToken(1).head)
    rows, _ = paired_rows(full, quantized, given, Tokens(), 8, CPU, "test")
    low, high = compare(rows, 0, [METRICS["perplexity"]])["delta/perplexity/ci95"]
    random, naive = np.random.default_rng(4), []
    tokens, fp, q = (rows[name].numpy() for name in ("predictions", "fp_nll", "q_nll"))
    for _ in range(3000):
        chosen = random.integers(0, 30, 30)
        weights = tokens[chosen] / tokens[chosen].sum()
        naive.append(math.exp(weights @ q[chosen]) - math.exp(weights @ fp[chosen]))
    assert [low, high] == pytest.approx(np.percentile(naive, [2.5, 97.5]).tolist(), abs=0.15 * np.std(naive))


def test_outputs_of_language_models_are_never_all_in_memory():
    """Each batch's outputs are gone when the next but one is made."""
    full, quantized, given = NextToken(0), NextToken(1), sentences(40)
    alive: list[weakref.ref] = []

    def recorded() -> Iterator[evaluation.Pair]:
        for pair in evaluation.pairs(full, quantized, given, 4, CPU, "test"):
            alive.extend(weakref.ref(x) for x in pair[:2])
            assert sum(x() is not None for x in alive) <= 4
            yield pair

    collect_rows(recorded(), 40, Tokens())
    assert len(alive) == 20


def test_full_precision_outputs_of_language_models_are_not_stored(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paired_rows(NextToken(0), NextToken(1), sentences(), Tokens(), 4, CPU, "test")
    assert not list(tmp_path.iterdir())
