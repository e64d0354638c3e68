"""Embeddings that cannot be rounded stop a run by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bayesq.budget import Budget
from bayesq.pipeline import round_embeddings
from bayesq.recipe import Quantized


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_table_that_is_not_finite_is_named(value):
    tables = {"words": nn.Embedding(6, 4), "places": nn.Embedding(5, 4)}
    result = Quantized()
    round_embeddings(SimpleNamespace(embeddings=tables), Budget(4.0, "code"), result)
    assert set(result.tensors) == {"words", "places"}
    with torch.no_grad():
        tables["places"].weight[2, 1] = value
    with pytest.raises(ValueError, match=r"^layer places: the weights have NaN or infinite entries"):
        round_embeddings(SimpleNamespace(embeddings=tables), Budget(4.0, "code"), Quantized())
