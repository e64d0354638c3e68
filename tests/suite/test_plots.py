"""The numbers behind the plots, compared with the metrics they must agree with."""

import math

import numpy as np
import pytest
import torch

from bayesq import evaluation
from bayesq.batches import Batch
from bayesq.likelihood import Categorical, Gaussian
from bayesq.metrics import ACCURACY
from bayesq.suite import plots

CATEGORICAL = Categorical()
LAYERS = [
    {"name": "stem", "bits/code": 8.0, "bits/stored": 8.5, "predicted_risk": 1e-3, "achieved_risk": 1e-2},
    {"name": "body", "bits/code": 3.0, "bits/stored": 3.25, "predicted_risk": 0.1, "achieved_risk": 0.0},
    {"name": "head", "bits/code": 4.0, "bits/stored": 4.125, "predicted_risk": None, "achieved_risk": None},
]


def logits(seed: int, examples: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full-precision and disturbed logits, and labels that the first predict mostly."""
    generator = torch.Generator().manual_seed(seed)
    full = 3 * torch.randn(examples, 5, generator=generator)
    labels = torch.where(torch.rand(examples, generator=generator) < 0.7, full.argmax(1), 0)
    return full, full + torch.randn(examples, 5, generator=generator), labels


def evaluated(full, quantized, labels, likelihood=CATEGORICAL, metrics=(ACCURACY,)):
    """Metrics and rows of predictions.csv as a run makes them."""
    rows = evaluation.batch_rows(full, quantized, Batch({}, labels, torch.arange(len(labels))), likelihood)
    return evaluation.compare(rows, 0, metrics), evaluation.prediction_rows(rows, [str(i) for i in range(len(labels))])


def test_layers_stay_in_order_and_carry_their_bits() -> None:
    assert plots.bits_per_layer(LAYERS, []) == [["1 stem", 8.0, 8.5], ["2 body", 3.0, 3.25], ["3 head", 4.0, 4.125]]
    assert plots.bits_per_layer(LAYERS * 4, [])[0][0] == "01 stem"


def test_risks_are_shown_where_a_layer_has_both() -> None:
    assert plots.risks(LAYERS, []) == [["stem", pytest.approx(-3), pytest.approx(-2)]]


def test_the_reliability_diagram_adds_up_to_the_calibration_error() -> None:
    full, quantized, labels = logits(0)
    found, rows = evaluated(full, quantized, labels)
    drawn = plots.reliability([], rows)
    for prefix, name in (("fp", "full precision"), ("q", "quantized")):
        own = [row for row in drawn if row[0] == name]
        assert sum(examples for *_, examples in own) == len(labels)
        error = sum(examples * abs(accuracy - confidence) for _, confidence, accuracy, examples in own) / len(labels)
        assert error == pytest.approx(found[f"{prefix}/ece"])
        assert [row[1] for row in own] == sorted(row[1] for row in own)
    assert [row for row in drawn if row[0] == "perfect"] == [["perfect", 0.0, 0.0, 0], ["perfect", 1.0, 1.0, 0]]


def test_confidences_are_probabilities_of_the_predicted_class() -> None:
    full, quantized, labels = logits(1, examples=50)
    _, rows = evaluated(full, quantized, labels)
    for row, x, y in zip(rows, full.tolist(), quantized.tolist(), strict=True):
        for name, logit in (("fp", x), ("q", y)):
            expected = math.exp(logit[row[f"{name}_prediction"]]) / sum(map(math.exp, logit))
            assert row[f"{name}_confidence"] == pytest.approx(expected)


def test_the_kl_histogram_keeps_its_shape_and_takes_zeros() -> None:
    kl = np.random.default_rng(0).lognormal(-5, 2, size=20_000)
    (shown,) = zip(*plots.divergences([], [{"kl": value} for value in kl]), strict=True)
    assert len(shown) == plots.MAX_QUANTILES
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(shown, share) == pytest.approx(np.quantile(np.log10(kl), share), abs=0.02)
    few = plots.divergences([], [{"kl": 0.01}, {"kl": 0.0}, {"kl": -1e-18}, {"kl": float("nan")}])
    assert few == [[pytest.approx(-2)], [pytest.approx(-12)], [pytest.approx(-12)]]


def test_a_regression_has_no_reliability_diagram_and_all_else() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(30, 1, generator=generator)
    _, rows = evaluated(full, full + 0.1, full[:, 0] + 0.2, Gaussian(), [])
    made = {chart.key: chart.rows(LAYERS, rows) for chart in plots.CHARTS}
    assert made["plots/reliability"] == []
    assert len(made["plots/kl"]) == 30
    assert made["plots/kl"][0] == [pytest.approx(math.log10(0.1**2 / 2), abs=1e-3)]


def test_nothing_to_plot_is_no_rows() -> None:
    assert all(chart.rows([], []) == [] for chart in plots.CHARTS)


@pytest.mark.parametrize("chart", plots.CHARTS, ids=lambda chart: chart.key)
def test_fields_are_columns_of_the_table(chart: plots.Chart) -> None:
    _, rows = evaluated(*logits(2))
    assert set(chart.fields.values()) <= set(chart.columns)
    assert {len(row) for row in chart.rows(LAYERS, rows)} == {len(chart.columns)}
